"""Sums over all but channels, and what transposes to them, against their formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import parallel
from neurosens.models import BatchNorm
from neurosens.models.channel_sums import _are_alike, scale_shift, square_sums

SHAPES = [(6, 4, 3, 5), (7, 2), (3, 4, 1), (1, 2, 2, 2, 3)]


def plain_sums(x):
    axes = tuple(range(x.ndim - 1))
    return x.sum(axes), (x * x).sum(axes)


def plain_shift(x, factor, shift):
    return x * factor + shift


def normalised(sums, shifted, x, scale):
    """Something of all that batch normalisation does with them."""
    total, squares = sums(x)
    count = x.size // x.shape[-1]
    mean = total / count
    factor = scale / jnp.sqrt(squares / count - mean * mean + 0.1)
    return jnp.sin(shifted(x, factor, -mean * factor)).sum()


ours = lambda x, scale: normalised(square_sums, scale_shift, x, scale)  # noqa: E731
formula = lambda x, scale: normalised(plain_sums, plain_shift, x, scale)  # noqa: E731


def draws(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, shape) + 0.5 for key in keys[:2])
    scale, ds = (jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return (x, scale), (dx, ds)


def test_by_hand():
    x = jnp.asarray([[[1.0, 2.0], [3.0, -4.0]]])
    chex.assert_trees_all_equal(square_sums(x), (jnp.asarray([4.0, -2.0]), jnp.asarray([10.0, 20])))
    factor, shift = jnp.asarray([2.0, -1.0]), jnp.asarray([0.5, 0.0])
    y, pull = jax.vjp(scale_shift, x, factor, shift)
    chex.assert_trees_all_equal(y, jnp.asarray([[[2.5, -2.0], [6.5, 4.0]]]))
    found = pull(jnp.asarray([[[1.0, 1.0], [10.0, 100.0]]]))
    expected = (
        jnp.asarray([[[2.0, -1.0], [20.0, -100.0]]]),
        jnp.asarray([1 + 30.0, 2 - 400.0]),
        jnp.asarray([11.0, 101.0]),
    )
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize('shape', SHAPES)
def test_all_derivatives_are_those_of_the_formulas(shape):
    primals, tangents = draws(shape)
    along = lambda function: lambda *at: jax.jvp(function, at, tangents)[1]  # noqa: E731
    both = {
        'value': lambda f: f,
        'forward': along,
        'reverse': lambda f: jax.grad(f, (0, 1)),
        'one argument': lambda f: jax.grad(f, 1),
        'forward over reverse': lambda f: along(jax.grad(f, (0, 1))),
        'reverse over forward': lambda f: jax.grad(along(f), (0, 1)),
        'reverse over reverse': lambda f: jax.grad(
            lambda *at: sum((g**2).sum() for g in jax.grad(f, (0, 1))(*at)), (0, 1)
        ),
    }
    run = jax.jit(lambda f, *at: {k: make(f)(*at) for k, make in both.items()}, static_argnums=0)
    found, expected = run(ours, *primals), run(formula, *primals)
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-4)


def test_derivatives_take_no_second_reduction():
    """What gradients of the mean and the factor ask for is in the two sums."""
    (x, scale), _ = draws((6, 4, 3, 5))
    text = str(jax.make_jaxpr(jax.grad(ours, (0, 1)))(x, scale))
    assert text.count('channel_square_sums ') == 1
    assert text.count('channel_product_sums ') == 1
    # All but the sum that makes a loss.
    assert text.count('reduce_sum') <= 1


@pytest.mark.parametrize('axes', [(0, None), (None, 0), (1, 1), (-1, 0)])
def test_they_are_mapped(axes):
    (x, scale), _ = draws((4, 4, 3, 4))
    scales = jnp.stack([scale, 2 * scale, -scale, scale + 1])
    x = x if axes[0] is None else jnp.stack([x, x + 1, 2 * x, -x], axes[0])
    scale = scale if axes[1] is None else scales
    maps = [jax.vmap(jax.value_and_grad(f, (0, 1)), axes)(x, scale) for f in (ours, formula)]
    chex.assert_trees_all_close(*maps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_other_types_stay_theirs(dtype):
    (x, scale), _ = draws((6, 4, 3, 5))
    x, scale = x.astype(dtype), scale.astype(dtype)
    found = square_sums(x), scale_shift(x, scale, scale)
    chex.assert_trees_all_equal_dtypes(found, (plain_sums(x), plain_shift(x, scale, scale)))
    # Of two types the formula says which is the result's.
    assert scale_shift(x, scale.astype(jnp.float32), scale.astype(jnp.float32)).dtype == jnp.float32


def test_double_precision():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)))
        jax.test_util.check_grads(lambda x: ours(x, x[0, 0]), (x,), order=2)


@pytest.mark.parametrize('checked', [False, True])
def test_they_are_sums_of_a_device_in_a_map_over_devices(checked):
    (x, scale), _ = draws((8, 4, 3, 5))
    mesh = parallel.data_mesh(4)

    def run(f):
        gradient = lambda x, s: jax.tree.map(lambda g: g[None], jax.grad(f, (0, 1))(x, s))  # noqa: E731
        mapped = jax.shard_map(
            gradient,
            mesh=mesh,
            in_specs=(jax.P('data'), jax.P()),
            out_specs=jax.P('data'),
            check_vma=checked,
        )
        return jax.jit(mapped)

    # Where types are checked, the gradient of what does not vary is summed over the mesh.
    chex.assert_trees_all_close(run(ours)(x, scale), run(formula)(x, scale), rtol=1e-4, atol=1e-4)


def test_split_batches_sum_over_devices():
    (x, scale), _ = draws((8, 4, 3, 5))
    mesh = parallel.data_mesh(8)
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
    found = jax.jit(jax.grad(ours, (0, 1)))(split, scale)
    chex.assert_trees_all_close(found, jax.grad(formula, (0, 1))(x, scale), rtol=1e-4, atol=1e-4)


def test_types_of_explicit_shardings_are_left_to_formulas():
    (x, _), _ = draws((8, 4, 3, 5))
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
    with jax.set_mesh(mesh):
        found = jax.jit(square_sums)(split)
    chex.assert_trees_all_close(found, plain_sums(x), rtol=1e-5, atol=1e-5)
    assert not _are_alike(split)


def test_tangents_that_do_not_vary_over_a_mesh_are_left_to_formulas():
    """Results vary as their arguments do together, which types check in maps."""
    (x, scale), (dx, _) = draws((8, 4, 3, 5))
    mesh = parallel.data_mesh(4)

    def run(sums, shifted):
        def along(x, dx):
            step = lambda x: (*sums(x), shifted(x, scale, scale))  # noqa: E731
            _, moved = jax.jvp(step, (x,), (dx,))
            return jax.tree.map(lambda t: t[None], moved)

        specs = {'in_specs': (jax.P('data'), jax.P()), 'out_specs': jax.P('data')}
        return jax.jit(jax.shard_map(along, mesh=mesh, **specs))(x, dx[:2])

    found, expected = run(square_sums, scale_shift), run(plain_sums, plain_shift)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_has_the_derivative_of_its_formula():
    """Of a variance that rounds to less than 0 it is that of the variance itself."""
    module = BatchNorm(use_running_average=False, epsilon=1e-3)
    x = jnp.full((7, 3), 1.7, jnp.float32)
    weights = jax.random.normal(jax.random.key(0), x.shape)
    variables = module.init(jax.random.key(1), x)

    def loss(x):
        return (module.apply(variables, x, mutable=['batch_stats'])[0] * weights).sum()

    # x - mean is 0, so that of the derivative is left what goes through the mean.
    expected = (weights - weights.mean(0)) / np.sqrt(1e-3)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-2, atol=1e-2)
    assert bool(jnp.isfinite(jax.hessian(loss)(x)).all())

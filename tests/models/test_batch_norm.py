"""Batch normalisation as one factor and one shift, against Flax's."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens.models import BatchNorm

SHAPES = [(6, 4, 3, 5), (7, 2)]


def variables_of(channels, random):
    draw = lambda low, high: np.float32(random.uniform(low, high, channels))  # noqa: E731
    return {
        'params': {'scale': draw(-2, 2), 'bias': draw(-1, 1)},
        'batch_stats': {'mean': draw(-1, 1), 'var': draw(0.5, 2)},
    }


def results(module, variables, x, weights):
    """Result, new statistics, and the derivatives of a weighted sum of the result."""

    def loss(params, x):
        y, updated = module.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
        return (y.astype(jnp.float32) * weights).sum(), (y, updated)

    _, (y, updated) = loss(variables['params'], x)
    slopes, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables['params'], x)
    return y, updated, slopes


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
    ('dtype', 'result', 'tolerance'),
    [
        (jnp.float32, jnp.float32, 1e-5),
        (jnp.float32, None, 1e-5),
        (jnp.bfloat16, jnp.bfloat16, 2e-2),
        (jnp.bfloat16, None, 2e-2),
        (jnp.float32, jnp.bfloat16, 2e-2),
    ],
)
def test_it_is_that_of_flax(shape, train, dtype, result, tolerance):
    random = np.random.default_rng(0)
    variables = variables_of(shape[-1], random)
    x = jnp.asarray(random.normal(0.5, 2, shape), dtype)
    weights = np.float32(random.normal(size=shape))
    settings = {'use_running_average': not train, 'momentum': 0.7, 'epsilon': 1e-3, 'dtype': result}
    expected = results(nn.BatchNorm(**settings), variables, x, weights)
    found = results(BatchNorm(**settings), variables, x, weights)
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    moved = found[1]['batch_stats']['mean'] != variables['batch_stats']['mean']
    assert moved.all() if train else not moved.any()


@pytest.mark.parametrize('train', [True, False])
def test_variables_begin_as_those_of_flax(train):
    x = jnp.ones((3, 4)) * 5
    settings = {'use_running_average': not train}
    found, expected = (
        module.init(jax.random.key(0), x)
        for module in (BatchNorm(**settings), nn.BatchNorm(**settings))
    )
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_structs(found, expected)


def test_one_channel_by_hand():
    """Images 1, 3, 5, 7 have mean 4 and variance 5; scale 2, bias 1, momentum 0.9."""
    variables = {
        'params': {'scale': np.full(1, 2.0, np.float32), 'bias': np.ones(1, np.float32)},
        'batch_stats': {'mean': np.zeros(1, np.float32), 'var': np.ones(1, np.float32)},
    }
    x = jnp.asarray([[1.0], [3.0], [5.0], [7.0]])
    module = BatchNorm(use_running_average=False, epsilon=4.0)
    y, updated = module.apply(variables, x, mutable=['batch_stats'])
    np.testing.assert_allclose(y[:, 0], [-1, 1 / 3, 5 / 3, 3], rtol=1e-6)
    np.testing.assert_allclose(updated['batch_stats']['mean'], [0.4], rtol=1e-6)
    np.testing.assert_allclose(updated['batch_stats']['var'], [1.4], rtol=1e-6)


def test_equal_values_have_no_negative_variance():
    """The mean of squares of some of these rounds to less than the square of the mean."""
    x = jnp.broadcast_to(jnp.linspace(1, 2, 100), (1000, 100))
    assert bool(((x * x).mean(0) - x.mean(0) ** 2 < -1e-8).any())
    module = BatchNorm(use_running_average=False, epsilon=1e-12)
    y, _ = module.init_with_output(jax.random.key(0), x)
    assert bool(jnp.isfinite(y).all())


def test_its_derivative_keeps_one_array_of_the_size_of_the_images():
    """Flax keeps two; that is where the time of a training step goes."""
    shape = (8, 6, 6, 4)

    def kept(module):
        variables = module.init(jax.random.key(0), jnp.zeros(shape))
        run = lambda x: module.apply(variables, x, mutable=['batch_stats'])[0]  # noqa: E731
        _, pull = jax.vjp(run, jax.random.normal(jax.random.key(1), shape))
        arrays = (leaf for leaf in jax.tree.leaves(pull) if leaf.shape == shape)
        return len({np.asarray(array).tobytes() for array in arrays})

    assert kept(BatchNorm(use_running_average=False)) == 1
    assert kept(nn.BatchNorm(use_running_average=False)) == 2

"""Jacobian penalties: closed forms, unbiased estimates and their variance, parity with loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens.forward import LinenForward
from neurosens.regularizers import jacobian, jacobian_root, squared_jacobian_norm

KEY = jax.random.key(0)
DRAWS = 20_000


def value(regularizer, problem, key=KEY):
    return float(regularizer(problem.forward, problem.variables, problem.x, problem.y, key)[0])


def test_of_a_linear_model_it_is_the_norm_of_the_weights(linear):
    weights = linear.matrix('head')
    norm = (weights**2).sum()
    assert value(jacobian(projections=-1), linear) == pytest.approx(norm / 2, rel=1e-5)
    root = value(jacobian_root(), linear)
    assert root == pytest.approx(np.sqrt(len(linear.x) * norm), rel=1e-5)
    first = value(jacobian_root(first_sample_only=True), linear)
    assert first == pytest.approx(np.sqrt(norm), rel=1e-5)

    def half(variables):
        return jacobian(projections=-1)(linear.forward, variables, linear.x, linear.y, KEY)[0]

    gradient = jax.grad(half)(linear.variables)['params']['head']
    np.testing.assert_allclose(gradient['kernel'].T, weights, rtol=1e-5)
    np.testing.assert_array_equal(gradient['bias'], 0)


def test_of_two_layers_the_gradients_are_the_matrix_products(straight):
    first, second = straight.matrix('dense1'), straight.matrix('head')
    product = second @ first
    assert value(jacobian(projections=-1), straight) == pytest.approx(
        (product**2).sum() / 2, rel=1e-5
    )

    @functools.partial(jax.jit, static_argnames='projections')
    def gradient(key, projections):
        regularizer = jacobian(projections=projections)
        return jax.grad(lambda v: regularizer(straight.forward, v, straight.x, straight.y, key)[0])(
            straight.variables
        )['params']

    exact = gradient(KEY, -1)
    np.testing.assert_allclose(exact['dense1']['kernel'].T, second.T @ product, rtol=1e-4)
    np.testing.assert_allclose(exact['head']['kernel'].T, product @ first.T, rtol=1e-4, atol=1e-6)
    # The stochastic gradient is that on average.
    many = jax.vmap(lambda key: gradient(key, 1))(jax.random.split(KEY, DRAWS // 6))
    for name in ('dense1', 'head'):
        draws = np.float64(many[name]['kernel'])
        error = 4 * draws.std(0) / np.sqrt(len(draws))
        assert (np.abs(draws.mean(0) - exact[name]['kernel']) <= error + 1e-6).all()


def test_behind_a_relu_only_units_that_are_on_count(relu):
    logits, _ = relu.jacobians()
    expected = (logits**2).sum((1, 2)).mean() / 2
    assert value(jacobian(projections=-1), relu) == pytest.approx(expected, rel=1e-5)
    assert value(jacobian_root(), relu) == pytest.approx(np.sqrt((logits**2).sum()), rel=1e-5)
    metrics = jacobian(projections=-1)(relu.forward, relu.variables, relu.x, relu.y, KEY)[1]
    assert metrics['norm'] == pytest.approx(np.sqrt(2 * expected), rel=1e-5)


@pytest.mark.parametrize('probe', ['output', 'input'])
def test_estimates_are_unbiased_with_the_variance_known(relu, probe):
    jacobians, _ = relu.jacobians()
    matrix = jacobians[0]
    estimate = jax.jit(
        jax.vmap(
            lambda key: squared_jacobian_norm(
                relu.forward, relu.variables, relu.x[:1], key, probe=probe
            )[0]
        )
    )
    draws = np.float64(estimate(jax.random.split(KEY, DRAWS)))
    norm = (matrix**2).sum()
    if probe == 'output':
        classes, gram = 3, matrix @ matrix.T
        spread = 2 * classes / (classes + 2) * np.trace(gram @ gram)
        variance = spread - 2 / (classes + 2) * np.trace(gram) ** 2
    else:
        # Of signs: twice the sum of squares off the diagonal.
        gram = matrix.T @ matrix
        variance = 2 * ((gram**2).sum() - (np.diag(gram) ** 2).sum())
    assert abs(draws.mean() - norm) <= 4 * np.sqrt(variance / DRAWS)
    assert draws.var() == pytest.approx(variance, rel=0.1)


def test_more_projections_have_less_variance(relu):
    def estimates(projections):
        return jax.vmap(
            lambda key: squared_jacobian_norm(
                relu.forward, relu.variables, relu.x[:1], key, projections=projections
            )[0]
        )(jax.random.split(KEY, 2000))

    assert estimates(4).var() == pytest.approx(float(estimates(1).var()) / 4, rel=0.25)


def test_a_single_logit_has_no_variance(relu):
    def forward(variables, x, **options):
        logits, tapped = relu.forward(variables, x, **options)
        return logits[:, :1], tapped

    keys = jax.random.split(KEY, 5)
    draws = jax.vmap(
        lambda key: squared_jacobian_norm(forward, relu.variables, relu.x[:1], key)[0]
    )(keys)
    jacobians, _ = relu.jacobians()
    np.testing.assert_allclose(draws, (jacobians[0, 0] ** 2).sum(), rtol=1e-5)


def test_keys_decide_and_images_differ(linear):
    regularizer = jacobian()
    assert value(regularizer, linear) == value(regularizer, linear)
    assert value(regularizer, linear) != value(regularizer, linear, jax.random.key(1))
    # The same image twice: other directions, so not twice the same estimate.
    same = jnp.stack([linear.x[0]] * 2)
    both = jacobian_root(projections=1)(linear.forward, linear.variables, same, None, KEY)[0]
    alone = jacobian_root(projections=1, first_sample_only=True)(
        linear.forward, linear.variables, same, None, KEY
    )[0]
    assert both**2 != pytest.approx(2 * float(alone) ** 2, rel=1e-3)


def test_a_circular_convolution_counts_every_position():
    import flax.linen as nn

    class Conv(nn.Module):
        padding: str

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(1, (3, 3), padding=self.padding, use_bias=False, name='conv')(x)
            return x.reshape(len(x), -1)

    x = np.random.default_rng(0).random((2, 5, 5, 1)).astype(np.float32)
    for padding in ('CIRCULAR', 'SAME'):
        module = Conv(padding)
        variables = module.init(KEY, x)
        kernel = np.float64(variables['params']['conv']['kernel'][:, :, 0, 0])
        norm = 2 * float(jacobian(projections=-1)(LinenForward(module), variables, x, None, KEY)[0])
        inside = 5 - np.abs(np.arange(3) - 1)
        counts = 25 if padding == 'CIRCULAR' else inside[:, None] * inside
        assert norm == pytest.approx((counts * kernel**2).sum(), rel=1e-5)


def test_nothing_left_to_reduce_is_no_trouble(linear):
    zero = jax.tree.map(jnp.zeros_like, linear.variables)

    def root(variables):
        return jacobian_root()(linear.forward, variables, linear.x, linear.y, KEY)[0]

    assert root(zero) == 0
    assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(jax.grad(root)(zero)))


MISTAKES = [
    ({'projections': 0}, 'projections is 0'),
    ({'projections': -2}, 'projections is -2'),
    ({'projections': 2.0}, 'projections is 2.0; it must be a whole number, such as 2'),
    ({'probe': 'both'}, "Unknown probe 'both'; valid names are output, input"),
    ({'probe': 'inputs'}, "Unknown probe 'inputs'; valid names are output, input"),
    ({'probe': 'input', 'projections': -1}, "probe is 'input', but projections -1 sums over all"),
]


@pytest.mark.parametrize('make', [jacobian, jacobian_root])
@pytest.mark.parametrize(('options', 'message'), MISTAKES)
def test_mistakes_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(('options', 'message'), MISTAKES)
def test_mistakes_are_named_by_the_norms_themselves_too(linear, options, message):
    with pytest.raises(ValueError, match=message):
        squared_jacobian_norm(linear.forward, linear.variables, linear.x, KEY, **options)


def test_a_flag_that_is_no_bool_is_named():
    with pytest.raises(ValueError, match="first_sample_only is 'no'; it must be True or False"):
        jacobian_root(first_sample_only='no')

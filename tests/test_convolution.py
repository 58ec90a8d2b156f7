"""The loop-safe convolution gradient equals JAX's own for every kind of convolution."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from neurosens.convolution import with_fast_input_gradients, with_fast_pooling

CASES = {
    'plain': {},
    'valid': {'padding': 'VALID'},
    'strided': {'window_strides': (2, 2)},
    'a larger window': {'window_strides': (2, 2), 'window': (5, 4)},
    'uneven stride and padding': {'window_strides': (3, 2), 'padding': ((0, 2), (1, 0))},
    'dilated kernel': {'rhs_dilation': (2, 1)},
    'dilated images': {'lhs_dilation': (1, 2), 'padding': ((1, 1), (1, 0))},
    'grouped': {'feature_group_count': 2},
    'depthwise, strided': {'feature_group_count': 4, 'window_strides': (2, 1)},
    'cropped images': {'padding': ((-1, 2), (1, -2))},
    'channels first': {'dimension_numbers': ('NCHW', 'OIHW', 'NCHW')},
}


def problem(case, channels):
    """A loss of images and a kernel, and the two."""
    options = {
        'window_strides': (1, 1),
        'padding': 'SAME',
        'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
        **CASES[case],
    }
    groups, window = options.get('feature_group_count', 1), options.pop('window', (3, 3))
    images = jax.random.normal(jax.random.key(0), (3, 9, 8, channels))
    kernel = jax.random.normal(jax.random.key(1), (*window, channels // groups, 8))
    if case == 'channels first':
        images, kernel = images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)

    def loss(images, kernel):
        return jnp.sin(lax.conv_general_dilated(images, kernel, **options)).sum()

    return loss, images, kernel


# Few channels take a way of their own.
@pytest.mark.parametrize('channels', [4, 8])
@pytest.mark.parametrize('case', CASES)
def test_gradients_equal_the_plain_ones(case, channels):
    loss, images, kernel = problem(case, channels)
    plain = jax.value_and_grad(loss, (0, 1))(images, kernel)
    fast = jax.jit(jax.value_and_grad(with_fast_input_gradients(loss), (0, 1)))(images, kernel)
    chex.assert_trees_all_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('channels', [4, 8])
@pytest.mark.parametrize('case', ['plain', 'uneven stride and padding', 'channels first'])
def test_gradients_of_gradients_equal_the_plain_ones(case, channels):
    loss, images, kernel = problem(case, channels)

    def penalty(loss, images, kernel):
        return (jax.grad(loss)(images, kernel) ** 2).sum()

    def slopes(loss):
        return jax.jit(jax.grad(functools.partial(penalty, loss), (0, 1)))(images, kernel)

    for fast, plain in zip(slopes(with_fast_input_gradients(loss)), slopes(loss)):
        # Sums of large terms that nearly cancel are as exact as the largest.
        np.testing.assert_allclose(fast, plain, rtol=0, atol=2e-6 * np.abs(plain).max())

    def further(loss):
        # Once more: what trains a model by the gradient of a penalty's gradient.
        def norm(kernel):
            return (jax.grad(functools.partial(penalty, loss), 0)(images, kernel) ** 2).sum()

        return jax.jit(jax.grad(norm))(kernel)

    chex.assert_trees_all_close(
        further(with_fast_input_gradients(loss)), further(loss), rtol=1e-3, atol=1e-2
    )


POOLS = {
    'halves': ((2, 2), (2, 2), 'VALID'),
    'with a rest': ((3, 2), (3, 2), 'VALID'),
    'overlapping': ((3, 3), (2, 2), ((1, 1), (1, 1))),
    'uneven': ((2, 4), (1, 3), ((0, 1), (2, 0))),
    'with gaps': ((2, 2), (3, 3), 'VALID'),
}


@pytest.mark.parametrize('case', POOLS)
@pytest.mark.parametrize('ties', [False, True])
def test_gradients_of_pooling_equal_the_plain_ones(case, ties):
    window, strides, padding = POOLS[case]
    images = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    if ties:
        # Of equal entries the first of a window takes all of its gradient.
        images = jnp.round(images)

    def loss(images):
        pooled = nn.max_pool(images, window, strides, padding)
        return (jnp.arange(pooled.size).reshape(pooled.shape) * jnp.sin(pooled)).sum()

    plain = jax.value_and_grad(loss)(images)
    fast = jax.jit(jax.value_and_grad(with_fast_input_gradients(loss)))(images)
    chex.assert_trees_all_close(fast, plain, rtol=1e-5, atol=1e-3)
    gradient = jax.make_jaxpr(jax.grad(with_fast_input_gradients(loss)))(images)
    assert 'select_and_scatter' not in str(gradient)


@pytest.mark.parametrize('case', POOLS)
@pytest.mark.parametrize('ties', [False, True])
def test_derivatives_of_pooling_are_transposed_by_its_gradients(case, ties):
    window, strides, padding = POOLS[case]
    images, direction = jax.random.normal(jax.random.key(0), (2, 2, 9, 8, 3))
    images = jnp.round(images) if ties else images

    def pool(images):
        return jnp.sin(nn.max_pool(images, window, strides, padding))

    value, push = jax.linearize(with_fast_pooling(pool), images)
    chex.assert_trees_all_close(value, pool(images), rtol=1e-6)
    weights = jnp.arange(value.size, dtype=jnp.float32).reshape(value.shape)
    (gradient,) = jax.vjp(pool, images)[1](weights)
    along = jnp.vdot(weights, jax.jit(push)(direction))
    assert along == pytest.approx(float(jnp.vdot(gradient, direction)), rel=1e-4)
    assert 'select_and_gather' not in str(jax.make_jaxpr(push)(direction))
    # Reverse mode over forward mode, as a regularizer's training step.
    chex.assert_trees_all_close(
        jax.linear_transpose(push, direction)(weights)[0], gradient, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize('case', ['halves', 'overlapping'])
def test_of_ties_the_first_takes_all_where_a_derivative_has_been_taken_before(case):
    """As in the gradient of a loss that shares its pass with a derivative."""
    window, strides, padding = POOLS[case]
    images = jnp.round(jax.random.normal(jax.random.key(0), (2, 9, 8, 3)))

    def pool(images):
        return nn.max_pool(images, window, strides, padding)

    def loss(images):
        pooled, push = jax.linearize(with_fast_pooling(pool), images)
        return (jnp.arange(pooled.size).reshape(pooled.shape) * pooled + push(0 * images)).sum()

    weights = jnp.arange(float(pool(images).size)).reshape(pool(images).shape)
    (expected,) = jax.vjp(pool, images)[1](weights)
    for found in (jax.grad(loss)(images), jax.grad(with_fast_input_gradients(loss))(images)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_windows_stay_as_they_are():
    images = jnp.arange(24).reshape(1, 4, 6, 1)
    window = (1, 2, 2, 1), (1, 1, 1, 1), 'VALID'

    def largest(scale):
        # Of integers, and with gaps between the entries of a window.
        whole = lax.reduce_window(images, -100, lax.max, *window)
        spread = lax.reduce_window(scale * images, -jnp.inf, lax.max, *window, None, (1, 2, 2, 1))
        return spread.sum() + whole.sum()

    assert with_fast_input_gradients(largest)(2.0) == largest(2.0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = nn.remat(nn.Conv)(6, (3, 3), strides=2, name='conv1')
        x = nn.max_pool(nn.relu(conv(x)), (2, 2), (2, 2))
        x = nn.jit(nn.Conv)(4, (3, 3), name='conv2')(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(nn.gelu(x).mean((1, 2)))


def test_whole_networks_under_vmap_and_loops():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    net = Net()
    variables = net.init(jax.random.key(1), x)

    def loss(x):
        return {'aux': net.apply(variables, x[None])[0]}

    def descend(function, x):
        gradient = jax.grad(lambda x: function(x)['aux'][0])
        return lax.fori_loop(0, 3, lambda _, x: x - 0.1 * gradient(x), x)

    plain = jax.jit(jax.vmap(lambda x: descend(loss, x)))(x)
    fast = jax.jit(jax.vmap(lambda x: descend(with_fast_input_gradients(loss), x)))(x)
    chex.assert_trees_all_close(fast, plain, atol=1e-5)
    assert not jnp.allclose(fast, x)
    # The backward pass holds the barrier that keeps a kernel in a plain layout.
    gradient = jax.grad(lambda x: with_fast_input_gradients(loss)(x)['aux'][0])
    assert 'optimization_barrier' in str(jax.make_jaxpr(gradient)(x[0]))

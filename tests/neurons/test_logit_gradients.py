"""Derivatives of the logits: the same in both directions, in closed form and by differences."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models
from neurosens.forward import LayerError, LinenForward
from neurosens.neurons import tail
from neurosens.neurons.logit_gradients import (
    logit_gradients,
    logit_gradients_example,
    logit_gradients_of_cut,
)


def random(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def plain_forward(variables, x, edits=(), taps=()):
    """Two smooth layers, in numpy's notation: `h` is the first, behind its nonlinearity."""
    h = jnp.tanh(x @ variables['first'])
    h = edits['h'](h) if 'h' in edits else h
    out = jnp.tanh(jnp.einsum('bpc,pcn->bn', h, variables['second'])) @ variables['head']
    return out, {'h': h}


smooth = jax.tree_util.Partial(plain_forward)


def smooth_net(neurons=4, classes=5, positions=3, batch=2, dtype=np.float32):
    variables = {
        'first': random(1, 2, neurons, dtype=dtype),
        'second': random(2, positions, neurons, 6, dtype=dtype) / 3,
        'head': random(3, 6, classes, dtype=dtype),
    }
    return smooth, variables, random(4, batch, positions, 2, dtype=dtype)


# Compiling is most of the time here, and the speed of the result does not matter.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def quick(function, *arguments):
    return jax.jit(function, compiler_options=QUICK)(*arguments)


def gradients(forward, variables, x, **options):
    return quick(functools.partial(logit_gradients, forward, **options), variables, x)


def assert_close(ours, theirs, rtol=1e-5):
    """Relative to the size of the derivatives: small ones are differences of large ones."""
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


# --------------------------------------------------------------------------- what they are


@pytest.mark.parametrize('direction', ['auto', 'reverse', 'forward'])
def test_a_linear_head_has_its_weights_as_derivatives(small_net, direction):
    forward, variables, x = small_net[:3]
    result = gradients(forward, variables, x[:2], direction=direction)
    kernel = np.asarray(variables['params']['head']['kernel'])
    np.testing.assert_allclose(result, np.broadcast_to(kernel.T, (2, 5, 12)), rtol=1e-6)


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
def test_finite_differences(direction):
    with jax.enable_x64(True):
        _, variables, x = smooth_net(dtype=np.float64)
        result = gradients(smooth, variables, x, layer='h', unit='unit', direction=direction)
        assert result.dtype == jnp.float64
        assert result.shape == (2, 5, 12)
        step = 1e-5

        def moved(change):
            edit = {'h': lambda h: h + change.reshape(3, 4)}
            return smooth(variables, x, edits=edit)[0]

        steps = step * np.eye(12)
        up, down = (quick(jax.vmap(moved), change) for change in (steps, -steps))
        expected = np.moveaxis((up - down) / (2 * step), 0, -1)
        np.testing.assert_allclose(result, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('layer', ['act1', 'conv2'])
def test_directions_units_and_channels_agree_on_a_network(small_net, layer):
    forward, variables, x = small_net[:3]
    run = functools.partial(gradients, forward, variables, x[:3], layer=layer)
    channels = {'act1': 4, 'conv2': 6}[layer]
    channel = run(direction='reverse')
    assert channel.shape == (3, 5, channels)
    assert_close(run(direction='forward'), channel)
    unit = run(unit='unit', direction='reverse')
    assert_close(np.reshape(unit, (3, 5, -1, channels)).sum(2), channel)
    assert_close(run(unit='unit', direction='forward'), unit)


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
def test_chunks_change_nothing(direction):
    forward, variables, x = smooth_net(neurons=40, classes=20)
    run = functools.partial(gradients, forward, variables, x, layer='h', direction=direction)
    whole = run(chunk=16)
    assert whole.shape == (2, 20, 40)
    for chunk in (1, 3, 1000):
        assert_close(run(chunk=chunk), whole, 1e-6)


def test_reverse_mode_through_convolutions_in_a_loop(small_net):
    """In a loop on a CPU, convolutions take another way back."""
    forward, variables, x = small_net[:3]
    run = functools.partial(gradients, forward, variables, x[:2], layer='act1')
    assert_close(run(direction='reverse', chunk=2), run(direction='reverse', chunk=1000))


def test_the_example_and_the_cut_are_rows_of_the_batch():
    forward, variables, x = smooth_net()
    batch = gradients(forward, variables, x, layer='h')
    example = functools.partial(logit_gradients_example, forward, layer='h')
    assert_close(quick(example, variables, x[1]), batch[1])

    def of_cut(variables, x):
        return logit_gradients_of_cut(tail.cut(forward, variables, x, 'h'))

    assert_close(quick(of_cut, variables, x[1]), batch[1])
    # And the function that users call, compiled as it is.
    assert_close(logit_gradients(forward, variables, x, layer='h'), batch)


# ------------------------------------------------------------------------------------- costs


def flops(forward, variables, x, **options):
    """Of the program, which has no loops when everything is one chunk."""

    def run(variables, x):
        return logit_gradients(forward, variables, x, layer='h', chunk=1000, **options)

    return jax.jit(run).lower(variables, x).cost_analysis()['flops']


@pytest.mark.parametrize(
    ('neurons', 'classes', 'unit', 'cheaper'),
    [
        (40, 2, 'channel', 'reverse'),
        (2, 40, 'channel', 'forward'),
        # Three positions: six units, more than the classes, and two channels, which are fewer.
        (2, 4, 'channel', 'forward'),
        (2, 4, 'unit', 'reverse'),
    ],
)
def test_auto_takes_the_fewer_passes(neurons, classes, unit, cheaper):
    net = smooth_net(neurons, classes)
    auto, reverse, forward = (
        flops(*net, unit=unit, direction=direction) for direction in ('auto', 'reverse', 'forward')
    )
    assert auto == {'reverse': reverse, 'forward': forward}[cheaper]
    assert reverse != forward
    if max(neurons, classes) >= 40:
        assert auto == min(reverse, forward)
        assert 3 * auto < max(reverse, forward)


# ------------------------------------------------------------------------------- small sizes


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize(('neurons', 'classes', 'positions'), [(4, 2, 3), (1, 3, 2), (1, 1, 1)])
def test_two_classes_one_neuron_one_example(neurons, classes, positions, direction):
    forward, variables, x = smooth_net(neurons, classes, positions, batch=1)
    result = gradients(forward, variables, x, layer='h', direction=direction, chunk=1)
    assert result.shape == (1, classes, neurons)

    def logits(change):
        return forward(variables, x, edits={'h': lambda h: h + change})[0][0]

    assert_close(result[0], quick(jax.jacfwd(logits), np.zeros(neurons, np.float32)))


def value_of_each_example(variables, x, edits=(), taps=()):
    h = jnp.tanh(x.sum((1, 2)))
    h = edits['h'](h) if 'h' in edits else h
    return h[:, None] ** 2 * jnp.arange(1.0, 4.0), {'h': h}


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_a_layer_of_one_value_is_one_neuron(unit, direction):
    x = random(1, 2, 3, 2)
    forward = jax.tree_util.Partial(value_of_each_example)
    result = gradients(forward, (), x, layer='h', unit=unit, direction=direction)
    assert result.shape == (2, 3, 1)
    expected = 2 * np.tanh(x.sum((1, 2)))[:, None] * np.arange(1.0, 4.0)
    np.testing.assert_allclose(result[..., 0], expected, rtol=1e-5)


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision(direction, dtype):
    """Derivatives are in float32; those of a bfloat16 layer are rounded to its 8 bits."""
    module = models.create('mlp', num_classes=3, hidden=(5, 6), activation='tanh')
    x = random(1, 2, 2, 2, 1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: random(leaf.size, *leaf.shape) / 2, shapes)
    run = functools.partial(gradients, layer='act1', direction=direction)
    exact = run(LinenForward(module), variables, x)
    rounded = run(LinenForward(module.clone(dtype=dtype)), variables, x)
    assert rounded.dtype == jnp.float32
    assert np.abs(rounded - exact).max() > 0
    assert_close(rounded, exact, 3e-2)


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_images_in_a_half_precision_network(direction, dtype):
    """Logits of half precision, too, are differentiated in float32."""
    run = functools.partial(logit_gradients, layer='h', direction=direction)
    forward, variables, x = smooth_net()
    exact = run(forward, variables, x)
    half = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, dtype))
    assert forward(half(variables), half(x))[0].dtype == dtype
    rounded = run(forward, half(variables), half(x))
    assert rounded.dtype == jnp.float32
    # Three layers, each rounded to 8 bits.
    assert_close(rounded, exact, 5e-2)


# ------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
def test_one_and_eight_devices_agree_without_communication(assert_splits_over_devices, direction):
    forward, variables, x = smooth_net(batch=16)

    def run(variables, x):
        return logit_gradients(forward, variables, x, layer='h', direction=direction, chunk=2)

    assert_splits_over_devices(run, variables, x, rtol=1e-5)


def test_convolutions_are_local_too(small_net, assert_splits_over_devices):
    forward, variables, x = small_net[:3]

    def run(variables, x):
        return logit_gradients(forward, variables, x, layer='act1', chunk=3)

    assert_splits_over_devices(run, variables, x)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'unit': 'filter'}, "Unknown unit 'filter'; valid names are channel, unit."),
        ({'direction': 'up'}, "Unknown direction 'up'; valid names are auto, reverse, forward."),
        ({'chunk': 0}, 'chunk is 0; it must be at least 1.'),
        ({'chunk': -3}, 'chunk is -3; it must be at least 1.'),
    ],
)
def test_a_mistake_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        logit_gradients(*smooth_net(), layer='h', **options)


def test_an_unknown_layer_is_answered_with_close_names(small_net):
    forward, variables, x = small_net[:3]
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        logit_gradients(forward, variables, x[:1], layer='act9')

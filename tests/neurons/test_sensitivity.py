"""Delta is the smallest change of one neuron that changes the prediction, and flips it there."""

import functools
import math
import re

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import models, parallel
from neurosens.forward import LayerError, LinenForward, with_edits
from neurosens.neurons.sensitivity import (
    closed_form,
    nearest_flip,
    sensitivity,
    sensitivity_example,
)

INFINITY = float('inf')


def oracle(features, weights, logits, low=0.0):
    """Delta in float64 with plain loops over neurons and classes: the definition, word by word."""
    features, weights, logits = (np.asarray(a, np.float64) for a in (features, weights, logits))
    predicted = int(logits.argmax())
    deltas, classes = [], []
    for i in range(len(features)):
        best, flips_to = INFINITY, -1
        for c in range(len(logits)):
            if c == predicted or weights[c, i] == weights[predicted, i]:
                continue
            delta = (logits[predicted] - logits[c]) / (weights[c, i] - weights[predicted, i])
            if features[i] + delta >= low and abs(delta) < abs(best):
                best, flips_to = delta, c
        deltas.append(best)
        classes.append(flips_to)
    return np.array(deltas), np.array(classes)


one_example = jax.jit(closed_form, static_argnames='activation_range')
batched = jax.jit(jax.vmap(closed_form, (0, None, 0)))
own_weights = jax.jit(jax.vmap(closed_form))


def random_problem(seed, examples, neurons, classes, dtype=np.float32):
    generator = np.random.default_rng(seed)
    features = np.maximum(generator.normal(size=(examples, neurons)), 0).astype(dtype)
    weights = generator.normal(size=(classes, neurons)).astype(dtype)
    bias = generator.normal(size=classes).astype(dtype)
    return features, weights, (features @ weights.T + bias).astype(dtype)


# --------------------------------------------------------------------------------- hand cases


def test_two_neurons_by_hand():
    result = one_example(jnp.array([1.0, 2.0]), jnp.eye(2), jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(result.delta, [1.0, -1.0])
    np.testing.assert_array_equal(result.flips_to, [0, 0])


def test_a_fall_below_zero_is_not_valid():
    result = one_example(jnp.array([1.0, 2.0]), jnp.eye(2), jnp.array([1.0, 5.0]))
    np.testing.assert_array_equal(result.delta, [4.0, INFINITY])
    np.testing.assert_array_equal(result.flips_to, [0, -1])


def test_without_a_lower_bound_every_fall_is_valid():
    result = one_example(
        jnp.array([1.0, 2.0]),
        jnp.eye(2),
        jnp.array([1.0, 5.0]),
        activation_range=(-INFINITY, INFINITY),
    )
    np.testing.assert_array_equal(result.delta, [4.0, -4.0])


def test_an_upper_bound_limits_rises():
    result = one_example(
        jnp.array([1.0, 2.0]), jnp.eye(2), jnp.array([1.0, 5.0]), activation_range=(-9.0, 4.9)
    )
    np.testing.assert_array_equal(result.delta, [INFINITY, -4.0])
    np.testing.assert_array_equal(result.flips_to, [-1, 0])


def test_a_fall_to_exactly_zero_is_valid():
    # 0.7 falls by 0.7: in float32 the quotient may come out a rounding above it.
    result = one_example(jnp.array([0.7]), jnp.array([[0.0], [3.0]]), jnp.array([0.0, 2.1]))
    np.testing.assert_allclose(result.delta, [-0.7], rtol=1e-6)


def test_an_invalid_nearer_class_gives_way_to_a_farther_rise():
    # Class 1 would need a fall by 3 from 2; class 2 a rise by 10.
    weights = jnp.array([[1.0], [0.0], [2.0]])
    result = one_example(jnp.array([2.0]), weights, jnp.array([5.0, 2.0, -5.0]))
    np.testing.assert_array_equal(result.delta, [10.0])
    np.testing.assert_array_equal(result.flips_to, [2])


def test_equal_weights_reach_no_class():
    result = one_example(jnp.ones(3), jnp.ones((4, 3)), jnp.arange(4.0))
    assert np.isposinf(result.delta).all() and (np.asarray(result.flips_to) == -1).all()


def test_tied_logits_need_no_change():
    weights = jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    result = one_example(jnp.array([1.0, 1.0]), weights, jnp.array([1.0, 1.0, -9.0]))
    np.testing.assert_array_equal(result.delta, [0.0, 0.0])
    np.testing.assert_array_equal(result.flips_to, [1, 1])


def test_of_classes_with_the_same_weights_and_logit_the_first_is_named():
    weights = jnp.array([[0.0], [1.0], [1.0]])
    result = one_example(jnp.array([0.0]), weights, jnp.array([2.0, 1.0, 1.0]))
    np.testing.assert_array_equal(result.flips_to, [1])


def test_nan_logits_are_not_hidden():
    result = one_example(jnp.ones(2), jnp.eye(2), jnp.array([jnp.nan, 1.0]))
    assert np.isnan(result.delta).all() and (np.asarray(result.flips_to) == -1).all()


def test_a_single_class_cannot_be_left():
    result = one_example(jnp.ones(2), jnp.ones((1, 2)), jnp.ones(1))
    assert np.isposinf(result.delta).all()


# ------------------------------------------------------------------------------------ oracle


@pytest.mark.parametrize('classes', [2, 3, 10, 32, 33, 100])
@pytest.mark.parametrize('neurons', [1, 40])
def test_equals_plain_loops(classes, neurons):
    features, weights, logits = random_problem(classes, 25, neurons, classes)
    result = batched(features, weights, logits)
    for row in range(len(features)):
        delta, flips_to = oracle(features[row], weights, logits[row])
        np.testing.assert_allclose(result.delta[row], delta, rtol=1e-5)
        np.testing.assert_array_equal(result.flips_to[row], flips_to)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_equals_plain_loops_where_weights_repeat(seed, step):
    # Multiples of a power of two make equal weights, ties, dead neurons and falls to exactly 0
    # common, and are computed without rounding; 50 nets a draw.
    features, weights, logits = random_problem(seed, 50, 12, 5)
    if step:
        features = (np.round(features / step) * step).astype('f4')
        weights = (np.round(weights / step) * step).astype('f4')
        logits = features @ weights.T
    result = batched(features, weights, logits)
    for row in range(len(features)):
        delta, _ = oracle(features[row], weights, logits[row])
        # A rise and a fall may be of the same size.
        np.testing.assert_allclose(np.abs(result.delta[row]), np.abs(delta), rtol=1e-5, atol=1e-6)
        # Several classes may be reached by the same change; the one named must be among them.
        predicted = logits[row].argmax()
        for neuron, named in enumerate(np.asarray(result.flips_to[row])):
            assert (named == -1) == np.isinf(delta[neuron])
            if named >= 0:
                slope = weights[named, neuron] - weights[predicted, neuron]
                reach = (logits[row, predicted] - logits[row, named]) / np.float64(slope)
                assert abs(reach) == pytest.approx(abs(delta[neuron]), rel=1e-5, abs=1e-6)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 7]))
def test_delta_ties_the_top_two_logits_and_a_little_more_flips(seed, classes):
    """Each draw is 100 random nets of 20 neurons, of one image each."""
    generator = np.random.default_rng(seed)
    features = np.maximum(generator.normal(size=(100, 20)), 0).astype('f4')
    weights = generator.normal(size=(100, classes, 20)).astype('f4')
    logits = np.einsum('rkn,rn->rk', weights, features)
    delta, flips_to = jax.tree.map(np.asarray, own_weights(features, weights, logits))
    row, neuron = np.nonzero(np.isfinite(delta))
    assert len(row) > 100
    change, slope = delta[row, neuron, None].astype(np.float64), weights[row, :, neuron]
    assert (features[row, neuron] + change[:, 0] >= -1e-5 * np.abs(change[:, 0])).all()
    logits, size = logits[row].astype(np.float64), np.abs(change * slope).max(-1)
    first, second = np.sort(logits + change * slope)[:, :-3:-1].T
    assert (first - second <= 1e-5 * (size + np.abs(logits).max(-1))).all()
    # A thousandth of the change must move the margin by more than rounding.
    margin = np.subtract(*np.sort(logits)[:, :-3:-1].T)
    clear = margin > 1e-3 * (size + np.abs(logits).max(-1))
    assert clear.mean() > 0.9
    before = (logits + 0.999 * change * slope).argmax(-1)
    beyond = (logits + 1.001 * change * slope).argmax(-1)
    np.testing.assert_array_equal(before[clear], logits.argmax(-1)[clear])
    assert (beyond != logits.argmax(-1))[clear].all()
    # The class named is one of the two that tie; a third may pass both a little later.
    named = np.take_along_axis(logits + change * slope, flips_to[row, neuron, None], 1)[:, 0]
    assert (first - named <= 1e-5 * (size + np.abs(logits).max(-1))).all()
    assert (beyond == flips_to[row, neuron])[clear].mean() > 0.98


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(-9, 9))
def test_scaling_the_logits_moves_no_boundary(seed, exponent):
    features, weights, logits = random_problem(seed, 20, 10, 4)
    plain = batched(features, weights, logits)
    # A power of two scales without rounding.
    scale = np.float32(2.0**exponent)
    scaled = batched(features, scale * weights, scale * logits)
    np.testing.assert_allclose(scaled.delta, plain.delta, rtol=1e-6)
    np.testing.assert_array_equal(scaled.flips_to, plain.flips_to)


def test_float64_is_kept():
    with jax.enable_x64(True):
        features, weights, logits = random_problem(3, 10, 20, 7, np.float64)
        result = batched(features, weights, logits)
        assert result.delta.dtype == jnp.float64
        for row in range(10):
            np.testing.assert_allclose(
                result.delta[row], oracle(features[row], weights, logits[row])[0], rtol=1e-13
            )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    features, weights, logits = (jnp.asarray(a, dtype) for a in random_problem(5, 10, 20, 4))
    result = batched(features, weights, logits)
    assert result.delta.dtype == jnp.float32
    for row in range(10):
        # The oracle sees the same rounded numbers, so only float32 rounding separates them.
        expected = oracle(features[row], weights, logits[row])[0]
        np.testing.assert_allclose(result.delta[row], expected, rtol=1e-5)


def test_gradients_per_example_equal_shared_weights():
    features, weights, logits = random_problem(8, 6, 9, 3)
    shared = batched(features, weights, logits)
    own = jax.vmap(nearest_flip)(np.tile(weights, (6, 1, 1)), logits, features)
    np.testing.assert_allclose(own.delta, shared.delta, rtol=1e-6)


# ------------------------------------------------------------------------------- whole models


@pytest.fixture(scope='module')
def net():
    """A small convolutional network and 16 images."""
    module = models.create('cnn', num_classes=5, features=(4, 6), hidden=(12,))
    x = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    return LinenForward(module), variables, x


def penultimate(net):
    forward, variables, x = net
    logits, tapped = forward(variables, x, taps=('head:in',))
    return tapped['head:in'], variables['params']['head']['kernel'].T, logits


@pytest.mark.parametrize('layer', ['head:in', 'act3'])
@pytest.mark.parametrize('method', ['auto', 'closed_form', 'first_order', 'exact'])
def test_every_method_agrees_on_the_last_layer(net, layer, method):
    features, weights, logits = penultimate(net)
    result = sensitivity(*net, layer=layer, method=method, limit=1e4)
    # Bisection ends at 2^-26 of its interval; the others differ by rounding of the logits only.
    tolerance = 1e-4 if method == 'exact' else 1e-6
    for row in range(16):
        delta, flips_to = oracle(features[row], weights, logits[row])
        np.testing.assert_allclose(result.delta[row], delta, rtol=max(tolerance, 1e-5))
        np.testing.assert_array_equal(result.flips_to[row], flips_to)
    reference = sensitivity(*net, layer=layer, method='closed_form')
    np.testing.assert_allclose(result.delta, reference.delta, rtol=tolerance)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
@pytest.mark.parametrize('layer', ['act1', 'conv2'])
def test_directions_and_chunks_agree(net, layer, unit):
    forward, variables, x = net
    options = {'layer': layer, 'unit': unit, 'method': 'first_order'}
    reference = sensitivity(forward, variables, x[:4], direction='reverse', **options)
    for direction, chunk in (('forward', None), ('forward', 7), ('reverse', 2), ('auto', 1000)):
        result = sensitivity(forward, variables, x[:4], direction=direction, chunk=chunk, **options)
        # Quotients of small derivatives amplify rounding.
        np.testing.assert_allclose(result.delta, reference.delta, rtol=2e-3)
        np.testing.assert_array_equal(np.isinf(result.delta), np.isinf(reference.delta))
        assert (result.flips_to == reference.flips_to).mean() > 0.99


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
def test_memory_follows_the_chunk(direction):
    """Derivatives of all classes with respect to all neurons are never held at once."""
    module = models.create('cnn', num_classes=40, features=(8,), hidden=())
    x = jnp.zeros((16, 16, 16, 1))
    variables = jax.eval_shape(module.init, jax.random.key(0), x[:1])
    options = {'layer': 'act1', 'method': 'first_order', 'unit': 'unit', 'direction': direction}

    def temporaries(chunk):
        run = jax.jit(lambda v, x: sensitivity(LinenForward(module), v, x, chunk=chunk, **options))
        return run.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    everything = 4 * 16 * 40 * (16 * 16 * 8)
    assert temporaries(2) < everything / 3
    assert temporaries(None) < temporaries(40)


@functools.partial(jax.jit, static_argnames=('forward', 'layer'))
def predictions_after(forward, variables, x, changes, layer):
    """Predictions of each image with its own change added to a layer."""

    def one(x, change):
        edits = {layer: lambda h: h + change}
        return forward(variables, x[None], edits=edits)[0][0].argmax()

    return jax.vmap(one)(x, changes)


@pytest.mark.parametrize(('layer', 'shape'), [('act1', (8, 8, 4)), ('conv2', (4, 4, 6))])
def test_exact_changes_flip_the_real_network_and_smaller_ones_do_not(net, layer, shape):
    forward, variables, x = net
    result = sensitivity(*net, layer=layer, method='exact')
    clean = np.asarray(forward(variables, x)[0].argmax(-1))
    reached = np.isfinite(result.delta)
    assert reached.mean() > 0.2
    for neuron in range(shape[-1]):
        rows = np.nonzero(reached[:, neuron])[0]
        if not len(rows):
            continue
        for factor in (0.05, 0.3, 0.7, 0.999, 1.001):
            changes = np.zeros((16, *shape), np.float32)
            changes[rows, ..., neuron] = factor * np.asarray(result.delta)[rows, neuron].reshape(
                -1, 1, 1
            )
            after = np.asarray(predictions_after(forward, variables, x, changes, layer))[rows]
            expected = clean[rows] if factor < 1 else np.asarray(result.flips_to)[rows, neuron]
            np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize('method', ['closed_form', 'first_order', 'exact'])
def test_a_little_more_than_delta_flips_the_real_network_and_a_little_less_does_not(net, method):
    """At the last layer, where all three are exact."""
    forward, variables, x = net
    result = jax.tree.map(np.asarray, sensitivity(*net, method=method))
    clean = np.asarray(forward(variables, x)[0].argmax(-1))
    reached = np.isfinite(result.delta)
    assert reached.mean() > 0.5
    for factor, expected in ((0.999, clean[:, None]), (1.001, result.flips_to)):
        for neuron in range(12):
            rows = reached[:, neuron]
            changes = np.zeros((16, 12), np.float32)
            changes[rows, neuron] = factor * result.delta[rows, neuron]
            after = np.asarray(predictions_after(forward, variables, x, changes, 'head:in'))
            wanted = np.broadcast_to(expected, (16, 12))[:, neuron]
            np.testing.assert_array_equal(after[rows], wanted[rows])


def test_exact_changes_of_single_units_flip_the_real_network(net):
    forward, variables, x = net
    result = sensitivity(*net, layer='conv2', unit='unit', method='exact')
    clean = np.asarray(forward(variables, x)[0].argmax(-1))
    assert result.delta.shape == (16, 4 * 4 * 6)
    reached = np.isfinite(result.delta)
    for neuron in np.argsort(reached.sum(0))[-3:]:
        rows = np.nonzero(reached[:, neuron])[0]
        assert len(rows) > 8
        for factor in (0.5, 0.999, 1.001):
            changes = np.zeros((16, 4 * 4 * 6), np.float32)
            changes[rows, neuron] = factor * np.asarray(result.delta)[rows, neuron]
            changes = changes.reshape(16, 4, 4, 6)
            after = np.asarray(predictions_after(forward, variables, x, changes, 'conv2'))[rows]
            expected = clean[rows] if factor < 1 else np.asarray(result.flips_to)[rows, neuron]
            np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize('chunk', [1, 3, 100])
def test_chunks_change_nothing_in_the_search_in_double_precision(net, chunk):
    with jax.enable_x64(True):
        forward, variables, x = net
        variables, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (variables, x[:4]))
        options = {'layer': 'act1', 'method': 'exact'}
        whole = sensitivity(forward, variables, x, **options)
        parts = sensitivity(forward, variables, x, chunk=chunk, **options)
        assert whole.delta.dtype == jnp.float64 and np.isfinite(whole.delta).any()
        np.testing.assert_allclose(parts.delta, whole.delta, rtol=1e-12)
        np.testing.assert_array_equal(parts.flips_to, whole.flips_to)


def test_chunks_change_nothing_in_the_search(net):
    forward, variables, x = net
    whole = sensitivity(forward, variables, x, layer='act1', method='exact')
    parts = sensitivity(forward, variables, x, layer='act1', method='exact', chunk=3)
    np.testing.assert_allclose(parts.delta, whole.delta, rtol=1e-5)
    np.testing.assert_array_equal(parts.flips_to, whole.flips_to)


def _identity(key, shape, dtype):
    del key
    return jnp.eye(*shape, dtype=dtype)


class _Itself(nn.Module):
    """A network whose logits are its first layer's values."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(2, use_bias=False, kernel_init=nn.initializers.ones, name='in')(x))
        return nn.Dense(2, use_bias=False, kernel_init=_identity, name='head')(h)


@pytest.mark.parametrize('method', ['closed_form', 'first_order', 'exact'])
def test_tied_logits_need_no_change_by_any_method(method):
    x = jnp.ones((1, 1))
    variables = _Itself().init(jax.random.key(0), x)
    result = sensitivity(LinenForward(_Itself()), variables, x, method=method)
    np.testing.assert_array_equal(result.delta, [[0, 0]])
    assert (result.flips_to == 1).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('direction', ['forward', 'reverse'])
def test_first_order_in_half_precision(net, dtype, direction):
    forward, variables, x = net
    options = {'layer': 'act1', 'method': 'first_order', 'direction': direction}
    module = forward.module.clone(dtype=dtype)
    low = sensitivity(LinenForward(module, forward.kwargs), variables, x, **options)
    reference = sensitivity(*net, **options)
    both = np.isfinite(low.delta) & np.isfinite(reference.delta)
    assert low.delta.dtype == jnp.float32 and both.mean() > 0.2
    apart = np.abs(low.delta / reference.delta - 1)[both]
    assert 0 < np.median(apart) < 0.05


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_search_sees_what_a_half_precision_network_sees(net, dtype):
    forward, variables, x = net
    module = forward.module.clone(dtype=dtype)
    low = sensitivity(LinenForward(module, forward.kwargs), variables, x, method='exact')
    reference = sensitivity(*net, method='exact')
    both = np.isfinite(low.delta) & np.isfinite(reference.delta)
    assert low.delta.dtype == jnp.float32 and both.mean() > 0.2
    apart = np.abs(low.delta / reference.delta - 1)[both]
    assert np.median(apart) < 0.05


def test_exact_respects_the_range_of_a_channel(net):
    forward, variables, x = net
    result = sensitivity(*net, layer='act1', method='exact')
    lowest = forward(variables, x, taps=('act1',))[1]['act1'].min((1, 2))
    falls = np.isfinite(result.delta) & (np.asarray(result.delta) < 0)
    assert (np.asarray(lowest + result.delta)[falls] >= -1e-6).all()
    free = sensitivity(*net, layer='act1', method='exact', activation_range=(-math.inf, math.inf))
    assert (np.abs(free.delta) <= np.abs(result.delta) * (1 + 1e-5)).all()
    assert np.isfinite(free.delta).sum() > np.isfinite(result.delta).sum()


def test_changes_beyond_the_limit_are_not_reached(net):
    wide = sensitivity(*net, layer='head:in', method='exact', limit=1e3)
    narrow = sensitivity(*net, layer='head:in', method='exact', limit=2.0)
    within = np.abs(wide.delta) <= 2.0
    assert 0 < within.mean() < 1
    np.testing.assert_array_equal(np.isfinite(narrow.delta), within)
    np.testing.assert_allclose(narrow.delta[within], wide.delta[within], rtol=1e-5)
    assert (np.asarray(narrow.flips_to)[~within] == -1).all()


def test_first_order_is_the_limit_of_small_changes():
    """On a smooth network the first-order change is exact to second order in its size."""
    module = models.create('mlp', num_classes=2, hidden=(6, 6), activation='tanh')
    x = jax.random.uniform(jax.random.key(3), (64, 3, 3, 1))
    variables = jax.jit(module.init)(jax.random.key(2), x[:1])
    # Start next to the decision boundary: move the bias until the first image nearly ties.
    forward = LinenForward(module)
    logits = forward(variables, x)[0]
    gap = logits[0, 0] - logits[0, 1]
    bias = variables['params']['head']['bias'] - jnp.array([gap - 1e-3, 0.0])
    head = {**variables['params']['head'], 'bias': bias}
    variables = {'params': {**variables['params'], 'head': head}}
    first = sensitivity(forward, variables, x[:1], layer='act1', method='first_order')
    exact = sensitivity(forward, variables, x[:1], layer='act1', method='exact')
    small = np.abs(first.delta) < 0.02
    assert small.any()
    np.testing.assert_allclose(exact.delta[small], first.delta[small], rtol=0.05)


def test_an_unbounded_layer_may_fall_below_zero(net):
    bounded = sensitivity(*net, layer='act1')
    same = sensitivity(*net, layer='act1', activation_range=(0.0, math.inf))
    np.testing.assert_array_equal(bounded.delta, same.delta)
    raw = sensitivity(*net, layer='conv2')
    free = sensitivity(*net, layer='conv2', activation_range=(-math.inf, math.inf))
    np.testing.assert_array_equal(raw.delta, free.delta)


def test_a_dead_neuron_can_only_rise(net):
    forward, variables, x = net
    dead = with_edits(forward, {'head:in': lambda h: h.at[:, 2].set(0)})
    result = sensitivity(dead, variables, x)
    assert (np.asarray(result.delta)[:, 2] > 0).all()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_models_and_inputs(dtype):
    module = models.create('cnn', num_classes=3, features=(2,), hidden=(5,), dtype=dtype)
    x = jax.random.uniform(jax.random.key(1), (4, 6, 6, 1), dtype)
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    forward = LinenForward(module)
    result = sensitivity(forward, variables, x)
    assert result.delta.dtype == jnp.float32
    logits, tapped = forward(variables, x, taps=('head:in',))
    for row in range(4):
        delta, _ = oracle(
            tapped['head:in'][row], variables['params']['head']['kernel'].T, logits[row]
        )
        # The derivatives of a half-precision layer are rounded to its type.
        np.testing.assert_allclose(result.delta[row], delta, rtol=2e-2)


def test_a_batch_of_one_and_one_example(net):
    forward, variables, x = net
    whole = sensitivity(*net)
    single = sensitivity(forward, variables, x[5:6])
    alone = jax.jit(functools.partial(sensitivity_example, forward))(variables, x[5])
    np.testing.assert_allclose(single.delta[0], whole.delta[5], rtol=1e-5)
    np.testing.assert_allclose(alone.delta, whole.delta[5], rtol=1e-5)


# ------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ('layer', 'method'), [('head:in', 'closed_form'), ('act1', 'first_order'), ('act1', 'exact')]
)
def test_one_and_eight_devices_agree_without_communication(net, layer, method):
    forward, variables, x = net
    mesh = parallel.data_mesh()
    options = {'layer': layer, 'method': method, 'chunk': 3}
    alone = sensitivity(forward, variables, x, **options)
    split = parallel.shard(mesh, x)
    copied = parallel.replicate(mesh, variables)
    together = sensitivity(forward, copied, split, **options)
    assert len(together.delta.sharding.device_set) == 8
    assert not together.delta.is_fully_replicated
    np.testing.assert_allclose(together.delta, alone.delta, rtol=1e-3)
    np.testing.assert_array_equal(together.flips_to, alone.flips_to)

    def run(variables, x):
        return sensitivity(forward, variables, x, **options)

    program = jax.jit(run).lower(copied, split).compile().as_text()
    found = re.findall(r'all-reduce|all-gather|all-to-all|collective-permute', program)
    assert found == []


def test_runs_under_pmap(net):
    forward, variables, x = net
    plain = sensitivity(*net)
    mapped = jax.pmap(lambda x: sensitivity(forward, variables, x))(x.reshape(8, 2, 8, 8, 1))
    np.testing.assert_allclose(mapped.delta.reshape(16, -1), plain.delta, rtol=1e-5)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'method': 'fast'}, "Unknown method 'fast'; valid names are auto, closed_form"),
        ({'unit': 'filter'}, "Unknown unit 'filter'; valid names are channel, unit."),
        ({'direction': 'up'}, "Unknown direction 'up'; valid names are auto, reverse, forward."),
        ({'chunk': 0}, 'chunk is 0; it must be at least 1.'),
        ({'limit': 0.0}, 'limit is 0.0; it must be greater than 0.'),
        ({'activation_range': (1.0, 0.0)}, 'activation_range is (1.0, 0.0); the first value'),
        ({'layer': 'act1', 'method': 'closed_form'}, "layer 'act1' with fixed weights"),
    ],
)
def test_a_mistake_is_one_sentence(net, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sensitivity(*net, **options)


def test_an_unknown_layer_is_answered_with_close_names(net):
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        sensitivity(*net, layer='act9')


class Gate(nn.Module):
    """The features of the last layer are scaled by a function of the input."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        h = nn.relu(nn.Dense(6, name='dense')(x))
        h = nn.Dense(6, name='inner')(h)
        return nn.Dense(3, name='head')(h * x.sum(-1, keepdims=True))


def test_weights_that_depend_on_the_input_have_no_closed_form():
    x = jax.random.uniform(jax.random.key(0), (2, 5))
    variables = Gate().init(jax.random.key(1), x)
    forward = LinenForward(Gate())
    with pytest.raises(ValueError, match='has no closed form'):
        sensitivity(forward, variables, x, layer='inner', method='closed_form')
    first = sensitivity(forward, variables, x, layer='inner')
    exact = sensitivity(forward, variables, x, layer='inner', method='exact', limit=1e4)
    np.testing.assert_allclose(exact.delta, first.delta, rtol=1e-4)

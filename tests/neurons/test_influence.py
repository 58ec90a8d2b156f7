"""Influence is activation times gradient, and front and tail are its ends."""

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

from neurosens.forward import LayerError, LinenForward
from neurosens.neurons.influence import class_influence, influence, labels, partition


class Features(nn.Module):
    """The input is taken for the features of a last layer without bias."""

    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, use_bias=False, name='head')(x)


def of_features(features, rows, y=None, **options):
    """Influence of features whose logits are given by one row of weights per class."""
    rows = np.asarray(rows, np.float32)
    variables = {'params': {'head': {'kernel': rows.T}}}
    x = np.asarray(features, np.float32)[None]
    y = None if y is None else np.array([y])
    return influence(LinenForward(Features(len(rows))), variables, x, y, **options)[0]


def test_signed_influence_and_its_ends_by_hand():
    values = of_features([2, 1, 3, 0.25], [[1, -2, 0.5, 4], [0, 0, 0, 0]], 0)
    np.testing.assert_array_equal(values, [2, -2, 1.5, 1])
    part = partition(values, front=1, tail=1)
    assert part.front.tolist() == [0] and part.tail.tolist() == [1]
    assert labels(part, 4).tolist() == [1, -1, 0, 0]


def test_probabilities_can_turn_the_ranking_round():
    rows = [[2, 1], [2, 0], [0, 0]]
    np.testing.assert_array_equal(of_features([1, 1], rows, 0), [2, 1])
    probability = of_features([1, 1], rows, 0, score='probability')
    np.testing.assert_allclose(probability, [0.04954, 0.20782], atol=5e-6)


def test_a_certain_model_has_no_probability_influence():
    rows = [[40, 80], [0, 0]]
    np.testing.assert_array_equal(of_features([1, 1], rows, 0, score='probability'), [0, 0])
    np.testing.assert_array_equal(of_features([1, 1], rows, 0), [40, 80])


class Rectified(nn.Module):
    """Three rectified units of two inputs, and two classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(3, use_bias=False, name='dense')(x))
        return nn.Dense(2, use_bias=False, name='head')(x)


def test_a_rectified_layer_by_hand():
    kernel = np.array([[1, 2], [-1, 1], [0.5, -0.5]], np.float32).T
    head = np.array([[1, -1, 2], [0, 0, 0]], np.float32).T
    variables = {'params': {'dense': {'kernel': kernel}, 'head': {'kernel': head}}}
    x, forward = np.array([[0.3, 0.6]], np.float32), LinenForward(Rectified())
    values = influence(forward, variables, x, np.array([0]))
    np.testing.assert_allclose(values[0], [1.5, -0.3, 0], rtol=1e-6)
    part = partition(values[0], front=1, tail=1)
    assert part.front.tolist() == [0] and part.tail.tolist() == [1]

    def front_minus_tail(x):
        h = forward(variables, x, taps=('head:in',))[1]['head:in'][0]
        return h[part.front].sum() - h[part.tail].sum()

    np.testing.assert_allclose(jax.grad(front_minus_tail)(x)[0], [2, 1], rtol=1e-6)


def test_neurons_behind_a_rectifier_that_are_off_are_tied():
    """Their influence is 0 or -0, which are equal: the lowest index comes first."""
    values = of_features([0, 0, 0, 1], [[-1, 2, -3, 1], [0, 0, 0, 0]], 0)
    assert np.signbit(values).tolist() == [True, False, True, False]
    part = partition(values, front=3, tail=1)
    assert part.front.tolist() == [3, 0, 1] and part.tail.tolist() == [2]
    part = partition(-values, front=1, tail=2)
    assert part.front.tolist() == [0] and part.tail.tolist() == [3, 1]


@pytest.mark.parametrize(('front', 'tail'), [(1, 5), (3, 0), (0, 0), (2, 4)])
def test_equal_influences_take_the_lowest_index(front, tail):
    part = partition(jnp.zeros(6), front=front, tail=tail)
    assert part.front.tolist() == list(range(front))
    assert part.tail.tolist() == list(range(front, front + tail))


def test_front_is_falling_and_tail_is_rising():
    part = partition(jnp.array([0.5, -3.0, 2.0, -1.0, 2.0]), front=2, tail=2)
    assert part.front.tolist() == [2, 4] and part.tail.tolist() == [1, 3]


numbers = st.floats(width=32, allow_nan=False, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, 1.0]
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(numbers, min_size=5, max_size=5), st.sampled_from([1, 3]))
@hypothesis.example([math.inf, math.inf, 0.0, 0.0, 0.0], 1)
def test_front_and_tail_are_the_two_ends_of_one_order(values, front):
    part = ends(jnp.array(values, jnp.float32), front)
    tail = 5 - front
    # Sorting in Python is stable: of equal numbers, the first comes first.
    falling = sorted(range(5), key=lambda i: -values[i])[:front]
    rising = sorted(set(range(5)) - set(falling), key=lambda i: values[i])[:tail]
    assert part.front.tolist() == falling
    assert part.tail.tolist() == rising
    expected = [1 if i in falling else -1 for i in range(5)]
    assert labels(part, 5).tolist() == expected


@functools.partial(jax.jit, static_argnums=1)
def ends(values, front):
    return partition(values, front=front, tail=5 - front)


def test_a_batch_is_divided_row_by_row():
    batch = np.array([[1, 2, 3], [3, 1, 2], [0, 0, 0]], np.float32)
    part = jax.vmap(lambda row: partition(row, front=1, tail=1))(batch)
    assert part.front.tolist() == [[2], [0], [0]]
    assert part.tail.tolist() == [[0], [1], [1]]
    assert part.front.dtype == part.tail.dtype == jnp.int32


@pytest.mark.parametrize(('front', 'tail'), [(4, 3), (-1, 3), (2, -1)])
def test_a_partition_that_does_not_fit_is_refused(front, tail):
    with pytest.raises(ValueError, match=f'front {front} and tail {tail} do not fit into 6'):
        partition(jnp.zeros(6), front=front, tail=tail)


def test_influences_of_a_network_without_bias_sum_to_the_logit(random_variables):
    """A ReLU network without biases is homogeneous: sum_i h_i dz/dh_i = z at every layer."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in (1, 2):
                x = nn.relu(nn.Conv(3, (3, 3), use_bias=False, name=f'conv{k}')(x))
                x = nn.Dropout(0.0, deterministic=True, name=f'act{k}')(x)
            return nn.Dense(4, use_bias=False, name='head')(x.reshape(len(x), -1))

    x = np.random.default_rng(0).normal(size=(5, 4, 4, 1)).astype(np.float32)
    forward, variables = LinenForward(Plain()), random_variables(Plain(), x)
    logits = np.asarray(forward(variables, x)[0])
    assert len(set(logits.argmax(-1))) > 1
    rows = np.arange(5)
    y = np.array([3, 1, 0, 2, 2])
    for layer in ('act1', 'act2'):
        for unit in ('channel', 'unit'):
            total = influence(forward, variables, x, y, layer=layer, unit=unit).sum(-1)
            # Rounded sums of terms that are larger than the logit.
            np.testing.assert_allclose(total, logits[rows, y], rtol=1e-4, atol=1e-5)
    predicted = influence(forward, variables, x, layer='act2').sum(-1)
    np.testing.assert_allclose(predicted, logits.max(-1), rtol=1e-4, atol=1e-5)


def test_the_predicted_class_is_explained_unless_another_is_given(small_net):
    forward, variables, x, y, _ = small_net
    predicted = np.asarray(forward(variables, x)[0]).argmax(-1)
    assert (predicted != y).any() and (predicted == y).any()
    by_default = influence(forward, variables, x)
    of_prediction, of_label = (influence(forward, variables, x, c) for c in (predicted, y))
    np.testing.assert_allclose(by_default, of_prediction, rtol=1e-6)
    differs = np.abs(of_label - of_prediction).max(-1) > 1e-4
    np.testing.assert_array_equal(differs, predicted != y)


@pytest.mark.parametrize('score', ['logit', 'probability'])
def test_an_nnx_network_has_the_influences_of_its_linen_twin(small_net, nnx_net, score):
    for layer in ('conv2', 'head:in'):
        ours, theirs = (
            influence(net.forward, net.variables, net.x, net.y, layer=layer, score=score)
            for net in (nnx_net, small_net)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert np.abs(theirs).max() > 1e-2


def test_a_channel_sums_its_positions_and_equals_autodiff(small_net):
    forward, variables, x, *_ = small_net
    x = x[:3]
    units = influence(forward, variables, x, layer='act1', unit='unit')
    channels = influence(forward, variables, x, layer='act1')
    np.testing.assert_allclose(units.reshape(3, 64, 4).sum(1), channels, rtol=1e-4, atol=1e-6)

    def logit(change, x):
        return forward(variables, x[None], edits={'act1': lambda h: h + change})[0].max()

    change = jnp.zeros((8, 8, 4))
    gradient = jax.jit(jax.vmap(jax.grad(logit), (None, 0)))(change, x)
    activation = forward(variables, x, taps=('act1',))[1]['act1']
    expected = (gradient * activation).reshape(3, -1)
    np.testing.assert_allclose(units, expected, rtol=1e-4, atol=1e-6)


def test_means_by_class_equal_a_loop():
    values = np.random.default_rng(0).normal(size=(20, 3))
    y = np.random.default_rng(1).integers(0, 4, 20)
    y[y == 2] = 1
    means = class_influence(values, y, 4)
    for label in (0, 1, 3):
        np.testing.assert_allclose(
            means[label], np.mean([v for v, c in zip(values, y) if c == label], 0)
        )
    assert np.isnan(means[2]).all()


def test_devices_agree_without_communication(small_net, assert_splits_over_devices):
    def run(variables, x):
        return influence(small_net.forward, variables, x, layer='conv2')

    assert_splits_over_devices(run, small_net.variables, small_net.x)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'score': 'margin'}, "Unknown score 'margin'; valid names are logit, probability."),
        ({'unit': 'x'}, "Unknown unit 'x'; valid names are channel, unit."),
    ],
)
def test_a_mistake_is_one_sentence(small_net, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        influence(small_net.forward, small_net.variables, small_net.x, **options)


def test_an_unknown_layer_is_answered_with_close_names(small_net):
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        influence(small_net.forward, small_net.variables, small_net.x, layer='act9')

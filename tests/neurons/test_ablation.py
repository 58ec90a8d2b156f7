"""Nodal dropout equals taking the neuron out of the network."""

import collections
import dataclasses
import re

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

from neurosens import models
from neurosens.forward import LayerError, LinenForward, with_edits
from neurosens.neurons.ablation import (
    ablation,
    ablation_example,
    fragility,
    response,
    without_neurons,
)


def judge(logits, y):
    """Correctness, cross-entropy and margin, plainly."""
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(y))
    others = logits.copy()
    others[rows, y] = -np.inf
    loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), y)
    return logits.argmax(-1) == y, np.asarray(loss), logits[rows, y] - others.max(-1)


def assert_ablation(result, neuron, logits, y):
    correct, loss, margin = judge(logits, y)
    np.testing.assert_array_equal(result.correct[:, neuron], correct)
    np.testing.assert_allclose(result.loss[:, neuron], loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.margin[:, neuron], margin, rtol=1e-4, atol=1e-5)


@jax.jit
def logits_of(forward, variables, x):
    return forward(variables, x)[0]


def mask(removed, filling, h):
    return jnp.where(removed, filling, h)


def logits_without(net, layer, removed, filling=0.0):
    """Logits of the network edited so that some entries of a layer have fixed values."""
    edit = jax.tree_util.Partial(mask, np.asarray(removed), np.float32(filling))
    return logits_of(with_edits(net.forward, {layer: edit}), net.variables, net.x)


@pytest.mark.parametrize(
    ('layer', 'neurons', 'values'),
    [
        ('act1', 4, None),
        ('act1', 4, 'one for each neuron'),
        ('conv2', 6, None),
        ('head:in', 12, 'one for all neurons'),
    ],
)
def test_equals_an_edit_that_masks_the_neuron(small_net, layer, neurons, values):
    forward, variables, x, y, _ = small_net
    replacement = {
        None: {},
        'one for all neurons': {'replacement': 0.7},
        'one for each neuron': {'replacement': np.linspace(-1, 1, neurons, dtype=np.float32)},
    }[values]
    result = ablation(forward, variables, x, y, layer=layer, **replacement)
    value = np.broadcast_to(replacement.get('replacement', 0.0), neurons)
    for neuron in range(neurons):
        logits = logits_without(small_net, layer, np.arange(neurons) == neuron, value[neuron])
        assert_ablation(result, neuron, logits, y)
    correct, loss, margin = judge(logits_of(forward, variables, x), y)
    np.testing.assert_array_equal(result.intact_correct, correct)
    np.testing.assert_allclose(result.intact_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.intact_margin, margin, rtol=1e-4, atol=1e-5)


def test_equals_the_smaller_network_without_the_filter(small_net):
    forward, variables, x, y, _ = small_net
    result = ablation(forward, variables, x, y, layer='act1')
    smaller = LinenForward(models.create('cnn', num_classes=5, features=(3, 6), hidden=(12,)))
    for neuron in (0, 3):
        keep = np.delete(np.arange(4), neuron)
        params = dict(variables['params'])
        params['conv1'] = {name: leaf[..., keep] for name, leaf in params['conv1'].items()}
        params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'][:, :, keep]}
        assert_ablation(result, neuron, logits_of(smaller, {'params': params}, x), y)


def test_equals_the_smaller_network_without_the_hidden_neuron(small_net):
    forward, variables, x, y, _ = small_net
    result = ablation(forward, variables, x, y, layer='act3')
    smaller = LinenForward(models.create('cnn', num_classes=5, features=(4, 6), hidden=(11,)))
    for neuron in (0, 5, 11):
        keep = np.delete(np.arange(12), neuron)
        params = dict(variables['params'])
        params['dense3'] = {name: leaf[..., keep] for name, leaf in params['dense3'].items()}
        params['head'] = {**params['head'], 'kernel': params['head']['kernel'][keep]}
        assert_ablation(result, neuron, logits_of(smaller, {'params': params}, x), y)


def test_equals_the_smaller_network_without_the_normalised_filter(random_variables):
    options = {'num_classes': 3, 'hidden': (), 'norm': 'batch'}
    x = np.random.default_rng(2).normal(size=(8, 6, 6, 1)).astype(np.float32)
    module = models.create('cnn', features=(4, 5), **options)
    variables, y = random_variables(module, x), np.arange(8) % 3
    result = ablation(LinenForward(module), variables, x, y, layer='act1')
    smaller = LinenForward(models.create('cnn', features=(3, 5), **options))
    for neuron in range(4):
        keep = np.delete(np.arange(4), neuron)
        params, statistics = dict(variables['params']), dict(variables['batch_stats'])
        for part in ('conv1', 'norm1'):
            params[part] = {name: leaf[..., keep] for name, leaf in params[part].items()}
        statistics['norm1'] = {name: leaf[keep] for name, leaf in statistics['norm1'].items()}
        params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'][:, :, keep]}
        without = {'params': params, 'batch_stats': statistics}
        assert_ablation(result, neuron, logits_of(smaller, without, x), y)


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_the_weights_mode_equals_zeroed_weights(random_variables, norm):
    module = models.create('cnn', num_classes=3, features=(4,), hidden=(), norm=norm)
    x = np.random.default_rng(2).normal(size=(8, 6, 6, 1)).astype(np.float32)
    # A normalisation has a mean and an offset that a removed filter leaves behind.
    variables = random_variables(module, x)
    y, forward = np.arange(8) % 3, LinenForward(module)
    result = ablation(forward, variables, x, y, layer='conv1', mode='weights')
    for neuron in range(4):
        params = dict(variables['params'])
        params['conv1'] = {
            name: leaf.at[..., neuron].set(0) for name, leaf in params['conv1'].items()
        }
        logits = logits_of(forward, {**variables, 'params': params}, x)
        assert_ablation(result, neuron, logits, y)
    removed = ablation(forward, variables, x, y, layer='act1')
    same = np.allclose(removed.margin, result.margin, atol=1e-4)
    assert same == (norm == 'none'), 'a normalisation leaves a constant'


def test_filters_without_weights_take_no_replacement(small_net):
    forward, variables, x, y, _ = small_net
    with pytest.raises(ValueError, match="'weights' leaves 0"):
        ablation(forward, variables, x, y, layer='conv1', mode='weights', replacement=0.5)


def test_an_nnx_network_without_the_weights_of_a_filter(small_net, nnx_net):
    forward, variables, x, y, _ = nnx_net
    result = ablation(forward, variables, x, y, layer='conv2', mode='weights')
    for neuron in range(6):
        pure = nnx.to_pure_dict(variables)
        pure['conv2'] = {name: leaf.at[..., neuron].set(0) for name, leaf in pure['conv2'].items()}
        # The same weights in the Linen network.
        logits = logits_of(small_net.forward, {'params': pure}, x)
        assert_ablation(result, neuron, logits, y)


def test_zero_outgoing_weights_change_nothing_at_all(small_net):
    forward, variables, x, y, _ = small_net
    params = dict(variables['params'])
    kernel = params['conv2']['kernel'].at[:, :, 1].set(0)
    params['conv2'] = {**params['conv2'], 'kernel': kernel}
    result = ablation(forward, {'params': params}, x, y, layer='act1')
    found = response(result)
    assert found.accuracy[1] == found.loss[1] == found.margin[1] == 0
    assert (found.loss[[0, 2, 3]] != 0).all() and found.accuracy.any()


def test_twin_filters_have_twin_responses_and_permutations_permute(small_net):
    forward, variables, x, y, _ = small_net
    order = np.array([2, 0, 2, 1])
    params = dict(variables['params'])
    params['conv1'] = {name: leaf[..., order] for name, leaf in params['conv1'].items()}
    outgoing = params['conv2']['kernel'][:, :, order]
    params['conv2'] = {**params['conv2'], 'kernel': outgoing}
    result = ablation(forward, {'params': params}, x, y, layer='act1')
    found = response(result)
    assert found.accuracy[0] == found.accuracy[2]
    assert found.loss[0] == found.loss[2] != found.loss[1]
    np.testing.assert_array_equal(result.margin[:, 0], result.margin[:, 2])

    order = np.array([3, 1, 0, 2])
    params = dict(variables['params'])
    params['conv1'] = {name: leaf[..., order] for name, leaf in params['conv1'].items()}
    params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'][:, :, order]}
    permuted = response(ablation(forward, {'params': params}, x, y, layer='act1'))
    plain = response(ablation(forward, variables, x, y, layer='act1'))
    for after, before in zip(permuted[:3], plain[:3]):
        # Sums over the filters in another order.
        np.testing.assert_allclose(after, before[order], rtol=1e-4, atol=1e-5)


def test_single_units_are_removed_alone(small_net):
    forward, variables, x, y, _ = small_net
    values = np.linspace(-1, 1, 96, dtype=np.float32)
    options = {'layer': 'act2', 'unit': 'unit', 'replacement': values}
    result = ablation(forward, variables, x[:4], y[:4], **options, chunk=9)
    assert result.margin.shape == (4, 96)
    for unit in (0, 41, 95):
        removed = (np.arange(96) == unit).reshape(4, 4, 6)
        logits = logits_without(small_net, 'act2', removed, values[unit])[:4]
        assert_ablation(result, unit, logits, y[:4])


def test_chunks_change_nothing(small_net):
    forward, variables, x, y, _ = small_net
    reference = ablation(forward, variables, x, y, layer='act1')
    for chunk in (1, 3, 100):
        result = ablation(forward, variables, x, y, layer='act1', chunk=chunk)
        for a, b in zip(result, reference):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_one_example_is_as_in_a_batch(small_net):
    forward, variables, x, y, _ = small_net
    whole = ablation(forward, variables, x, y, layer='act1')
    alone = jax.jit(lambda v, x, y: ablation_example(forward, v, x, y, layer='act1'))(
        variables, x[3], y[3]
    )
    np.testing.assert_allclose(alone.margin, whole.margin[3], rtol=1e-5, atol=1e-6)
    assert alone.intact_correct == whole.intact_correct[3]


def test_devices_agree_without_communication(small_net, assert_splits_over_devices):
    def run(variables, batch):
        x, y = batch
        result = ablation(small_net.forward, variables, x, y, layer='act1', chunk=2)
        return result.margin, result.loss

    assert_splits_over_devices(run, small_net.variables, (small_net.x, small_net.y))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counting:
    """A forward that counts how often it is traced."""

    forward: LinenForward
    traces: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __call__(self, variables, x, edits=None, taps=()):
        self.traces['calls'] += 1
        return self.forward(variables, x, edits=edits or {}, taps=taps)


@pytest.mark.parametrize(('layer', 'unit', 'shape'), [('act1', 'channel', 4), ('act2', 'unit', 96)])
def test_other_neurons_are_removed_without_a_new_trace(small_net, layer, unit, shape):
    _, variables, x, *_ = small_net
    counting = Counting(small_net.forward)
    run = jax.jit(lambda forward, variables, x: forward(variables, x)[0])
    for kind in (0, 2, 5):
        removed = np.arange(shape) % 5 == kind
        logits = run(without_neurons(counting, layer, removed, unit), variables, x)
        place = removed if unit == 'channel' else removed.reshape(4, 4, 6)
        expected = logits_without(small_net, layer, place)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        assert np.allclose(logits, run(counting, variables, x), atol=1e-3) == (not removed.any())
    assert counting.traces['calls'] == 2, 'one with the mask and one without'
    # Removing nothing restores the logits bit for bit.
    np.testing.assert_array_equal(logits, run(counting, variables, x))


class Table(nn.Module):
    """Four features pass to two classes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name='head')(x)


def test_responses_by_hand():
    # Logits (h0 + h1, h2): without feature 0, the first example turns to class 1.
    variables = {'params': {'head': {'kernel': np.array([[1, 0], [1, 0], [0, 1.0]], np.float32)}}}
    x = np.array([[2, 0.5, 1], [1, 1, 0.25]], np.float32)
    y = np.array([0, 0])
    found = response(ablation(LinenForward(Table()), variables, x, y, layer='head:in'))
    np.testing.assert_allclose(found.accuracy, [0.5, 0, 0])
    # Margins 1.5 and 1.75; without a feature 1.5 - 2, 1.5 - 0.5, 2.5 and 0.75, 0.75, 2.
    np.testing.assert_allclose(found.margin, [(2 + 1) / 2, (0.5 + 1) / 2, -(1 + 0.25) / 2])
    softplus = lambda m: np.log1p(np.exp(-np.asarray(m)))  # noqa: E731
    expected = softplus([-0.5, 0.75]).mean() - softplus([1.5, 1.75]).mean()
    np.testing.assert_allclose(found.loss[0], expected, rtol=1e-5)
    assert found.intact_accuracy == 1


@pytest.mark.parametrize(
    ('rule', 'fragile', 'threshold', 'words'),
    [
        ('mean', [False, False, True, False], 0.1, 'd_k > mean of d = 0.1'),
        ('median', [False, True, True, False], 0.05, 'd_k > median of d = 0.05'),
        ('zero', [False, True, True, False], 0.0, 'd_k > 0'),
        (0.25, [False, False, True, False], 0.25, 'd_k > 0.25'),
    ],
)
def test_labels_follow_their_rule(rule, fragile, threshold, words):
    label = fragility(np.array([0.0, 0.1, 0.4, -0.1]), rule)
    assert label.fragile.tolist() == fragile
    assert label.threshold == pytest.approx(threshold) and label.rule == words


@pytest.mark.parametrize('rule', ['mean', 'median'])
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(-500, 500), st.integers(1, 60))
@hypothesis.example(50, 6)
def test_equal_responses_are_all_robust(rule, errors, neurons):
    """None of them is above their mean, however that is rounded."""
    label = fragility(np.full(neurons, errors / 500), rule)
    assert not label.fragile.any()


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'layer': 'act1', 'mode': 'kernel'}, "Unknown mode 'kernel'; valid names are activation"),
        ({'layer': 'act1', 'mode': 'weights'}, "Unknown layer with a kernel 'act1'"),
        ({'layer': 'conv1', 'mode': 'weights', 'unit': 'unit'}, "use unit='channel'"),
        ({'layer': 'act1', 'chunk': 0}, 'chunk is 0; it must be at least 1.'),
        ({'layer': 'act1', 'unit': 'map'}, "Unknown unit 'map'"),
    ],
)
def test_a_mistake_is_one_sentence(small_net, options, sentence):
    forward, variables, x, y, _ = small_net
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ablation(forward, variables, x, y, **options)


def test_an_unknown_layer_is_answered_with_close_names(small_net):
    forward, variables, x, y, _ = small_net
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        ablation(forward, variables, x, y, layer='act9')


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="Unknown rule 'max'"):
        fragility(np.zeros(3), 'max')
    with pytest.raises(ValueError, match="Unknown unit 'filter'"):
        without_neurons(None, 'act1', np.zeros(4, bool), 'filter')

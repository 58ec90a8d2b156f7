"""Nodal dropout equals taking the neuron out of the network."""

import collections
import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurosens import models
from neurosens.forward import LinenForward
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


@pytest.mark.parametrize(('layer', 'neurons'), [('act1', 4), ('conv2', 6), ('head:in', 12)])
@pytest.mark.parametrize('value', [0.0, 0.7])
def test_equals_an_edit_that_masks_the_neuron(small_net, layer, neurons, value):
    forward, variables, x, y, _ = small_net
    result = ablation(forward, variables, x, y, layer=layer, replacement=value)
    for neuron in range(neurons):
        logits = forward(variables, x, edits={layer: lambda h, k=neuron: h.at[..., k].set(value)})[
            0
        ]
        assert_ablation(result, neuron, logits, y)
    correct, loss, margin = judge(forward(variables, x)[0], y)
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
        assert_ablation(result, neuron, smaller({'params': params}, x)[0], y)


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_the_weights_mode_equals_zeroed_weights(norm):
    module = models.create('cnn', num_classes=3, features=(4,), hidden=(5,), norm=norm)
    x = jax.random.uniform(jax.random.key(2), (8, 6, 6, 1))
    variables = jax.jit(module.init)(jax.random.key(3), x)
    if norm == 'batch':
        # As after training: a mean that a removed filter leaves behind.
        means = jax.tree.map(lambda leaf: leaf - 0.5, variables['batch_stats']['norm1'])
        variables = {**variables, 'batch_stats': {'norm1': {**means, 'var': jnp.ones(4)}}}
    y, forward = np.arange(8) % 3, LinenForward(module)
    result = ablation(forward, variables, x, y, layer='conv1', mode='weights')
    for neuron in range(4):
        params = dict(variables['params'])
        params['conv1'] = {
            name: leaf.at[..., neuron].set(0) for name, leaf in params['conv1'].items()
        }
        logits = forward({**variables, 'params': params}, x)[0]
        assert_ablation(result, neuron, logits, y)
    removed = ablation(forward, variables, x, y, layer='act1')
    same = np.allclose(removed.margin, result.margin, atol=1e-4)
    assert same == (norm == 'none'), 'a normalisation leaves a constant'


def test_zero_outgoing_weights_change_nothing_at_all(small_net):
    forward, variables, x, y, _ = small_net
    params = dict(variables['params'])
    kernel = params['conv2']['kernel'].at[:, :, 1].set(0)
    params['conv2'] = {**params['conv2'], 'kernel': kernel}
    result = ablation(forward, {'params': params}, x, y, layer='act1')
    found = response(result)
    assert found.accuracy[1] == found.loss[1] == found.margin[1] == 0
    assert (found.loss[[0, 2, 3]] != 0).all()


def test_twin_filters_have_twin_responses_and_permutations_permute(small_net):
    forward, variables, x, y, _ = small_net
    order = np.array([2, 0, 2, 1])
    params = dict(variables['params'])
    params['conv1'] = {name: leaf[..., order] for name, leaf in params['conv1'].items()}
    outgoing = params['conv2']['kernel'][:, :, order]
    params['conv2'] = {**params['conv2'], 'kernel': outgoing}
    result = ablation(forward, {'params': params}, x, y, layer='act1')
    np.testing.assert_array_equal(result.margin[:, 0], result.margin[:, 2])
    np.testing.assert_array_equal(result.correct[:, 0], result.correct[:, 2])

    order = np.array([3, 1, 0, 2])
    params = dict(variables['params'])
    params['conv1'] = {name: leaf[..., order] for name, leaf in params['conv1'].items()}
    params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'][:, :, order]}
    permuted = ablation(forward, {'params': params}, x, y, layer='act1')
    plain = ablation(forward, variables, x, y, layer='act1')
    np.testing.assert_allclose(permuted.margin, plain.margin[:, order], rtol=1e-4, atol=1e-5)


def test_single_units_are_removed_alone(small_net):
    forward, variables, x, y, _ = small_net
    result = ablation(forward, variables, x[:4], y[:4], layer='act2', unit='unit', chunk=9)
    assert result.margin.shape == (4, 96)
    for unit in (0, 41, 95):
        place = np.unravel_index(unit, (4, 4, 6))
        logits = forward(
            variables, x[:4], edits={'act2': lambda h, p=place: h.at[(slice(None), *p)].set(0)}
        )[0]
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


def test_other_neurons_are_removed_without_a_new_trace(small_net):
    forward, variables, x, *_ = small_net
    counting = Counting(forward)
    run = jax.jit(lambda forward, variables, x: forward(variables, x)[0])
    for mask in ([1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]):
        removed = np.array(mask, bool)
        logits = run(without_neurons(counting, 'act1', removed), variables, x)
        expected = forward(variables, x, edits={'act1': lambda h, r=removed: h * ~r})[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert counting.traces['calls'] == 1
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


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="Unknown rule 'max'"):
        fragility(np.zeros(3), 'max')

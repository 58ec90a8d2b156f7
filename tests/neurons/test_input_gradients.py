"""Input gradients of neurons: exact norms, and unbiased estimates with honest errors."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

import neurosens
from neurosens.forward import LinenForward
from neurosens.neurons.input_gradients import (
    input_gradient_norms,
    input_gradient_norms_example,
    probe_gradients,
)


class Layer(nn.Module):
    """One dense layer, rectified, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name='dense')(x)
        x = nn.Dropout(0.0, deterministic=True, name='act')(nn.relu(x))
        return nn.Dense(2, name='head')(x)


@pytest.fixture(scope='module')
def layer():
    x = jax.random.normal(jax.random.key(0), (6, 7))
    return LinenForward(Layer()), Layer().init(jax.random.key(1), x), x


def test_a_linear_layer_has_the_norms_of_its_weights(layer):
    weights = np.asarray(layer[1]['params']['dense']['kernel'])
    found = input_gradient_norms(*layer, layer='dense')
    for name, order in (('l1', 1), ('l2', 2), ('linf', np.inf)):
        norms = np.linalg.norm(weights, order, axis=0)
        np.testing.assert_allclose(getattr(found, name), np.tile(norms, (6, 1)), rtol=1e-6)


def test_behind_a_relu_only_active_units_have_gradients(layer):
    forward, variables, x = layer
    active = np.asarray(forward(variables, x, taps=('act',))[1]['act']) > 0
    assert 0 < active.mean() < 1
    norms = np.linalg.norm(variables['params']['dense']['kernel'], axis=0)
    found = input_gradient_norms(*layer, layer='act')
    np.testing.assert_allclose(found.l2, active * norms, rtol=1e-6)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_equals_a_loop_of_gradients(small_net, unit):
    forward, variables, x, *_ = small_net
    x = x[:3]
    found = input_gradient_norms(forward, variables, x, layer='conv2', unit=unit, chunk=5)

    def values(x):
        h = forward(variables, x[None], taps=('conv2',))[1]['conv2'][0]
        return h.sum((0, 1)) if unit == 'channel' else h.ravel()

    jacobian = jax.jit(jax.vmap(jax.jacfwd(values)))(x).reshape(3, -1, 64)
    assert found.l1.shape == jacobian.shape[:2]
    np.testing.assert_allclose(found.l1, np.abs(jacobian).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found.l2, np.linalg.norm(jacobian, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(found.linf, np.abs(jacobian).max(-1), rtol=1e-4)


def test_chunks_and_single_examples_change_nothing(small_net):
    forward, variables, x, *_ = small_net
    reference = input_gradient_norms(forward, variables, x, layer='act3')
    for chunk in (1, 5, 100):
        result = input_gradient_norms(forward, variables, x, layer='act3', chunk=chunk)
        for a, b in zip(result, reference):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    alone = jax.jit(lambda v, x: input_gradient_norms_example(forward, v, x, layer='act3'))(
        variables, x[7]
    )
    np.testing.assert_allclose(alone.l2, reference.l2[7], rtol=1e-5)


# ------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize('distribution', ['rademacher', 'normal'])
def test_probes_are_unbiased_for_every_neuron_of_every_layer(small_net, distribution):
    forward, variables, x, *_ = small_net
    x = x[:2]
    found = probe_gradients(
        forward, variables, x, jax.random.key(5), probes=2000, distribution=distribution
    )
    scores = []
    for name in ('conv1', 'act1', 'conv2', 'act2', 'dense3', 'act3', 'head'):
        exact = np.asarray(input_gradient_norms(forward, variables, x, layer=name).l2) ** 2
        value, error = np.asarray(found[name].value), np.asarray(found[name].standard_error)
        assert ((np.abs(value - exact) <= 5 * error) | (exact == 0)).all(), name
        assert (value[exact == 0] == 0).all()
        scores.append(((value - exact) / np.where(error > 0, error, 1))[exact > 0])
    # The errors are neither too small nor too large. Neurons share probes, so loosely.
    spread = np.sqrt(np.mean(np.concatenate(scores) ** 2))
    assert 0.5 < spread < 1.6


def test_single_units_are_probed_alone(layer):
    found = probe_gradients(*layer, jax.random.key(0), probes=3000, layers=('dense',), unit='unit')
    exact = np.linalg.norm(layer[1]['params']['dense']['kernel'], axis=0) ** 2
    estimate = found['dense']
    assert (np.abs(estimate.value - exact) <= 5 * estimate.standard_error).all()


def test_every_layer_is_there_by_default(small_net):
    forward, variables, x, *_ = small_net
    found = probe_gradients(forward, variables, x[:2], jax.random.key(0), probes=1)
    shapes = neurosens.layers(forward, variables, x)
    assert found.keys() == shapes.keys()
    for name, estimate in found.items():
        assert estimate.value.shape == (2, shapes[name].shape[-1])
        # The spread of one probe is not known.
        assert np.isnan(estimate.standard_error).all() and np.isfinite(estimate.value).all()


def test_rescaling_two_layers_multiplies_hidden_norms_and_changes_no_logit(small_net):
    """(W1, b1) -> 2 (W1, b1), W2 -> W2 / 2: the classifier is the same, the norms are not."""
    forward, variables, x, *_ = small_net
    params = dict(variables['params'])
    params['conv1'] = jax.tree.map(lambda leaf: 2 * leaf, params['conv1'])
    params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'] / 2}
    options = {'probes': 4, 'layers': ('act1', 'conv2', 'head')}
    plain = probe_gradients(forward, variables, x, jax.random.key(1), **options)
    scaled = probe_gradients(forward, {'params': params}, x, jax.random.key(1), **options)
    np.testing.assert_allclose(scaled['act1'].value, 4 * plain['act1'].value, rtol=1e-5)
    np.testing.assert_allclose(scaled['conv2'].value, plain['conv2'].value, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scaled['head'].value, plain['head'].value, rtol=1e-3, atol=1e-6)


def test_an_example_has_its_own_probes_in_any_batch(small_net):
    forward, variables, x, *_ = small_net
    options = {'probes': 3, 'layers': ('act1',)}
    key, index = jax.random.key(2), np.arange(100, 116)
    whole = probe_gradients(forward, variables, x, key, index=index, **options)['act1'].value
    part = probe_gradients(forward, variables, x[::2], key, index=index[::2], **options)
    np.testing.assert_allclose(part['act1'].value, whole[::2], rtol=1e-5)
    other = probe_gradients(forward, variables, x, key, index=index + 1, **options)
    assert not np.allclose(other['act1'].value, whole, rtol=1e-3)
    again = probe_gradients(forward, variables, x, key, index=index, **options)['act1'].value
    np.testing.assert_array_equal(again, whole)


def test_devices_agree_without_communication(small_net, assert_splits_over_devices):
    def run(variables, batch):
        x, index = batch
        exact = input_gradient_norms(small_net.forward, variables, x, layer='act1')
        probes = probe_gradients(
            small_net.forward, variables, x, jax.random.key(0), probes=3, index=index
        )
        return exact.l2, probes['conv2'].value

    batch = (small_net.x, np.arange(16))
    assert_splits_over_devices(run, small_net.variables, batch)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'probes': 0}, 'probes is 0; it must be at least 1.'),
        ({'distribution': 'uniform'}, "Unknown distribution 'uniform'; valid names are normal"),
        ({'unit': 'x'}, "Unknown unit 'x'"),
    ],
)
def test_a_mistake_is_one_sentence(small_net, options, sentence):
    forward, variables, x, *_ = small_net
    with pytest.raises(ValueError, match=re.escape(sentence)):
        probe_gradients(forward, variables, x, jax.random.key(0), **options)


def test_one_layer_name_is_not_a_collection(small_net):
    forward, variables, x, *_ = small_net
    with pytest.raises(TypeError, match="not the string 'act1'"):
        probe_gradients(forward, variables, x, jax.random.key(0), layers='act1')
    with pytest.raises(ValueError, match='chunk is 0'):
        input_gradient_norms(forward, variables, x, chunk=0)

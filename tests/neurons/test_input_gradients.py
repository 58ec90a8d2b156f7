"""Input gradients of neurons: exact norms, and unbiased estimates with honest errors."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurosens
from neurosens.forward import LayerError, LinenForward
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
    x = x[:3]
    reference = input_gradient_norms(forward, variables, x, layer='act1')
    for chunk in (1, 3):
        result = input_gradient_norms(forward, variables, x, layer='act1', chunk=chunk)
        for a, b in zip(result, reference):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    alone = jax.jit(lambda v, x: input_gradient_norms_example(forward, v, x, layer='act1'))(
        variables, x[2]
    )
    np.testing.assert_allclose(alone.l2, reference.l2[2], rtol=1e-5)


# ------------------------------------------------------------------------------------- probes


@pytest.fixture(scope='module')
def exact(small_net):
    """Squared gradient norms of every channel of every layer for two images, from Jacobians."""
    forward, variables, x, *_ = small_net

    def channels(x):
        tapped = forward(variables, x[None], taps=('*',))[1]
        return {name: h.sum(tuple(range(h.ndim - 1))) for name, h in tapped.items()}

    jacobians = jax.jit(jax.vmap(jax.jacfwd(channels)))(x[:2])
    return {name: np.asarray((j**2).sum((2, 3, 4))) for name, j in jacobians.items()}


@pytest.mark.parametrize('distribution', ['rademacher', 'normal'])
def test_probes_are_unbiased_for_every_neuron_of_every_layer(small_net, exact, distribution):
    forward, variables, x, *_ = small_net
    key = jax.random.key(5)
    found = probe_gradients(forward, variables, x[:2], key, probes=2000, distribution=distribution)
    assert found.keys() == exact.keys()
    for name, norms in exact.items():
        value, error = (np.asarray(leaf) for leaf in found[name])
        # A neuron without a gradient is estimated without error.
        np.testing.assert_allclose(value[error == 0], norms[error == 0], rtol=1e-5)
        z = ((value - norms) / np.where(error > 0, error, 1))[error > 0]
        assert (np.abs(z) <= 4).all(), name
        assert (error <= 0.1 * norms).all(), 'the interval is narrow'


@pytest.mark.parametrize('distribution', ['rademacher', 'normal'])
def test_standard_errors_are_those_of_independent_estimates(layer, distribution):
    """Over many examples that differ only in their directions, squared errors are the variance."""
    forward, variables, x = layer
    many = np.broadcast_to(x[:1], (4000, 7))
    found = probe_gradients(
        forward, variables, many, jax.random.key(3), layers=('dense',), distribution=distribution
    )['dense']
    value, error = (np.asarray(leaf, np.float64) for leaf in found)
    gram = np.asarray(variables['params']['dense']['kernel'], np.float64) ** 2
    # A square of a sum of n signs or normal numbers: Var (w u)^2 = 2 |w|^4 - (0 or 2) sum w^4.
    variance = 2 * gram.sum(0) ** 2
    if distribution == 'rademacher':
        variance -= 2 * (gram**2).sum(0)
    # Of 4000 heavy-tailed values, sample variances are good to 3 or 4 per cent.
    np.testing.assert_allclose(value.var(0), variance / 8, rtol=0.15)
    np.testing.assert_allclose((error**2).mean(0), variance / 8, rtol=0.15)
    scores = (value.mean(0) - gram.sum(0)) / np.sqrt(variance / 8 / 4000)
    assert (np.abs(scores) < 4).all()


def test_single_units_are_probed_alone(layer):
    found = probe_gradients(*layer, jax.random.key(0), probes=3000, layers=('dense',), unit='unit')
    exact = np.linalg.norm(layer[1]['params']['dense']['kernel'], axis=0) ** 2
    estimate = found['dense']
    assert (np.abs(estimate.value - exact) <= 5 * estimate.standard_error).all()


def test_named_layers_are_those_of_the_whole_network(small_net):
    """The directions depend on the example alone."""
    forward, variables, x, *_ = small_net
    options = {'key': jax.random.key(0), 'probes': 1}
    whole = probe_gradients(forward, variables, x[:2], **options)
    part = probe_gradients(forward, variables, x[:2], **options, layers=['act1', 'head:in'])
    assert part.keys() == {'act1', 'head:in'}
    np.testing.assert_allclose(part['act1'].value, whole['act1'].value, rtol=1e-5)
    np.testing.assert_allclose(part['head:in'].value, whole['act3'].value, rtol=1e-5)


def test_an_nnx_network_has_the_gradients_of_its_linen_twin(nnx_net, exact):
    forward, variables, x, *_ = nnx_net
    found = input_gradient_norms(forward, variables, x[:2], layer='conv2')
    np.testing.assert_allclose(found.l2**2, exact['conv2'], rtol=1e-4)


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
    """(W1, b1) -> 3 (W1, b1), W2 -> W2 / 3: the classifier is the same, the norms are not."""
    forward, variables, x, *_ = small_net
    params = dict(variables['params'])
    params['conv1'] = jax.tree.map(lambda leaf: 3 * leaf, params['conv1'])
    params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'] / 3}
    logits = forward({'params': params}, x)[0]
    np.testing.assert_allclose(logits, forward(variables, x)[0], rtol=1e-4, atol=1e-5)
    options = {'probes': 4, 'layers': ('act1', 'conv2', 'head')}
    plain = probe_gradients(forward, variables, x, jax.random.key(1), **options)
    scaled = probe_gradients(forward, {'params': params}, x, jax.random.key(1), **options)
    np.testing.assert_allclose(scaled['act1'].value, 9 * plain['act1'].value, rtol=1e-5)
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
        options = {'probes': 3, 'layers': ('conv2',), 'index': index}
        probes = probe_gradients(small_net.forward, variables, x, jax.random.key(0), **options)
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


def mixed(variables, x, edits=None, taps=()):
    """One layer with neurons, one of integers, and two whose first axis is not the batch."""
    h = x @ variables
    sign = jnp.sign(x).astype(jnp.int32)
    layers = {'h': h, 'sign': sign, 'sum': x.sum(), 'twice': jnp.concatenate([x, x])}
    return h, layers if '*' in taps else {name: layers[name] for name in taps}


MIXED = jax.tree_util.Partial(mixed), jnp.ones((3, 2)), jnp.ones((4, 3))


def test_layers_without_neurons_are_left_out_of_all_layers():
    found = probe_gradients(*MIXED, jax.random.key(0), probes=1)
    assert found.keys() == {'h'}
    assert found['h'].value.shape == (4, 2)


@pytest.mark.parametrize(
    ('layer', 'reason'),
    [
        ('sign', 'only floating-point layers'),
        ('sum', 'a leading batch axis'),
        ('twice', 'a leading batch axis'),
    ],
)
def test_a_layer_without_neurons_is_refused_where_it_is_named(layer, reason):
    with pytest.raises(LayerError, match=reason):
        input_gradient_norms(*MIXED, layer=layer)
    with pytest.raises(LayerError, match=reason):
        probe_gradients(*MIXED, jax.random.key(0), layers=(layer,))


def test_an_unknown_layer_is_answered_with_close_names(small_net):
    forward, variables, x, *_ = small_net
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        input_gradient_norms(forward, variables, x, layer='act9')
    with pytest.raises(LayerError, match=r"Unknown layer 'act9'.*'act1'"):
        probe_gradients(forward, variables, x, jax.random.key(0), layers=('act9',))


def linear(variables, x, edits=None, taps=()):
    h = x @ variables
    return h, dict.fromkeys(taps, h)


def test_gradients_of_half_precision_are_measured_in_float32():
    """In bfloat16, of 8 bits, the norm of these weights would be 1, and so would most squares."""
    weights = jnp.array([[1], [1 / 128], [1 / 128]], jnp.bfloat16)
    net = jax.tree_util.Partial(linear), weights, jnp.ones((16, 3), jnp.bfloat16)
    found = input_gradient_norms(*net, layer='h')
    assert all(values.dtype == jnp.float32 for values in found)
    np.testing.assert_allclose(found.l2, (1 + 2 / 128**2) ** 0.5, rtol=1e-7)
    probed = probe_gradients(*net, jax.random.key(0), probes=1, layers=('h',))['h']
    assert probed.value.dtype == jnp.float32
    assert set(np.ravel(probed.value).tolist()) == {(1 - 1 / 64) ** 2, 1.0, (1 + 1 / 64) ** 2}


class Wide(nn.Module):
    """A dense layer of some width."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name='narrow')(x))
        return nn.Dense(2, name='head')(nn.relu(nn.Dense(self.width, name='wide')(x)))


def test_the_cost_of_a_wide_layer_is_in_proportion_to_its_width():
    x = jax.random.normal(jax.random.key(0), (2, 7))

    def operations(width):
        forward = LinenForward(Wide(width))
        variables = Wide(width).init(jax.random.key(1), x)
        compiled = input_gradient_norms.lower(forward, variables, x, layer='wide', chunk=width)
        return compiled.compile().cost_analysis()['flops']

    assert operations(256) < 4.5 * operations(64)


def test_rows_of_kernels_give_the_norms_of_the_jacobian():
    x = jax.random.normal(jax.random.key(0), (4, 7))
    forward, variables = LinenForward(Wide(9)), Wide(9).init(jax.random.key(1), x)
    for layer in ('wide', 'head:in'):
        found = input_gradient_norms(forward, variables, x, layer=layer, chunk=4)

        def values(x, layer=layer):
            return forward(variables, x[None], taps=(layer,))[1][layer][0]

        jacobian = jax.vmap(jax.jacrev(values))(x)
        np.testing.assert_allclose(found.l2, jnp.linalg.norm(jacobian, axis=-1), rtol=1e-5)
        np.testing.assert_allclose(found.linf, jnp.abs(jacobian).max(-1), rtol=1e-5)

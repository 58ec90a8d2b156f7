"""What holds for every measure: differences, half precision, small sizes, NNX and permutations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import models
from neurosens.forward import LinenForward
from neurosens.neurons import units
from neurosens.neurons.ablation import ablation, response
from neurosens.neurons.influence import influence
from neurosens.neurons.input_gradients import input_gradient_norms, probe_gradients
from neurosens.neurons.sensitivity import sensitivity
from neurosens.neurons.shift import shift, targeting
from neurosens.neurons.statistics import statistics


def gradient_probes(forward, variables, x, y, *, layer, index=None):
    key = jax.random.key(0)
    return probe_gradients(forward, variables, x, key, probes=3, layers=(layer,), index=index)[
        layer
    ]


def with_labels(measure):
    """The measure as a function of labels, too, which it does not need."""
    return lambda forward, variables, x, y, **options: measure(forward, variables, x, **options)


def moved_by_a_square(measure):
    return lambda forward, variables, x, y, **options: measure(
        forward, variables, x, x**2, **options
    )


# Each of a forward, variables, images and labels; of its results, the last axis is the neurons.
MEASURES = {
    'sensitivity': with_labels(functools.partial(sensitivity, method='first_order')),
    'influence': influence,
    'ablation': lambda *net, layer: ablation(*net, layer=layer)[:3],
    'shift': moved_by_a_square(shift),
    'input_gradient_norms': with_labels(input_gradient_norms),
    'probe_gradients': gradient_probes,
}
# Quotients of small derivatives amplify rounding.
ROUNDING = {'sensitivity': 2e-3}


def assert_alike(ours, theirs, rtol=1e-4):
    """Relative to the largest finite value: small ones are differences of large ones."""

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if not np.issubdtype(b.dtype, np.floating):
            np.testing.assert_array_equal(a, b)
            return
        size = np.abs(b[np.isfinite(b)]).max()
        assert size > 0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * size)

    jax.tree.map(compare, ours, theirs)


# ------------------------------------------------------------------------- finite differences


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def conv(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def plain_forward(variables, x, edits=(), taps=()):
    """Smooth in every pixel: `h` is the first layer, behind its nonlinearity."""
    h = jnp.tanh(conv(x, variables['first']))
    h = edits['h'](h) if 'h' in edits else h
    g = jax.nn.softplus(conv(h, variables['second']))
    return g.reshape(len(g), -1) @ variables['head'], {'h': h}


smooth = jax.tree_util.Partial(plain_forward)
SHAPE = (4, 4, 3)  # Of `h`: 48 units, which take several turns of a loop, or 3 channels.
STEP = 1e-5


def smooth_net():
    """The network, float64 weights and two images."""
    variables = {
        'first': random(1, 3, 3, 1, 3) / 2,
        'second': random(2, 3, 3, 3, 2) / 3,
        'head': random(3, 32, 4) / 3,
    }
    return smooth, variables, random(4, 2, 4, 4, 1)


def differences(function, size):
    """Central differences of a function of a vector at 0, `[size, ...]`."""
    up, down = (jax.jit(jax.vmap(function))(step * np.eye(size)) for step in (STEP, -STEP))
    return np.asarray(up - down) / (2 * STEP)


@pytest.mark.parametrize('score', ['logit', 'probability'])
@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_influence_is_what_the_score_changes_as_the_neuron_is_scaled(unit, score):
    with jax.enable_x64(True):
        forward, variables, x = smooth_net()
        y = np.array([3, 1])
        result = influence(forward, variables, x, y, layer='h', unit=unit, score=score)
        assert result.dtype == jnp.float64

        def scaled(change):
            edit = {'h': lambda h: h * (1 + units.spread(change, SHAPE, unit))}
            logits = forward(variables, x, edits=edit)[0]
            return (jax.nn.softmax(logits) if score == 'probability' else logits)[jnp.arange(2), y]

        expected = differences(scaled, units.count(SHAPE, unit)).T
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_input_gradient_norms_are_those_of_differences_between_pixels(unit):
    with jax.enable_x64(True):
        forward, variables, x = smooth_net()
        found = input_gradient_norms(forward, variables, x, layer='h', unit=unit)

        def neurons(change):
            h = forward(variables, x + change.reshape(4, 4, 1), taps=('h',))[1]['h']
            return jax.vmap(functools.partial(units.pool, unit=unit))(h)

        jacobian = differences(neurons, 16)
        for name, order in (('l1', 1), ('l2', 2), ('linf', np.inf)):
            values = getattr(found, name)
            assert values.dtype == jnp.float64
            expected = np.linalg.norm(jacobian, order, axis=0)
            np.testing.assert_allclose(values, expected, rtol=1e-7)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_delta_depends_on_neither_direction_nor_chunk(unit):
    """In float64, where rounding is far smaller than anything else."""
    with jax.enable_x64(True):
        net = smooth_net()
        options = {'layer': 'h', 'unit': unit, 'method': 'first_order'}
        reference = sensitivity(*net, direction='reverse', **options)
        assert np.isfinite(reference.delta).all()
        for direction in ('reverse', 'forward'):
            for chunk in (1, 2, 3, 7, 100):
                found = sensitivity(*net, direction=direction, chunk=chunk, **options)
                np.testing.assert_allclose(found.delta, reference.delta, rtol=1e-11)
                np.testing.assert_array_equal(found.flips_to, reference.flips_to)


@pytest.mark.parametrize('unit', ['channel', 'unit'])
def test_first_order_delta_is_that_of_differences_between_margins(unit):
    with jax.enable_x64(True):
        forward, variables, x = smooth_net()
        options = {'layer': 'h', 'unit': unit, 'activation_range': (-2.0, 2.0)}
        result = sensitivity(forward, variables, x, method='first_order', **options)
        assert result.delta.dtype == jnp.float64
        logits, tapped = jax.jit(lambda x: forward(variables, x, taps=('h',)))(x)
        predicted = logits.argmax(-1)

        def margins(change):
            edit = {'h': lambda h: h + units.spread(change, SHAPE, unit)}
            values = forward(variables, x, edits=edit)[0]
            return values[jnp.arange(2), predicted][:, None] - values

        slopes = differences(margins, units.count(SHAPE, unit))
        values = np.asarray(tapped['h']).reshape(2, -1, slopes.shape[0])
        at_rest = np.asarray(logits.max(-1)[:, None] - logits)
        for row, neuron in np.ndindex(result.delta.shape):
            best, flips_to = np.inf, -1
            for c in set(range(4)) - {int(predicted[row])}:
                delta = -at_rest[row, c] / slopes[neuron, row, c]
                inside = (np.abs(values[row, :, neuron] + delta) <= 2).all()
                if inside and abs(delta) < abs(best):
                    best, flips_to = delta, c
            assert result.delta[row, neuron] == pytest.approx(best, rel=1e-6)
            assert result.flips_to[row, neuron] == flips_to
        assert 0 < np.isfinite(result.delta).mean() < 1


# ----------------------------------------------------------------------------- half precision


def zoo_net(dtype):
    """A half-precision network with float32 weights, and images of its type."""
    x = jnp.asarray(random(1, 6, 6, 6, 1), dtype)
    module = models.create('cnn', num_classes=3, features=(3,), hidden=(5,), dtype=dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.float32(random(leaf.size, *leaf.shape) / 2), shapes)
    return LinenForward(module), variables, x, 'act1'


def narrow_net(dtype):
    """A network whose weights and logits, too, are in half precision."""
    forward, variables, _ = smooth_net()
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    return forward, narrow, jnp.asarray(random(1, 6, 4, 4, 1), dtype), 'h'


def explained(forward, variables, x, layer):
    y = np.arange(len(x)) % 3
    net = forward, variables, x
    probed = gradient_probes(*net, y, layer=layer)
    return {
        'influence': influence(*net, y, layer=layer),
        'probes': probed.value,
        'probes error': probed.standard_error,
        **{
            f'gradient {k}': v for k, v in input_gradient_norms(*net, layer=layer)._asdict().items()
        },
        **{f'shift {k}': v for k, v in shift(*net, x**2, layer=layer)._asdict().items()},
        **ablation(*net, y, layer=layer)._asdict(),
    }


@pytest.mark.parametrize('make', [zoo_net, narrow_net])
@pytest.mark.parametrize(('dtype', 'rtol'), [('bfloat16', 5e-2), ('float16', 1e-2)])
def test_measures_of_half_precision_are_nearly_those_of_float32(make, dtype, rtol):
    forward, variables, x, layer = make(dtype)
    rounded = explained(forward, variables, x, layer)
    # The same weights and images in a network that does not round further.
    wide = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    exact = explained(make('float32')[0], wide(variables), wide(x), layer)
    for name, theirs in exact.items():
        ours = rounded[name]
        if 'correct' in name:
            margin = np.abs(exact[name.replace('correct', 'margin')])
            clear = margin > 2 * rtol * margin.max()
            assert clear.mean() > 0.5
            np.testing.assert_array_equal(ours[clear], theirs[clear])
            continue
        assert ours.dtype == jnp.float32
        close = np.isclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())
        # Derivatives jump where rounding takes a unit across its kink.
        assert close.mean() > (0.9 if name.split()[0] in ('probes', 'gradient', 'shift') else 0.999)
        assert np.abs(ours - theirs).max() > 0, 'it is rounded'


# -------------------------------------------------------------------------------- small sizes


class Narrow(nn.Module):
    """A layer of one neuron, rectified, and three classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(1, name='dense')(x))
        return nn.Dense(3, name='head')(x)


@pytest.fixture(scope='module')
def narrow():
    """Pre-activations of 2, 1 and -3."""
    params = {
        'dense': {'kernel': np.array([[1], [-2], [2]], np.float32), 'bias': np.ones(1, np.float32)},
        'head': {
            'kernel': np.array([[1, 2, -1]], np.float32),
            'bias': np.array([0.5, 0, 0], np.float32),
        },
    }
    x = np.array([[1, 0, 0], [0, 1, 1], [0, 2, 0]], np.float32)
    return LinenForward(Narrow()), {'params': params}, x


def test_one_neuron_is_all_there_is_to_explain(narrow):
    # Activations 2, 1 and 0 times the weight of the class.
    np.testing.assert_array_equal(influence(*narrow, np.array([1, 2, 0])), [[4], [-1], [0]])
    np.testing.assert_array_equal(influence(*narrow), [[4], [2], [0]])


@pytest.mark.parametrize('method', ['closed_form', 'first_order', 'exact'])
def test_the_only_neuron_flips_where_its_classes_meet(narrow, method):
    """Logits (h + 1/2, 2h, -h) meet at h = 1/2 and, of the last two, at 0."""
    result = sensitivity(*narrow, method=method, limit=10.0)
    np.testing.assert_allclose(result.delta, [[-1.5], [-0.5], [0.5]], rtol=1e-4)
    np.testing.assert_array_equal(result.flips_to, [[0], [0], [1]])


@pytest.mark.parametrize('method', ['closed_form', 'first_order', 'exact'])
def test_a_neuron_that_all_classes_weigh_alike_flips_nothing(narrow, method):
    forward, variables, x = narrow
    params = dict(variables['params'])
    params['head'] = {**params['head'], 'kernel': np.full((1, 3), 0.5, np.float32)}
    result = sensitivity(forward, {'params': params}, x, method=method)
    assert np.isposinf(result.delta).all() and (np.asarray(result.flips_to) == -1).all()


def test_without_the_only_neuron_the_bias_decides(narrow):
    y = np.array([1, 1, 0])
    for layer, mode in (('head:in', 'activation'), ('dense', 'weights')):
        result = ablation(*narrow, y, layer=layer, mode=mode)
        np.testing.assert_array_equal(result.correct, [[False], [False], [True]])
        np.testing.assert_array_equal(result.margin, [[-0.5], [-0.5], [0.5]])
        np.testing.assert_array_equal(result.intact_margin, [1.5, 0.5, 0.5])
        found = response(result)
        np.testing.assert_allclose(found.accuracy, [2 / 3])
        np.testing.assert_allclose(found.margin, [1])


def test_one_neuron_has_the_gradient_of_its_weights(narrow):
    found = input_gradient_norms(*narrow, layer='dense')
    for values, norm in zip(found, (5, 3, 2)):
        np.testing.assert_array_equal(values, np.full((3, 1), norm))
    behind = input_gradient_norms(*narrow).l2
    np.testing.assert_array_equal(behind, [[3], [3], [0]])


def test_one_neuron_is_always_the_targeted_one(narrow):
    x_adv = narrow[2] + np.array([0.5, 0, -1], np.float32)
    moved = shift(*narrow, x_adv, layer='dense')
    np.testing.assert_array_equal(moved.mean, np.full((3, 1), -1.5))
    np.testing.assert_array_equal(moved.l2, np.full((3, 1), 1.5))
    np.testing.assert_allclose(moved.relative_l2, [[0.75], [1.5], [0.5]], rtol=1e-6)
    result = targeting(*narrow, x_adv, layer='dense')
    assert result.targeted.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(result.scores, moved.l2)


@pytest.mark.parametrize('name', ['ablation', 'input_gradient_norms', 'probe_gradients'])
def test_an_image_alone_is_as_in_a_batch(small_net, name):
    forward, variables, x, y, _ = small_net
    place = {'index': np.arange(16)} if name == 'probe_gradients' else {}
    whole = MEASURES[name](forward, variables, x, y, layer='act1', **place)
    place = {'index': np.array([5])} if place else {}
    alone = MEASURES[name](forward, variables, x[5:6], y[5:6], layer='act1', **place)
    assert_alike(alone, jax.tree.map(lambda leaf: leaf[5:6], whole))


@pytest.mark.parametrize(('filters', 'layer'), [('conv1', 'act1'), ('dense3', 'act3')])
def test_nothing_at_all_is_lost_without_a_dead_neuron(small_net, filters, layer):
    forward, variables, x, y, _ = small_net
    params = dict(variables['params'])
    params[filters] = {**params[filters], 'bias': params[filters]['bias'].at[2].set(-100)}
    for name, mode in ((layer, 'activation'), (filters, 'weights')):
        found = response(ablation(forward, {'params': params}, x, y, layer=name, mode=mode))
        assert found.accuracy[2] == found.loss[2] == found.margin[2] == 0
        assert np.delete(found.loss, 2).any()


# ------------------------------------------------------------------------------ other networks


@pytest.mark.parametrize('name', ['sensitivity', 'ablation', 'shift', 'probe_gradients'])
def test_an_nnx_network_is_measured_like_its_linen_twin(small_net, nnx_net, name):
    ours, theirs = (MEASURES[name](*net[:4], layer='act1') for net in (nnx_net, small_net))
    assert_alike(ours, theirs, ROUNDING.get(name, 1e-4))


def test_an_nnx_network_has_the_closed_form_of_its_linen_twin(small_net, nnx_net):
    ours, theirs = (sensitivity(*net[:3], method='closed_form') for net in (nnx_net, small_net))
    assert_alike(ours, theirs, 1e-5)


def test_an_nnx_network_is_targeted_like_its_linen_twin(small_net, nnx_net):
    options = {'layer': 'conv1', 'score': 'relative_l2'}
    ours, theirs = (targeting(*net[:3], net.x**2, **options) for net in (nnx_net, small_net))
    assert_alike(ours, theirs)
    assert len(set(theirs.targeted.tolist())) > 1


def test_an_nnx_network_has_the_statistics_of_its_linen_twin(small_net, nnx_net):
    ours, theirs = (statistics(*net[:3], layer='act1') for net in (nnx_net, small_net))
    assert ours.count == theirs.count
    assert theirs.zeros.any()
    np.testing.assert_array_equal(ours.zeros, theirs.zeros)
    for name in ('mean', 'minimum', 'maximum'):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=1e-5)


# -------------------------------------------------------------------------------- permutations

ORDER = np.array([3, 1, 0, 2])


@pytest.fixture(scope='module')
def permuted(small_net):
    """The same classifier with its first filters in another order."""
    params = dict(small_net.variables['params'])
    params['conv1'] = {name: leaf[..., ORDER] for name, leaf in params['conv1'].items()}
    params['conv2'] = {**params['conv2'], 'kernel': params['conv2']['kernel'][:, :, ORDER]}
    return small_net._replace(variables={'params': params})


@pytest.mark.parametrize('layer', ['conv1', 'act1'])
@pytest.mark.parametrize('name', [name for name in MEASURES if name != 'ablation'])
def test_permuted_filters_have_permuted_values(small_net, permuted, name, layer):
    before, after = (MEASURES[name](*net[:4], layer=layer) for net in (small_net, permuted))
    expected = jax.tree.map(lambda leaf: leaf[..., ORDER], before)
    assert_alike(after, expected, ROUNDING.get(name, 1e-4))
    with pytest.raises(AssertionError):
        assert_alike(after, before, ROUNDING.get(name, 1e-4))


def test_permuted_filters_are_targeted_under_their_new_numbers(small_net, permuted):
    options = {'layer': 'conv1', 'score': 'relative_l2'}
    before, after = (targeting(*net[:3], net.x**2, **options) for net in (small_net, permuted))
    assert_alike(after.scores, before.scores[:, ORDER])
    np.testing.assert_array_equal(ORDER[after.targeted], before.targeted)
    assert len(set(before.targeted.tolist())) > 1

"""Synaptic filtering: exact masks, curves with known scores, one program for all thresholds."""

import collections
import dataclasses
import functools
import re

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from neurosens import models, parallel
from neurosens.attacks import Threat, fgsm
from neurosens.forward import LinenForward, NNXForward
from neurosens.neurons.filtering import (
    KINDS,
    Curve,
    classify,
    filter_kernel,
    filter_variables,
    filtering_responses,
    global_thresholds,
    present_shares,
    removing_nothing,
    scores,
    thresholds,
)
from neurosens.neurons.kernels import by_layer, norms

BATCH = 16
MANY = hypothesis.settings(max_examples=25, deadline=None)
weights = st.lists(
    st.floats(-8, 8, width=32, allow_subnormal=False), min_size=2, max_size=20
).filter(lambda values: max(values) > min(values))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A small network and images with the labels that it gives most of them."""

    forward: LinenForward
    variables: dict
    x: jax.Array
    y: jax.Array


@pytest.fixture(scope='module')
def net():
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(8,))
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.uniform(keys[0], (BATCH, 6, 6, 1))
    variables = jax.jit(module.init)(keys[1], x)
    forward = LinenForward(module, {'train': False})
    y = jax.jit(forward)(variables, x)[0].argmax(-1)
    y = jnp.where(jnp.arange(BATCH) % 5 == 4, (y + 1) % 4, y)
    return Setting(forward, variables, x, y)


def attack(forward, variables, x, y):
    return fgsm(forward, variables, x, y, jax.random.key(0), threat=Threat('linf', 0.1)).x_adv


def hand_filter(theta, alpha, kind, width):
    theta = np.array(theta)
    for index, value in np.ndenumerate(theta):
        if {
            'minmax': value <= alpha,
            'maxmin': value >= alpha,
            'pulse': alpha - width / 2 <= value < alpha + width / 2,
        }[kind]:
            theta[index] = 0
    return theta


# --------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ('kind', 'alpha', 'width', 'expected'),
    [
        ('minmax', -1, None, [0, 0, -0.5, 0, 0.5, 1, 2]),
        ('minmax', 0.5, None, [0, 0, 0, 0, 0, 1, 2]),
        ('maxmin', 1, None, [-2, -1, -0.5, 0, 0.5, 0, 0]),
        ('maxmin', -0.5, None, [-2, -1, 0, 0, 0, 0, 0]),
        ('pulse', 0.75, 0.5, [-2, -1, -0.5, 0, 0, 1, 2]),
        ('pulse', -0.75, 0.5, [-2, 0, -0.5, 0, 0.5, 1, 2]),
        # The default width is 4 / 25.
        ('pulse', 0.45, None, [-2, -1, -0.5, 0, 0, 1, 2]),
        ('pulse', 0.40, None, [-2, -1, -0.5, 0, 0.5, 1, 2]),
    ],
)
def test_a_hand_worked_filter(kind, alpha, width, expected):
    theta = jnp.array([-2, -1, -0.5, 0, 0.5, 1, 2])
    np.testing.assert_array_equal(filter_kernel(theta, alpha, kind, width), expected)


@MANY
@hypothesis.given(weights)
def test_a_sweep_begins_at_the_smallest_and_ends_at_the_largest_weight(values):
    theta = np.array(values, np.float32)
    alphas = thresholds(theta)
    assert alphas.shape == (25,) and alphas.dtype == np.float32
    assert (np.diff(alphas) >= 0).all()
    np.testing.assert_array_equal(filter_kernel(theta, alphas[-1], 'minmax'), 0)
    np.testing.assert_array_equal(filter_kernel(theta, alphas[0], 'maxmin'), 0)
    # Not the next float: XLA treats the ones next to 0 as 0.
    below, above = theta.min() - np.float32(1e-3), theta.max() + np.float32(1e-3)
    np.testing.assert_array_equal(filter_kernel(theta, below, 'minmax'), theta)
    np.testing.assert_array_equal(filter_kernel(theta, above, 'maxmin'), theta)


@pytest.mark.parametrize('kind', KINDS)
def test_a_threshold_that_removes_nothing(kind):
    theta = jnp.array([-1e30, -1.0, 0.5, 1e30])
    alpha = removing_nothing(kind)
    np.testing.assert_array_equal(filter_kernel(theta, alpha, kind, 2.0), theta)
    np.testing.assert_array_equal(filter_kernel(theta, -alpha, kind, 2.0) == 0, kind != 'pulse')


def test_pulses_that_tile_the_range_remove_each_weight_exactly_once():
    # Eighths, so that the edges of the windows are exact; some weights lie on them.
    theta = np.random.default_rng(0).permutation(np.arange(-16, 16) / 8).astype(np.float32)
    alphas = np.arange(-7, 8, 2) / 4
    assert theta[(theta[:, None] == alphas - 0.25).any(1)].size == 8
    removed = [
        np.asarray(filter_kernel(theta + 10, alpha + 10, 'pulse', 0.5)) == 0 for alpha in alphas
    ]
    np.testing.assert_array_equal(np.sum(removed, axis=0), 1)
    np.testing.assert_array_equal(np.sum(removed, axis=1), 4)


def test_narrow_weights_are_compared_with_the_threshold_as_given():
    theta = jnp.array([1.0, 2.0], jnp.bfloat16)
    # Rounded to bfloat16 the threshold would be 1.
    assert float(jnp.bfloat16(0.999)) == 1
    for alpha in (0.999, jnp.float32(0.999)):
        filtered = filter_kernel(theta, alpha, 'minmax')
        np.testing.assert_array_equal(filtered, theta)
        assert filtered.dtype == jnp.bfloat16


def test_sweeps():
    np.testing.assert_array_equal(thresholds(jnp.array([[3.0, -1.0]]), 5), [-1, 0, 1, 2, 3])
    np.testing.assert_allclose(global_thresholds(), np.arange(-12, 13) / 12, atol=1e-7)
    np.testing.assert_array_equal(global_thresholds(3), [-1, 0, 1])


# ------------------------------------------------------------------------------- variables


class NNXNet(nnx.Module):
    """The network of the fixture, in the other interface; one module sits in a list."""

    def __init__(self, variables):
        params = variables['params']
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.rest = nnx.List([nnx.Linear(27, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        for module, name in (
            (self.conv1, 'conv1'),
            (self.rest[0], 'dense2'),
            (self.rest[1], 'head'),
        ):
            module.kernel[...] = params[name]['kernel']
            module.bias[...] = params[name]['bias']

    def __call__(self, x):
        x = nn.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        return self.rest[1](nnx.relu(self.rest[0](x.reshape(len(x), -1))))


NNX_NAMES = {'conv1': 'conv1', 'dense2': 'rest/0', 'head': 'rest/1', None: None}


@pytest.fixture(scope='module')
def twin(net):
    graphdef, state = nnx.split(NNXNet(net.variables))
    return NNXForward(graphdef), state


def test_the_kernels_are_listed_by_module_path(net, twin):
    found, other = by_layer(net.variables), by_layer(twin[1])
    assert {name: kernel.shape for name, kernel in found.items()} == {
        'conv1': (3, 3, 1, 3),
        'dense2': (27, 8),
        'head': (8, 4),
    }
    # The NNX network has a norm too, with a scale and no kernel.
    assert set(other) == {'conv1', 'rest/0', 'rest/1'}
    for name, kernel in found.items():
        np.testing.assert_array_equal(kernel, net.variables['params'][name]['kernel'])
        np.testing.assert_array_equal(kernel, other[NNX_NAMES[name]])


def test_deep_boxed_single_and_other_collections():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name='second')(nn.Dense(2, name='first')(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, 'model'))
            x = nn.Dense(3, kernel_init=init, name='params')(x)
            self.variable('params_extra', 'kernel', lambda: jnp.ones((2, 2)))
            return Block(name='block')(x)

    variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 4)))
    names = ['block/first', 'block/second', 'params']
    assert sorted(by_layer(variables)) == names
    assert sorted(by_layer(nn.FrozenDict(variables))) == names
    filtered, removed, total = filter_variables(variables, 1.0, 'minmax', layer='params')
    assert isinstance(filtered['params']['params']['kernel'], nn.Partitioned)
    assert (int(removed), total) == (12, 12)
    np.testing.assert_array_equal(filtered['params']['params']['kernel'].value, 0)
    np.testing.assert_array_equal(filtered['params_extra']['kernel'], 1)
    alone = jax.jit(nn.Dense(3).init)(jax.random.key(0), jnp.ones((1, 4)))
    assert [(name, kernel.shape) for name, kernel in by_layer(alone).items()] == [('', (4, 3))]
    state = nnx.split(nnx.Dict(params=nnx.Linear(2, 3, rngs=nnx.Rngs(0))))[1]
    assert list(by_layer(state)) == ['params']


@pytest.mark.parametrize('layer', ['conv1', 'head', None])
@pytest.mark.parametrize('kind', KINDS)
def test_filtered_variables_are_those_zeroed_by_hand(net, twin, kind, layer):
    params = net.variables['params']
    chosen = ['conv1', 'dense2', 'head'] if layer is None else [layer]
    # A weight of the layer, so that equality counts.
    alpha = float(np.sort(np.ravel(params[layer or 'dense2']['kernel']))[15])
    width = 2 / 25 if layer is None else float(np.ptp(params[layer]['kernel'])) / 25
    expected = jax.tree.map(np.array, net.variables)
    for name in chosen:
        expected['params'][name]['kernel'] = hand_filter(params[name]['kernel'], alpha, kind, width)
    count = sum(
        int((expected['params'][name]['kernel'] != params[name]['kernel']).sum()) for name in chosen
    )
    filtered, removed, total = filter_variables(net.variables, alpha, kind, layer=layer)
    chex.assert_trees_all_equal(filtered, expected)
    assert int(removed) == count > 0
    assert total == sum(params[name]['kernel'].size for name in chosen) > count
    # In the other interface, and traced.
    name = NNX_NAMES[layer]
    state, removed, total_other = filter_variables(twin[1], alpha, kind, layer=name)
    assert (int(removed), total_other) == (count, total)
    assert isinstance(state, nnx.State)
    chex.assert_trees_all_equal_structs(state, twin[1])
    for own, kernel in by_layer(filtered).items():
        np.testing.assert_array_equal(by_layer(state)[NNX_NAMES[own]], kernel)
    np.testing.assert_array_equal(state['conv1']['bias'][...], params['conv1']['bias'])
    traced = jax.jit(lambda alpha: filter_variables(net.variables, alpha, kind, layer=layer)[0])
    chex.assert_trees_all_equal(traced(alpha), filtered)
    # The given width is used.
    if kind == 'pulse':
        wide = filter_variables(net.variables, alpha, kind, layer=layer, width=20.0)
        assert int(wide[1]) == total


def test_the_norm_of_each_channel(net, twin):
    kernel = np.asarray(net.variables['params']['conv1']['kernel'], np.float64)
    for order in (1, 2, 3, np.inf):
        expected = [np.linalg.norm(kernel[..., channel].ravel(), order) for channel in range(3)]
        for variables in (net.variables, twin[1]):
            np.testing.assert_allclose(norms(variables, 'conv1', order), expected, rtol=1e-5)
    assert norms(net.variables, 'dense2').shape == (8,)
    # 16 ** 2 + 1 is no number of bfloat16.
    narrow = {'params': {'head': {'kernel': jnp.array([[16.0], [1.0]], jnp.bfloat16)}}}
    norm = norms(narrow, 'head')
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.sqrt(257), rtol=1e-6)
    np.testing.assert_array_equal(norms(net.variables, 'conv1'), norms(net.variables, 'conv1', 2))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layer', ['dense2', None])
def test_the_shares_present_are_those_counted(net, twin, kind, layer):
    alphas = thresholds(by_layer(net.variables)['dense2'], 7) if layer else global_thresholds(7)
    expected = []
    for alpha in alphas:
        _, removed, total = filter_variables(net.variables, alpha, kind, layer=layer)
        expected.append(1 - int(removed) / total)
    shares = present_shares(net.variables, alphas, kind, layer=layer)
    assert isinstance(shares, np.ndarray)
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-12)
    other = present_shares(twin[1], alphas, kind, layer=NNX_NAMES[layer])
    np.testing.assert_array_equal(other, shares)
    assert np.ptp(shares) > 0
    if layer and kind != 'pulse':
        assert (shares == 0).sum() == 1
    np.testing.assert_array_equal(
        present_shares(net.variables, [removing_nothing(kind)], kind, layer=layer), 1
    )


# ------------------------------------------------------------------------------- responses


@pytest.mark.parametrize(
    ('kind', 'layer'), [('minmax', 'conv1'), ('maxmin', None), ('pulse', 'conv1')]
)
def test_responses_are_those_of_models_zeroed_by_hand(net, twin, kind, layer):
    if layer is None:
        alphas, width = np.array([-0.3, 0.1, 0.4], np.float32), 0.4
    else:
        alphas, width = thresholds(by_layer(net.variables)[layer], 5), 0.25
    alphas = np.concatenate([alphas, [removing_nothing(kind)]]).astype(np.float32)
    options = {'alphas': alphas, 'kind': kind, 'width': width}
    result = filtering_responses(
        net.forward, net.variables, net.x, net.y, layer=layer, attack=attack, **options
    )
    assert result.clean.shape == result.adversarial.shape == (BATCH, len(alphas))
    assert result.clean.dtype == result.adversarial.dtype == bool
    run, hit = jax.jit(net.forward), jax.jit(functools.partial(attack, net.forward))
    for index, alpha in enumerate(alphas):
        model = jax.tree.map(np.array, net.variables)
        for name in ['conv1', 'dense2', 'head'] if layer is None else [layer]:
            kernel = model['params'][name]['kernel']
            model['params'][name]['kernel'] = hand_filter(kernel, alpha, kind, width)
        clean = run(model, net.x)[0].argmax(-1) == net.y
        np.testing.assert_array_equal(result.clean[:, index], clean)
        adversarial = run(model, hit(model, net.x, net.y))[0].argmax(-1) == net.y
        np.testing.assert_array_equal(result.adversarial[:, index], adversarial)
    # The filter and the attack both do something, and the intact model is in the last column.
    intact = run(net.variables, net.x)[0].argmax(-1) == net.y
    np.testing.assert_array_equal(result.clean[:, -1], intact)
    assert (result.clean != result.clean[:, -1:]).any()
    assert (result.clean != result.adversarial).any()
    forward, state = twin
    other = filtering_responses(
        forward, state, net.x, net.y, layer=NNX_NAMES[layer], attack=attack, **options
    )
    jax.tree.map(np.testing.assert_array_equal, other, result)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_responses_of_half_precision_networks(net, dtype):
    """Kernels of the narrow type are filtered as they are, and images of it are attacked."""
    narrow = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    variables, x = narrow(net.variables), narrow(net.x)
    alphas = thresholds(by_layer(variables)['conv1'].astype(jnp.float32), 4)
    forward = LinenForward(net.forward.module.clone(dtype=dtype), net.forward.kwargs)
    result = filtering_responses(
        forward, variables, x, net.y, alphas=alphas, kind='minmax', layer='conv1', attack=attack
    )
    run = jax.jit(forward)
    assert run(variables, x)[0].dtype == dtype
    for index, alpha in enumerate(alphas):
        filtered = filter_variables(variables, alpha, 'minmax', layer='conv1')[0]
        clean = run(filtered, x)[0].argmax(-1) == net.y
        # A tie of rounded logits may go either way in another program.
        assert (result.clean[:, index] == clean).mean() > 0.9
    assert result.adversarial.mean() < result.clean.mean()


def test_without_an_attack_only_clean_responses(net):
    options = {'alphas': global_thresholds(4), 'kind': 'minmax'}
    both = filtering_responses(net.forward, net.variables, net.x, net.y, attack=attack, **options)
    alone = filtering_responses(net.forward, net.variables, net.x, net.y, **options)
    assert alone.adversarial is None
    np.testing.assert_array_equal(alone.clean, both.clean)


def test_padding_is_never_correct(net):
    options = {'alphas': global_thresholds(4), 'kind': 'maxmin', 'attack': attack}
    whole = filtering_responses(net.forward, net.variables, net.x, net.y, **options)
    mask = np.arange(BATCH) < 11
    masked = filtering_responses(net.forward, net.variables, net.x, net.y, mask=mask, **options)
    for part, full in zip(masked, whole):
        np.testing.assert_array_equal(part, full & mask[:, None])
        assert full[11:].any()


def test_one_and_eight_devices_agree_and_do_not_communicate(net):
    options = {'alphas': global_thresholds(5), 'kind': 'pulse', 'attack': attack}
    alone = filtering_responses(net.forward, net.variables, net.x, net.y, width=0.3, **options)
    mesh = parallel.data_mesh()
    x, y, mask = parallel.shard(mesh, (net.x, net.y, np.ones(BATCH, bool)))
    variables = parallel.replicate(mesh, net.variables)

    def run(variables, x, y, mask):
        return filtering_responses(net.forward, variables, x, y, mask=mask, width=0.3, **options)

    together = run(variables, x, y, mask)
    for part, full in zip(together, alone):
        assert len(part.sharding.device_set) == 8
        assert not part.is_fully_replicated
        np.testing.assert_array_equal(part, full)
    program = jax.jit(run).lower(variables, x, y, mask).compile().as_text()
    found = re.findall(
        r' (while|all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(',
        program,
    )
    assert set(found) == {'while'}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counting:
    """A linear forward that counts how often it is traced."""

    traces: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __call__(self, variables, x, edits=None, taps=()):
        self.traces[x.shape] += 1
        return x @ variables['params']['head']['kernel'], {}


def test_all_thresholds_widths_and_bound_arrays_share_one_compiled_program():
    generator = np.random.default_rng(0)
    variables = {'params': {'head': {'kernel': generator.normal(size=(5, 3)).astype('f4')}}}
    x, y = generator.normal(size=(8, 5)).astype('f4'), generator.integers(0, 3, 8)
    forward = Counting()

    def shift(change, forward, variables, x, y):
        return x + change

    def run(alphas, width, change):
        responses = filtering_responses(
            forward,
            variables,
            x,
            y,
            alphas=np.asarray(alphas, 'f4'),
            kind='pulse',
            width=width,
            attack=jax.tree_util.Partial(shift, change),
        )
        return responses, forward.traces.total()

    first, traces = run([-1, 0, 1], 0.5, 0.0)
    # Once for clean and once for attacked images, not once per threshold.
    assert traces == 2
    np.testing.assert_array_equal(first.clean, first.adversarial)
    second, traces = run([-0.5, 0.25, 0.75], 1.5, 3.0)
    assert traces == 2
    assert (second.clean != second.adversarial).any()


# ---------------------------------------------------------------------------------- scores

SWEEP = np.linspace(0, 1, 25)


def curve(clean, adversarial=None, *, alphas=SWEEP, present=None, baselines=(1.0, 1.0)):
    present = 1 - SWEEP if present is None else present
    adversarial = clean if adversarial is None else adversarial
    return Curve(alphas, present, clean, adversarial, *baselines)


@pytest.mark.parametrize(
    ('accuracy', 'score', 'label'),
    [
        (np.ones(25), 0.5, 'antifragile'),
        (1 - SWEEP, 0.0, 'robust'),
        ((1 - SWEEP) ** 2, -1 / 6, 'fragile'),
    ],
)
@pytest.mark.parametrize('baseline', [1.0, 0.8])
def test_curves_whose_score_is_known(accuracy, score, label, baseline):
    result = scores(curve(baseline * accuracy, baselines=(baseline, baseline)))
    np.testing.assert_allclose(result, (score, score, 0), rtol=0, atol=1e-12)
    assert classify(result.clean) == label


def test_the_two_accuracies_have_baselines_of_their_own():
    result = scores(curve(0.9 * np.ones(25), 0.4 * (1 - SWEEP) ** 2, baselines=(0.9, 0.4)))
    np.testing.assert_allclose(result, (0.5, -1 / 6, 1 / 3 - 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('count', [3, 24, 25])
def test_the_unit_and_the_order_of_thresholds_do_not_matter(count):
    sweep = np.linspace(0, 1, count)
    generator = np.random.default_rng(count)
    clean, adversarial = generator.uniform(size=(2, count))
    present = (1 - sweep) ** 2
    # A 'minmax' sweep rises; a 'maxmin' sweep falls, or is listed backwards.
    rising = Curve(sweep, present, clean, adversarial, 0.9, 0.5)
    falling = rising._replace(alphas=3 - 7 * sweep)
    backwards = Curve(*(array[::-1] for array in falling[:4]), 0.9, 0.5)
    for other in (falling, backwards, rising._replace(alphas=100 * sweep)):
        np.testing.assert_allclose(scores(other), scores(rising), rtol=0, atol=1e-12)
    assert abs(scores(rising).adversarial) > 0.01


def test_unequal_steps_are_weighted_by_their_length():
    alphas = np.array([0.0, 0.1, 0.2, 0.6, 1.0])
    result = scores(curve((1 - alphas) ** 2, alphas=alphas, present=1 - alphas))
    assert result.clean == pytest.approx(-1 / 6, abs=1e-12)


def test_a_whole_sweep_of_a_model(net):
    alphas = thresholds(by_layer(net.variables)['conv1'], 9)
    options = {'kind': 'minmax', 'layer': 'conv1'}
    result = filtering_responses(
        net.forward,
        net.variables,
        net.x,
        net.y,
        alphas=np.concatenate([[removing_nothing('minmax')], alphas]).astype('f4'),
        attack=attack,
        **options,
    )
    clean, adversarial = np.mean(result.clean, axis=0), np.mean(result.adversarial, axis=0)
    present = present_shares(net.variables, alphas, **options)
    result = scores(Curve(alphas, present, clean[1:], adversarial[1:], clean[0], adversarial[0]))
    assert result.difference == pytest.approx(result.adversarial - result.clean, abs=1e-12)
    assert clean[0] == 13 / 16
    assert all(np.isfinite(result))


def test_without_a_baseline_there_is_no_score():
    flat, missing = np.ones(25), np.full(25, np.nan)
    for adversarial, baseline in ((0 * flat, 0.0), (missing, np.nan)):
        result = scores(curve(flat, adversarial, baselines=(1.0, baseline)))
        assert result.clean == pytest.approx(0.5)
        assert np.isnan(result.adversarial) and np.isnan(result.difference)
    assert np.isnan(scores(curve(0 * flat, flat, baselines=(0.0, 1.0))).clean)


@pytest.mark.parametrize(
    ('score', 'tau', 'label'),
    [
        (-0.051, 0.05, 'fragile'),
        (-0.05, 0.05, 'robust'),
        (0.05, 0.05, 'robust'),
        (0.051, 0.05, 'antifragile'),
        (0.051, 0.1, 'robust'),
        (0.0, 0.0, 'robust'),
        (-1e-9, 0.0, 'fragile'),
    ],
)
def test_labels(score, tau, label):
    assert classify(score, tau) == label


# ---------------------------------------------------------------------------------- errors

DENSE = {'params': {'head': {'kernel': np.array([[1.0, 2.0]]), 'bias': np.zeros(2)}}}
KIND = "Unknown kind of filter 'max'; valid names are minmax, maxmin, pulse."
LAYER = "Unknown layer with a kernel 'conv9'; valid names are head."
WIDTH = 'width is {}; it must be greater than 0.'
NO_KERNEL = (
    'The variables hold no kernel of 2 or more axes to filter; give a Linen variable dict or an '
    'NNX state with a convolution or dense layer.'
)
RANGE = (
    'The weights range from {}, which leaves nothing to sweep; give a kernel of finite weights '
    'that differ.'
)
ALPHAS = 'alphas has shape (); give thresholds in an array of one axis.'


def respond(**options):
    options = {'alphas': np.zeros(3), 'kind': 'minmax', **options}
    return filtering_responses(None, DENSE, np.zeros((2, 1)), np.zeros(2), **options)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: filter_kernel(np.ones(2), 0.0, 'max'), KIND),
        (lambda: filter_kernel(np.ones(2), 0.0, 'pulse', 0.0), WIDTH.format('0.0')),
        (lambda: filter_variables(DENSE, 0.0, 'max'), KIND),
        (lambda: filter_variables(DENSE, 0.0, 'minmax', layer='conv9'), LAYER),
        (lambda: filter_variables({'params': {'kernel': np.ones(3)}}, 0.0, 'minmax'), NO_KERNEL),
        (lambda: norms(DENSE, 'conv9'), LAYER),
        (lambda: norms(DENSE, 'head', 0), 'order is 0; it must be greater than 0.'),
        (lambda: present_shares(DENSE, np.zeros(3), 'minmax', layer='conv9'), LAYER),
        (lambda: present_shares(DENSE, 0.0, 'minmax'), ALPHAS),
        (lambda: respond(kind='max'), KIND),
        (lambda: respond(layer='conv9'), LAYER),
        (lambda: respond(width=-1.0), WIDTH.format('-1.0')),
        (lambda: respond(alphas=0.0), ALPHAS),
        (lambda: removing_nothing('max'), KIND),
        (lambda: thresholds(np.arange(3.0), 2), 'count is 2; it must be at least 3.'),
        (lambda: global_thresholds(2), 'count is 2; it must be at least 3.'),
        (lambda: thresholds(np.full(3, 0.5)), RANGE.format('0.5 to 0.5')),
        (lambda: thresholds(np.array([0.5, np.nan])), RANGE.format('nan to nan')),
        (
            lambda: scores(curve(np.ones(24))),
            'The curve has arrays of shape (25,), (25,), (24,), (24,); give one value per '
            'threshold, at 3 thresholds or more.',
        ),
        (
            lambda: scores(Curve(*np.ones((4, 2)), 1.0, 1.0)),
            'The curve has arrays of shape (2,), (2,), (2,), (2,); give one value per threshold, '
            'at 3 thresholds or more.',
        ),
        (
            lambda: scores(Curve(np.array([0.0, 1.0, 1.0]), *np.ones((3, 3)), 1.0, 1.0)),
            'The thresholds [0.0, 1.0, 1.0] neither only rise nor only fall; sort them, without '
            'repetition.',
        ),
        (lambda: classify(0.1, -1.0), 'tau is -1.0; it must be at least 0.'),
        (
            lambda: classify(float('nan')),
            'score is nan, as it is where the accuracy with nothing removed is 0 or was not '
            'measured; classify only scores that are defined.',
        ),
    ],
)
def test_what_cannot_be_filtered_is_refused(call, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        call()

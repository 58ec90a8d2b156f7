"""What holds for every attack: inside a user's jit, on eight devices, on any kind of model."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neurosens import attacks, parallel
from neurosens.attacks import Threat, batches
from neurosens.forward import NNXForward, with_input_transform

BATCH = 16
KEY = jax.random.key(0)


def through_neurons(forward, variables, x, y, key, **options):
    """One neuron per image, by its place."""
    neurons = (jnp.arange(len(x)) % 3)[:, None]
    aims = {'neurons': neurons, 'delta': jnp.ones(neurons.shape), 'layer': 'act1', 'steps': 3}
    return attacks.neuron_attack(forward, variables, x, y, key, **{**aims, **options})


def transferred(forward, variables, x, y, key, **options):
    """From the model itself, which other tests tell from another one."""
    surrogate = {'surrogate': forward, 'surrogate_variables': variables, 'steps': 3}
    return attacks.transfer(forward, variables, x, y, key, **{**surrogate, **options})


ATTACKS = {
    'fgsm_rs': (attacks.fgsm_rs, 'linf', {}),
    'pgd': (attacks.pgd, 'l1', {'steps': 3}),
    'pgd_l0': (attacks.pgd, 'l0', {'steps': 3}),
    'mi_fgsm': (attacks.mi_fgsm, 'linf', {'steps': 3}),
    'ni_fgsm': (attacks.ni_fgsm, 'l2', {'steps': 3}),
    'apgd': (attacks.apgd, 'linf', {'steps': 5, 'loss': 'dlr'}),
    'apgd_l1': (attacks.apgd, 'l1', {'steps': 5, 'large_start': True}),
    'square': (attacks.square, 'linf', {'queries': 5}),
    'square_l1': (attacks.square, 'l1', {'queries': 5}),
    'fab': (attacks.fab, 'l2', {'steps': 4}),
    'fmn': (attacks.fmn, 'linf', {'steps': 4}),
    # Images that have not fallen wander on, and carry differences of rounding further each step.
    'deepfool': (attacks.deepfool, 'l2', {'steps': 8}),
    'carlini_wagner': (
        attacks.carlini_wagner,
        'l2',
        {'steps': 20, 'searches': 2, 'initial_weight': 1.0, 'step_size': 0.1},
    ),
    'noise': (attacks.noise, 'l2', {}),
    'latent': (attacks.latent_attack, 'l2', {'layer': 'act1', 'steps': 3}),
    'activation': (attacks.activation_attack, 'linf', {'layer': 'act1', 'neuron': 1, 'steps': 3}),
    'neuron': (through_neurons, 'l2', {}),
    'transfer': (transferred, 'linf', {}),
}
EPS = {'linf': 0.1, 'l2': 0.5, 'l1': 2.0, 'l0': 4}
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1, 'l0': 0}

SPEAKING = r' (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('


def chosen(name):
    attack, norm, options = ATTACKS[name]
    return functools.partial(attack, threat=Threat(norm, EPS[norm]), **options), norm


@pytest.mark.parametrize('name', ATTACKS)
def test_eight_devices_share_the_work_of_a_users_jit_and_never_speak(net, name):
    attack, _ = chosen(name)

    @jax.jit
    def run(variables, x, y, key, index):
        result = attack(net.forward, variables, x, y, key, index=index)
        return {field: getattr(result, field) for field in ('x_adv', 'success', 'margin')}

    inputs = (net.variables, net.x, net.y, KEY, np.arange(BATCH))
    alone = run.lower(*inputs).compile()
    mesh = parallel.data_mesh()
    x, y, index = parallel.shard(mesh, (net.x, net.y, np.arange(BATCH)))
    variables, key = parallel.replicate(mesh, (net.variables, KEY))
    together = run.lower(variables, x, y, key, index).compile()
    assert not re.findall(SPEAKING, together.as_text())
    share = together.cost_analysis()['flops'] / alone.cost_analysis()['flops']
    assert share == pytest.approx(1 / 8, rel=0.1)
    one, eight = alone(*inputs), together(variables, x, y, key, index)
    np.testing.assert_array_equal(one['success'], eight['success'])
    np.testing.assert_allclose(one['x_adv'], eight['x_adv'], atol=1e-5)
    np.testing.assert_allclose(one['margin'], eight['margin'], atol=1e-4)


ENDING = {
    'deepfool': functools.partial(attacks.deepfool, threat=Threat('l2', 9.0), steps=200),
    'pgd': functools.partial(
        attacks.pgd, threat=Threat('l2', 9.0), steps=200, step_size=0.2, keep='first'
    ),
}


@pytest.mark.parametrize('name', ENDING)
def test_every_device_ends_once_its_own_examples_have_fallen(net, name, monkeypatch):
    attack, run, programs, passes = ENDING[name], batches._run, [], []

    def recorded(*arguments):
        programs.append(run.lower(*arguments).compile().as_text())
        return run(*arguments)

    def counted(x):
        jax.debug.callback(lambda: passes.append(1))
        return x

    alone = attack(with_input_transform(net.forward, counted), net.variables, net.x, net.y, KEY)
    jax.effects_barrier()
    assert np.asarray(alone.success).all() and 2 < len(passes) < 100
    monkeypatch.setattr(batches, '_run', recorded)
    x, y, index = parallel.shard(parallel.data_mesh(), (net.x, net.y, np.arange(BATCH)))
    together = attack(net.forward, net.variables, x, y, KEY, index=index)
    assert not re.findall(SPEAKING, programs[0])
    np.testing.assert_array_equal(alone.success, together.success)
    # A caller's jit, which may hold a batch that is split, runs to the same end.
    inside = jax.jit(lambda x, y: attack(net.forward, net.variables, x, y, KEY))(net.x, net.y)
    # Those that wander for long carry differences of rounding further each step.
    soon = np.asarray(alone.queries) <= 10 if name == 'deepfool' else slice(None)
    assert len(alone.queries[soon]) > BATCH / 2
    for other in (together, inside):
        np.testing.assert_allclose(alone.x_adv[soon], other.x_adv[soon], atol=1e-5)


# What each attack makes no smaller than on the clean image; the others keep or return the image.
CROSS_ENTROPY = (
    'fgsm_rs',
    'pgd',
    'pgd_l0',
    'mi_fgsm',
    'ni_fgsm',
    'apgd_l1',
    'noise',
    'neuron',
    'transfer',
)
DLR = ('apgd',)
MARGIN = ('square', 'square_l1')
NEAREST = ('fab', 'fmn', 'deepfool', 'carlini_wagner')
judged = jax.jit(lambda forward, variables, x: forward(variables, x)[0])


def margins(logits, y):
    own = np.arange(len(y)), y
    others = logits.copy()
    others[own] = -np.inf
    return logits[own] - others.max(-1)


@pytest.mark.parametrize('name', ATTACKS)
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31 - 1), share=st.floats(0, 3))
def test_results_are_inside_the_threat_and_what_they_claim(net, name, seed, share):
    """On 16 images a draw: soft, saturated and constant ones, with right and wrong labels."""
    random = np.random.default_rng(seed)
    attack, norm = chosen(name)
    eps = np.round(share * EPS[norm]) if norm == 'l0' else np.float32(share * EPS[norm])
    x = random.random((BATCH, *net.x.shape[1:])).astype(np.float32)
    x[:4] = np.round(x[:4])
    x[4] = random.random()
    logits = np.asarray(judged(net.forward, net.variables, x))
    y = np.where(random.random(BATCH) < 0.7, logits.argmax(-1), random.integers(0, 4, BATCH))
    result = attack(
        net.forward, net.variables, x, y, jax.random.key(seed), threat=Threat(norm, eps)
    )
    x_adv, success, margin = (
        np.asarray(value).reshape(BATCH, *shape)
        for value, shape in zip(result[:3], (x.shape[1:], (), ()))
    )
    assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    change = (np.float64(x_adv) - x).reshape(BATCH, -1)
    assert (np.linalg.norm(change, ORDER[norm], axis=1) <= eps * (1 + 1e-5) + 1e-6).all()
    # Flags and margins are those of a fresh pass, where rounding does not decide.
    after = np.float64(judged(net.forward, net.variables, x_adv))
    fresh = margins(after, y)
    np.testing.assert_allclose(margin, fresh, rtol=1e-4, atol=1e-4)
    clear = np.abs(fresh) > 1e-4
    np.testing.assert_array_equal(success[clear], fresh[clear] < 0)
    if name == 'activation':  # Of any image, whatever its class.
        assert (np.asarray(result.activation) >= np.asarray(result.before) - 1e-4).all()
        return
    wrong = logits.argmax(-1) != y
    np.testing.assert_array_equal(x_adv[wrong], x[wrong])
    if name in CROSS_ENTROPY:
        loss = optax.softmax_cross_entropy_with_integer_labels
        assert (success | (loss(after, y) >= loss(np.float64(logits), y) - 1e-4)).all()
    elif name in DLR:
        loss = jax.vmap(attacks.losses.dlr)
        assert (success | (np.asarray(loss(after, y) - loss(logits, y)) >= -1e-4)).all()
    elif name in MARGIN:
        assert (fresh <= margins(np.float64(logits), y) + 1e-4).all()
    elif name in NEAREST:
        np.testing.assert_array_equal(x_adv[~success], x[~success])


@pytest.mark.parametrize('label', [4, -1])
def test_labels_that_are_no_classes_are_refused(net, label):
    y = np.where(np.arange(BATCH) == 3, label, np.asarray(net.y))
    whole = (net.forward, net.variables, np.asarray(net.x), y, KEY)
    sentence = f'Label {label} is not one of the 4 classes of the model'
    for attack in (*(chosen(name)[0] for name in ATTACKS), attacks.autoattack):
        with pytest.raises(ValueError, match=sentence):
            attack(*whole, threat=Threat('l2', 0.5))
    with pytest.raises(ValueError, match=sentence):
        attacks.spatial(*whole, threat=attacks.Motion(20.0))
    # Also where they are split over devices, and not inside of a caller's jit.
    x, split = parallel.shard(parallel.data_mesh(), (whole[2], y))
    with pytest.raises(ValueError, match=sentence):
        attacks.noise(net.forward, net.variables, x, split, KEY, threat=Threat('l2', 0.5))
    jax.eval_shape(lambda x: attacks.noise(*whole[:2], x, y, KEY, threat=Threat('l2', 0.5)), x)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (
            {'x': np.zeros((BATCH, 6, 6, 1), np.uint8)},
            'type uint8.*floating-point',
        ),
        ({'y': np.zeros(BATCH, np.float32)}, 'labels are of type float32; they must be integers'),
        ({'x': np.zeros((0, 6, 6, 1), np.float32), 'y': np.zeros(0, int)}, 'at least one'),
    ],
)
def test_images_and_labels_of_other_types_or_none_are_named(net, change, sentence):
    given = {'x': net.x, 'y': net.y, **change}
    for attack in (*(chosen(name)[0] for name in ATTACKS), attacks.autoattack):
        with pytest.raises(ValueError, match=sentence):
            attack(
                net.forward, net.variables, given['x'], given['y'], KEY, threat=Threat('l2', 0.5)
            )


def operations(jaxpr):
    """How many a program has, those of its loops and branches counted once each."""
    inner = [jax.extend.core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns]
    return len(inner) + sum(operations(one) for several in inner for one in several)


@pytest.mark.parametrize(
    ('name', 'number'),
    [
        *((name, 'steps') for name in ('pgd', 'apgd', 'apgd_l1', 'fab', 'fmn', 'deepfool')),
        ('carlini_wagner', 'steps'),
        ('carlini_wagner', 'searches'),
        ('latent', 'steps'),
        ('square', 'queries'),
    ],
)
def test_programs_do_not_grow_with_steps(net, name, number):
    attack, _ = chosen(name)

    def size(count):
        def run(x):
            return attack(net.forward, net.variables, x, net.y, KEY, **{number: count})[:2]

        return operations(jax.make_jaxpr(run)(net.x).jaxpr)

    assert size(20) == size(100) > 50


@pytest.mark.parametrize(
    'name',
    ['fgsm_rs', 'pgd', 'mi_fgsm', 'ni_fgsm', 'apgd', 'apgd_l1', 'fab', 'fmn', 'carlini_wagner'],
)
def test_passes_are_as_many_as_the_result_says(net, name):
    attack, _ = chosen(name)
    passes = []

    def counted(x):
        jax.debug.callback(lambda: passes.append(None))
        return x

    forward = with_input_transform(net.forward, counted)
    result = attack(forward, net.variables, net.x, net.y, KEY)
    jax.block_until_ready(result)
    jax.effects_barrier()
    np.testing.assert_array_equal(result.queries, len(passes))


@pytest.mark.parametrize('name', [name for name in ATTACKS if name != 'neuron'])
def test_an_example_gets_the_same_result_in_any_order_and_company(net, name):
    attack, _ = chosen(name)
    index = np.arange(100, 100 + BATCH)
    whole = attack(net.forward, net.variables, net.x, net.y, KEY, index=index)
    # The same examples between others.
    rows = np.concatenate([np.arange(BATCH)[::-2], np.full(BATCH // 2, 3)])
    again = attack(net.forward, net.variables, net.x[rows], net.y[rows], KEY, index=index[rows])
    for field in ('x_adv', 'success', 'margin'):
        ours, theirs = np.asarray(getattr(again, field)), np.asarray(getattr(whole, field))[rows]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ATTACKS)
def test_an_image_alone_is_attacked_as_in_its_batch(net, name):
    attack, _ = chosen(name)
    index = np.arange(BATCH)
    whole = attack(net.forward, net.variables, net.x, net.y, KEY, index=index)
    rows = slice(0, 1)
    alone = attack(net.forward, net.variables, net.x[rows], net.y[rows], KEY, index=index[rows])
    for field in ('x_adv', 'success', 'margin'):
        ours, theirs = np.asarray(getattr(alone, field)), np.asarray(getattr(whole, field))[rows]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [name for name in ATTACKS if name not in ('fgsm_rs', 'noise')])
def test_a_single_step_is_one(net, name):
    attack, _ = chosen(name)
    budget = {'queries': 1} if 'square' in name else {'steps': 1}
    if name == 'carlini_wagner':
        budget['searches'] = 1
    result = attack(net.forward, net.variables, net.x, net.y, KEY, **budget)
    assert np.isfinite(result.x_adv).all() and np.asarray(result.queries).max() <= 4
    if name == 'neuron':
        # One attack per neuron.
        assert result.x_adv.shape == (BATCH, 1, *net.x.shape[1:])
        result = result._replace(x_adv=result.x_adv[:, 0], success=result.success[:, 0])
    after = np.asarray(judged(net.forward, net.variables, result.x_adv)).argmax(-1)
    np.testing.assert_array_equal(result.success, after != net.y)


BALLS_ONLY = (
    'apgd',
    'square',
    'fab',
    'fmn',
    'deepfool',
    'carlini_wagner',
    'neuron',
    'latent',
    'activation',
)


@pytest.mark.parametrize('name', BALLS_ONLY)
def test_attacks_that_need_a_norm_refuse_to_count_pixels(net, name):
    attack, _ = chosen(name)
    with pytest.raises(ValueError, match='l0'):
        attack(net.forward, net.variables, net.x, net.y, KEY, threat=Threat('l0', 4))


class Net(nnx.Module):
    """An NNX model that computes in half precision."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        half = {'dtype': jnp.bfloat16, 'rngs': rngs}
        self.conv = nnx.Conv(1, 3, (3, 3), **half)
        self.act1 = nnx.BatchNorm(3, use_running_average=True, **half)
        self.head = nnx.Linear(108, 4, **half)

    def __call__(self, x):
        h = nnx.relu(self.act1(self.conv(x)))
        return 4 * self.head(h.reshape(len(h), -1))


@pytest.fixture(scope='module')
def half():
    """A defended half-precision NNX model, images and their labels."""
    graphdef, state = nnx.split(Net())
    forward = with_input_transform(NNXForward(graphdef), lambda x: 0.9 * x + 0.05)
    x = jax.random.uniform(jax.random.key(1), (BATCH, 6, 6, 1))
    y = jax.jit(forward)(state, x)[0].argmax(-1)
    return forward, state, x, y


@pytest.mark.parametrize('name', ATTACKS)
def test_a_defended_half_precision_nnx_model_is_attacked_like_any_other(half, name):
    attack, norm = chosen(name)
    forward, state, x, y = half
    result = attack(forward, state, x, y, KEY)
    x_adv = np.asarray(result.x_adv).reshape(BATCH, 6, 6, 1)
    assert x_adv.dtype == np.float32 and np.isfinite(x_adv).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    change = (np.float64(x_adv) - x).reshape(BATCH, -1)
    length = np.linalg.norm(change, ORDER[norm], axis=1)
    assert (length <= EPS[norm] * (1 + 1e-5)).all() and length.max() > 0
    # Where rounding to half precision does not decide, the flags are those of a fresh pass.
    logits = np.float64(jax.jit(forward)(state, x_adv)[0])
    top = np.sort(logits)
    clear = top[:, -1] - top[:, -2] > 0.1
    assert clear.any()
    success = np.asarray(result.success).reshape(BATCH)
    np.testing.assert_array_equal(success[clear], (logits.argmax(-1) != y)[clear])
    assert_edge_cases(name, half)


@pytest.mark.parametrize('name', ['autoattack', 'spatial'])
def test_ensembles_and_motions_take_any_model_too(half, name):
    forward, state, x, y = half
    if name == 'autoattack':
        result = attacks.autoattack(
            forward,
            state,
            np.asarray(x),
            np.asarray(y),
            KEY,
            threat=Threat('linf', 0.1),
            attacks=('apgd-ce', 'fab-t', 'square'),
            steps=4,
            queries=5,
            batch_size=BATCH,
        )
    else:
        motion = attacks.Motion(20.0, 0.2)
        result = attacks.spatial(forward, state, x, y, KEY, threat=motion, draws=5)
    x_adv = np.asarray(result.x_adv)
    assert x_adv.dtype == np.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
    logits = np.float64(jax.jit(forward)(state, x_adv)[0])
    top = np.sort(logits)
    clear = top[:, -1] - top[:, -2] > 0.1
    assert clear.any()
    np.testing.assert_array_equal(
        np.asarray(result.success)[clear], (logits.argmax(-1) != y)[clear]
    )


def assert_edge_cases(name, half):
    """Constant and saturated images, no room at all, and what is no image; of the same program."""
    attack, norm = chosen(name)
    forward, state, x, _ = half
    flat = jnp.broadcast_to(
        jnp.array([0.0, 1.0, 0.5, 0.25])[:, None, None, None], (4, *x.shape[1:])
    )
    edges = jnp.concatenate([flat, jnp.round(x[:12])])
    y = jax.jit(forward)(state, edges)[0].argmax(-1)
    x_adv = np.asarray(attack(forward, state, edges, y, KEY).x_adv).reshape(BATCH, 6, 6, 1)
    assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    change = (np.float64(x_adv) - edges).reshape(BATCH, -1)
    assert (np.linalg.norm(change, ORDER[norm], axis=1) <= EPS[norm] * (1 + 1e-5)).all()
    still = attack(forward, state, edges, y, KEY, threat=Threat(norm, 0))
    np.testing.assert_array_equal(np.asarray(still.x_adv).reshape(edges.shape), edges)
    with pytest.raises(ValueError, match=r'not finite|NaN'):
        attack(forward, state, edges.at[0, 0, 0, 0].set(jnp.nan), y, KEY)

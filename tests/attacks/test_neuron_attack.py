"""Attacks through single neurons: what they claim is true, and exact where the answer is known."""

import collections
import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurosens import models, parallel
from neurosens.attacks import (
    NeuronAttackResult,
    Threat,
    activation_attack,
    easiest_neurons,
    latent_attack,
    neuron_attack,
    neuron_attack_example,
    neuron_attack_report,
)
from neurosens.attacks.result import Iterate, louder, stronger
from neurosens.forward import LinenForward
from neurosens.neurons import sensitivity

BATCH, NEURONS = 8, 3
WIDE = (-100.0, 100.0)
NORMS = ('linf', 'l2', 'l1')
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}
DUAL = {'linf': 1, 'l2': 2, 'l1': np.inf}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, images, the classes to leave, and the neurons to attack."""

    forward: LinenForward
    variables: dict
    x: jax.Array
    y: jax.Array
    neurons: jax.Array
    delta: jax.Array

    def launch(self, threat, seed=0, **options):
        aims = {'neurons': self.neurons, 'delta': self.delta, 'steps': 6, **options}
        return neuron_attack(
            self.forward,
            self.variables,
            self.x,
            self.y,
            jax.random.key(seed),
            threat=threat,
            **aims,
        )

    def attack(self, threat, **options):
        return jax.device_get(self.launch(threat, **options))


@pytest.fixture(scope='module')
def net():
    """A convolutional network; six images have the label that it gives them."""
    module = models.create('cnn', num_classes=4, features=(3,), hidden=(8,))
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.uniform(keys[0], (BATCH, 6, 6, 1))
    variables = jax.jit(module.init)(keys[1], x)
    variables = jax.tree.map(lambda leaf: 2 * leaf, variables)
    forward = LinenForward(module, {'train': False})
    predicted = jax.jit(forward)(variables, x)[0].argmax(-1)
    y = jnp.where(jnp.arange(BATCH) < 6, predicted, (predicted + 1) % 4)
    delta = sensitivity(forward, variables, x).delta
    return Setting(
        forward, variables, x, y, *easiest_neurons(delta, None, None, NEURONS, by='absolute')
    )


@functools.partial(jax.jit, static_argnums=0)
def margins(forward, variables, x, y):
    logits = forward(variables, x)[0]
    own = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
    return own - jnp.where(jax.nn.one_hot(y, logits.shape[-1]) > 0, -jnp.inf, logits).max(-1)


def distances(norm, x_adv, x):
    change = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)[:, None]
    return np.linalg.norm(change.reshape(*change.shape[:2], -1), ORDER[norm], axis=-1)


def assert_same(actual, expected):
    for name, a, b in zip(actual._fields, actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


# ------------------------------------------------------------------------------- invariants


@pytest.fixture(scope='module', params=NORMS)
def attacked(request, net):
    threats = [
        Threat(request.param, eps)
        for eps in {'linf': (0.02, 0.2), 'l2': (0.1, 1.0)}.get(request.param, (0.5, 5.0))
    ]
    return [(threat, net.attack(threat)) for threat in threats]


def test_images_are_inside_the_threat(net, attacked):
    for threat, result in attacked:
        assert (distances(threat.norm, result.x_adv, net.x) <= threat.eps * (1 + 1e-5) + 1e-6).all()
        assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1


def test_success_and_margin_are_those_of_a_fresh_forward_pass(net, attacked):
    for _, result in attacked:
        for place in range(NEURONS):
            fresh = margins(net.forward, net.variables, result.x_adv[:, place], net.y)
            np.testing.assert_allclose(result.margin[:, place], fresh, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(result.success, result.margin < 0)
        np.testing.assert_array_equal(result.queries, 1 + NEURONS * 7)
    weak, strong = (result.margin[:6].mean() for _, result in attacked)
    assert strong < weak - 0.1, 'the radii make a difference'


def test_the_papers_choice_is_the_iterate_of_largest_cross_entropy(net):
    threat = Threat('l2', 0.7)
    ours, papers = (net.attack(threat, keep=keep) for keep in ('misclassified', 'loss'))

    def losses(result):
        each = [
            optax.softmax_cross_entropy_with_integer_labels(
                net.forward(net.variables, result.x_adv[:, place])[0], net.y
            )
            for place in range(NEURONS)
        ]
        return np.stack(each, 1)

    assert (losses(papers) >= losses(ours) - 1e-4).all()
    # It never succeeds where ours fails.
    assert (ours.success >= papers.success).all()
    np.testing.assert_allclose(ours.gain, papers.gain, rtol=1e-5)


def test_an_iterate_is_kept_for_fooling_or_for_its_loss():
    fooling, loud = (
        Iterate(jnp.full(2, value), jnp.array(fools), jnp.float32(loss), jnp.float32(0))
        for value, fools, loss in ((1.0, True, 0.5), (2.0, False, 0.7))
    )
    for new, old in ((fooling, loud), (loud, fooling)):
        assert stronger(new, old).x[0] == 1
        assert louder(new, old).x[0] == 2
    level = fooling._replace(loss=loud.loss, margin=jnp.float32(-1))
    assert louder(level, loud).x[0] == louder(loud, level).x[0] == 1


def test_misclassified_images_come_back_unchanged(net, attacked):
    for _, result in attacked:
        np.testing.assert_array_equal(result.x_adv[6:], np.stack([net.x[6:]] * NEURONS, 1))
        assert result.success[6:].all()
        assert not result.reached[6:].any() and not result.gain[6:].any()


def test_a_neuron_is_reached_where_its_gain_is_1(attacked):
    for _, result in attacked:
        np.testing.assert_array_equal(result.reached, result.gain >= 1 - 1e-5)
        assert (result.gain >= 0).all()
    assert (attacked[0][1].gain <= attacked[1][1].gain + 1e-5)[:6].mean() > 0.7


def test_chunks_do_not_change_the_result(net):
    threat = Threat('l2', 0.5)
    whole = net.attack(threat)
    # The second chunk of two runs past the last neuron.
    assert_same(net.attack(threat, chunk=2), whole)


def test_radius_zero_returns_the_clean_images(net):
    result = net.attack(Threat('l2', 0.0))
    np.testing.assert_array_equal(result.x_adv, np.stack([net.x] * NEURONS, 1))
    assert not result.success[:6].any() and not result.gain.any()


# ----------------------------------------------------------- independence of batch and devices


class Map(nn.Module):
    """Six inputs, a layer `map` of two positions of three channels, and three classes."""

    curved: bool = True

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6, name='mix')(x.reshape(len(x), -1))
        h = (jnp.tanh(h) if self.curved else h).reshape(len(x), 2, 3)
        h = nn.Dropout(0.0, deterministic=True, name='map')(h)
        return nn.Dense(3, name='head')(h.reshape(len(x), -1))


CURVED, LINEAR = LinenForward(Map()), LinenForward(Map(curved=False))


@pytest.fixture(scope='module')
def mapped():
    """A network of tanh units, and a channel of `map` to move in each of 8 images."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.normal(size=shape).astype(np.float32)

    params = {
        'mix': {'kernel': 0.5 * draw(6, 6), 'bias': 0.1 * draw(6)},
        'head': {'kernel': draw(6, 3), 'bias': 0.1 * draw(3)},
    }
    x = draw(BATCH, 6)
    y = np.array([cross_entropy64(params, image, 0)[1] for image in x])
    neurons = generator.integers(0, 3, (BATCH, 2))
    return Setting(CURVED, {'params': params}, x, y, neurons, 0.3 * draw(BATCH, 2))


# Attacks with randomness in them.
RANDOM = {'layer': 'map', 'start': 'random', 'restarts': 2, 'threat': Threat('linf', 0.3, WIDE)}


def test_an_example_gets_the_same_result_in_any_place(mapped):
    index = np.array([7, 300, 2, 90, 11, 4, 1000, 6])
    whole = mapped.attack(index=index, **RANDOM)
    rows = np.array([5, 2, 2, 7, 0, 1, 6, 3])
    moved = dataclasses.replace(
        mapped, **{name: getattr(mapped, name)[rows] for name in ('x', 'y', 'neurons', 'delta')}
    )
    expected = jax.tree.map(lambda leaf: leaf[rows], whole)
    assert_same(moved.attack(index=index[rows], **RANDOM), expected)
    renamed = mapped.attack(index=index + 1, **RANDOM)
    assert (np.abs(renamed.x_adv - whole.x_adv) > 1e-3).any()


def test_a_neuron_gets_the_same_result_whatever_other_neurons_are_attacked(mapped):
    whole = mapped.attack(**RANDOM)
    twice = {name: getattr(mapped, name)[:, [1, 1]] for name in ('neurons', 'delta')}
    again = mapped.attack(**RANDOM, **twice)
    np.testing.assert_array_equal(again.queries, 1 + 2 * 2 * 7)
    for place in (0, 1):
        for field in ('x_adv', 'success', 'margin', 'reached', 'gain'):
            actual, expected = getattr(again, field)[:, place], getattr(whole, field)[:, 1]
            np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=field)


def test_one_example_is_attacked_as_in_a_batch(mapped):
    batch = mapped.attack(**RANDOM)
    attack = functools.partial(neuron_attack_example, CURVED, steps=6, step_size=0.125, **RANDOM)
    alone = jax.jit(attack)(
        mapped.variables,
        mapped.x[5],
        mapped.y[5],
        jax.random.fold_in(jax.random.key(0), 5),
        neurons=mapped.neurons[5],
        delta=mapped.delta[5],
    )
    assert_same(alone, jax.tree.map(lambda leaf: leaf[5], batch))


def test_one_and_eight_devices_give_the_same_result(mapped):
    mesh = parallel.data_mesh()
    split = ('x', 'y', 'neurons', 'delta')
    values = parallel.shard(mesh, tuple(np.asarray(getattr(mapped, name)) for name in split))
    spread = dataclasses.replace(
        mapped,
        variables=parallel.replicate(mesh, mapped.variables),
        **dict(zip(split, values)),
    )
    (index,) = parallel.shard(mesh, (np.arange(BATCH),))
    together = spread.launch(index=index, **RANDOM)
    assert len(together.x_adv.sharding.device_set) == 8
    assert not together.x_adv.is_fully_replicated
    assert_same(together, mapped.attack(**RANDOM))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counting:
    """A forward that counts how often it is traced."""

    traces: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __call__(self, variables, x, edits=None, taps=()):
        self.traces[x.shape] += 1
        return CURVED(variables, x, edits=edits or {}, taps=taps)


def test_radii_steps_weights_and_neurons_share_one_compiled_program(mapped):
    counting = dataclasses.replace(mapped, forward=Counting())

    def run(eps, **options):
        counting.attack(Threat('l2', eps, WIDE), layer='map', **options)
        return counting.forward.traces.total()

    first = run(0.1)
    assert first > 0
    assert run(0.3, steps=2, weight=1.0, restarts=2, step_size=0.01) == first
    assert run(0.1, neurons=2 - mapped.neurons, delta=-mapped.delta) == first


# ---------------------------------------------------------------------------------- the loss


def features64(params, x):
    h = np.tanh(x @ np.float64(params['mix']['kernel']) + params['mix']['bias'])
    return h.reshape(2, 3)


def cross_entropy64(params, x, y):
    logits = features64(params, x).ravel() @ np.float64(params['head']['kernel'])
    logits = logits + params['head']['bias']
    return np.log(np.exp(logits).sum()) - logits[y], logits.argmax()


def slope64(function, x, step=1e-6):
    """Central differences."""
    return np.array(
        [
            (function(x + step * unit) - function(x - step * unit)) / (2 * step)
            for unit in np.eye(len(x))
        ]
    )


@pytest.mark.parametrize('weight', [10.0, 0.3])
def test_two_steps_follow_the_formula(mapped, weight):
    """From the clean image only the direction of the neuron matters, from the first iterate on
    both terms do."""
    result = mapped.attack(
        Threat('l2', 10.0, WIDE), layer='map', steps=2, step_size=0.1, weight=weight
    )
    params = mapped.variables['params']
    last = 0
    for row, place in np.ndindex(BATCH, 2):
        x, channel = np.float64(mapped.x[row]), mapped.neurons[row, place]
        delta, clean = np.float64(mapped.delta[row, place]), features64(params, x)
        target = clean.copy()
        target[:, channel] += delta

        def loss(x):
            off = features64(params, x) - target
            own = np.linalg.norm(off[:, channel]) / np.linalg.norm(target[:, channel])
            return np.linalg.norm(off) / np.linalg.norm(target) + weight * own

        images = [x]
        for _ in range(2):
            slope = slope64(loss, images[-1])
            images.append(images[-1] - 0.1 * slope / np.linalg.norm(slope))
        judged = [cross_entropy64(params, image, mapped.y[row]) for image in images]
        strengths = [(predicted != mapped.y[row], loss) for loss, predicted in judged]
        kept = max(range(3), key=strengths.__getitem__)
        last += kept == 2
        np.testing.assert_allclose(result.x_adv[row, place], images[kept], rtol=0, atol=1e-4)
        gains = [(features64(params, image) - clean)[:, channel].mean() / delta for image in images]
        np.testing.assert_allclose(result.gain[row, place], max(gains), rtol=1e-3, atol=1e-4)
    assert last > 4, 'the second step is seen'


def test_a_target_of_zero_and_a_change_of_zero_are_finite(mapped):
    params = mapped.variables['params']
    clean = np.stack([features64(params, x) for x in mapped.x]).reshape(BATCH, 6)
    neurons = np.tile(np.arange(2), (BATCH, 1))
    delta = np.where(neurons == 0, -clean[:, :2], 0).astype(np.float32)
    result = mapped.attack(
        Threat('l2', 2.0, WIDE), layer='map', unit='unit', neurons=neurons, delta=delta, steps=20
    )
    assert all(np.isfinite(leaf).all() for leaf in result)
    assert result.reached[:, 0].all()
    assert not result.reached[:, 1].any() and not result.gain[:, 1].any()
    # With nothing to move there is no gradient.
    np.testing.assert_array_equal(result.x_adv[:, 1], mapped.x)


# ----------------------------------------------------------------------------- linear features


def linear_setting(kernel, head_bias=(0.0, 0.0, 0.0)):
    head = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    params = {
        'mix': {'kernel': np.float32(kernel), 'bias': np.ones(6, np.float32)},
        'head': {'kernel': head, 'bias': np.float32(head_bias)},
    }
    x = np.random.default_rng(2).normal(size=(BATCH, len(kernel))).astype(np.float32)
    y = ((x @ kernel + 1) @ head + head_bias).argmax(-1)
    return Setting(LINEAR, {'params': params}, x, y, None, None)


@pytest.fixture(scope='module')
def separate():
    """Each of six features is a sum over two pixels of its own; class 0 cannot be left."""
    weights = np.array([[3, 2], [1, -0.5], [0.6, 0.2], [-0.5, 0.2], [0.4, 0.3], [0.2, 0.5]])
    kernel = np.zeros((12, 6))
    for feature, pair in enumerate(weights):
        kernel[2 * feature : 2 * feature + 2, feature] = pair
    return linear_setting(kernel, (1e4, 0, 0)), weights


@pytest.mark.parametrize('norm', NORMS)
def test_a_linear_neuron_is_reached_exactly_where_the_radius_suffices(separate, norm):
    setting, weights = separate
    steps, eps = 40, 0.3
    farthest = eps * np.linalg.norm(weights, DUAL[norm], axis=1)
    neurons = np.tile(np.arange(6), (BATCH, 1))
    share = np.random.default_rng(3).uniform(0.2, 2.0, (BATCH, 6)) * [1, -1, 1, -1, 1, -1]
    share = np.where(np.abs(np.abs(share) - 1) < 0.02, 1.5, share)
    result = setting.attack(
        Threat(norm, eps, WIDE),
        layer='head:in',
        neurons=neurons,
        delta=np.float32(share * farthest),
        steps=steps,
    )
    enough = np.abs(share) < 1
    assert 8 < enough.sum() < 40
    np.testing.assert_array_equal(result.reached, enough)
    np.testing.assert_allclose(result.gain[~enough], 1 / np.abs(share[~enough]), rtol=1e-3)
    overshoot = result.gain[enough] - 1
    # Beyond the target it goes no further than one step.
    assert (overshoot <= 2.5 / steps / np.abs(share[enough]) + 1e-4).all()


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('sign', [1, -1])
def test_an_activation_moves_by_eps_times_the_dual_norm_of_its_weights(norm, sign):
    kernel = np.random.default_rng(4).normal(size=(5, 6))
    setting, threat = linear_setting(kernel), Threat(norm, 0.25, WIDE)
    channel = np.arange(BATCH) % 3
    result = activation_attack(
        *(setting.forward, setting.variables, setting.x, setting.y, jax.random.key(0)),
        threat=threat,
        layer='map',
        neuron=channel,
        sign=sign,
    )
    clean = (setting.x @ kernel + 1).reshape(BATCH, 2, 3).sum(1)[np.arange(BATCH), channel]
    # A channel is the sum over its two positions.
    weights = kernel.reshape(5, 2, 3).sum(1)[:, channel]
    rise = 0.25 * np.linalg.norm(weights, DUAL[norm], axis=0)
    np.testing.assert_allclose(result.before, clean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.activation - result.before, sign * rise, rtol=1e-4)
    assert (distances(norm, result.x_adv[:, None], setting.x) <= 0.25 + 1e-4).all()
    fresh = margins(setting.forward, setting.variables, result.x_adv, setting.y)
    np.testing.assert_array_equal(result.success, fresh < 0)
    np.testing.assert_allclose(result.margin, fresh, atol=1e-4)
    np.testing.assert_array_equal(result.queries, 22)


def test_a_single_unit_moves_by_its_own_weights(separate):
    setting, weights = separate
    result = activation_attack(
        *(setting.forward, setting.variables, setting.x, setting.y, jax.random.key(0)),
        threat=Threat('l2', 0.25, WIDE),
        layer='map',
        neuron=4,
        unit='unit',
    )
    rise = 0.25 * np.linalg.norm(weights[4])
    np.testing.assert_allclose(result.activation - result.before, rise, rtol=1e-4)


@pytest.mark.parametrize('norm', NORMS)
def test_a_linear_layer_moves_by_eps_times_its_operator_norm(separate, norm):
    setting, weights = separate
    arguments = setting.forward, setting.variables, setting.x, setting.y, jax.random.key(0)
    result = latent_attack(
        *arguments, threat=Threat(norm, 0.25, WIDE), layer='map', steps=100, restarts=8
    )
    # Every pixel serves one feature, so the norms of features add up (linf) or the best wins.
    farthest = (
        0.25
        * {
            'linf': np.linalg.norm(np.linalg.norm(weights, 1, axis=1)),
            'l2': np.linalg.norm(weights, 2, axis=1).max(),
            'l1': np.abs(weights).max(),
        }[norm]
    )
    change = (np.asarray(result.x_adv) - setting.x) @ setting.variables['params']['mix']['kernel']
    moved = np.linalg.norm(change, axis=1)
    assert (moved <= farthest * (1 + 1e-4)).all()
    np.testing.assert_allclose(moved, farthest, rtol=1e-2)
    assert not result.success.any()
    np.testing.assert_array_equal(result.queries, 1 + 8 * 101)


def test_a_latent_attack_keeps_images_that_fool(net):
    result = latent_attack(
        net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=Threat('linf', 0.2)
    )
    fresh = margins(net.forward, net.variables, result.x_adv, net.y)
    np.testing.assert_array_equal(result.success, fresh < 0)
    np.testing.assert_array_equal(result.x_adv[6:], net.x[6:])
    assert result.success[:6].any()
    assert (distances('linf', result.x_adv[:, None], net.x) <= 0.2 + 1e-6).all()


# ------------------------------------------------------------------------------ straight layers


class Gated(nn.Module):
    """Two dense layers with a ReLU `act`, and a head."""

    @nn.compact
    def __call__(self, x):
        h = models.common.Activation('relu', name='act')(nn.Dense(7, name='first')(x))
        h = models.common.Activation('relu', name='last')(nn.Dense(4, name='second')(h))
        return nn.Dense(3, name='head')(h)


@pytest.fixture(scope='module')
def gated():
    generator = np.random.default_rng(5)
    params = {
        name: {
            'kernel': generator.normal(size=shape).astype(np.float32),
            'bias': 0.1 * np.arange(shape[1], dtype=np.float32),
        }
        for name, shape in {'first': (5, 7), 'second': (7, 4), 'head': (4, 3)}.items()
    }
    x = generator.normal(size=(BATCH, 5)).astype(np.float32)
    forward = LinenForward(Gated())
    y = np.argmax(gated_features(params, x) @ params['head']['kernel'] + [0, 0.1, 0.2], -1)
    return Setting(forward, {'params': params}, x, y, None, None)


def gated_features(params, x):
    for name in ('first', 'second'):
        x = np.maximum(x @ params[name]['kernel'] + params[name]['bias'], 0)
    return x


@jax.custom_vjp
def fake_relu(u):
    return jnp.maximum(u, 0)


fake_relu.defvjp(lambda u: (fake_relu(u), None), lambda _, g: (g,))


@pytest.mark.parametrize('straight', ['act', 'last'])
def test_the_gradient_of_a_straight_layer_is_that_of_the_hand_written_network(gated, straight):
    size = 0.5
    layer = 'second' if straight != 'last' else 'last'
    result = activation_attack(
        *(gated.forward, gated.variables, gated.x, gated.y, jax.random.key(0)),
        threat=Threat('l2', 1.0, WIDE),
        layer=layer,
        neuron=2,
        steps=1,
        step_size=size,
        straight_layer=straight,
    )
    params = gated.variables['params']

    def by_hand(x):
        first = fake_relu if straight == 'act' else jax.nn.relu
        hidden = first(x @ params['first']['kernel'] + params['first']['bias'])
        value = hidden @ params['second']['kernel'][:, 2] + params['second']['bias'][2]
        return fake_relu(value) if straight == 'last' else value

    slopes = np.asarray(jax.vmap(jax.grad(by_hand))(gated.x))
    moved = gated.x + size * slopes / np.linalg.norm(slopes, axis=1, keepdims=True)
    before, after = (np.asarray(jax.vmap(by_hand)(image)) for image in (gated.x, moved))
    rose = after > before
    assert rose.sum() > 2
    np.testing.assert_allclose(result.x_adv, np.where(rose[:, None], moved, gated.x), atol=1e-5)
    # Only gradients are changed, no value.
    np.testing.assert_allclose(result.before, before, rtol=1e-5, atol=1e-5)
    fresh = margins(gated.forward, gated.variables, result.x_adv, gated.y)
    np.testing.assert_allclose(result.margin, fresh, atol=1e-5)


def test_only_through_a_straight_layer_a_neuron_that_is_off_is_moved(gated):
    rows, columns = np.nonzero(gated_features(gated.variables['params'], gated.x) == 0)
    assert len(rows) > 4
    rows, columns = rows[-BATCH:], columns[-BATCH:]
    off = dataclasses.replace(
        gated,
        x=gated.x[rows],
        y=gated.y[rows],
        neurons=columns[:, None],
        delta=np.full((len(rows), 1), 0.5, np.float32),
    )
    threat = Threat('l2', 5.0, WIDE)
    still = off.attack(threat, steps=30)
    assert not still.gain.any()
    np.testing.assert_array_equal(still.x_adv[:, 0], off.x)
    moved = off.attack(threat, steps=30, straight_layer='last')
    assert moved.reached.mean() > 0.7
    for result in (still, moved):
        fresh = margins(off.forward, off.variables, result.x_adv[:, 0], off.y)
        np.testing.assert_array_equal(result.success[:, 0], fresh < 0)


# ------------------------------------------------------------------ easiest neurons and report


INF, NAN = np.inf, np.nan


def test_the_easiest_neurons_by_hand():
    delta = np.array([[3, -1, INF, 2], [INF, -5, NAN, 4], [INF, INF, NAN, INF]], np.float32)
    mean, std = np.array([2.0, 0, 0, 0]), np.array([1.0, 2, 1, 0.5])
    neurons, chosen = easiest_neurons(delta, mean, std, 4)
    # Scores: (1, -0.5, inf, 4), (inf, -2.5, nan, 8), (inf, inf, nan, inf).
    np.testing.assert_array_equal(neurons, [[1, 0, 3, 2], [1, 3, 0, 2], [0, 1, 3, 2]])
    np.testing.assert_array_equal(chosen, [[-1, 3, 2, 3], [-5, 4, -5, -5], [0, 0, 0, 0]])
    assert neurons.dtype == jnp.int32
    neurons, chosen = easiest_neurons(delta, None, None, 2, by='absolute')
    np.testing.assert_array_equal(neurons, [[1, 3], [3, 1], [0, 1]])
    np.testing.assert_array_equal(chosen, [[-1, 2], [4, -5], [0, 0]])
    neurons, _ = easiest_neurons(delta, None, std, 2, by='scaled_absolute')
    np.testing.assert_array_equal(neurons, [[1, 0], [1, 3], [0, 1]])


def test_a_dead_neuron_is_not_easy():
    neurons, chosen = easiest_neurons(np.array([[0.1, 7.0]]), np.zeros(2), np.array([0, 1.0]), 2)
    np.testing.assert_array_equal(neurons, [[1, 0]])
    np.testing.assert_allclose(chosen, [[7.0, 0.1]])


def test_the_report_by_hand():
    success = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    reached = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], bool)
    empty = np.zeros(0)
    result = NeuronAttackResult(empty, success, empty, reached, empty, empty)
    report = neuron_attack_report(result, (1, 2, 3))
    np.testing.assert_array_equal(report.counts, [1, 2, 3])
    np.testing.assert_array_equal(report.broken, [0.25, 0.5, 0.75])
    np.testing.assert_array_equal(report.success_by_rank, [0.25, 0.25, 0.5])
    assert report.mean_successes == 1.0
    assert report.reached == 0.25


def test_more_neurons_break_no_fewer_images(net):
    report = neuron_attack_report(net.attack(Threat('linf', 0.05)), (1, 2, 3))
    assert (np.diff(report.broken) >= 0).all()
    assert report.broken[0] == report.success_by_rank[0]


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'steps': 0}, 'steps is 0; it must be at least 1.'),
        ({'restarts': 0}, 'restarts is 0; it must be at least 1.'),
        ({'start': 'zero'}, "start is 'zero'; it must be 'random' or 'clean'."),
        ({'weight': -1.0}, 'weight is -1.0; it must be at least 0.'),
        ({'keep': 'last'}, "Unknown keep 'last'; valid names are misclassified, loss."),
        ({'unit': 'pixel'}, "Unknown unit 'pixel'; valid names are channel, unit."),
        ({'chunk': 0}, 'chunk is 0; it must be at least 1.'),
        (
            {'neurons': np.full((BATCH, 2), 3)},
            "neurons reach from 3 to 3, but layer 'map' has 3 of them with unit='channel'; give "
            'indices from 0 to 2.',
        ),
        (
            {'neurons': np.full((BATCH, 2), 0.5)},
            'neurons are of type float32; they must be integer indices.',
        ),
        (
            {'neurons': np.zeros(BATCH, int)},
            'neurons have shape (8,) and delta (8, 2); both must be [B, n] with at least one '
            'neuron.',
        ),
        (
            {'neurons': np.zeros((2, 1), int), 'delta': np.ones((2, 1))},
            'neurons has shape (2, 1); it must have a value for each of 8 images.',
        ),
        (
            {'delta': np.full((BATCH, 2), np.inf)},
            'delta has values that are not finite; easiest_neurons() replaces those of neurons '
            'that no change suffices for.',
        ),
        (
            {'straight_layer': 'head'},
            "straight_layer 'head' maps shape (1, 6) to (1, 3); name a layer that keeps the "
            'shape, such as an activation.',
        ),
    ],
)
def test_an_impossible_attack_is_refused(mapped, options, message):
    # Behind messages of traced code, JAX adds a note.
    with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
        mapped.attack(Threat('l2', 0.1, WIDE), layer='map', **options)


def test_an_unknown_layer_is_refused(mapped):
    with pytest.raises(KeyError, match="Unknown layer 'mop'"):
        mapped.attack(Threat('l2', 0.1, WIDE), layer='mop')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'sign': 2}, 'sign is 2; it must be 1 to raise the neuron or -1 to lower it.'),
        (
            {'neuron': np.zeros((8, 2), int)},
            'neuron has shape (8, 2); it must be one index, or [B].',
        ),
        (
            {'neuron': -1},
            "neurons reach from -1 to -1, but layer 'map' has 3 of them with unit='channel'; give "
            'indices from 0 to 2.',
        ),
        ({'steps': -1}, 'steps is -1; it must be at least 1.'),
    ],
)
def test_an_impossible_activation_attack_is_refused(mapped, options, message):
    arguments = mapped.forward, mapped.variables, mapped.x, mapped.y, jax.random.key(0)
    options = {'neuron': 0, **options}
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        activation_attack(*arguments, threat=Threat('l2', 0.1, WIDE), layer='map', **options)


@pytest.mark.parametrize(
    ('arguments', 'options', 'message'),
    [
        (
            (None, None, 2),
            {},
            "by='scaled' needs the mean and std of each neuron; give them, or by='absolute'.",
        ),
        ((None, None, 4), {'by': 'absolute'}, 'count is 4; it must be at least 1, at most 3.'),
        (
            (None, None, 2),
            {'by': 'size'},
            "Unknown kind 'size'; valid names are scaled, absolute, scaled_absolute.",
        ),
    ],
)
def test_an_impossible_choice_of_neurons_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        easiest_neurons(np.ones((2, 3)), *arguments, **options)


def test_an_impossible_report_is_refused():
    empty, success = np.zeros(0), np.ones((2, 3), bool)
    result = NeuronAttackResult(empty, success, empty, success, empty, empty)
    message = (
        'counts are (1, 4, 8, 16), but 3 neurons of each image were attacked; give counts from 1 '
        'to 3.'
    )
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        neuron_attack_report(result)
    none = result._replace(success=success[:0])
    with pytest.raises(ValueError, match='There is no image to report on'):
        neuron_attack_report(none)

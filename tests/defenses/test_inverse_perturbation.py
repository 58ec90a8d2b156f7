"""Inverse perturbation: its directions by hand, its rules, and gradients that reach through it."""

import dataclasses

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import Threat, attacks, neurons, parallel
from neurosens.defenses import inverse_perturbation, oracles
from neurosens.defenses.inverse_perturbation import (
    Parameters,
    Settings,
    adaptive,
    apply,
    calibrate,
    direction_example,
    directions,
    normalize,
    partition,
    passes,
)
from neurosens.forward import LayerError, LinenForward, with_edits, with_input_transform


class Rectified(nn.Module):
    """Three rectified units of two inputs, and two classes."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(3, use_bias=False, name='units')(x))
        return nn.Dense(2, use_bias=False, name='head')(h)


RECTIFIED = {
    'params': {
        'units': {'kernel': np.float32([[1, -1, 0.5], [2, 1, -0.5]])},
        'head': {'kernel': np.float32([[1, 0], [-1, 0], [2, 0]])},
    }
}


def one_and_one(**changes):
    return Settings(**{'front': 1, 'tail': 1, **changes})


def test_the_direction_of_an_image_by_hand():
    found = direction_example(
        LinenForward(Rectified()),
        RECTIFIED,
        jnp.array([0.3, 0.6]),
        jnp.int32(0),
        settings=one_and_one(),
    )
    np.testing.assert_allclose(found.activation['head:in'], [1.5, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(found.influence['head:in'], [1.5, -0.3, 0], atol=1e-6)
    # J = h_0 - h_1 has the gradient (1, 2) - (-1, 1).
    np.testing.assert_allclose(found.direction, [1.26490, 0.63245], atol=5e-5)


def test_directions_have_a_root_mean_square_of_one():
    cases = [
        ([3, 4, 0, 0], [1.199995, 1.599994, 0, 0]),
        ([3e-6, 4e-6, 0, 0], [0.24, 0.32, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ]
    rows = jnp.array([row for row, _ in cases], jnp.float32)
    found = jax.vmap(normalize)(rows)
    np.testing.assert_allclose(found, [row for _, row in cases], rtol=2e-6)


def test_a_move_is_bounded_in_l2():
    # Each of 3,072 pixels moves by 0.001 in the mean square.
    direction = normalize(jax.random.normal(jax.random.key(0), (32, 32, 3)))
    assert float(jnp.linalg.norm(0.001 * direction)) == pytest.approx(0.0554256, rel=2e-5)


def test_where_all_influences_vanish_the_direction_is_finite():
    variables = jax.tree.map(np.zeros_like, RECTIFIED)
    for x in ([0.3, 0.6], [0.0, 0.0]):
        found = direction_example(
            LinenForward(Rectified()), variables, jnp.array(x), settings=one_and_one()
        )
        np.testing.assert_array_equal(found.direction, [0, 0])


def test_an_offset_tail_follows_the_front_in_rank():
    influence = jnp.array([5.0, 1, 4, 0, 3, 2])
    part = partition(influence, Settings(front=1, tail=2, tail_mode='offset', offset=1))
    assert part.front.tolist() == [0] and part.tail.tolist() == [4, 5]
    part = partition(influence, Settings(front=1, tail=2))
    assert part.front.tolist() == [0] and part.tail.tolist() == [3, 1]


# ------------------------------------------------------------------------------------- calibration


@pytest.fixture(scope='module')
def model():
    """A small network, and images that it calls whatever it calls them."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(12, name='hidden')(4 * x.reshape(len(x), -1) - 2))
            return 3 * nn.Dense(3, name='head')(x)

    forward = LinenForward(Net())
    x = np.asarray(jax.random.uniform(jax.random.key(1), (48, 4, 2)))
    variables = Net().init(jax.random.key(5), x)
    y = np.asarray(forward(variables, x)[0].argmax(-1))
    assert len(set(y.tolist())) == 3
    return forward, variables, x, y


SMALL = Settings(front=2, tail=3, rho=(0.05, 0.2))


@pytest.fixture(scope='module')
def parameters(model):
    return calibrate(*model, settings=SMALL, batch_size=32)


def test_calibration_averages_the_directions_of_each_class(model, parameters):
    forward, variables, x, y = model
    found = directions(forward, variables, x, settings=SMALL)
    assert parameters.directions.shape == (3, 1, 4, 2)
    for label in range(3):
        mean = np.asarray(found.direction)[y == label].mean(0)
        expected = mean / (np.sqrt((mean**2).mean()) + 1e-5)
        np.testing.assert_allclose(parameters.directions[label, 0], expected, rtol=1e-4, atol=1e-6)
        influence = neurons.influence(forward, variables, x[y == label], unit='unit').mean(0)
        part = partition(influence, SMALL)
        np.testing.assert_array_equal(parameters.front['head:in'][label], part.front)
        np.testing.assert_array_equal(parameters.tail['head:in'][label], part.tail)
        h = np.asarray(found.activation['head:in'])[y == label]
        lift = h[:, part.front].sum(1) - h[:, part.tail].sum(1)
        np.testing.assert_allclose(parameters.mean[label], lift.mean(), rtol=1e-5)
        np.testing.assert_allclose(parameters.std[label], lift.std(), rtol=1e-4)


def test_misclassified_images_do_not_calibrate(model, parameters):
    forward, variables, x, y = model
    more = np.concatenate([x, np.random.default_rng(0).random((16, 4, 2), np.float32)])
    wrong = np.concatenate([y, (np.asarray(forward(variables, more[48:])[0].argmax(-1)) + 1) % 3])
    same = calibrate(forward, variables, more, wrong, settings=SMALL)
    np.testing.assert_allclose(same.directions, parameters.directions, rtol=1e-4, atol=1e-6)


def test_batches_and_devices_do_not_change_a_calibration(model, parameters):
    one = calibrate(*model, settings=SMALL, batch_size=5, mesh=parallel.data_mesh(1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, parameters
    )


def test_prototypes_are_centres_of_clusters(model):
    found = calibrate(*model, settings=dataclasses.replace(SMALL, prototypes=2))
    assert found.directions.shape == (3, 2, 4, 2)
    size = np.sqrt(np.square(found.directions).mean((2, 3)))
    np.testing.assert_allclose(size, 1, rtol=1e-3)
    assert np.abs(found.directions[:, 0] - found.directions[:, 1]).max(axis=(1, 2)).min() > 1e-3


def test_bad_input_is_refused_with_one_sentence(model):
    forward, variables, x, y = model
    bad = x.copy()
    bad[3, 0, 0] = np.nan
    for images, labels, message in (
        (2 * x, y, r'Pixels lie between .* in \[0, 1\]'),
        (bad, y, 'NaN or infinite'),
        (x[:0], y[:0], 'at least one image'),
        ((255 * x).astype(np.uint8), y, 'uint8.*divide bytes by 255'),
        (x[:, :3], y, r'shape \(3, 2\) and type float32, which the model does not take'),
        (x, y[:5], r'Labels have shape \(5,\)'),
        (x, y + 7, 'is not one of the 3 classes'),
        (x[y != 1], y[y != 1], 'Class 1 has 0 correctly classified'),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(forward, variables, images, labels, settings=SMALL)
    with pytest.raises(ValueError, match='batch_size is 0; it must be at least 1'):
        calibrate(forward, variables, x, y, settings=SMALL, batch_size=0)
    with pytest.raises(LayerError, match="Unknown layer 'hiden'"):
        calibrate(forward, variables, x, y, settings=Settings(layers=('hiden',)))
    with pytest.raises(ValueError, match='front 9 and tail 5 do not fit into 12'):
        calibrate(forward, variables, x, y, settings=Settings(front=9))


def test_directions_that_are_not_finite_are_named_with_class_and_layer(model):
    forward, variables, x, y = model

    def root(z):
        # Has no finite derivative where a number is 0.
        return z + 0 * jnp.sqrt(z)

    dark = x.copy()
    dark[7, 0, 0] = 0
    y = np.asarray(forward(variables, dark)[0].argmax(-1))
    for lossy, message in (
        (
            with_input_transform(forward, root),
            f"Class {y[7]} has 1 calibration images .* at 'head:in', 'hidden' are not finite; mend",
        ),
        (
            with_edits(forward, {'head:in': lambda h: h + root(h - h)}),
            "Class 0 has [1-9].* at 'hidden' are not finite; mend",
        ),
    ):
        settings = dataclasses.replace(SMALL, layers=('hidden', 'head:in'))
        with pytest.raises(ValueError, match=message):
            calibrate(lossy, variables, dark, y, settings=settings)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: (255 * x).astype(np.uint8), 'type uint8.*divide bytes by 255'),
        (lambda x: x[:, :3], r'Images have shape \(3, 2\).*calibrated on \(\d, \d\)'),
        (lambda x: 255 * x, r'Pixels lie between .* in \[0, 1\]'),
        (lambda x: np.where(x == x.max(), np.nan, x), 'NaN or infinite'),
    ],
)
def test_images_that_it_was_not_calibrated_on_are_refused(model, parameters, change, message):
    forward, variables, x, _ = model
    with pytest.raises(ValueError, match=message):
        apply(parameters, forward)(variables, change(x))


@pytest.mark.parametrize(
    'changes',
    [
        {'rule': 'avrage'},
        {'unit': 'filter'},
        {'tail_mode': 'low'},
        {'score': 'loss'},
        {'front': 0, 'tail': 0},
        {'rho': ()},
        {'rho': (0.2, 0.1)},
        {'rho': (-0.1,)},
        {'rho': ('a',)},
        {'rho': (0.1, float('nan'))},
        {'rho': 0.1},
        {'layers': (1,)},
        {'temperature': float('inf')},
        {'layers': 'head:in'},
        {'layers': ()},
        {'temperature': 0.0},
        {'top': 0},
        {'prototypes': 0},
        {'adaptive': 'no'},
        {'adaptive': True, 'rho': (0.1,)},
        {'offset': 3},
    ],
)
def test_settings_are_checked(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Settings(**changes)


def test_settings_from_lists_are_static_arguments():
    found = Settings(layers=['act1'], rho=[0.1])
    assert hash(found) == hash(Settings(layers=('act1',), rho=(0.1,)))


# ------------------------------------------------------------------------------------- the defence


@pytest.fixture(scope='module')
def cases(model, parameters):
    """Models and what was calibrated on them: plainly, of several layers, and of channels."""
    several = dataclasses.replace(
        SMALL, layers=('hidden', 'head:in'), tail_mode='offset', offset=1, prototypes=2, top=1
    )

    class Convolved(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(5, (3, 3), name='conv1')(4 * x.reshape(-1, 4, 4, 1) - 2)
            x = nn.Dropout(0.0, deterministic=True, name='act1')(nn.relu(x))
            return 3 * nn.Dense(3, name='head')(x.reshape(len(x), -1))

    forward, x = LinenForward(Convolved()), np.reshape(model[2], (-1, 4, 4))
    variables = Convolved().init(jax.random.key(2), x)
    y = np.asarray(forward(variables, x)[0].argmax(-1))
    channels = dataclasses.replace(
        SMALL, layers=('act1',), unit='channel', front=1, tail=2, tail_mode='offset', offset=1
    )
    convolved = forward, variables, x, y
    return {
        'plain': (model, parameters),
        'several': (model, calibrate(*model, settings=several)),
        'channels': (convolved, calibrate(*convolved, settings=channels)),
    }


def pooled(parameters, h):
    """Neurons of one image's activation of a layer."""
    h = np.asarray(h, np.float64)
    return h.sum((0, 1)) if parameters.settings.unit == 'channel' else h.ravel()


def lift(model, parameters, z, label):
    """J of one image for a class: its front minus its tail, of all layers."""
    layers = parameters.settings.layers
    tapped = model[0](model[1], z[None], taps=layers)[1]
    total = 0.0
    for layer in layers:
        h = pooled(parameters, tapped[layer][0])
        total += h[parameters.front[layer][label]].sum() - h[parameters.tail[layer][label]].sum()
    return total


@pytest.mark.parametrize('name', ['several', 'channels'])
def test_layers_add_up_and_channels_are_sums(cases, name):
    (forward, variables, x, y), parameters = cases[name]
    settings = parameters.settings
    assert np.bincount(y).min() > 3
    found = directions(forward, variables, x, settings=settings)
    parts = {
        layer: [partition(influence, settings) for influence in found.influence[layer][:4]]
        for layer in settings.layers
    }

    def total(z, row):
        tapped = forward(variables, z[None], taps=settings.layers)[1]
        value = 0.0
        for layer in settings.layers:
            h = tapped[layer][0]
            h = h.sum((0, 1)) if settings.unit == 'channel' else h
            value += h[parts[layer][row].front].sum() - h[parts[layer][row].tail].sum()
        return value

    for row in range(4):
        expected = normalize(jax.grad(total)(jnp.asarray(x[row]), row))
        np.testing.assert_allclose(found.direction[row], expected, rtol=1e-3, atol=1e-5)
    for label in range(3):
        for layer in settings.layers:
            influence = neurons.influence(
                forward, variables, x[y == label], layer=layer, unit=settings.unit
            )
            part = partition(influence.mean(0), settings)
            np.testing.assert_array_equal(parameters.front[layer][label], part.front)
            np.testing.assert_array_equal(parameters.tail[layer][label], part.tail)
        lifts = [lift((forward, variables), parameters, z, label) for z in x[y == label]]
        np.testing.assert_allclose(parameters.mean[label], np.mean(lifts), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(parameters.std[label], np.std(lifts), rtol=1e-4, atol=1e-5)


def oracle_logits(model, parameters, z):
    """The defence in plain loops: every candidate of one image, and the plain logits."""
    forward, variables, *_ = model
    settings = parameters.settings
    plain = np.asarray(forward(variables, z[None])[0][0])
    order = np.argsort(-plain, kind='stable')[: settings.top]
    candidates, owners = [], []
    for label in order:
        sizes = settings.rho
        if settings.adaptive:
            away = float(parameters.mean[label]) - lift(model, parameters, z, label)
            away /= float(parameters.std[label])
            sizes = [settings.rho[int(np.clip(np.floor(away), 0, len(settings.rho) - 1))]]
        for prototype in range(settings.prototypes):
            for size in sizes:
                step = size * np.asarray(parameters.directions[label, prototype])
                moved = np.clip(z + step, 0, 1)
                candidates.append(np.asarray(forward(variables, moved[None])[0][0]))
                owners.append(label)
    return plain, candidates, owners


def margin(logits, label):
    return logits[label] - np.delete(logits, label).max()


def combine(rule, plain, candidates, owners):
    every = [plain, *candidates]
    if rule == 'average':
        return np.mean(every, 0)
    if rule == 'margin':
        gains = [0.0] + [margin(c, k) - margin(plain, k) for c, k in zip(candidates, owners)]
        return every[int(np.argmax(gains))]
    votes = [int(np.argmax(logits)) for logits in every]
    winner = int(np.argmax(np.bincount(votes, minlength=len(plain))))
    return np.mean([logits for logits, vote in zip(every, votes) if vote == winner], 0)


@pytest.mark.parametrize(
    ('name', 'rule', 'sized'),
    [
        *(('plain', rule, sized) for rule in inverse_perturbation.RULES for sized in (False, True)),
        ('several', 'margin', False),
        ('several', 'majority', True),
        ('channels', 'average', True),
        ('channels', 'margin', False),
    ],
)
def test_the_defence_is_what_plain_loops_say(cases, name, rule, sized):
    model, parameters = cases[name]
    settings = dataclasses.replace(parameters.settings, rule=rule, adaptive=sized)
    chosen = dataclasses.replace(parameters, settings=settings)
    x = model[2][:12]
    found, _ = apply(chosen, model[0])(model[1], x)
    for logits, z in zip(found, x):
        expected = combine(rule, *oracle_logits(model, chosen, z))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    straight, _ = apply(chosen, model[0], gradient='straight_through')(model[1], x)
    np.testing.assert_allclose(straight, found, rtol=1e-4, atol=1e-5)


def test_candidates_are_classified_alone(model, parameters):
    x = model[2][:6]
    assert passes(parameters) == 5
    for number in range(4):
        found, _ = apply(parameters, model[0], candidate=number)(model[1], x)
        expected = [oracle_logits(model, parameters, z)[1][number] for z in x]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert set(adaptive(parameters, model[0])) == {
        'straight_through',
        'soft',
        *(f'candidate_{number}' for number in range(4)),
    }
    with pytest.raises(ValueError, match='candidate is 4; there are 4'):
        apply(parameters, model[0], candidate=4)
    with pytest.raises(ValueError, match='gradient'):
        apply(parameters, model[0], gradient='none')


def test_soft_choices_become_hard_ones_when_cold(model, parameters):
    for rule in inverse_perturbation.RULES:
        settings = dataclasses.replace(parameters.settings, rule=rule, temperature=1e-4)
        cold = dataclasses.replace(parameters, settings=settings)
        x = model[2][:12]
        hard, _ = apply(cold, model[0])(model[1], x)
        soft, _ = apply(cold, model[0], gradient='soft')(model[1], x)
        # Where two classes have equally many votes, soft choices take both.
        clear = np.ones(len(x), bool)
        if rule == 'majority':
            clear = np.array([is_clear(oracle_logits(model, cold, z)) for z in x])
        assert clear.any()
        np.testing.assert_allclose(soft[clear], hard[clear], rtol=1e-3, atol=1e-3)


def is_clear(candidates):
    """Whether one class has more votes than any other."""
    plain, moved, _ = candidates
    votes = np.sort(np.bincount([int(np.argmax(logits)) for logits in (plain, *moved)]))
    return len(votes) == 1 or votes[-1] > votes[-2]


def test_the_exact_gradient_is_the_derivative(model, parameters):
    defended = apply(parameters, model[0])
    z = 0.4 + 0.2 * model[2][:1]

    def value(z):
        return defended(model[1], z)[0][0, 1]

    gradient = jax.grad(value)(z)
    direction = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)
    slope = (value(z + 1e-3 * direction) - value(z - 1e-3 * direction)) / 2e-3
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2)


@pytest.mark.parametrize(
    ('rule', 'sized'), [*((rule, False) for rule in inverse_perturbation.RULES), ('average', True)]
)
def test_the_soft_gradient_is_the_derivative_of_soft_choices(model, parameters, rule, sized):
    # So short that nothing is clipped, through which these gradients pass.
    settings = dataclasses.replace(
        parameters.settings, rule=rule, rho=(0.02, 0.05), temperature=0.5, adaptive=sized
    )
    z = np.float64(0.4 + 0.2 * model[2][:1])
    # One deviation from the benign mean, where the size is half way between the two.
    lifts = [lift(model, parameters, z[0], label) for label in range(3)]
    chosen = dataclasses.replace(
        parameters, settings=settings, mean=jnp.float32(lifts) + parameters.std
    )
    soft = apply(chosen, model[0], gradient='soft')
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model[1])

        def value(z):
            return soft(variables, z)[0][0, 1]

        gradient = jax.grad(value)(z)
        direction = np.random.default_rng(0).normal(size=z.shape)
        slope = (value(z + 1e-7 * direction) - value(z - 1e-7 * direction)) / 2e-7
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5)


def test_the_straight_through_gradient_is_that_of_fixed_choices_unclipped(model, parameters):
    # So warm that soft choices, whose derivative stands in for that of hard ones, hardly change.
    settings = dataclasses.replace(parameters.settings, rule='average', temperature=1e6)
    warm = dataclasses.replace(parameters, settings=settings)
    forward, variables, x, _ = model
    defended = apply(warm, forward, gradient='straight_through')
    z = np.float32(np.round(x[:1]))

    def logit(z):
        return forward(variables, z)[0][0, 0]

    likeliest = int(np.asarray(forward(variables, z)[0]).argmax())
    moved = [z] + [
        np.clip(z + rho * np.asarray(parameters.directions[likeliest, 0]), 0, 1)
        for rho in settings.rho
    ]
    second = np.asarray(forward(variables, z)[0])[0].argsort()[-2]
    moved += [
        np.clip(z + rho * np.asarray(parameters.directions[second, 0]), 0, 1)
        for rho in settings.rho
    ]
    assert settings.top == 2 and any((image == z).any() for image in moved[1:])
    expected = np.mean([jax.grad(logit)(image) for image in moved], axis=0)
    found = jax.grad(lambda z: defended(variables, z)[0][0, 0])(z)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_straight_through_gradients_pass_clipping(model, parameters):
    # At the border every candidate that moves outwards is clipped: its exact gradient is 0.
    z = np.zeros((1, 4, 2), np.float32)

    def gradient(kind):
        forward = apply(parameters, model[0], gradient=kind)
        return jax.grad(lambda z: forward(model[1], z)[0][0, 0])(z)

    assert np.abs(gradient('exact') - gradient('straight_through')).max() > 1e-3


def test_candidates_that_attacks_follow_pass_clipping_too(model, parameters):
    # So warm that soft choices hardly change: what is left is the gradient of the moved image.
    settings = dataclasses.replace(parameters.settings, temperature=1e6)
    warm, (forward, variables) = dataclasses.replace(parameters, settings=settings), model[:2]
    z = np.zeros((1, 4, 2), np.float32)
    number = len(settings.rho) - 1

    def gradient(of):
        return np.asarray(jax.grad(lambda z: of(variables, z)[0][0, 0])(z))

    exact = apply(warm, forward, candidate=number)
    followed = inverse_perturbation.adaptive(warm, forward)[f'candidate_{number}']
    likeliest = int(np.asarray(forward(variables, z)[0]).argmax())
    along = np.asarray(warm.directions)[likeliest, 0]
    moved = np.clip(z + settings.rho[number] * along, 0, 1)
    np.testing.assert_allclose(followed(variables, z)[0], forward(variables, moved)[0], rtol=1e-5)
    np.testing.assert_allclose(
        gradient(followed), jax.grad(lambda z: forward(variables, z)[0][0, 0])(moved), atol=1e-4
    )
    held = along < 0
    assert held.any() and (gradient(exact)[0][held] == 0).all()
    assert (gradient(followed)[0][held] != 0).any()


def test_taps_read_the_image_itself_and_edits_reach_every_pass(model, parameters):
    forward, variables, x, _ = model
    defended = apply(parameters, forward)
    _, tapped = defended(variables, x[:4], taps=('hidden', '*:in'))
    expected = forward(variables, x[:4], taps=('hidden', '*:in'))[1]
    assert tapped.keys() == expected.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), tapped, expected)
    # With the features replaced by values of each image there is nothing left to move.
    features = np.random.default_rng(0).random((4, 12), np.float32)
    edits = {'head:in': lambda h: features}
    logits, _ = defended(variables, x[:4], edits=edits)
    plain = forward(variables, x[:4], edits=edits)[0]
    np.testing.assert_allclose(logits, plain, rtol=1e-5)
    adaptive_settings = dataclasses.replace(parameters.settings, adaptive=True)
    _, tapped = apply(dataclasses.replace(parameters, settings=adaptive_settings), forward)(
        variables, x[:4], taps=()
    )
    assert tapped == {}


def test_attacks_and_measures_run_on_a_defended_model(model, parameters):
    forward, variables, x, y = model
    defended = apply(parameters, forward)
    threat = Threat('linf', 0.1)
    found = attacks.pgd(defended, variables, x, y, jax.random.key(0), threat=threat, steps=5)
    judged = np.asarray(defended(variables, found.x_adv)[0].argmax(-1)) != y
    np.testing.assert_array_equal(found.success, judged)
    assert found.success.any()
    delta = neurons.sensitivity(defended, variables, x[:4], layer='head:in', method='first_order')
    assert np.isfinite(delta.delta).any()
    influence = neurons.influence(defended, variables, x[:4], layer='head:in')
    # The average over candidates whose features are all replaced is the plain head.
    np.testing.assert_allclose(
        influence, neurons.influence(forward, variables, x[:4], layer='head:in'), rtol=1e-4
    )


def test_new_parameters_need_no_new_program(model, parameters):
    traces = []

    @jax.jit
    def run(defended, variables, x):
        traces.append(1)
        return defended(variables, x)[0]

    for factor in (1, 2):
        other = dataclasses.replace(parameters, directions=factor * parameters.directions)
        run(apply(other, model[0]), model[1], model[2])
    assert len(traces) == 1


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_image_gives_finite_logits_and_batches_do_not_matter(model, parameters, seed):
    generator = np.random.default_rng(seed)
    x = generator.choice([0, 0.5, 1], (4, 4, 2)).astype(np.float32)
    together = _defended(model[0], parameters)(model[1], x)
    alone = _defended(model[0], parameters)(model[1], np.repeat(x[2:3], 4, 0))[0]
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[2], alone, rtol=1e-4, atol=1e-5)


def _defended(forward, parameters):
    def run(variables, x):
        return _run(apply(parameters, forward), variables, x)

    return run


@jax.jit
def _run(defended, variables, x):
    return defended(variables, x)[0]


def test_a_batch_over_eight_devices_needs_no_communication(model, parameters):
    mesh = parallel.data_mesh()
    defended = parallel.replicate(mesh, apply(parameters, model[0]))
    variables = parallel.replicate(mesh, model[1])
    x = parallel.shard(mesh, model[2][:16])
    text = _run.lower(defended, variables, x).compile().as_text()
    assert 'all-gather' not in text and 'all-reduce' not in text
    one, _ = apply(parameters, model[0])(model[1], model[2][:16])
    np.testing.assert_allclose(_run(defended, variables, x), one, rtol=1e-4, atol=1e-5)


def test_too_many_classes_to_try_are_refused(model, parameters):
    settings = dataclasses.replace(parameters.settings, top=4)
    with pytest.raises(ValueError, match='top is 4, but the model has 3 classes'):
        apply(dataclasses.replace(parameters, settings=settings), model[0])(model[1], model[2])


def test_a_model_of_other_classes_is_refused(model, parameters):
    forward, variables, x, y = model

    def four(variables, x, edits=None, taps=()):
        logits, tapped = forward(variables, x, edits=edits or {}, taps=taps)
        return jnp.concatenate([logits, logits[:, :1]], -1), tapped

    four = jax.tree_util.Partial(four)
    message = 'The model has 4 classes, but the defence was calibrated for 3'
    with pytest.raises(ValueError, match=message):
        apply(parameters, four)(variables, x[:2])
    with pytest.raises(ValueError, match=message):
        oracles.moved(
            four, variables, x[:2], x[:2], y[:2], jax.random.key(0), rho=0.1, parameters=parameters
        )


# ----------------------------------------------------------------------------------------- oracles


class Sum(nn.Module):
    """Class 1 where the two inputs add up to more than 1.95."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.ones, (2, 1))
        h = nn.Dropout(0.0, deterministic=True, name='act')(x)
        total = (h @ kernel)[:, 0]
        return jnp.stack([jnp.full_like(total, 1.95), total], -1)


def test_the_oracle_clips_after_it_has_judged():
    # Unclipped the move would succeed; the clipped image sums to 1.9 and fails.
    forward = LinenForward(Sum())
    variables = {'params': {'kernel': np.ones((2, 1), np.float32)}}
    settings = Settings(layers=('act',), front=1, tail=0)
    known = dataclasses.replace(
        inverse_perturbation.skeleton(settings), directions=jnp.ones((2, 1, 2))
    )
    x, x_adv = np.float32([[1, 0.99]]), np.float32([[0.995, 0.9]])
    found = oracles.moved(
        forward, variables, x, x_adv, np.int32([1]), jax.random.key(0), rho=0.1,
        parameters=known,
    )  # fmt: skip
    moved = np.asarray(found['influence, oracle'])[0]
    # The front unit is the first input, of gradient (1, 0) and root mean square 1 / sqrt(2).
    np.testing.assert_allclose(moved, [1, 0.9], atol=1e-6)
    assert forward(variables, moved[None])[0].argmax() == 0


def test_the_oracle_of_random_moves_recovers_whatever_they_do():
    # In most of a corner's directions clipping undoes a part of the move.
    forward = LinenForward(Sum())
    variables = {'params': {'kernel': np.ones((2, 1), np.float32)}}
    settings = Settings(layers=('act',), front=1, tail=0)
    known = dataclasses.replace(
        inverse_perturbation.skeleton(settings), directions=jnp.ones((2, 1, 2))
    )
    x_adv = np.tile(np.float32([[0.999, 0.945]]), (200, 1))
    found = oracles.moved(
        forward, variables, np.ones_like(x_adv), x_adv, np.ones(200, np.int32), jax.random.key(0),
        rho=0.1, parameters=known,
    )  # fmt: skip
    plain, chosen = (
        np.asarray(forward(variables, found[name])[0]).argmax(-1) == 1
        for name in ('random', 'random, oracle sign')
    )
    assert 0 < plain.sum() < chosen.sum() < 200
    assert not (plain & ~chosen).any()
    # Judged before they are clipped some moves would be taken for right that are not.
    assert (np.asarray(found['random']) == 1).any()


def test_oracles_move_by_rho_along_their_directions(model, parameters):
    forward, variables, x, y = model
    inside = 0.3 + 0.4 * x[:8]
    found = oracles.moved(
        forward, variables, x[:8], inside, y[:8], jax.random.key(0), rho=0.05, parameters=parameters
    )
    assert set(found) == set(oracles.NAMES)
    np.testing.assert_array_equal(found['identity'], inside)
    for name in oracles.NAMES[1:]:
        size = np.sqrt(np.square(found[name] - inside).mean((1, 2)))
        np.testing.assert_allclose(size, 0.05, rtol=1e-3)
    clean = np.asarray(directions(forward, variables, x[:8], settings=SMALL).direction)
    step = (np.asarray(found['influence, oracle']) - inside) / 0.05
    np.testing.assert_allclose(np.abs((step * clean).mean((1, 2))), 1, rtol=1e-3)
    taken_for = np.asarray(forward(variables, inside)[0]).argmax(-1)
    assert len(set(taken_for.tolist())) > 1
    own = np.asarray(parameters.directions)[taken_for, 0]
    np.testing.assert_allclose((found['class direction'] - inside) / 0.05, own, atol=1e-4)
    again = oracles.moved(
        forward, variables, x[4:8], inside[4:], y[4:8], jax.random.key(0), rho=0.05,
        parameters=parameters, index=jnp.arange(4, 8),
    )  # fmt: skip
    np.testing.assert_allclose(again['random'], found['random'][4:], atol=1e-6)


def test_parameters_are_a_pytree_of_arrays(parameters):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, parameters)
    assert isinstance(doubled, Parameters) and doubled.settings is parameters.settings

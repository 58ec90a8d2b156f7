"""Optimizers and schedules: values computed by hand, and which parameters they touch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurosens.config import Optimizer, Schedule
from neurosens.training import make_optimizer, make_schedule

CONSTANT = Schedule('constant', warmup=0.0)
PLAIN = Optimizer('sgd', learning_rate=0.5, momentum=0.0, nesterov=False, weight_decay=0.0)


def cosine(share, end=0.0):
    return end + (1 - end) * (1 + np.cos(np.pi * share)) / 2


@pytest.mark.parametrize(
    ('schedule', 'points'),
    [
        (Schedule('constant', warmup=0.0), {0: 1, 50: 1, 99: 1}),
        (Schedule('constant', warmup=0.2), {0: 0, 5: 0.25, 10: 0.5, 19: 0.95, 20: 1, 99: 1}),
        (
            Schedule('cosine', warmup=0.0),
            {0: 1, 25: cosine(0.25), 50: 0.5, 99: cosine(0.99), 100: 0},
        ),
        (
            Schedule('cosine', warmup=0.1, end=0.2),
            {0: 0, 1: 0.1, 9: 0.9, 10: 1, 55: 0.6, 70: cosine(60 / 90, 0.2), 100: 0.2},
        ),
        (
            Schedule('piecewise', warmup=0.0, boundaries=(0.5, 0.75), factor=0.1),
            {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01},
        ),
        (
            Schedule('piecewise', warmup=0.1, boundaries=(0.3, 0.6, 0.8), factor=0.5),
            {0: 0, 5: 0.5, 10: 1, 29: 1, 30: 0.5, 59: 0.5, 60: 0.25, 80: 0.125},
        ),
        (Schedule('piecewise', warmup=0.0, boundaries=(), factor=0.5), {0: 1, 99: 1}),
        (
            Schedule('onecycle', warmup=0.3),
            {
                0: 1 / 25,
                15: (1 / 25 + 1) / 2,
                30: 1,
                65: (1 + 1 / 250_000) / 2,
                100: 1 / 250_000,
            },
        ),
    ],
)
def test_a_schedule_passes_through_the_points_computed_by_hand(schedule, points):
    peak = 0.3
    rate = make_schedule(schedule, peak, updates=100)
    actual = {update: float(rate(update)) for update in points}
    assert actual == pytest.approx({u: peak * v for u, v in points.items()}, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize('name', ['constant', 'cosine', 'piecewise'])
def test_warm_up_rises_linearly_to_the_peak(name):
    rate = make_schedule(Schedule(name, warmup=0.25), 2.0, updates=40)
    rates = [float(rate(update)) for update in range(11)]
    np.testing.assert_allclose(rates, [0.2 * update for update in range(11)], rtol=1e-6)


@pytest.mark.parametrize('updates', [1, 2, 3])
@pytest.mark.parametrize('name', ['constant', 'cosine'])
def test_the_shortest_training_has_a_finite_rate(name, updates):
    rate = make_schedule(Schedule(name, warmup=0.9), 0.1, updates)
    assert all(0 <= float(rate(update)) <= 0.1 * (1 + 1e-6) for update in range(updates + 1))


@pytest.mark.parametrize(
    ('schedule', 'updates', 'message'),
    [
        (Schedule('linear'), 100, "Unknown schedule.name 'linear'"),
        (Schedule('onecycle', warmup=0.0), 100, "schedule.warmup is 0.0; 'onecycle' needs"),
        (Schedule('onecycle', warmup=0.1), 3, "schedule.warmup is 0.1; 'onecycle' needs"),
        (Schedule('piecewise', boundaries=(0.7, 0.5)), 100, 'schedule.boundaries are'),
        (Schedule('piecewise', boundaries=(0.5, 0.5)), 100, 'schedule.boundaries are'),
        (Schedule('piecewise', warmup=0.6, boundaries=(0.5,)), 100, 'schedule.boundaries are'),
        (Schedule('piecewise', boundaries=(0.5, 0.501)), 100, 'schedule.boundaries are'),
    ],
)
def test_an_impossible_schedule_is_refused(schedule, updates, message):
    with pytest.raises(ValueError, match='^' + message) as error:
        make_schedule(schedule, 0.1, updates)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


@pytest.mark.parametrize('name', ['adam', 'SGD', ''])
def test_an_unknown_optimizer_is_refused(name):
    with pytest.raises(ValueError, match=f"^Unknown optimizer.name '{name}'.*adamw"):
        make_optimizer(dataclasses.replace(PLAIN, name=name), CONSTANT, 10)


# ------------------------------------------------------------------------------- updates

PARAMETERS = {
    'conv': {'kernel': jnp.full((3, 3, 1, 4), 2.0), 'bias': jnp.full(4, 2.0)},
    'norm': {'scale': jnp.full(4, 2.0)},
    'dense': {'kernel': jnp.full((4, 3), 2.0), 'bias': jnp.full(4, 2.0)},
}


def changes(settings, *gradients, schedule=CONSTANT, parameters=PARAMETERS):
    """What a sequence of gradients adds to the parameters."""
    rule, _ = make_optimizer(settings, schedule, updates=10)
    state, current = rule.init(parameters), parameters
    update = jax.jit(rule.update)
    for gradient in gradients:
        updates, state = update(gradient, state, current)
        current = optax.apply_updates(current, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), current, parameters)


def like(parameters, value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), parameters)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_weight_decay_shrinks_kernels_and_nothing_else(name, momentum):
    settings = dataclasses.replace(PLAIN, name=name, momentum=momentum, weight_decay=0.01)
    change = changes(settings, like(PARAMETERS, 0.0))
    for layer, parameters in change.items():
        for parameter, value in parameters.items():
            expected = -0.5 * 0.01 * 2.0 if parameter == 'kernel' else 0.0
            np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=f'{layer}/{parameter}')


def test_nesterov_momentum_looks_ahead():
    gradient = like(PARAMETERS, 1.0)
    heavy = dataclasses.replace(PLAIN, momentum=0.9)
    ahead = dataclasses.replace(heavy, nesterov=True)
    for settings, expected in ((PLAIN, 2.0), (heavy, 1 + 1.9), (ahead, 1.9 + 2.71)):
        change = changes(settings, gradient, gradient)
        np.testing.assert_allclose(change['conv']['kernel'], -0.5 * expected, rtol=1e-6)


def test_adamw_uses_both_decay_rates():
    settings = dataclasses.replace(PLAIN, name='adamw', b1=0.5, b2=0.75, learning_rate=0.1)
    change = changes(settings, like(PARAMETERS, 1.0), like(PARAMETERS, 3.0))
    first = (0.5 * 0.5 * 1 + 0.5 * 3) / (1 - 0.5**2)
    second = (0.75 * 0.25 * 1 + 0.25 * 9) / (1 - 0.75**2)
    expected = -0.1 * (1 + first / np.sqrt(second))
    np.testing.assert_allclose(change['dense']['bias'], expected, rtol=1e-5)


@pytest.mark.parametrize(('clip', 'factor'), [(0.0, 1.0), (100.0, 1.0), (2.0, 0.2), (5.0, 0.5)])
def test_clipping_limits_the_global_norm(clip, factor):
    parameters = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
    gradient = {'a': jnp.array([6.0, 0.0]), 'b': jnp.array([8.0])}
    change = changes(dataclasses.replace(PLAIN, clip_norm=clip), gradient, parameters=parameters)
    np.testing.assert_allclose(change['a'], [-3.0 * factor, 0.0], rtol=1e-6)
    np.testing.assert_allclose(change['b'], [-4.0 * factor], rtol=1e-6)


def test_weight_decay_is_not_clipped():
    settings = dataclasses.replace(PLAIN, clip_norm=1e-6, weight_decay=0.1)
    change = changes(settings, like(PARAMETERS, 0.0))
    np.testing.assert_allclose(change['dense']['kernel'], -0.5 * 0.1 * 2.0, rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
@pytest.mark.parametrize('clip', [0.0, 0.1])
def test_accumulated_gradients_act_as_their_mean(name, clip):
    settings = dataclasses.replace(
        PLAIN, name=name, momentum=0.9, weight_decay=0.01, clip_norm=clip
    )
    generator = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape)), PARAMETERS)
        for _ in range(8)
    ]
    means = [
        jax.tree.map(lambda *leaves: sum(leaves) / 4, *gradients[first : first + 4])
        for first in (0, 4)
    ]
    # A schedule that moves shows that it counts updates and not batches.
    schedule = Schedule('cosine', warmup=0.0)
    whole = changes(settings, *means, schedule=schedule)
    pieces = changes(dataclasses.replace(settings, accumulate=4), *gradients, schedule=schedule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), pieces, whole)


def test_between_updates_nothing_moves():
    settings = dataclasses.replace(PLAIN, accumulate=3, weight_decay=0.01)
    gradient = like(PARAMETERS, 1.0)
    for count in (1, 2):
        jax.tree.map(
            lambda leaf: np.testing.assert_array_equal(leaf, 0),
            changes(settings, *[gradient] * count),
        )
    assert changes(settings, *[gradient] * 3)['conv']['bias'] == pytest.approx(-0.5)


def test_the_returned_schedule_is_the_one_in_use():
    schedule = Schedule('piecewise', warmup=0.0, boundaries=(0.1,), factor=0.5)
    _, rate = make_optimizer(PLAIN, schedule, updates=10)
    gradient = like(PARAMETERS, 1.0)
    one, two = (changes(PLAIN, *[gradient] * n, schedule=schedule) for n in (1, 2))
    assert float(rate(0)) == 0.5 and float(rate(1)) == 0.25
    np.testing.assert_allclose(one['dense']['bias'], -0.5)
    np.testing.assert_allclose(two['dense']['bias'] - one['dense']['bias'], -0.25)

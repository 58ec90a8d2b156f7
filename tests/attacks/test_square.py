"""Square: schedule, windows, and results that are inside the threat and never get worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import attacks
from neurosens.attacks import Threat, project, square
from neurosens.attacks.square import _proposer, _start, _window, bump, window_sides

EPS = {'linf': 0.08, 'l2': 0.5, 'l1': 2.5}
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}


def attack(net, norm, seed=0, **options):
    options = {'queries': 60, **options}
    threat = options.pop('threat', Threat(norm, EPS[norm]))
    key = jax.random.key(seed)
    result = square(net.forward, net.variables, net.x, net.y, key, threat=threat, **options)
    return jax.device_get(result)


def test_windows_shrink_by_the_schedule_of_the_paper():
    sides = window_sides(5000, 32, 32, 0.8, odd=False)
    halvings = [10, 50, 200, 500, 1000, 2000, 4000]
    for count, (before, after) in enumerate(zip([0, *halvings], [*halvings, 4999])):
        expected = max(round((0.8 / 2**count * 1024) ** 0.5), 1)
        np.testing.assert_array_equal(sides[before + 1 : after + 1], expected)
    stretched = window_sides(1000, 32, 32, 0.8, odd=False, rescale=True)
    np.testing.assert_array_equal(stretched, window_sides(10_000, 32, 32, 0.8, odd=False)[::10])
    odd = window_sides(10_000, 32, 32, 0.8, odd=True)
    assert (odd % 2 == 1).all() and odd.min() == 3
    assert window_sides(5, 4, 6, 1.0, odd=True).max() == 3


@pytest.mark.parametrize(('power', 'norm'), [(2, 2), (4, 1)])
@pytest.mark.parametrize('side', [2, 3, 6, 7])
def test_a_bump_has_two_signs_and_norm_one(power, norm, side):
    values = bump(side, power)
    assert np.linalg.norm(values.ravel(), norm) == pytest.approx(1)
    assert (values[: side // 2] > 0).all() and (values[side // 2 :] < 0).all()
    # The largest of each half is where its rectangles start.
    assert values[: side // 2].max() == values[side // 4, side // 2]


def test_a_small_bump_by_hand():
    # Upper half: a row of 3, in the middle of the first rectangle, 1 and then 1/4 on all of them.
    upper = np.array([0.25, 1.25, 0.25])
    lower = np.array([[0.25] * 3, [0.25, 1.25, 0.25]])
    upper /= np.linalg.norm(upper)
    lower /= np.linalg.norm(lower)
    expected = np.concatenate([upper[None], -lower]) / 2**0.5
    np.testing.assert_allclose(bump(3, 2), expected)


def authors_move(norm, x, image, side, places, signs, turned, eps):
    """A query of the authors' program in l2 or l1, written afresh in NumPy; before the box."""
    (row, column), (row2, column2) = places
    change = np.float64(image - x)
    channels = change.shape[-1]
    window = slice(row, row + side), slice(column, column + side)
    other = slice(row2, row2 + side), slice(column2, column2 + side)
    order = 2 if norm == 'l2' else 1

    def by_channel(values):
        return np.linalg.norm(values.reshape(-1, channels), order, axis=0)

    held = np.zeros_like(change)
    held[window], held[other] = change[window], change[other]
    whole, freed = (np.linalg.norm(v.ravel(), order) for v in (change, held))
    pattern = bump(side, 2 if norm == 'l2' else 4)
    new = (pattern.T if turned else pattern)[..., None] * signs
    new = new + change[window] / (1e-12 + by_channel(change[window]))
    new = new / (1e-12 + by_channel(new))
    if norm == 'l2':
        new = new * np.sqrt(max(eps**2 - whole**2, 0) / channels + freed**2)
    else:
        new = new * (max(eps - whole, 0) / channels + freed) * channels
    change[other] = 0
    change[window] = new
    return change


@pytest.mark.parametrize(('norm', 'eps'), [('l2', 0.5), ('l1', 2.0)])
def test_queries_are_those_of_the_plain_program(norm, eps):
    threat, x = Threat(norm, eps), jnp.full((15, 15, 3), 0.5)
    sides = window_sides(200, 15, 15, 0.8, odd=True)
    propose = jax.jit(_proposer(threat, x, sides))
    image, turns = _start(threat, x, jax.random.key(0)), set()
    for number in (3, 20, 80, 150, 199):
        key = jax.random.fold_in(jax.random.key(1), number)
        sign_key, turn_key, *place_keys = jax.random.split(key, 4)
        places = [tuple(map(int, _window(x, int(sides[number]), own)[:2])) for own in place_keys]
        signs = np.asarray(jax.random.rademacher(sign_key, (3,), jnp.float32))
        turned = bool(jax.random.bernoulli(turn_key))
        turns.add(turned)
        expected = authors_move(norm, x, image, int(sides[number]), places, signs, turned, eps)
        if norm == 'l2':
            expected = expected * eps / np.linalg.norm(expected)
        else:
            moved = project(Threat('l1', eps * (1 - 1e-6)), x, x + jnp.float32(expected))
            expected = np.asarray(moved - x)
        image = propose(image, number, key)
        np.testing.assert_allclose(np.asarray(image - x), expected, atol=2e-6)
    assert turns == {False, True}


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_the_result_is_inside_the_threat_and_what_it_claims(net, norm):
    result = attack(net, norm, restarts=2)
    change = np.float64(result.x_adv - net.x).reshape(16, -1)
    assert (np.linalg.norm(change, ORDER[norm], axis=1) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    np.testing.assert_array_equal(result.success, logits.argmax(-1) != net.y)
    np.testing.assert_array_equal(result.x_adv[~net.correct], net.x[~net.correct])
    clean = np.asarray(
        attacks.pgd(
            net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=Threat(norm, 0.0)
        ).margin
    )
    assert (result.margin <= clean + 1e-5).all() and (result.margin < clean - 1e-3).any()
    robust = ~result.success
    np.testing.assert_array_equal(result.queries[robust], 1 + 2 * 60)
    assert (result.queries[~net.correct] == 1).all()


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_more_queries_are_never_weaker(net, norm):
    margins = [attack(net, norm, queries=queries).margin for queries in (1, 20, 150)]
    robust = margins[2] > 0
    assert (margins[1][robust] <= margins[0][robust] + 1e-6).all()
    assert (margins[2][robust] <= margins[1][robust] + 1e-6).all()
    assert (margins[2] > 0).sum() <= (margins[0] > 0).sum()


def test_it_finds_what_gradients_find(net):
    found = attack(net, 'linf', queries=400)
    threat = Threat('linf', EPS['linf'])
    strong = attacks.pgd(
        net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=threat, restarts=3
    )
    assert found.success.sum() >= 0.8 * strong.success.sum()
    assert strong.success.sum() > (~net.correct).sum()


def test_radius_zero_returns_the_clean_images(net):
    for norm in ORDER:
        result = attack(net, norm, threat=Threat(norm, 0.0), queries=5)
        np.testing.assert_allclose(result.x_adv, net.x, atol=1e-7)


def test_an_example_gets_the_same_result_in_any_batch(net):
    index = np.arange(16) + 7
    whole = attack(net, 'l2', index=index)
    rows = np.array([12, 2, 4])
    part = square(
        net.forward,
        net.variables,
        net.x[rows],
        net.y[rows],
        jax.random.key(0),
        threat=Threat('l2', EPS['l2']),
        queries=60,
        index=index[rows],
    )
    np.testing.assert_allclose(part.x_adv, whole.x_adv[rows], atol=1e-5)
    np.testing.assert_array_equal(part.queries, whole.queries[rows])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'queries': 0}, 'queries is 0; it must be at least 1'),
        ({'share': 0.0}, 'share is 0.0; it must be greater than 0, at most 1'),
        ({'restarts': 0}, 'restarts is 0; it must be at least 1'),
    ],
)
def test_an_impossible_attack_is_refused(net, options, message):
    with pytest.raises(ValueError, match=message):
        attack(net, 'linf', **options)


def test_vectors_have_no_windows(linear, linear_forward):
    variables, x, y, _, _ = linear
    with pytest.raises(ValueError, match=r'shape \(3, 4\); Square needs'):
        square(
            linear_forward, variables, x, y, jax.random.key(0), threat=Threat('l2', 1, (-9.0, 9.0))
        )

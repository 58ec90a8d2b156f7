"""Square: schedule, windows, and results that are inside the threat and never get worse."""

import jax
import numpy as np
import pytest

from neurosens import attacks
from neurosens.attacks import Threat, square
from neurosens.attacks.square import bump, window_sides

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

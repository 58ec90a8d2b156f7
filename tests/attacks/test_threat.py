"""Threat models: projections land inside, starts are uniform, steps are steepest."""

import hypothesis
import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import attacks
from neurosens.attacks import Threat, inside, project, random_start, steepest_ascent
from neurosens.attacks.threat import kth_largest, largest_float
from neurosens.attacks.threat import length as attack_length

SHAPE = (3, 4, 2)
F1 = np.float32(1)
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}
DUAL = {'linf': 1, 'l2': 2, 'l1': np.inf}

norms = st.sampled_from(['linf', 'l2', 'l1'])
radii = st.just(0.0) | st.floats(2**-10, 3, width=32)
bounds = st.sampled_from([(0.0, 1.0), (-1.0, 2.0)])
images = npst.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32, allow_subnormal=False))
anywhere = npst.arrays(
    np.float32, SHAPE, elements=st.floats(-5, 5, width=32, allow_subnormal=False)
)
keys = st.integers(0, 2**31 - 1)

QUICK = hypothesis.settings(deadline=None, max_examples=50)

# A threat's only leaf is its radius: one program per norm and box.
fast_project = jax.jit(project)
fast_start = jax.jit(lambda threat, clean, seed: random_start(threat, clean, jax.random.key(seed)))
fast_ascent = jax.jit(steepest_ascent)


def length(norm, change):
    return np.linalg.norm(np.asarray(change, np.float64).ravel(), ORDER[norm])


def assert_inside(threat, clean, moved):
    """Checks ball and box up to rounding, without the library's own test."""
    assert length(threat.norm, np.float64(moved) - clean) <= threat.eps * (1 + 1e-6) + 1e-6
    assert threat.bounds[0] <= moved.min() and moved.max() <= threat.bounds[1]


@QUICK
@hypothesis.given(norms, radii, bounds, images, anywhere)
# All pixels but one far outside: the common shrinkage is large beside the moves that it leaves.
@hypothesis.example(
    'l1', 1.0, (0.0, 1.0), np.zeros(SHAPE, np.float32), np.r_[0, [5] * 23].reshape(SHAPE) * F1
)
def test_a_projection_lands_inside_the_ball_and_the_box(norm, eps, box, clean, moved):
    threat = Threat(norm, eps, box)
    projected = np.asarray(fast_project(threat, clean, moved))
    assert_inside(threat, clean, projected)
    assert inside(threat, clean, projected)


@QUICK
@hypothesis.given(norms, radii, bounds, images, anywhere)
def test_projecting_twice_is_projecting_once(norm, eps, box, clean, moved):
    threat = Threat(norm, eps, box)
    once = fast_project(threat, clean, moved)
    np.testing.assert_allclose(fast_project(threat, clean, once), once, rtol=0, atol=2e-6)


@QUICK
@hypothesis.given(norms, radii, bounds, images, anywhere)
def test_a_projection_follows_its_definition(norm, eps, box, clean, moved):
    change = np.float64(moved) - clean
    if norm == 'linf':
        change = np.clip(change, -eps, eps)
    elif norm == 'l1':
        change = sorted_projection(clean, change, eps, box)
    elif length(norm, change) > eps:
        change *= eps / length(norm, change)
    expected = np.clip(clean + change, *box)
    actual = fast_project(Threat(norm, eps, box), clean, moved)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def sorted_projection(clean, change, eps, box):
    """The l1 projection by sorting the breakpoints of the shrinkage, in double precision."""
    clean = np.float64(clean)
    wish = np.abs(change)
    room = np.where(change > 0, box[1] - clean, clean - box[0])

    def moves(shrink):
        return np.clip(wish - shrink, 0, room)

    if eps == 0:
        return np.zeros_like(wish)
    shrink = 0.0
    if moves(0).sum() > eps:
        breaks = np.unique(
            np.maximum(np.concatenate([wish.ravel(), (wish - room).ravel(), [0]]), 0)
        )
        sums = np.array([moves(point).sum() for point in breaks])
        last = np.flatnonzero(sums >= eps)[-1]
        low, high = breaks[last : last + 2]
        shrink = low + (sums[last] - eps) * (high - low) / (sums[last] - sums[last + 1])
    return np.sign(change) * moves(shrink)


def test_the_box_caps_one_pixel_and_the_l1_ball_the_other():
    moved = project(Threat('l1', 0.6), jnp.array([0.5, 0.5]), jnp.array([1.5, 0.7]))
    np.testing.assert_allclose(moved, [1.0, 0.6], atol=1e-6)


@QUICK
@hypothesis.given(radii, images, anywhere, anywhere)
def test_the_l1_projection_is_nearest_and_brings_points_no_further_apart(eps, clean, one, other):
    threat = Threat('l1', eps)
    first, second = (np.float64(fast_project(threat, clean, moved)) for moved in (one, other))
    assert np.linalg.norm(first - second) <= np.linalg.norm(np.float64(one) - other) + 1e-5
    # Nearest: the way back to the point makes a blunt angle with the way to any other point.
    slack = 1e-5 * (1 + np.abs(one).sum())
    assert ((np.float64(one) - first) * (second - first)).sum() <= slack


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
@QUICK
@hypothesis.given(clean=images, moved=anywhere)
def test_a_ball_of_radius_zero_holds_only_the_clean_image(norm, clean, moved):
    threat = Threat(norm, 0.0)
    np.testing.assert_array_equal(fast_project(threat, clean, moved), clean)
    np.testing.assert_array_equal(fast_start(threat, clean, 0), clean)


@QUICK
@hypothesis.given(norms, radii, bounds, images, keys)
def test_a_random_start_is_inside_the_ball_and_the_box(norm, eps, box, clean, seed):
    threat = Threat(norm, eps, box)
    assert_inside(threat, clean, np.asarray(fast_start(threat, clean, seed)))


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_random_starts_are_uniform_in_the_ball(norm):
    threat, count, size = Threat(norm, 0.25, (-9.0, 9.0)), 20_000, 6
    clean = jnp.linspace(-1, 1, size)
    draw = jax.vmap(lambda key: random_start(threat, clean, key) - clean)
    changes = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), count)), np.float64)
    # The share of a ball inside a concentric one of share r of its radius is r^n.
    radius = np.linalg.norm(changes, ORDER[norm], axis=1) / threat.eps
    levels = np.quantile(radius**size, np.linspace(0.1, 0.9, 9))
    np.testing.assert_allclose(levels, np.linspace(0.1, 0.9, 9), atol=0.02)
    # No direction is preferred.
    np.testing.assert_allclose(changes.mean(0), 0, atol=5 * threat.eps / np.sqrt(count))
    covariance = np.cov(changes.T) / changes.var()
    np.testing.assert_allclose(covariance, np.eye(size), atol=0.05)


@QUICK
@hypothesis.given(norms, anywhere)
def test_the_steepest_direction_has_unit_norm_and_reaches_the_dual_norm(norm, gradient):
    hypothesis.assume(np.abs(gradient).max() > 1e-10)
    # A share of 0 moves a single pixel, the steepest of all for l1.
    direction = np.asarray(fast_ascent(Threat(norm, 1.0), gradient, share=0.0), np.float64)
    assert length(norm, direction) == pytest.approx(1, rel=1e-5)
    dual = np.linalg.norm(np.float64(gradient).ravel(), DUAL[norm])
    assert (direction * gradient).sum() == pytest.approx(dual, rel=1e-5)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
@pytest.mark.parametrize('scale', [1e-30, 1e-18, 1e18, 1e30])
def test_the_steepest_direction_does_not_depend_on_the_size_of_the_gradient(norm, scale):
    gradient = jnp.array([3.0, -4.0, 0.0])
    threat = Threat(norm, 1.0)
    np.testing.assert_allclose(
        fast_ascent(threat, gradient * scale), fast_ascent(threat, gradient), rtol=1e-5
    )


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_without_a_gradient_there_is_no_step(norm):
    np.testing.assert_array_equal(fast_ascent(Threat(norm, 1.0), jnp.zeros(SHAPE)), 0)


@pytest.mark.parametrize(('share', 'moving'), [(0.0, 1), (0.1, 3), (0.25, 6), (0.5, 12), (1.0, 24)])
def test_a_sparse_step_moves_the_largest_pixels_by_the_same_amount(share, moving):
    gradient = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    direction = np.asarray(fast_ascent(Threat('l1', 1.0), gradient, share=share))
    largest = np.sort(np.abs(gradient).ravel())[-moving]
    expected = np.where(np.abs(gradient) >= largest, np.sign(gradient), 0) / moving
    np.testing.assert_allclose(direction, expected, rtol=1e-6)


@QUICK
@hypothesis.given(anywhere, st.integers(1, 24))
def test_the_k_th_largest_value_is_exact(values, k):
    found = jax.jit(kth_largest)(np.abs(values), k)
    assert found == np.sort(np.abs(values).ravel())[-k]


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_the_largest_float_is_found_to_the_last_bit(dtype):
    for limit in (0.0, 1e-4, 0.3, 1.0, 77.7, float(np.finfo(dtype).max)):
        limit = np.asarray(limit, dtype)
        assert largest_float(lambda value, limit=limit: value <= limit, dtype) == limit
    assert largest_float(lambda value: value < 0, dtype) == 0


@pytest.mark.parametrize(
    ('norm', 'change', 'expected'),
    [
        ('linf', [0.1, -0.1, 0.1], True),
        ('linf', [0.0, -0.102, 0.0], False),
        ('l2', [0.06, 0.08, 0.0], True),
        ('l2', [0.06, 0.08, 0.02], False),
        ('linf', [0.0, 0.0, 0.0], True),
        ('l1', [0.05, -0.05, 0.0], True),
        ('l1', [0.05, -0.05, 0.01], False),
    ],
)
def test_inside_means_inside_the_ball(norm, change, expected):
    clean = jnp.full(3, 0.5)
    assert inside(Threat(norm, 0.1), clean, clean + jnp.array(change)) == expected


@pytest.mark.parametrize(('value', 'expected'), [(1.001, False), (-0.001, False), (1.0, True)])
def test_inside_means_inside_the_box(value, expected):
    clean = jnp.full(3, 0.5)
    assert inside(Threat('linf', 1.0), clean, clean.at[1].set(value)) == expected


# ---------------------------------------------------------------------------- counted pixels


counted = st.integers(0, 12) | st.floats(0, 12, width=32)


@QUICK
@hypothesis.given(counted, bounds, images, anywhere)
@hypothesis.example(3, (0.0, 1.0), np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32))
def test_no_choice_of_as_many_pixels_is_nearer_than_the_l0_projection(eps, box, clean, moved):
    projected = np.asarray(fast_project(Threat('l0', eps, box), clean, moved), np.float64)
    changed = (projected != clean).any(-1)
    assert changed.sum() <= eps
    assert box[0] <= projected.min() and projected.max() <= box[1]
    # The choice of each pixel is apart from the others, so the best are those that save most.
    staying = ((clean - np.float64(moved)) ** 2).sum(-1)
    going = ((np.clip(moved, *box) - np.float64(moved)) ** 2).sum(-1)
    saved = np.sort((staying - going).ravel())[::-1][: int(eps)]
    nearest = staying.sum() - saved.sum()
    assert ((projected - moved) ** 2).sum() <= nearest + 1e-4
    assert inside(Threat('l0', eps, box), clean, projected)


@QUICK
@hypothesis.given(counted, bounds, images, keys)
def test_a_random_start_changes_as_many_pixels_as_it_may(eps, box, clean, seed):
    moved = np.asarray(fast_start(Threat('l0', eps, box), clean, seed))
    assert (moved != clean).any(-1).sum() == int(eps)
    assert box[0] <= moved.min() and moved.max() <= box[1]


def test_the_length_in_l0_counts_pixels_and_a_step_goes_along_the_gradient():
    change = np.zeros(SHAPE, np.float32)
    change[0, 1] = 1e-30, 5
    change[2, 3, 1] = -2
    assert attack_length('l0', change) == 2
    # Without channels, each number is a pixel.
    assert attack_length('l0', change.reshape(12, 2)) == 3
    np.testing.assert_allclose(fast_ascent(Threat('l0', 1), change), change / 7, rtol=1e-6)


def test_a_threat_carries_its_radius_as_its_only_leaf():
    leaves, structure = jax.tree.flatten(Threat('l2', 0.5, (-1.0, 1.0)))
    assert leaves == [0.5]
    assert jax.tree.unflatten(structure, [0.25]) == Threat('l2', 0.25, (-1.0, 1.0))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('l3', 0.1), "Unknown norm 'l3'"),
        (('linf', -0.1), 'eps is -0.1; it must be at least 0.'),
        (('linf', float('nan')), 'eps is nan; it must be finite, at least 0.'),
        (('linf', np.float32(-1)), 'eps is -1.0; it must be at least 0.'),
        (('l2', np.float32('nan')), 'eps is nan; it must be finite, at least 0.'),
        (('l2', 0.1, (1.0, 0.0)), r'bounds are \(1.0, 0.0\); the first must be below the second.'),
        (('l2', 0.1, (0.5, 0.5)), r'bounds are \(0.5, 0.5\)'),
    ],
)
def test_an_impossible_threat_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        Threat(*arguments)


@pytest.mark.parametrize(
    'attack', ['apgd', 'autoattack', 'deepfool', 'fab', 'fmn', 'ni_fgsm', 'square']
)
def test_attacks_that_need_a_norm_do_not_count_pixels(net, attack):
    with pytest.raises(ValueError, match='works in linf, l2, l1, not in l0; there use pgd'):
        getattr(attacks, attack)(
            net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=Threat('l0', 3)
        )

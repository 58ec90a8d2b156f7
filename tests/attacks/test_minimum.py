"""Minimum-norm attacks: exact on linear models, near the best everywhere, consistent results."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from neurosens.attacks import (
    Threat,
    carlini_wagner,
    deepfool,
    fab,
    fmn,
    median_distance,
    pgd,
    robust_accuracy,
)
from neurosens.attacks.fab import to_hyperplane

QUICK = hypothesis.settings(deadline=None, max_examples=60)
BOX = (-10.0, 10.0)
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}
DUAL = {'linf': 1, 'l2': 2, 'l1': np.inf}
METHODS = {
    'fab': (functools.partial(fab, steps=30), ('linf', 'l2', 'l1')),
    'deepfool': (deepfool, ('linf', 'l2', 'l1')),
    'fmn': (functools.partial(fmn, steps=150), ('linf', 'l2', 'l1')),
    'carlini_wagner': (
        functools.partial(
            carlini_wagner, steps=200, searches=8, step_size=0.03, initial_weight=1.0
        ),
        ('l2',),
    ),
}
CASES = [(name, norm) for name, (_, norms) in METHODS.items() for norm in norms]


def lengths(norm, change):
    return np.linalg.norm(np.float64(change).reshape(len(change), -1), ORDER[norm], axis=1)


def run(net, name, norm, eps=math.inf, seed=0, **options):
    method = functools.partial(METHODS[name][0], threat=Threat(norm, eps), **options)
    key = jax.random.key(seed)
    return jax.device_get(method(net.forward, net.variables, net.x, net.y, key))


# ------------------------------------------------------------------------------- hyperplanes


fast_to_hyperplane = jax.jit(to_hyperplane, static_argnames=('norm', 'bounds', 'early_end'))
points = npst.arrays(np.float32, 6, elements=st.floats(0, 1, width=32))
normals = npst.arrays(np.float32, 6, elements=st.integers(-8, 8).map(lambda v: np.float32(v / 4)))


def best_length(norm, point, normal, excess):
    """The smallest norm of a change to the hyperplane within the box, by linear programming."""
    count = len(point)
    if norm == 'l1':
        # change = up - down, the sum of both is smallest.
        cost, equal = np.ones(2 * count), np.concatenate([normal, -normal])[None]
        limits = [(0, 1 - p) for p in point] + [(0, p) for p in point]
        found = scipy.optimize.linprog(cost, A_eq=equal, b_eq=[-excess], bounds=limits)
    else:
        # |change_i| <= t, and t is smallest.
        cost = np.concatenate([np.zeros(count), [1]])
        above = np.concatenate([np.eye(count), -np.ones((count, 1))], 1)
        below = np.concatenate([-np.eye(count), -np.ones((count, 1))], 1)
        found = scipy.optimize.linprog(
            cost,
            A_ub=np.concatenate([above, below]),
            b_ub=np.zeros(2 * count),
            A_eq=np.concatenate([normal, [0]])[None],
            b_eq=[-excess],
            bounds=[(-p, 1 - p) for p in point] + [(0, None)],
        )
    return found.fun if found.success else None


@pytest.mark.parametrize(('norm', 'early_end'), [('linf', True), ('linf', False), ('l1', False)])
@QUICK
@hypothesis.given(points, normals, st.floats(-3, 3))
def test_the_way_to_a_hyperplane_is_the_shortest_in_the_box(norm, early_end, point, normal, excess):
    hypothesis.assume(np.abs(normal).max() > 0)
    found = fast_to_hyperplane(norm, point, normal, excess, (0.0, 1.0), early_end=early_end)
    change = np.float64(found)
    assert (point + change >= -1e-6).all() and (point + change <= 1 + 1e-6).all()
    best = best_length(norm, np.float64(point), np.float64(normal), excess)
    reached = abs(excess + (normal * change).sum())
    if best is None:
        # It does not cross the box: every pixel goes to its end.
        most = np.where(normal * np.sign(excess or 1) > 0, point, 1 - point)
        np.testing.assert_allclose(np.abs(change), np.where(normal == 0, 0, most), atol=1e-6)
    elif reached > 1e-4:
        # On the edge of what the box allows, rounding decides.
        assert reached < 1e-3
    else:
        assert np.linalg.norm(change, ORDER[norm]) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize('early_end', [True, False])
@QUICK
@hypothesis.given(points, normals, st.floats(-3, 3))
def test_the_euclidean_way_satisfies_the_optimality_conditions(early_end, point, normal, excess):
    hypothesis.assume(np.abs(normal).max() > 0)
    found = fast_to_hyperplane('l2', point, normal, excess, (0.0, 1.0), early_end=early_end)
    change = np.float64(found)
    room = np.where(normal * np.sign(excess or 1) > 0, point, 1 - point)
    full = np.abs(change) >= room - 1e-6
    moving = ~full & (normal != 0)
    # What the box does not stop moves in proportion to the normal.
    if moving.any():
        time = np.abs(change[moving]) / np.abs(normal[moving])
        np.testing.assert_allclose(time, time[0], rtol=1e-3, atol=1e-5)
        assert abs(excess + (normal * change).sum()) < 1e-4
        stopped = full & (normal != 0)
        assert (room[stopped] <= time.max() * np.abs(normal[stopped]) + 1e-4).all()


@pytest.mark.parametrize('early_end', [True, False])
@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_half_precision_comes_near_the_hyperplane_too(dtype, norm, early_end):
    random = np.random.default_rng(0)
    point = jnp.asarray(random.random(50), dtype)
    normal = jnp.asarray(random.normal(size=50), dtype)
    # Logits, and with them the excess, are in single precision.
    change = fast_to_hyperplane(
        norm, point, normal, np.float32(2.0), (0.0, 1.0), early_end=early_end
    )
    share = float((np.float64(normal) * np.float64(change)).sum()) / -2
    assert share == pytest.approx(1, abs=0.05 if dtype == jnp.bfloat16 else 1e-5)


def test_pixels_without_room_hide_no_others():
    point, normal = np.float32([0, 0.5]), np.float32([1, 1e-25])
    for early_end in (True, False):
        change = fast_to_hyperplane(
            'l2', point, normal, np.float32(2e-26), (0.0, 1.0), early_end=early_end
        )
        np.testing.assert_allclose(change, [0, -0.2], rtol=1e-5)


@pytest.mark.parametrize(('name', 'norm'), CASES)
def test_half_precision_images_are_taken(net, name, norm):
    x = jnp.asarray(net.x, jnp.bfloat16)
    method = functools.partial(METHODS[name][0], threat=Threat(norm, 5.0))
    result = method(net.forward, net.variables, x, net.y, jax.random.key(0))
    assert result.x_adv.dtype == jnp.bfloat16
    # With eight bits not every boundary has an image behind it that is near.
    found = np.isfinite(result.distance)
    assert found[net.correct].any()
    after = np.asarray(net.forward(net.variables, result.x_adv)[0]).argmax(-1)
    np.testing.assert_array_equal(after[found] != net.y[found], True)


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(('name', 'norm'), CASES)
def test_a_linear_model_is_fooled_at_its_margin_over_the_dual_norm(
    linear, linear_forward, name, norm
):
    variables, x, y, weight, margin = linear
    method = METHODS[name][0]
    threat = Threat(norm, math.inf, BOX)
    if name == 'carlini_wagner':
        # Its steps are shares of the box, which is wide here.
        method = functools.partial(method, step_size=0.003, steps=800)
    result = method(linear_forward, variables, x, y, jax.random.key(0), threat=threat)
    expected = margin / np.linalg.norm(weight, DUAL[norm])
    slack = {'fab': 0.02, 'deepfool': 0.021, 'fmn': 0.02, 'carlini_wagner': 0.05}[name]
    assert (result.distance >= expected * (1 - 1e-4)).all()
    np.testing.assert_allclose(result.distance, expected, rtol=slack, atol=1e-4)


def linear_classes(variables, x, edits=None, taps=()):
    return x.reshape(len(x), -1) @ variables['kernel'], {}


several = jax.tree_util.Partial(linear_classes)


@pytest.mark.parametrize(('name', 'norm'), CASES)
def test_of_several_linear_classes_the_nearest_boundary_is_found(name, norm):
    generator = np.random.default_rng(3)
    kernel = generator.normal(size=(12, 4)).astype(np.float32)
    x = generator.normal(size=(16, 12)).astype(np.float32)
    logits = np.float64(x) @ kernel
    y = logits.argmax(-1)
    method, rows = METHODS[name][0], np.arange(16)
    if name == 'carlini_wagner':
        method = functools.partial(method, step_size=0.003, steps=800)
    variables = {'kernel': jnp.asarray(kernel)}
    result = method(several, variables, x, y, jax.random.key(0), threat=Threat(norm, math.inf, BOX))
    normals = np.float64(kernel.T[None] - kernel.T[y][:, None])
    with np.errstate(invalid='ignore'):
        distances = (logits[rows, y, None] - logits) / np.linalg.norm(normals, DUAL[norm], axis=-1)
    distances[rows, y] = np.inf
    expected = distances.min(-1)
    # The nearest one is not always that of the runner-up.
    assert (distances.argmin(-1) != np.argsort(logits)[:, -2]).any()
    assert (result.distance >= expected * (1 - 1e-4)).all()
    slack = {'fab': 0.02, 'deepfool': 0.021, 'fmn': 0.03, 'carlini_wagner': 0.05}[name]
    near = np.asarray(result.distance) <= expected * (1 + slack) + 1e-4
    # FMN and Carlini & Wagner follow the margin of the runner-up, and need not see a nearer class.
    assert near.mean() >= {'fab': 1, 'deepfool': 1, 'fmn': 0.7, 'carlini_wagner': 0.7}[name]


@pytest.mark.parametrize(('name', 'norm'), CASES)
def test_results_are_consistent(net, name, norm):
    result = run(net, name, norm)
    assert np.isfinite(result.distance).mean() > 0.8
    np.testing.assert_allclose(
        result.distance[result.success], lengths(norm, result.x_adv - net.x)[result.success],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    np.testing.assert_array_equal(result.success, logits.argmax(-1) != net.y)
    np.testing.assert_array_equal(result.success, np.isfinite(result.distance))
    np.testing.assert_array_equal(result.distance == 0, ~net.correct)
    np.testing.assert_array_equal(result.x_adv[~net.correct], net.x[~net.correct])


@pytest.mark.parametrize(('name', 'norm'), CASES)
def test_a_radius_only_decides_on_success(net, name, norm):
    free = run(net, name, norm)
    eps = float(np.median(free.distance[net.correct]))
    bound = run(net, name, norm, eps)
    assert 0 < bound.success[net.correct].mean() < 1
    np.testing.assert_array_equal(bound.success, bound.distance <= eps)
    np.testing.assert_array_equal(bound.x_adv[~bound.success], net.x[~bound.success])
    np.testing.assert_allclose(bound.distance, free.distance, rtol=1e-4)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_pgd_finds_nothing_much_nearer(net, norm):
    nearest = np.min([run(net, name, norm).distance for name in ('fab', 'fmn')], axis=0)
    for factor, fewest in ((0.8, 0), (1.2, 1)):
        found = np.zeros(len(nearest))
        for place in np.flatnonzero(net.correct):
            result = pgd(
                net.forward,
                net.variables,
                net.x[place][None],
                net.y[place][None],
                jax.random.key(0),
                threat=Threat(norm, factor * float(nearest[place])),
                steps=40,
            )
            found[place] = result.success[0]
        share = found[net.correct].mean()
        assert share >= 0.85 if fewest else share <= 0.15, (factor, share)


def test_fab_with_a_target_goes_to_that_boundary_and_restarts_help(linear, linear_forward, net):
    order = np.argsort(-np.asarray(net.logits), -1)
    each = [run(net, 'fab', 'l2', target=order[:, rank]).distance for rank in range(1, 4)]
    whole = run(net, 'fab', 'l2').distance
    # Several ways find at least what one does, up to its luck.
    assert (np.min(each, 0)[net.correct] <= 1.1 * whole[net.correct]).all()
    assert (np.max(each, 0)[net.correct] > 1.1 * whole[net.correct]).any()
    again = run(net, 'fab', 'l2', eps=1.0, restarts=3).distance
    assert (again <= run(net, 'fab', 'l2', eps=1.0).distance * (1 + 1e-6)).all()


def test_a_confident_attack_goes_further(net):
    near = run(net, 'carlini_wagner', 'l2')
    far = run(net, 'carlini_wagner', 'l2', confidence=1.0)
    both = near.success & far.success & net.correct
    assert both.any()
    assert (far.margin[both] <= -1 + 1e-4).all()
    assert (far.distance[both] > near.distance[both]).all()


@pytest.mark.parametrize('name', ['fmn', 'carlini_wagner'])
@pytest.mark.parametrize('rank', [1, 2, 3])
def test_targets_are_reached_though_other_classes_are_nearer(net, name, rank):
    target = np.argsort(-np.asarray(net.logits), -1)[:, rank]
    result = run(net, name, 'l2', target=target)
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    np.testing.assert_array_equal(logits.argmax(-1) == target, result.success)
    assert result.success.mean() > 0.6
    assert (result.distance > 0).all()


def test_what_is_taken_for_the_target_already_stays(net):
    target = np.asarray(net.logits).argmax(-1)
    for name in ('fmn', 'carlini_wagner'):
        result = run(net, name, 'l2', target=target)
        np.testing.assert_array_equal(result.x_adv, net.x)
        assert result.success.all() and (result.distance == 0).all()


def test_a_confident_target_leads_all_other_classes(net):
    target = np.argsort(-np.asarray(net.logits), -1)[:, 2]
    result = run(net, 'carlini_wagner', 'l2', target=target, confidence=1.0)
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    lead = np.sort(logits, -1)
    assert result.success.any()
    np.testing.assert_array_equal(logits.argmax(-1)[result.success], target[result.success])
    assert ((lead[:, -1] - lead[:, -2])[result.success] >= 1 - 1e-4).all()


# ----------------------------------------------------------------------- curves and errors


def test_the_curve_counts_what_no_perturbation_fools():
    distance = np.array([0.0, 0.1, 0.3, np.inf])
    curve = robust_accuracy(distance, np.array([0.0, 0.05, 0.1, 0.2, 0.3, 9.0]))
    np.testing.assert_allclose(curve, [0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


def test_medians_have_an_interval_that_holds_them():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        median = median_distance(random.exponential(size=100), samples=300)
        assert median.low < median.value < median.high
        held += median.low < np.log(2) < median.high
    assert held >= 51
    distance = random.exponential(size=400)
    median = median_distance(distance)
    spread = median.high - median.low
    assert median_distance(distance[:40]).high - median_distance(distance[:40]).low > spread
    # Half of the images cannot be fooled: a median may be infinite, and is never NaN.
    endless = np.where(np.arange(400) % 2, np.inf, distance)
    assert median_distance(endless).high == np.inf
    assert median_distance(np.full(5, np.inf)) == (np.inf, np.inf, np.inf)
    with pytest.raises(ValueError, match='no distance'):
        median_distance(np.array([]))


@pytest.mark.parametrize(
    ('method', 'norm', 'options', 'message'),
    [
        (fab, 'l2', {'steps': 0}, 'steps is 0; it must be at least 1'),
        (fab, 'l2', {'steps': 7.0}, 'steps is 7.0; it must be a whole number, such as 7'),
        (fab, 'l2', {'beta': 2.0}, 'beta is 2.0; it must be at least 0, at most 1'),
        (deepfool, 'l2', {'classes': 1}, 'classes is 1; it must be at least 2'),
        (deepfool, 'l2', {'overshoot': -0.1}, 'overshoot is -0.1; it must be at least 0'),
        (fmn, 'l2', {'gamma': 1.5}, 'gamma is 1.5; it must be at least 0, at most 1'),
        (carlini_wagner, 'l1', {}, "minimises the l2 norm; the threat's is 'l1'"),
        (carlini_wagner, 'l2', {'searches': 0}, 'searches is 0; it must be at least 1'),
    ],
)
def test_an_impossible_attack_is_refused(net, method, norm, options, message):
    with pytest.raises(ValueError, match=message):
        method(
            net.forward,
            net.variables,
            net.x,
            net.y,
            jax.random.key(0),
            threat=Threat(norm, math.inf),
            **options,
        )


def test_images_that_deepfool_does_not_fool_come_back_as_they_were(net):
    result = run(net, 'deepfool', 'l2', steps=1, overshoot=0.0)
    lost = ~np.asarray(result.success)
    assert lost.any() and np.isinf(result.distance[lost]).all()
    np.testing.assert_array_equal(result.x_adv[lost], net.x[lost])


def test_deepfool_may_look_at_the_nearest_classes_only(net):
    few = run(net, 'deepfool', 'l2', classes=2)
    whole = run(net, 'deepfool', 'l2')
    assert jnp.isfinite(few.distance).all()
    assert np.median(few.distance) <= 2 * np.median(whole.distance) + 1e-6


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_deepfool_crosses_a_boundary_though_the_box_takes_half_of_its_steps(linear_forward, norm):
    """Half of the pixels are at a bound: the steps shrink, and would end before the boundary."""
    generator = np.random.default_rng(0)
    free = np.arange(400) < 200
    weight = generator.uniform(0.5, 1.5, 400) * np.where(free, generator.choice([-1, 1], 400), 1)
    weight = weight.astype(np.float32)
    x = np.where(free, generator.uniform(-0.6, -0.4, (40, 400)), 0).astype(np.float32)
    # As much as the others have room for.
    needed = 0.3 * np.abs(weight[free]).sum()
    labels, key = np.zeros(1, np.int32), jax.random.key(0)
    distances = []
    for image in x:
        bias = np.float32([0, -np.float64(image) @ weight - needed])
        head = {'kernel': np.stack([np.zeros(400, np.float32), weight], -1), 'bias': bias}
        variables, threat = {'params': {'head': head}}, Threat(norm, math.inf, (-1.0, 0.0))
        found = deepfool(linear_forward, variables, image[None], labels, key, threat=threat)
        distances.append(found.distance[0])
    expected = needed / np.linalg.norm(weight[free], DUAL[norm])
    np.testing.assert_allclose(distances, expected, rtol=0.03)

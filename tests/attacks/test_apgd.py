"""Auto-PGD: checkpoints, step sizes and iterates of a plain program, and never weaker than PGD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens.attacks import Threat, apgd, losses, pgd
from neurosens.attacks.apgd import apgd_example, checkpoints
from neurosens.attacks.objective import objective

EPS = {'linf': 0.05, 'l2': 0.3, 'l1': 1.5}
ORDER = {'linf': np.inf, 'l2': 2, 'l1': 1}
BOX = (-10.0, 10.0)


def attack(net, norm, seed=0, eps=None, **options):
    threat = Threat(norm, EPS[norm] if eps is None else eps)
    key = jax.random.key(seed)
    result = apgd(net.forward, net.variables, net.x, net.y, key, threat=threat, **options)
    return jax.device_get(result)


def distances(norm, change):
    return np.linalg.norm(np.float64(change).reshape(len(change), -1), ORDER[norm], axis=1)


@pytest.mark.parametrize(
    ('steps', 'norm', 'expected'),
    [
        (100, 'linf', [22, 41, 57, 70, 80, 87, 93, 99]),
        (10, 'l2', [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1, 'linf', [1]),
        (100, 'l1', list(range(4, 101, 4))),
        (20, 'l1', list(range(1, 21))),
    ],
)
def test_step_sizes_are_reviewed_where_the_paper_says(steps, norm, expected):
    np.testing.assert_array_equal(np.flatnonzero(checkpoints(steps, norm)) + 1, expected)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
@pytest.mark.parametrize('options', [{}, {'loss': 'dlr', 'restarts': 2}, {'large_start': True}])
def test_the_result_is_inside_the_threat_and_what_it_claims(net, norm, options):
    result = attack(net, norm, steps=12, **options)
    assert (distances(norm, result.x_adv - net.x) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    np.testing.assert_array_equal(result.success, logits.argmax(-1) != net.y)
    np.testing.assert_array_equal(result.x_adv[~net.correct], net.x[~net.correct])
    assert result.success[net.correct].any() or norm == 'l1'
    stages = {True: 3, False: 1}[options.get('large_start', False)]
    expected = 1 + options.get('restarts', 1) * (12 + stages)
    np.testing.assert_array_equal(result.queries, expected)


def test_targets_are_left_for_any_other_class(net):
    order = np.argsort(-np.asarray(net.logits), -1)
    found = [attack(net, 'linf', steps=12, loss='dlr', target=order[:, rank]) for rank in (1, 2, 3)]
    for result in found:
        logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
        np.testing.assert_array_equal(result.success, logits.argmax(-1) != net.y)
    assert np.any([result.success[net.correct] for result in found])
    assert (found[0].x_adv != found[2].x_adv)[net.correct].any()


@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2), ('l1', np.inf)])
def test_a_linear_margin_falls_by_the_dual_norm(linear, linear_forward, norm, dual):
    variables, x, y, weight, margin = linear
    threat = Threat(norm, 0.1, BOX)
    result = apgd(linear_forward, variables, x, y, jax.random.key(0), threat=threat)
    drop = 0.1 * np.linalg.norm(weight, dual)
    broken = margin < drop
    # Where it cannot fool, it reaches the largest loss there is.
    reached = (margin - result.margin)[~broken]
    # Sparse steps never end on the single steepest of so few pixels.
    least = 0.7 if norm == 'l1' else 0.998
    assert (reached >= least * drop).all() and (reached <= 1.002 * drop).all()
    assert (reached <= drop * (1 + 1e-4)).all()
    if norm != 'l1':
        np.testing.assert_array_equal(result.success, broken)


def reference(net, norm, eps, steps, start, gradient_of, first_rises):
    """The authors' loop for one image, written afresh in NumPy double precision."""
    x = np.float64(net)
    project = {
        'linf': lambda v: np.clip(v, x - eps, x + eps),
        'l2': lambda v: x + (v - x) * min(1, eps / (np.linalg.norm(v - x) + 1e-12)),
    }[norm]

    def inside(v):
        return np.clip(project(v), 0, 1)

    def direction(g):
        return np.sign(g) if norm == 'linf' else g / (np.linalg.norm(g) + 1e-12)

    current, previous = start, start
    loss, grad = gradient_of(current)
    best, best_grad, best_loss = current, grad, loss
    size, halved, at_review = 2 * eps, True, loss
    history, sizes = [], []
    ends = set(np.flatnonzero(checkpoints(steps, norm)))
    window = 0
    for number in range(steps):
        ahead = inside(current + size * direction(grad))
        a = 0.75 if number else 1.0
        moved = inside(current + a * (ahead - current) + (1 - a) * (current - previous))
        previous, current = current, moved
        last = loss
        loss, grad = gradient_of(current)
        history.append(loss > (0.0 if number == 0 and first_rises else last))
        window += 1
        if loss > best_loss:
            best, best_grad, best_loss = current, grad, loss
        if number in ends:
            oscillates = sum(history[-window:]) <= 0.75 * window
            stuck = not halved and at_review >= best_loss
            halved = oscillates or stuck
            at_review, window = best_loss, 0
            if halved:
                size /= 2
                current, grad = best, best_grad
        sizes.append(size)
    return best_loss, best, sizes


@pytest.mark.parametrize('first_rises', [False, True])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_iterates_are_those_of_the_plain_program(net, norm, first_rises):
    with jax.enable_x64(True):
        place = int(np.flatnonzero(net.correct)[1])
        x, y = jnp.asarray(net.x[place], jnp.float64), net.y[place]
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), net.variables)
        eps, steps, key = 0.02, 30, jax.random.key(4)
        module = net.forward.module.clone(dtype=jnp.float64)
        forward = type(net.forward)(module, {'train': False})
        _, climb = objective(forward, variables, y, losses.cross_entropy)
        climb = jax.jit(climb)

        def gradient_of(image):
            gradient, iterate = climb(jnp.asarray(image), key)
            return float(iterate.loss), np.asarray(gradient)

        # The start of the first restart, drawn as the attack draws it.
        start_key = jax.random.fold_in(jax.random.fold_in(key, 0), 1)
        if norm == 'linf':
            change = jax.random.uniform(start_key, x.shape, x.dtype, -1.0, 1.0)
            change = eps * change / jnp.abs(change).max()
        else:
            change = jax.random.normal(start_key, x.shape, x.dtype)
            change = eps * change / jnp.linalg.norm(change.ravel())
        start = np.clip(np.asarray(x + change), 0, 1)
        loss, best, sizes = reference(x, norm, eps, steps, start, gradient_of, first_rises)
        result = apgd_example(
            forward,
            variables,
            x,
            y,
            key,
            threat=Threat(norm, eps),
            steps=steps,
            first_rises=first_rises,
        )
        assert not result.success, 'of a fooled image the latest iterate is returned, not the best'
        assert sizes[-1] < 2 * eps
        np.testing.assert_allclose(result.x_adv, best, rtol=0, atol=1e-9)
        assert gradient_of(result.x_adv)[0] == pytest.approx(loss, rel=1e-9)


def nearest_l1(x, v, eps):
    """The nearest image to v in the l1 ball of x and the box, found by bisection."""
    wish, room = np.abs(v - x), np.where(v > x, 1 - x, x)
    low, high = 0.0, wish.max()
    if np.minimum(wish, room).sum() <= eps:
        return x + np.sign(v - x) * np.minimum(wish, room)
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(wish - middle, 0, room).sum() > eps:
            low = middle
        else:
            high = middle
    return x + np.sign(v - x) * np.clip(wish - high, 0, room)


def sparse_reference(x, radii, start, gradient_of):
    """The authors' loop in l1 for one image: a run for each of (eps, steps), written afresh."""
    best, whole = start, len(radii) == 1
    for eps, steps in radii:
        current = nearest_l1(x, best, eps)
        moved = np.count_nonzero(current != x)
        share, last = (0.2, x.size) if whole else (moved / x.size / 1.5, moved)
        loss, grad = gradient_of(current)
        best, best_grad, best_loss, size = current, grad, loss, eps
        for number in range(steps):
            order = np.sort(np.abs(grad).ravel())
            least = order[min(int((1 - share) * x.size), x.size - 1)]
            sparse = np.sign(grad) * (np.abs(grad) >= least)
            current = nearest_l1(x, current + size * sparse / np.abs(sparse).sum(), eps)
            loss, grad = gradient_of(current)
            if loss > best_loss:
                best, best_grad, best_loss = current, grad, loss
            if (number + 1) % max(int(0.04 * steps), 1) == 0:
                moved = np.count_nonzero(best != x)
                if moved / last < 0.95:
                    size, current, grad = eps, best, best_grad
                else:
                    size = min(max(size / 1.5, eps / 10), eps)
                share, last = moved / x.size / 1.5, moved
    return best_loss, best


@pytest.mark.parametrize('large_start', [False, True])
def test_sparse_iterates_are_those_of_the_plain_program(net, large_start):
    with jax.enable_x64(True):
        place = int(np.flatnonzero(net.correct)[1])
        x, y = jnp.asarray(net.x[place], jnp.float64), net.y[place]
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), net.variables)
        module = net.forward.module.clone(dtype=jnp.float64)
        forward = type(net.forward)(module, {'train': False})
        _, climb = objective(forward, variables, y, losses.cross_entropy)
        climb, key, eps, steps = jax.jit(climb), jax.random.key(4), 0.3, 60

        def gradient_of(image):
            gradient, iterate = climb(jnp.asarray(image), key)
            return float(iterate.loss), np.asarray(gradient)

        draws = np.random.default_rng(2).normal(size=x.shape)
        start = np.asarray(x) + draws
        radii = [(3 * eps, 18), (2 * eps, 18), (eps, 24)] if large_start else [(eps, steps)]
        loss, best = sparse_reference(np.asarray(x), radii, start, gradient_of)
        result = apgd_example(
            forward,
            variables,
            x,
            y,
            key,
            threat=Threat('l1', eps),
            steps=steps,
            large_start=large_start,
            start=jnp.asarray(start),
        )
        assert not result.success, 'of a fooled image the latest iterate is returned, not the best'
        np.testing.assert_allclose(result.x_adv, best, rtol=0, atol=1e-9)
        assert gradient_of(result.x_adv)[0] == pytest.approx(loss, rel=1e-9)
        assert loss > gradient_of(x)[0] + 1e-3


def random_starts(net, key):
    """Where linf runs with this key begin, drawn as the attack draws it."""

    def draw(x, number):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, number), 0), 1)
        change = jax.random.uniform(own, x.shape, x.dtype, -1.0, 1.0)
        return jnp.clip(x + EPS['linf'] * change / jnp.abs(change).max(), 0, 1)

    return jax.vmap(draw)(net.x, jnp.arange(len(net.x)))


def test_the_first_run_begins_where_it_is_told(net):
    random = attack(net, 'linf', steps=8)
    starts = random_starts(net, jax.random.key(0))
    given = attack(net, 'linf', seed=9, steps=8, start=starts)
    np.testing.assert_allclose(given.x_adv, random.x_adv, atol=1e-6)
    np.testing.assert_array_equal(given.success, random.success)
    # Further runs do not repeat it, and a start outside the ball counts as its projection.
    far = np.clip(net.x + 3 * (starts - net.x), 0, 1)
    nearest = np.clip(far, net.x - EPS['linf'], net.x + EPS['linf'])
    outside = attack(net, 'linf', steps=8, start=far)
    np.testing.assert_allclose(
        outside.x_adv, attack(net, 'linf', steps=8, start=nearest).x_adv, atol=1e-6
    )
    again = attack(net, 'linf', seed=9, steps=8, restarts=2, start=starts)
    assert (again.margin <= given.margin + 1e-6)[~again.success].all()
    assert (again.margin < given.margin - 1e-6).any()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_it_is_not_weaker_than_pgd_with_as_many_steps(net, norm):
    threat = Threat(norm, EPS[norm])
    mine = attack(net, norm, steps=40)
    theirs = pgd(
        net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=threat, steps=40
    )
    assert mine.success.sum() >= theirs.success.sum()
    robust = ~mine.success & ~theirs.success
    assert (mine.margin - theirs.margin)[robust].mean() <= 1e-3


@pytest.mark.parametrize('norm', ['linf', 'l1'])
def test_an_example_gets_the_same_result_in_any_batch(net, norm):
    index = np.arange(16) + 100
    whole = attack(net, norm, steps=8, index=index)
    rows = np.array([3, 0, 9, 14])
    threat, key = Threat(norm, EPS[norm]), jax.random.key(0)
    part = apgd(
        net.forward,
        net.variables,
        net.x[rows],
        net.y[rows],
        key,
        threat=threat,
        steps=8,
        index=index[rows],
    )
    np.testing.assert_allclose(part.x_adv, whole.x_adv[rows], atol=1e-5)
    single = jax.jit(functools.partial(apgd_example, net.forward, steps=8))
    alone = single(net.variables, net.x[9], net.y[9], jax.random.fold_in(key, 109), threat=threat)
    np.testing.assert_allclose(alone.x_adv, whole.x_adv[9], atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'steps': 0}, 'steps is 0; it must be at least 1'),
        ({'steps': 7.0}, 'steps is 7.0; it must be a whole number, such as 7'),
        ({'restarts': True}, 'restarts is True; it must be a whole number'),
        ({'restarts': 0}, 'restarts is 0; it must be at least 1'),
        ({'rho': 1.5}, 'rho is 1.5; it must be at least 0, at most 1'),
        ({'loss': 'hinge'}, "Unknown loss 'hinge'"),
        ({'start': np.zeros((1, 2, 2, 1))}, r'start has shape \(1, 2, 2, 1\); it must have that'),
        ({'start': 'nan'}, 'pixels that are NaN'),
    ],
)
def test_an_impossible_attack_is_refused(net, options, message):
    if isinstance(options.get('start'), str):
        options = {'start': np.full_like(net.x, np.nan)}
    with pytest.raises(ValueError, match=message):
        attack(net, 'linf', **options)


def test_two_classes_have_no_ratio(linear, linear_forward):
    variables, x, y, _, _ = linear
    with pytest.raises(ValueError, match='dlr needs at least 3 classes, the model has 2'):
        apgd(
            linear_forward,
            variables,
            x,
            y,
            jax.random.key(0),
            threat=Threat('linf', 0.1, BOX),
            loss='dlr',
        )

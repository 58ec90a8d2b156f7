"""Attacks: inside the threat, never weaker than doing nothing, exact where the answer is known."""

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
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

from neurosens import models, parallel
from neurosens.attacks import Threat, bim, fgsm, fgsm_rs, mi_fgsm, ni_fgsm, pgd, pgd_example
from neurosens.forward import LinenForward, NNXForward

BATCH = 16
FEW = hypothesis.settings(max_examples=15, deadline=None)
radii = st.floats(2**-10, 1.0, width=32)
norms = st.sampled_from(['linf', 'l2', 'l1'])


class Linear(nn.Module):
    """One linear layer."""

    classes: int = 2

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, name='head')(x.reshape(len(x), -1))


LINEAR = LinenForward(Linear())


def attack(net, threat, seed=0, method=pgd, **options):
    key = jax.random.key(seed)
    return jax.device_get(
        method(net.forward, net.variables, net.x, net.y, key, threat=threat, **options)
    )


@functools.partial(jax.jit, static_argnums=0)
def evaluate(forward, variables, x, y):
    """Cross-entropy, margin and misclassification of a batch, written afresh."""
    logits = forward(variables, x)[0]
    own = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
    others = jnp.where(jax.nn.one_hot(y, logits.shape[-1]) > 0, -jnp.inf, logits).max(-1)
    return jax.nn.logsumexp(logits, -1) - own, own - others, logits.argmax(-1) != y


def distances(norm, change):
    return np.linalg.norm(
        np.asarray(change, np.float64).reshape(len(change), -1),
        {'linf': np.inf, 'l2': 2, 'l1': 1}[norm],
        axis=1,
    )


def assert_not_weaker(strong, weak, loss_strong, loss_weak, tolerance=0.0):
    """Fools wherever the other does; where both or neither do, the loss is no smaller."""
    assert (strong >= weak).all()
    same = strong == weak
    assert (loss_strong[same] >= loss_weak[same] - tolerance).all()


# ------------------------------------------------------------------------------ invariants


@FEW
@hypothesis.given(norms, radii, st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_the_result_is_inside_the_threat_and_what_it_claims(net, norm, eps, steps, restarts, seed):
    result = attack(net, Threat(norm, eps), seed, steps=steps, restarts=restarts)
    assert (distances(norm, result.x_adv - net.x) <= eps * (1 + 1e-5) + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    loss, margin, fooled = evaluate(net.forward, net.variables, result.x_adv, net.y)
    np.testing.assert_array_equal(result.success, fooled)
    np.testing.assert_allclose(result.margin, margin, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(result.success, result.margin < 0)
    clean_loss, _, wrong = evaluate(net.forward, net.variables, net.x, net.y)
    assert_not_weaker(result.success, np.asarray(wrong), loss, clean_loss, 1e-5)
    np.testing.assert_array_equal(result.x_adv[~net.correct], net.x[~net.correct])
    np.testing.assert_array_equal(result.queries, 1 + restarts * (steps + 1))


def test_the_setting_has_images_of_every_fate(net):
    weak, strong = (attack(net, Threat('linf', eps), steps=5) for eps in (0.01, 0.5))
    assert 2 <= (~net.correct).sum() <= BATCH - 6
    assert weak.success.sum() < strong.success.sum()


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
@pytest.mark.parametrize('method', [pgd, fgsm])
def test_radius_zero_returns_the_clean_images(net, norm, method):
    result = method(
        net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=Threat(norm, 0.0)
    )
    np.testing.assert_array_equal(result.x_adv, net.x)
    np.testing.assert_array_equal(result.success, ~net.correct)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_more_restarts_are_never_weaker(net, norm):
    threat = Threat(norm, {'linf': 0.05, 'l2': 0.3}[norm])
    results = [attack(net, threat, steps=3, restarts=restarts) for restarts in (1, 2, 4)]
    losses = [
        np.asarray(evaluate(net.forward, net.variables, result.x_adv, net.y)[0])
        for result in results
    ]
    for number in (0, 1):
        strong, weak = results[number + 1], results[number]
        assert_not_weaker(strong.success, weak.success, losses[number + 1], losses[number], 1e-6)
    assert (losses[2] > losses[0] + 1e-5).any()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_pgd_is_stronger_than_doing_one_step(net, norm):
    threat = Threat(norm, {'linf': 0.1, 'l2': 0.6}[norm])
    one = fgsm(net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=threat)
    many = attack(net, threat, steps=20, restarts=2)
    gain = many.margin - one.margin
    assert gain[net.correct].mean() < 0
    assert many.success.sum() >= one.success.sum()


def test_fgsm_needs_no_randomness(net):
    results = [
        fgsm(net.forward, net.variables, net.x, net.y, jax.random.key(seed), threat=threat)
        for seed, threat in ((0, Threat('linf', 0.1)), (1, Threat('linf', 0.1)))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    np.testing.assert_array_equal(results[0].queries, 2)


def test_other_keys_start_elsewhere(net):
    first, second = (attack(net, Threat('linf', 0.1), seed, steps=2) for seed in (0, 1))
    assert (first.x_adv[net.correct] != second.x_adv[net.correct]).any()


# ------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2), ('l1', np.inf)])
@pytest.mark.parametrize('eps', [0.01, 0.1, 1.0])
def test_a_single_step_lowers_a_linear_margin_by_the_dual_norm(linear, norm, dual, eps):
    variables, x, y, weight, margin = linear
    threat = Threat(norm, eps, (-10.0, 10.0))
    result = fgsm(LINEAR, variables, x, y, jax.random.key(0), threat=threat)
    expected = margin - eps * np.linalg.norm(weight, dual)
    np.testing.assert_allclose(result.margin, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.success, expected < 0)


@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2)])
@pytest.mark.parametrize('start', ['clean', 'random'])
def test_pgd_lowers_a_linear_margin_by_the_dual_norm(linear, norm, dual, start):
    variables, x, y, weight, margin = linear
    threat, key = Threat(norm, 0.1, (-10.0, 10.0)), jax.random.key(0)
    result = pgd(LINEAR, variables, x, y, key, threat=threat, steps=100, start=start)
    drop = 0.1 * np.linalg.norm(weight, dual)
    # From a random start the l2 attack turns towards the optimum, step by step.
    slack = 0.05 if (norm, start) == ('l2', 'random') else 1e-5
    np.testing.assert_allclose(result.margin, margin - drop, rtol=0, atol=slack * drop + 1e-5)
    assert (result.margin >= margin - drop - 1e-5).all()


def test_pgd_in_l1_spends_the_ball_on_the_steepest_pixel(linear):
    variables, x, y, weight, margin = linear
    options = {'threat': Threat('l1', 0.5, (-10.0, 10.0)), 'steps': 30, 'share': 1 / weight.size}
    result = pgd(LINEAR, variables, x, y, jax.random.key(0), start='clean', **options)
    steepest = np.abs(weight).argmax()
    expected = margin - 0.5 * np.abs(weight[steepest])
    np.testing.assert_allclose(result.margin, expected, rtol=1e-5, atol=1e-5)
    change = (result.x_adv - x).reshape(len(x), -1)
    np.testing.assert_allclose(np.abs(change[:, steepest]), 0.5, rtol=1e-5)
    assert not np.delete(change, steepest, 1).any()


@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2), ('l1', np.inf)])
def test_of_several_classes_the_one_whose_margin_falls_fastest_is_reached(norm, dual):
    """The margin loss of three classes by hand: the lead over class 1 is smaller."""
    kernel = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 1]], np.float32)
    variables = {'params': {'head': {'kernel': kernel, 'bias': np.array([0, 0, 0.5], np.float32)}}}
    x = np.array([[[5.0, 2.0, 3.0]]], np.float32)  # Logits 5, 4 and 3.5.
    forward = LinenForward(Linear(3))
    result = pgd(
        forward,
        variables,
        x,
        np.array([0]),
        jax.random.key(0),
        threat=Threat(norm, 0.2, (-10.0, 10.0)),
        steps=20,
        loss='margin',
        start='clean',
        share=0.2,
    )
    drop = 0.2 * np.linalg.norm([1, 2], dual)
    np.testing.assert_allclose(result.margin, [1 - drop], rtol=1e-4)
    assert not np.asarray(result.x_adv - x)[0, 0, 2]


def test_the_box_limits_the_attack(linear):
    variables, _, _, weight, _ = linear
    x = np.clip(np.random.default_rng(1).normal(size=(8, 3, 4)), 0, 1).astype(np.float32)
    y = (x.reshape(8, -1) @ variables['params']['head']['kernel']).argmax(-1).astype(np.int32)
    result = fgsm(LINEAR, variables, x, y, jax.random.key(0), threat=Threat('linf', 0.3))
    towards = np.where(y[:, None] == 0, -np.sign(weight), np.sign(weight)).reshape(x.shape)
    np.testing.assert_allclose(result.x_adv, np.clip(x + 0.3 * towards, 0, 1), atol=1e-6)


def test_the_step_size_is_a_length_in_pixels(linear):
    variables, x, y, weight, margin = linear
    threat, key = Threat('l2', 1.0, (-10.0, 10.0)), jax.random.key(0)
    result = pgd(
        LINEAR, variables, x, y, key, threat=threat, steps=3, step_size=0.02, start='clean'
    )
    expected = margin - 3 * 0.02 * np.linalg.norm(weight)
    np.testing.assert_allclose(result.margin, expected, rtol=1e-5, atol=1e-5)


def test_a_schedule_scales_the_steps(linear):
    variables, x, y, weight, margin = linear
    result = pgd(
        LINEAR, variables, x, y, jax.random.key(0), threat=Threat('l2', 1.0, (-10.0, 10.0)),
        steps=3, step_size=0.02, start='clean', schedule=lambda number: 1 / (1 + number),
    )  # fmt: skip
    expected = margin - (1 + 1 / 2 + 1 / 3) * 0.02 * np.linalg.norm(weight)
    np.testing.assert_allclose(result.margin, expected, rtol=1e-5, atol=1e-5)


def test_an_optax_transformation_makes_the_steps(linear):
    variables, x, y, weight, margin = linear
    result = pgd(
        LINEAR, variables, x, y, jax.random.key(0), threat=Threat('l2', 5.0, (-10.0, 10.0)),
        steps=3, start='clean', loss='margin', optimizer=optax.sgd(0.01, momentum=0.5),
    )  # fmt: skip
    # Steps of 1, 1.5 and 1.75 gradients, each the difference of the two classes' weights.
    expected = margin - 0.01 * (1 + 1.5 + 1.75) * np.linalg.norm(weight) ** 2
    np.testing.assert_allclose(result.margin, expected, rtol=1e-5, atol=1e-5)


def lower_own_logit(logits, y):
    return -logits[y]


def test_a_users_loss_is_climbed(linear):
    variables, x, y, _, _ = linear
    result = pgd(
        LINEAR, variables, x, y, jax.random.key(0), threat=Threat('l2', 0.3, (-10.0, 10.0)),
        steps=1, step_size=0.3, start='clean', loss=lower_own_logit, keep='last',
    )  # fmt: skip
    own = np.asarray(variables['params']['head']['kernel']).T[y]
    expected = x.reshape(8, -1) - 0.3 * own / np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(result.x_adv.reshape(8, -1), expected, atol=1e-5)


def test_a_target_is_reached_and_nothing_else_counts(net):
    target = (np.asarray(net.y) + 1) % 3
    threat = Threat('l2', 5.0)
    result = attack(net, threat, steps=30, target=target)
    found = np.asarray(net.forward(net.variables, result.x_adv)[0]).argmax(-1)
    np.testing.assert_array_equal(result.success, found == target)
    away = attack(net, threat, steps=30)
    others = np.asarray(net.forward(net.variables, away.x_adv)[0]).argmax(-1)
    assert result.success.sum() > (others == target).sum()


@pytest.mark.parametrize('method', [mi_fgsm, ni_fgsm])
@pytest.mark.parametrize(('norm', 'eps'), [('linf', 0.1), ('l2', 0.4)])
def test_momentum_follows_its_definition(net, method, norm, eps):
    """Against plain loops over images and steps; of the second, with gradients taken ahead."""
    steps, momentum = 4, 0.7
    result = method(
        net.forward, net.variables, net.x, net.y, jax.random.key(0), threat=Threat(norm, eps),
        steps=steps, momentum=momentum, keep='last',
    )  # fmt: skip

    @jax.jit
    def slope(x):
        return jax.grad(lambda x: evaluate(net.forward, net.variables, x, net.y)[0].sum())(x)

    def size(values):
        return np.sqrt((values**2).sum((1, 2, 3), keepdims=True))

    def unit(values):
        return values / np.maximum(size(values), 1e-12)

    x, carried = np.asarray(net.x), np.zeros_like(net.x)
    for _ in range(steps):
        # In linf along the momentum itself, as published; in l2 that has no scale.
        ahead = carried if norm == 'linf' else unit(carried)
        gradient = np.asarray(slope(x + eps / steps * momentum * ahead * (method is ni_fgsm)))
        carried = momentum * carried + gradient / np.abs(gradient).mean((1, 2, 3), keepdims=True)
        change = x + eps / steps * (np.sign(carried) if norm == 'linf' else unit(carried)) - net.x
        if norm == 'linf':
            change = np.clip(change, -eps, eps)
        else:
            change = change * np.minimum(1, eps / np.maximum(size(change), 1e-12))
        x = np.clip(net.x + change, 0, 1)
    np.testing.assert_allclose(result.x_adv[net.correct], x[net.correct], atol=1e-5)


def test_a_random_start_is_followed_by_one_long_step(linear):
    variables, x, y, weight, _ = linear
    threat = Threat('linf', 0.2, (-10.0, 10.0))
    result = fgsm_rs(LINEAR, variables, x, y, jax.random.key(0), threat=threat, keep='last')
    uphill = np.where(y == 0, -1, 1)[:, None] * np.sign(weight)
    # From anywhere in the ball 1.25 eps uphill: at least a quarter of it, at most all.
    change = (result.x_adv - x).reshape(8, -1) * uphill
    assert (change >= 0.25 * 0.2 - 1e-6).all() and (change <= 0.2 + 1e-6).all()
    assert len(np.unique(np.round(change, 4))) > 10


def test_who_has_fallen_asks_no_more(net):
    threat = Threat('l2', 5.0)
    first = attack(net, threat, steps=40, step_size=0.1, start='clean', keep='first')
    whole = attack(net, threat, steps=40, step_size=0.1, start='clean')
    assert first.success.all() and (whole.queries == 41).all()
    # The first gradient tells which images are misclassified.
    np.testing.assert_array_equal(first.queries[~net.correct], 2)
    fallen = first.queries[net.correct]
    assert (fallen > 2).all() and (fallen < 41).all() and len(set(fallen)) > 1


def test_an_nnx_model_is_attacked_like_a_linen_one(linear):
    variables, x, y, _, _ = linear

    class Net(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
            self.head = nnx.Linear(12, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.drop(x.reshape(len(x), -1)))

    net = Net()
    net.head.kernel[...] = jnp.asarray(variables['params']['head']['kernel'])
    graphdef, state = nnx.split(net)
    options = {'threat': Threat('l2', 0.2, (-10.0, 10.0)), 'steps': 4}
    key = jax.random.key(0)
    result = pgd(NNXForward(graphdef), state, x, y, key, **options)
    expected = pgd(LINEAR, variables, x, y, key, **options)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-6)
    np.testing.assert_array_equal(result.success, expected.success)


# --------------------------------------------------------- independence of batch and devices


def assert_same_result(actual, expected):
    np.testing.assert_allclose(actual.x_adv, expected.x_adv, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual.margin, expected.margin, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(actual.success, expected.success)
    np.testing.assert_array_equal(actual.queries, expected.queries)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_an_example_gets_the_same_result_in_any_batch(linear, norm):
    variables, x, y, _, _ = linear
    threat = Threat(norm, 0.3, (-2.5, 2.5))
    options = {'threat': threat, 'steps': 3, 'step_size': 0.03, 'restarts': 2}
    key, index = jax.random.key(5), np.array([7, 300, 2, 90, 11, 4, 1000, 6])
    whole = pgd(LINEAR, variables, x, y, key, index=index, **options)
    # Three other batches: the odd rows, the even ones, and all of them backwards.
    for rows in (np.s_[1::2], np.s_[::2], np.s_[::-1]):
        part = pgd(LINEAR, variables, x[rows], y[rows], key, index=index[rows], **options)
        assert_same_result(part, jax.tree.map(lambda leaf: leaf[rows], whole))
    renamed = pgd(LINEAR, variables, x, y, key, index=index + 1, **options)
    assert (np.abs(renamed.x_adv - whole.x_adv) > 1e-3).any()


def test_by_default_the_place_in_the_batch_is_the_identity(linear):
    variables, x, y, _, _ = linear
    options = {'threat': Threat('linf', 0.3, (-2.5, 2.5)), 'steps': 3, 'restarts': 2}
    key = jax.random.key(5)
    implicit = pgd(LINEAR, variables, x, y, key, **options)
    explicit = pgd(LINEAR, variables, x, y, key, index=np.arange(8), **options)
    jax.tree.map(np.testing.assert_array_equal, implicit, explicit)


def test_one_example_is_attacked_as_in_a_batch(linear):
    variables, x, y, _, _ = linear
    threat, key = Threat('l2', 0.3, (-2.5, 2.5)), jax.random.key(5)
    batch = pgd(LINEAR, variables, x, y, key, threat=threat, steps=3, restarts=2)
    single = jax.jit(functools.partial(pgd_example, LINEAR), static_argnames='start')
    alone = single(
        variables,
        x[6],
        y[6],
        jax.random.fold_in(key, 6),
        threat=threat,
        steps=3,
        step_size=2.5 * 0.3 / 3,
        restarts=2,
    )
    assert_same_result(alone, jax.tree.map(lambda leaf: leaf[6], batch))


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_one_and_eight_devices_give_the_same_result(net, norm):
    options = {'threat': Threat(norm, 0.2), 'steps': 4, 'restarts': 2}
    alone = attack(net, **options)
    mesh = parallel.data_mesh()
    x, y, index = parallel.shard(mesh, (net.x, net.y, np.arange(BATCH)))
    variables, key = parallel.replicate(mesh, (net.variables, jax.random.key(0)))
    together = pgd(net.forward, variables, x, y, key, index=index, **options)
    assert len(together.x_adv.sharding.device_set) == 8
    assert not together.x_adv.is_fully_replicated
    assert_same_result(together, alone)


def test_an_attack_on_eight_devices_needs_no_communication(net):
    mesh = parallel.data_mesh()
    x, y, index = parallel.shard(mesh, (net.x, net.y, np.arange(BATCH)))
    variables, key = parallel.replicate(mesh, (net.variables, jax.random.key(0)))

    def run(variables, x, y, key, index):
        return pgd(
            net.forward, variables, x, y, key, index=index, threat=Threat('linf', 0.1), steps=3
        )

    program = jax.jit(run).lower(variables, x, y, key, index).compile().as_text()
    found = collections.Counter(
        re.findall(
            r' (while|all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)'
            r'(?:-start)?\(',
            program,
        )
    )
    assert set(found) == {'while'}


# ------------------------------------------------------------------------- one compilation


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counting:
    """A forward that counts how often it is traced."""

    traces: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __call__(self, variables, x, edits=None, taps=()):
        self.traces[x.shape] += 1
        return LINEAR(variables, x)


def test_radii_steps_and_restarts_share_one_compiled_program(linear):
    variables, x, y, _, _ = linear
    forward, key = Counting(), jax.random.key(0)

    def run(eps, **options):
        pgd(forward, variables, x, y, key, threat=Threat('linf', eps, (-3.0, 3.0)), **options)
        return forward.traces.total()

    first = run(0.1, steps=2)
    assert first > 0
    for eps, steps, restarts, step_size in (
        (0.1, 7, 1, None),
        (0.25, 2, 3, None),
        (0.0, 40, 2, 0.01),
    ):
        assert run(eps, steps=steps, restarts=restarts, step_size=step_size) == first
    assert run(0.1, steps=2, start='clean') > first


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'steps': 0}, 'steps is 0; it must be at least 1.'),
        ({'restarts': 0}, 'restarts is 0; it must be at least 1.'),
        ({'steps': -3, 'restarts': 2}, 'steps is -3; it must be at least 1.'),
        ({'start': 'zero'}, "start is 'zero'; it must be 'random' or 'clean'."),
        (
            {'index': np.arange(3)},
            'index has shape (3,); it must have a value for each of 8 images.',
        ),
    ],
)
def test_an_impossible_attack_is_refused(linear, options, message):
    variables, x, y, _, _ = linear
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        pgd(LINEAR, variables, x, y, jax.random.key(0), threat=Threat('linf', 0.1), **options)


def test_iterates_ahead_of_which_gradients_are_taken_need_a_pass_only_to_be_kept(net):
    # The first gradient is that of the clean image itself.
    for keep, passes in (('strongest', 6 + 5 + 1), ('last', 6 + 1)):
        result = attack(net, Threat('linf', 0.1), method=ni_fgsm, steps=6, keep=keep)
        np.testing.assert_array_equal(result.queries, passes)


@pytest.mark.parametrize('attack', [bim, mi_fgsm, ni_fgsm])
def test_iterations_need_a_step(linear, attack):
    variables, x, y, _, _ = linear
    with pytest.raises(ValueError, match='steps is 0'):
        attack(LINEAR, variables, x, y, jax.random.key(0), threat=Threat('linf', 0.1), steps=0)


def test_an_attack_runs_unchanged_under_pmap():
    module = models.create('mlp', num_classes=3, hidden=(4,))
    forward = LinenForward(module)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    devices = jax.device_count()
    x = jax.random.uniform(jax.random.key(1), (devices * 2, 4, 4, 1))
    y = jnp.arange(devices * 2) % 3
    key, threat = jax.random.key(2), Threat('linf', 0.2)

    def attack(x, y, index):
        return pgd(forward, variables, x, y, key, threat=threat, steps=3, index=index)

    def split(leaf):
        return leaf.reshape(devices, 2, *leaf.shape[1:])

    index = jnp.arange(devices * 2)
    plain = attack(x, y, index)
    mapped = jax.pmap(attack)(split(x), split(y), split(index))
    merged = jax.tree.map(lambda leaf: leaf.reshape(devices * 2, *leaf.shape[2:]), mapped)
    chex.assert_trees_all_close(merged, plain, atol=1e-6)


def test_steps_that_count_pixels_find_the_best_ones_of_a_linear_model(linear):
    variables, x, y, weight, margin = linear
    low, high = box = (-4.0, 4.0)
    sign = np.where(y == 0, 1, -1)[:, None]
    values = x.reshape(len(x), -1)
    gain = np.maximum(sign * weight * (values - low), sign * weight * (values - high))
    best = margin - np.sort(gain)[:, ::-1][:, :3].sum(1)
    threat = Threat('l0', 3, box)
    options = {'threat': threat, 'steps': 4, 'step_size': 400.0, 'start': 'clean'}
    result = pgd(LINEAR, variables, x, y, jax.random.key(0), **options)
    np.testing.assert_allclose(result.margin, best, rtol=1e-5)
    assert ((result.x_adv != x).reshape(len(x), -1).sum(1) == 3).all()


def test_steps_that_count_pixels_are_long_enough_by_default(net):
    """Against every single pixel, black or white: few images may need a value in between."""
    single = np.repeat(np.asarray(net.x).reshape(BATCH, 1, 36), 72, 1)
    single[:, np.arange(72), np.arange(72) % 36] = (np.arange(72) // 36)[None]
    logits = np.asarray(net.forward(net.variables, single.reshape(-1, 6, 6, 1))[0])
    wrong = (logits.argmax(-1).reshape(BATCH, 72) != np.asarray(net.y)[:, None]).any(1)
    found = attack(net, Threat('l0', 1), steps=40, restarts=5)
    assert (net.correct & wrong).any()
    assert (found.success >= wrong).all()

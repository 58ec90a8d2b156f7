"""Auto-PGD: projected gradient ascent without a step size to choose (Croce & Hein 2020, 2021).

The l1 variant, with sparse steps, is of Croce & Hein 2021 (https://arxiv.org/abs/2103.01208).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch, check_images
from neurosens.attacks.objective import Climb, Look, objective, unseen
from neurosens.attacks.result import AttackResult, Iterate, choose
from neurosens.attacks.threat import Threat, project, require_ball, steepest_ascent
from neurosens.forward import Forward, Variables

_MOMENTUM = 0.75
_FIRST_SHARE = 0.2
_SPARSER = 1.5
_L1_SHRINK = 1.5
_L1_LEAST = 10.0
# The l1 attack on shrinking balls: factors of eps, and shares of the steps.
_LARGE_EPS = (3.0, 2.0, 1.0)
_LARGE_SHARES = (0.3, 0.3, 0.4)


def checkpoints(steps: int, norm: str = 'linf') -> np.ndarray:
    """Whether the step size is reviewed after each step.

    Args:
      steps: number of steps.
      norm: norm of the threat; for l1 reviews are evenly spaced.

    Returns:
      Booleans `[steps]`; for 100 steps and linf true after 22, 41, 57, 70, 80, 87, 93 and 99.
    """
    reviewed = np.zeros(steps, bool)
    if norm == 'l1':
        every = max(int(0.04 * steps), 1)
        reviewed[every - 1 :: every] = True
        return reviewed
    interval, position = max(int(0.22 * steps), 1), 0
    least, less = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    while position + interval <= steps:
        position += interval
        reviewed[position - 1] = True
        interval = max(interval - less, least)
    return reviewed


class _State(NamedTuple):
    """One example between two steps.

    Attributes:
      x: the next image.
      previous: the image that the step to it began at.
      loss: of the image that was looked at last.
      best: the iterate of largest loss.
      best_gradient: the gradient there.
      fooling: the latest iterate that fools; the start while there is none.
      step_size: in the units of the threat.
      rises: steps since the last review in which the loss rose.
      since: steps since the last review.
      best_at_review: largest loss at the last review.
      halved: whether the step size was halved there.
      share: for l1, the share of pixels that move.
      nonzero: for l1, how many pixels of the best image had moved at the last review.
    """

    x: Array
    previous: Array
    loss: Array
    best: Iterate
    best_gradient: Array
    fooling: Iterate
    step_size: Array
    rises: Array
    since: Array
    best_at_review: Array
    halved: Array
    share: Array
    nonzero: Array


def _start(threat: Threat, x: Array, key: PRNGKeyArray) -> Array:
    """The reference's random start: at distance eps, for l1 a projected normal direction."""
    if threat.norm == 'linf':
        change = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
        change = threat.eps * change / jnp.abs(change).max()
    else:
        change = jax.random.normal(key, x.shape, x.dtype)
        if threat.norm == 'l1':
            return project(threat, x, x + change)
        change = threat.eps * change / jnp.linalg.norm(change.ravel())
    return jnp.clip(x + change, *threat.bounds)


def _moved_pixels(x: Array, moved: Array) -> Array:
    return (moved != x).sum().astype(jnp.float32)


def _initial(
    threat: Threat, x: Array, start: Array, look: Look, key: PRNGKeyArray, fresh: bool
) -> _State:
    """The state before the first gradient: what is known without it, and zeros."""
    unknown = unseen(look, start, key)
    pixels = float(x.size)
    nonzero = jnp.float32(pixels) if fresh else _moved_pixels(x, start)
    share = jnp.float32(_FIRST_SHARE) if fresh else nonzero / pixels / _SPARSER
    factor = 1.0 if threat.norm == 'l1' else 2.0
    return _State(
        x=start,
        previous=start,
        loss=unknown.loss,
        best=unknown,
        best_gradient=jnp.zeros_like(start),
        fooling=unknown,
        step_size=jnp.asarray(factor * threat.eps, x.dtype),
        rises=jnp.int32(0),
        since=jnp.int32(0),
        best_at_review=unknown.loss,
        halved=jnp.asarray(True),
        share=share,
        nonzero=nonzero,
    )


def _seen(number: Array, iterate: Iterate, gradient: Array, state: _State) -> _State:
    """Takes note of what the model says of the next image, which is the start at number 0."""
    better = (number == 0) | (iterate.loss > state.best.loss)
    return state._replace(
        best=choose(better, iterate, state.best),
        best_gradient=jnp.where(better, gradient, state.best_gradient),
        fooling=choose((number == 0) | iterate.fools, iterate, state.fooling),
    )


def _step(
    threat: Threat,
    x: Array,
    climb: Climb,
    rho: float | Array,
    first_rises: bool,
    number: Array,
    review: Array,
    state: _State,
    key: PRNGKeyArray,
) -> _State:
    """The gradient at an image, after a review if one is due, and the step away from it."""
    position, at_start = state.x, number == 0
    gradient, iterate = climb(position, key)
    rose = iterate.loss > state.loss
    if first_rises:
        # The reference compares the first loss with one that it has not written yet, 0.
        rose = jnp.where(number == 1, iterate.loss > 0, rose)
    state = _seen(number, iterate, gradient, state)
    state = state._replace(
        loss=iterate.loss,
        rises=state.rises + (rose & ~at_start),
        since=state.since + ~at_start,
        best_at_review=jnp.where(at_start, iterate.loss, state.best_at_review),
    )
    changed, back = _reviewed_l1(threat, x, state) if threat.norm == 'l1' else _reviewed(state, rho)
    state = jax.tree.map(lambda new, old: jnp.where(review, new, old), changed, state)
    position = jnp.where(review & back, state.best.x, position)
    gradient = jnp.where(review & back, state.best_gradient, gradient)

    direction = steepest_ascent(threat, gradient, share=state.share)
    moved = project(threat, x, position + state.step_size * direction)
    if threat.norm != 'l1':
        weight = jnp.where(at_start, 1.0, _MOMENTUM).astype(x.dtype)
        change = weight * (moved - position) + (1 - weight) * (position - state.previous)
        moved = project(threat, x, position + change)
    return state._replace(x=moved, previous=position)


def _reviewed(state: _State, rho: float | Array) -> tuple[_State, Array]:
    """Halves the step size of an example that oscillates or has found nothing better.

    Returns:
      The state after the review, and whether the example goes on from its best image.
    """
    oscillates = state.rises <= rho * state.since
    stuck = ~state.halved & (state.best_at_review >= state.best.loss)
    halve = oscillates | stuck
    changed = state._replace(
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        halved=halve,
        best_at_review=state.best.loss,
        rises=jnp.zeros_like(state.rises),
        since=jnp.zeros_like(state.since),
    )
    return changed, halve


def _reviewed_l1(threat: Threat, x: Array, state: _State) -> tuple[_State, Array]:
    """Follows how sparse the best perturbation is; restarts large steps where it became sparser.

    Returns:
      As `_reviewed`.
    """
    nonzero = _moved_pixels(x, state.best.x)
    sparser = nonzero / state.nonzero < 0.95
    size = jnp.where(sparser, threat.eps, state.step_size / _L1_SHRINK)
    size = jnp.clip(size, threat.eps / _L1_LEAST, threat.eps).astype(state.step_size.dtype)
    share = nonzero / x.size / _SPARSER
    return state._replace(step_size=size, share=share, nonzero=nonzero), sparser


def _run(
    threat: Threat,
    x: Array,
    start: Array,
    look: Look,
    climb: Climb,
    steps: int,
    rho: float | Array,
    first_rises: bool,
    key: PRNGKeyArray,
    fresh: bool,
) -> _State:
    # Each step but the first begins with the review of the one before. The last image needs no
    # gradient, so that there are no more gradients than steps.
    reviews = jnp.asarray(np.concatenate([[False], checkpoints(steps, threat.norm)[:-1]]))

    def own(number: Array | int) -> PRNGKeyArray:
        return jax.random.fold_in(key, number)

    def step(number: Array, state: _State) -> _State:
        return _step(
            threat, x, climb, rho, first_rises, number, reviews[number], state, own(number)
        )

    state = _initial(threat, x, start, look, own(0), fresh)
    state = jax.lax.fori_loop(0, steps, step, state)
    return _seen(jnp.int32(steps), look(state.x, own(steps)), state.best_gradient, state)


def apgd_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 100,
    rho: float | Float[Array, ''] = 0.75,
    restarts: int | Int[Array, ''] = 1,
    loss: str | losses.Loss = 'cross_entropy',
    target: Int[Array, ''] | None = None,
    start: Float[Array, '...'] | None = None,
    large_start: bool = False,
    draws: int = 1,
    first_rises: bool = False,
) -> AttackResult:
    """Auto-PGD on one example: the function that `apgd` maps over a batch.

    It has the arguments and errors of `apgd`, with `x` and `start` one image, `y` its label and
    `target` one class; `restarts` may be traced. Returns one image and scalars.
    """
    require_ball('apgd', threat)
    loss = losses.named(loss, targeted=target is not None)
    # Success is any other class even if the loss aims at one of them, as in AutoAttack.
    aimed = loss if target is None else lambda logits, label: loss(logits, label, target)
    look, climb = objective(forward, variables, y, aimed, draws=draws)
    stages = _stages(steps) if large_start else ((1.0, steps),)

    def restart(number: Array, best: Iterate) -> Iterate:
        own = jax.random.fold_in(key, number)
        wide = Threat(threat.norm, stages[0][0] * threat.eps, threat.bounds)
        first = _start(wide, x, jax.random.fold_in(own, len(stages)))
        if start is not None:
            first = jnp.where(number == 0, project(wide, x, start.astype(x.dtype)), first)
        for place, (factor, count) in enumerate(stages):
            ball = Threat(threat.norm, factor * threat.eps, threat.bounds)
            if place > 0:
                first = project(ball, x, first)
            stage_key = jax.random.fold_in(own, place)
            fresh = not large_start
            state = _run(ball, x, first, look, climb, count, rho, first_rises, stage_key, fresh)
            first = state.best.x
        found = choose(state.fooling.fools, state.fooling, state.best)
        replace = (found.fools & ~best.fools) | (~best.fools & (found.loss > best.loss))
        return choose(replace, found, best)

    clean = look(x, key)
    best = jax.lax.fori_loop(0, restarts, restart, clean)
    best = choose(clean.fools, clean, best)
    total = sum(count + 1 for _, count in stages)
    queries = jnp.int32(draws) * (1 + restarts * total)
    return AttackResult(best.x, best.fools, best.margin, queries)


def _stages(steps: int) -> tuple[tuple[float, int], ...]:
    """Factors of eps and numbers of steps of the attack on shrinking balls."""
    counts = [int(share * steps) for share in _LARGE_SHARES[:-1]]
    stages = zip(_LARGE_EPS, (*counts, steps - sum(counts)))
    # Few steps leave the first balls none.
    return tuple((factor, count) for factor, count in stages if count)


def apgd(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 100,
    rho: float = 0.75,
    restarts: int = 1,
    loss: str | losses.Loss = 'cross_entropy',
    target: Int[Array, ' batch'] | None = None,
    start: Float[Array, 'batch ...'] | None = None,
    large_start: bool = False,
    draws: int = 1,
    first_rises: bool = False,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Auto-PGD (Croce & Hein 2020, algorithm 1), jit-compiled.

    Steps of 2 eps (l1: eps) with momentum, halved for each example at fixed checkpoints where its
    loss oscillates or has not improved; the example then goes on from its best iterate. For l1 the
    steps are sparse and follow the sparsity of the best perturbation (Croce & Hein 2021). Images
    that are misclassified already come back unchanged.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the starts, and of a random model.
      threat: the perturbations allowed.
      steps: gradient steps per restart, at least 1; compiled in, for the checkpoints.
      rho: an example oscillates if its loss rose in at most this share of the steps.
      restarts: independent runs, at least 1.
      loss: what to maximise: `'cross_entropy'`, `'dlr'`, another name of `losses.UNTARGETED`
        (with a target: `losses.TARGETED`), or a function.
      target: classes that the loss aims at `[B]` (APGD-T). Success is any class but the label.
      start: images `[B, ...]` inside the threat's bounds from which the first run begins, projected
        into the ball; by default it begins at random, as the others do.
      large_start: spend 30 % of the steps in a ball of 3 eps, 30 % of 2 eps and the rest in the
        ball itself, each from the best iterate before; what AutoAttack does for l1.
      draws: how many draws of a random model each gradient is averaged over.
      first_rises: count the first step as a rise wherever its loss is above 0, which the authors'
        program does by accident.
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example the latest iterate that is misclassified, or else the one of largest loss.

    Raises:
      ValueError: a number or choice is out of range, the model has too few classes for the loss,
        images are not finite or out of bounds, or a label is no class.
    """
    for name, value in (('steps', steps), ('restarts', restarts), ('draws', draws)):
        _validate.check_whole(name, value)
    _validate.check_range('rho', rho, low=0, high=1)
    losses.named(loss, targeted=target is not None)
    if start is not None:
        if jnp.shape(start) != jnp.shape(x):
            raise ValueError(
                f'start has shape {jnp.shape(start)}; it must have that of the images, '
                f'{jnp.shape(x)}.'
            )
        check_images(start, threat.bounds)
    return attack_batch(
        apgd_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'target': target, 'start': start},
        shared={'rho': rho, 'restarts': restarts},
        options={
            'steps': steps,
            'loss': loss,
            'large_start': large_start,
            'draws': draws,
            'first_rises': first_rises,
        },
    )

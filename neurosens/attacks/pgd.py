"""Gradient ascent within a threat: FGSM, PGD, and their variants with momentum or a random start.

Goodfellow et al. 2015 (FGSM), Kurakin et al. 2017 (BIM), Madry et al. 2018 (PGD), Dong et al. 2018
(MI-FGSM), Lin et al. 2020 (NI-FGSM), Wong et al. 2020 (FGSM with a random start).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.objective import objective, unseen
from neurosens.attacks.result import AttackResult, Iterate, choose, stronger
from neurosens.attacks.threat import (
    SPARSE_SHARE,
    Threat,
    default_step,
    project,
    random_start,
    require_ball,
    steepest_ascent,
)
from neurosens.forward import Forward, Variables

STARTS = ('random', 'clean')
KEEP = ('strongest', 'first', 'last')


class _State(NamedTuple):
    """Where one restart is.

    Attributes:
      x: the next image.
      momentum: of the steps so far.
      best: the iterate kept so far.
      clean: what the model says of the clean image, without the image.
    """

    x: Array
    momentum: Any
    best: Iterate
    clean: Iterate


def pgd_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''],
    step_size: float | Float[Array, ''],
    restarts: int | Int[Array, ''] = 1,
    start: str = 'random',
    loss: str | losses.Loss = 'cross_entropy',
    target: Int[Array, ''] | None = None,
    momentum: float | Float[Array, ''] | None = None,
    look_ahead: bool = False,
    share: float | Float[Array, ''] = SPARSE_SHARE,
    schedule: Callable[[Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    keep: str = 'strongest',
    draws: int = 1,
) -> AttackResult:
    """PGD on one example: the function that `pgd` and its variants map over a batch.

    It has the arguments and errors of `pgd`, with `x` one image, `y` its label and `target` one
    class; `steps` and `restarts`, at least 1, may be traced; `step_size` has no default, and
    `momentum` None compiles no momentum in. Returns one image and scalars.
    """
    _check_choices(start, keep)
    loss = losses.named(loss, targeted=target is not None)
    look, climb = objective(forward, variables, y, loss, target=target, draws=draws)
    judged = look_ahead and keep != 'last'
    # Whose first step is at the clean image learns there what a pass of its own would say.
    learned = start == 'clean'

    def ascend(state: _State, number: Array, key: PRNGKeyArray, first: Array) -> _State:
        size = step_size * (1.0 if schedule is None else schedule(number))
        position = state.x
        if look_ahead and momentum is not None:
            # In other norms a gradient over its mean would lead far out of the ball.
            ahead = state.momentum
            if threat.norm != 'linf':
                ahead = steepest_ascent(threat, ahead, share=share)
            position = position + size * momentum * ahead
        gradient, iterate = climb(position, key)
        if judged:
            # What counts is the image itself, not the point ahead of it. They differ from the
            # second step on. Where a batch rests one by one, each has a number of its own, and XLA
            # looks in the first step too.
            iterate = jax.lax.cond(number > 0, lambda: look(state.x, key), lambda: iterate)
        if optimizer is not None:
            descent = jax.tree.map(jnp.negative, gradient)
            change, carried = optimizer.update(descent, state.momentum, state.x)
        elif momentum is not None:
            carried = momentum * state.momentum + _unit_mean(gradient)
            change = size * steepest_ascent(threat, carried, share=share)
        else:
            carried = state.momentum
            change = size * steepest_ascent(threat, gradient, share=share)
        moved = project(threat, x, state.x + change)
        best, clean = _kept(iterate, state.best), state.clean
        if learned:
            best = choose(first, iterate, best)
            clean = choose(first, iterate._replace(x=()), clean)
        return _State(moved, carried, best, clean)

    def _kept(new: Iterate, best: Iterate) -> Iterate:
        return choose(~best.fools, new, best) if keep == 'first' else stronger(new, best)

    def restart(number: Array, carry: tuple[Iterate, Iterate, Array]) -> tuple:
        clean, best, passes = carry
        own, run = jax.random.fold_in(key, number), number
        first = random_start(threat, x, own) if start == 'random' else x
        carried: Any = () if momentum is None else jnp.zeros_like(x)
        if optimizer is not None:
            carried = optimizer.init(first)

        def step(number: Array, state: _State) -> _State:
            return ascend(state, number, jax.random.fold_in(own, number), run + number == 0)

        state = _State(first, carried, best, clean)
        done, state = _repeat(steps, step, state, until_fooled=keep == 'first')
        last = look(state.x, jax.random.fold_in(own, steps))
        best = last if keep == 'last' else _kept(last, state.best)
        passes += done + 1
        if judged:
            passes += jnp.maximum(done - 1, 0)
        return state.clean, best, passes

    clean = unseen(look, x, key) if learned else look(x, key)
    begun = (clean._replace(x=()), clean, jnp.int32(not learned))
    clean, best, passes = jax.lax.fori_loop(0, restarts, restart, begun)
    best = choose(clean.fools, clean._replace(x=x), best)
    return AttackResult(best.x, best.fools, best.margin, draws * passes)


def _repeat(
    steps: int | Array, step: Callable[[Array, _State], _State], state: _State, until_fooled: bool
) -> tuple[Array, _State]:
    """Applies a step several times; optionally only until the best iterate fools the model.

    Under vmap the latter runs until all examples are done, of which those that are rest.

    Returns:
      The number of steps taken, and the last state.
    """
    if not until_fooled:
        return jnp.int32(steps), jax.lax.fori_loop(0, steps, step, state)

    def unfinished(carry: tuple[Array, _State]) -> Array:
        number, state = carry
        return (number < steps) & ~state.best.fools

    def advance(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        number, state = carry
        return number + 1, step(number, state)

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))


def _unit_mean(gradient: Float[Array, '...']) -> Float[Array, '...']:
    mean = jnp.abs(gradient).mean()
    return gradient / jnp.where(mean > 0, mean, 1.0)


def _check_choices(start: str, keep: str) -> None:
    if start not in STARTS:
        raise ValueError(f"start is {start!r}; it must be 'random' or 'clean'.")
    if keep not in KEEP:
        raise ValueError(_validate.unknown('keep', keep, KEEP))


def pgd(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 20,
    step_size: float | Float[Array, ''] | None = None,
    restarts: int = 1,
    start: str = 'random',
    loss: str | losses.Loss = 'cross_entropy',
    target: Int[Array, ' batch'] | None = None,
    momentum: float | None = None,
    share: float = SPARSE_SHARE,
    schedule: Callable[[Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    keep: str = 'strongest',
    draws: int = 1,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Projected gradient ascent on a loss (Madry et al. 2018), jit-compiled.

    One compiled program serves all radii, step sizes and numbers of steps. Images that are
    misclassified already (with a target: classified as it) come back unchanged.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the starts, and of a random model.
      threat: the perturbations allowed.
      steps: gradient steps per restart, at least 1.
      step_size: length of a step in the threat's norm, for l0 in l1; by default 2.5 eps / steps,
        for l0 see `neurosens.attacks.threat.default_step`.
      restarts: independent runs, of which the strongest iterate counts, at least 1.
      start: `'random'` (uniform in the ball) or `'clean'`.
      loss: what to maximise, a name of `losses.UNTARGETED` (with a target: `losses.TARGETED`) or a
        function; create a function once, as each new one is compiled anew.
      target: classes aimed at `[B]`; success is then to be classified as them.
      momentum: factor of the previous direction, to which the gradient over its mean absolute
        value is added (Dong et al. 2018); None for none.
      share: for l1, the share of the pixels that a step moves.
      schedule: factor of the step size by the number of the step, such as an Optax schedule.
      optimizer: an Optax transformation that makes the steps instead (`optax.adam(0.01)`, on the
        loss as something to ascend); `step_size`, `momentum` and `schedule` then have no effect.
      keep: `'strongest'` iterate; `'first'` that fools, at which an example stops, and the program
        once all of a batch have; or the `'last'` iterate, as PyTorch libraries do.
      draws: how many draws of a random model each gradient is averaged over (`random_forward`).
      index: identity of each example `[B]`, such as its position in the data set: the same example
        gets the same randomness in any batch. By default its place in this batch.

    Returns:
      Per example the iterate kept; the strongest is one that fools, if any does, and of largest
      loss among those.

    Raises:
      ValueError: a number or choice is out of range, images are not finite or out of bounds, or a
        label is no class.
    """
    _validate.check_whole('steps', steps)
    _validate.check_whole('restarts', restarts)
    _validate.check_whole('draws', draws)
    _check_choices(start, keep)
    losses.named(loss, targeted=target is not None)
    shared = {
        'steps': steps,
        'step_size': default_step(threat, jnp.shape(x)[1:], 2.5 / steps)
        if step_size is None
        else step_size,
        'restarts': restarts,
        'share': share,
    }
    if momentum is not None:
        shared['momentum'] = momentum
    options = {
        'start': start,
        'loss': loss,
        'schedule': schedule,
        'optimizer': optimizer,
        'keep': keep,
        'draws': draws,
    }
    return attack_batch(
        pgd_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'target': target},
        shared=shared,
        options=options,
    )


def bim(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 10,
    **options: Any,
) -> AttackResult:
    """The basic iterative method (Kurakin et al. 2017): PGD from the clean image, jit-compiled.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: used by a random model only.
      threat: the perturbations allowed.
      steps: gradient steps.
      **options: those of `pgd` but `start` and `restarts`; `step_size` is eps / steps by default.

    Returns:
      As of `pgd`.
    """
    _validate.check_whole('steps', steps)
    options.setdefault('step_size', default_step(threat, jnp.shape(x)[1:], 1 / steps))
    return pgd(forward, variables, x, y, key, threat=threat, steps=steps, start='clean', **options)


def mi_fgsm(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 10,
    momentum: float = 1.0,
    **options: Any,
) -> AttackResult:
    """Momentum iterative FGSM (Dong et al. 2018), jit-compiled.

    m <- momentum m + g / mean |g|, then a steepest step along m from the clean image on.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: used by a random model only.
      threat: the perturbations allowed.
      steps: gradient steps.
      momentum: factor of the previous direction.
      **options: those of `bim`.

    Returns:
      As of `pgd`.
    """
    return bim(
        forward, variables, x, y, key, threat=threat, steps=steps, momentum=momentum, **options
    )


def ni_fgsm(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 10,
    step_size: float | Float[Array, ''] | None = None,
    momentum: float = 1.0,
    loss: str | losses.Loss = 'cross_entropy',
    target: Int[Array, ' batch'] | None = None,
    keep: str = 'strongest',
    draws: int = 1,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Nesterov iterative FGSM (Lin et al. 2020), jit-compiled.

    `mi_fgsm` with the gradient taken ahead, at x + step_size momentum m; in l2 and l1, for which it
    was not published, with the steepest direction along m in the place of m. The iterates
    themselves are judged by a forward pass of their own, but with `keep='last'`, as published.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: used by a random model only.
      threat: the perturbations allowed.
      steps: gradient steps.
      step_size: length of a step in the threat's norm; eps / steps by default.
      momentum: factor of the previous direction.
      loss: as of `pgd`.
      target: as of `pgd`.
      keep: as of `pgd`.
      draws: as of `pgd`.
      index: as of `pgd`.

    Returns:
      As of `pgd`.

    Raises:
      ValueError: as of `pgd`.
    """
    _validate.check_whole('steps', steps)
    _validate.check_whole('draws', draws)
    _check_choices('clean', keep)
    # Looking ahead needs steps that stay near.
    require_ball('ni_fgsm', threat)
    return attack_batch(
        pgd_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'target': target},
        shared={
            'steps': steps,
            'step_size': threat.eps / steps if step_size is None else step_size,
            'momentum': momentum,
        },
        options={
            'start': 'clean',
            'loss': loss,
            'keep': keep,
            'draws': draws,
            'look_ahead': True,
        },
    )


def fgsm(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    **options: Any,
) -> AttackResult:
    """One steepest-ascent step of length eps (Goodfellow et al. 2015), jit-compiled.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: used by a random model only.
      threat: the perturbations allowed.
      **options: `loss`, `target`, `share`, `keep`, `draws` and `index` of `pgd`.

    Returns:
      Per example the moved image, or the clean one where it has the larger loss.
    """
    return bim(forward, variables, x, y, key, threat=threat, steps=1, **options)


def fgsm_rs(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    **options: Any,
) -> AttackResult:
    """FGSM from a random start (Wong et al. 2020), jit-compiled: one step of length 1.25 eps.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the start.
      threat: the perturbations allowed.
      **options: those of `pgd` but `steps`; `step_size` is 1.25 eps by default.

    Returns:
      As of `pgd`.
    """
    options.setdefault('step_size', default_step(threat, jnp.shape(x)[1:], 1.25))
    return pgd(forward, variables, x, y, key, threat=threat, steps=1, **options)

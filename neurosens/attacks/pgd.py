"""FGSM (Goodfellow et al. 2015) and projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens.attacks.threat import Threat, project, random_start, steepest_ascent
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables


class AttackResult(NamedTuple):
    """What an attack found, per example (or for one).

    Attributes:
      x_adv: the strongest image found `[B, ...]`; the clean one where it is misclassified already.
      success: whether `x_adv` is misclassified `[B]`.
      margin: logit of the label minus the largest other, on `x_adv` `[B]`; negative on success.
      queries: forward passes made `[B]`, of which each with its gradient unless it is the last.
    """

    x_adv: Float[Array, 'batch ...']
    success: Bool[Array, ' batch']
    margin: Float[Array, ' batch']
    queries: Int[Array, ' batch']


class _Best(NamedTuple):
    """An iterate; the strongest is misclassified, then of larger loss, then of smaller margin."""

    x: Array
    fools: Array
    loss: Array
    margin: Array


def _margin(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    others = jnp.where(jnp.arange(logits.shape[-1]) == y, -jnp.inf, logits)
    return logits[y] - others.max()


def _evaluate(forward: Forward, variables: Variables, y: Array, x: Array) -> tuple[Array, _Best]:
    """Cross-entropy of one image, and the image as an iterate."""
    logits = forward(variables, x[None])[0][0].astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return loss, _Best(x, logits.argmax() != y, loss, _margin(logits, y))


def _stronger(new: _Best, old: _Best) -> _Best:
    # Where float32 cross-entropies no longer differ, the margins still do.
    larger = (new.loss > old.loss) | ((new.loss == old.loss) & (new.margin < old.margin))
    replace = (new.fools & ~old.fools) | ((new.fools == old.fools) & larger)
    return jax.tree.map(lambda a, b: jnp.where(replace, a, b), new, old)


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
) -> AttackResult:
    """PGD on one example: the function that `pgd` and `fgsm` map over a batch.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: one image.
      y: its label.
      key: randomness of the starts.
      threat: the perturbations allowed.
      steps: gradient steps per restart; static or traced.
      step_size: length of a step in the threat's norm, in pixel units.
      restarts: independent runs, of which the strongest iterate counts.
      start: `'random'` (uniform in the ball) or `'clean'`.

    Returns:
      The strongest of all iterates, as scalars and one image.
    """
    evaluate = functools.partial(_evaluate, forward, variables, y)
    evaluate_with_gradient = jax.value_and_grad(with_fast_input_gradients(evaluate), has_aux=True)
    _, clean = evaluate(x)

    def step(_: Array, carry: tuple[Array, _Best]) -> tuple[Array, _Best]:
        current, best = carry
        (_, iterate), gradient = evaluate_with_gradient(current)
        moved = current + step_size * steepest_ascent(threat, gradient)
        return project(threat, x, moved), _stronger(iterate, best)

    def restart(index: Array, best: _Best) -> _Best:
        first = random_start(threat, x, jax.random.fold_in(key, index)) if start == 'random' else x
        last, best = jax.lax.fori_loop(0, steps, step, (first, best))
        return _stronger(evaluate(last)[1], best)

    best = jax.lax.fori_loop(0, restarts, restart, clean)
    best = jax.tree.map(lambda old, new: jnp.where(clean.fools, old, new), clean, best)
    queries = jnp.int32(1) + restarts * (steps + 1)
    return AttackResult(best.x, best.fools, best.margin, queries)


@functools.partial(jax.jit, static_argnames=('start',))
def _attack_batch(
    forward: Forward,
    variables: Variables,
    x: Array,
    y: Array,
    key: PRNGKeyArray,
    index: Array,
    threat: Threat,
    steps: Array,
    step_size: Array,
    restarts: Array,
    *,
    start: str,
) -> AttackResult:
    attack = functools.partial(
        pgd_example,
        forward,
        variables,
        threat=threat,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        start=start,
    )
    # Keys follow the example, not its place in a batch or on a device.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    return jax.vmap(attack)(x, y, keys)


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
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018), jit-compiled.

    One compiled program serves all radii, step sizes and numbers of steps. Images that are
    misclassified already come back unchanged.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the starts.
      threat: the perturbations allowed.
      steps: gradient steps per restart, at least 1.
      step_size: length of a step in the threat's norm; 2.5 eps / steps by default.
      restarts: independent runs, of which the strongest iterate counts, at least 1.
      start: `'random'` (uniform in the ball) or `'clean'`.
      index: identity of each example `[B]`, such as its position in the data set: the same example
        gets the same randomness in any batch. By default its place in this batch.

    Returns:
      Per example the strongest iterate: misclassified if any is, of largest loss among those.

    Raises:
      ValueError: `steps`, `restarts` or `start` is out of range.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f'steps is {steps} and restarts {restarts}; both must be at least 1.')
    if start not in ('random', 'clean'):
        raise ValueError(f"start is {start!r}; it must be 'random' or 'clean'.")
    if step_size is None:
        step_size = 2.5 * threat.eps / steps
    if index is None:
        index = jnp.arange(x.shape[0])
    return _attack_batch(
        forward, variables, x, y, key, index, threat, steps, step_size, restarts, start=start
    )


def fgsm(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """One steepest-ascent step of length eps (Goodfellow et al. 2015), jit-compiled.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: not used, as the attack has no randomness; there for the common call form.
      threat: the perturbations allowed.
      index: as in `pgd`; without effect.

    Returns:
      Per example the moved image, or the clean one where it has the larger loss.
    """
    return pgd(
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        steps=1,
        step_size=threat.eps,
        start='clean',
        index=index,
    )

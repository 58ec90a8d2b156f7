"""Random images of the ball: a control that every attack has to beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.objective import objective
from neurosens.attacks.result import AttackResult, Iterate, choose, stronger
from neurosens.attacks.threat import Threat, random_start
from neurosens.forward import Forward, Variables


def noise_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    restarts: int | Int[Array, ''] = 1,
) -> AttackResult:
    """Random images around one example: the function that `noise` maps over a batch.

    It has the arguments and errors of `noise`, with `x` one image and `y` its label; `restarts` may
    be traced. Returns one image and scalars.
    """
    look, _ = objective(forward, variables, y, losses.cross_entropy)

    def restart(number: Array, best: Iterate) -> Iterate:
        own = jax.random.fold_in(key, number)
        return stronger(look(random_start(threat, x, own), own), best)

    clean = look(x, key)
    best = choose(clean.fools, clean, jax.lax.fori_loop(0, restarts, restart, clean))
    return AttackResult(best.x, best.fools, best.margin, jnp.int32(1) + restarts)


def noise(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    restarts: int = 1,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """The strongest of several random images, uniform in the ball, jit-compiled.

    Not an attack to rely on, but a control: a model that noise fools nearly as often as gradients
    do hides its gradients.

    Args:
      forward: the model.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness.
      threat: the perturbations allowed.
      restarts: random images for each example, at least 1.
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example the image of largest cross-entropy, misclassified if any is.

    Raises:
      ValueError: `restarts` is below 1, images are not finite or out of bounds, or a label is no
        class.
    """
    _validate.check_whole('restarts', restarts)
    return attack_batch(
        noise_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        shared={'restarts': restarts},
    )

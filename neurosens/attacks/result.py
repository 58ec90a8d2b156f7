"""What attacks return, and how they judge an image."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neurosens.attacks.losses import label_margin
from neurosens.forward import Forward, Variables


class AttackResult(NamedTuple):
    """What an attack found, per example (or for one).

    Attributes:
      x_adv: the strongest image found `[B, ...]`; the clean one where it is misclassified already.
      success: whether `x_adv` is misclassified `[B]`, with a target class: classified as it.
      margin: logit of the label minus the largest other, on `x_adv` `[B]`; negative if it is
        misclassified.
      queries: forward passes made `[B]`, by most attacks with a gradient each.
    """

    x_adv: Float[Array, 'batch ...']
    success: Bool[Array, ' batch']
    margin: Float[Array, ' batch']
    queries: Int[Array, ' batch']


def worst_case(first: Any, *others: Any) -> AttackResult:
    """The strongest of several attacks for each image: any ensemble.

    Args:
      first: result of an attack on B images, of `AttackResult` or with its fields.
      *others: results of other attacks on the same images and for the same threat.

    Returns:
      Per image what an attack that succeeded found, or else the first that reached the smallest
      margin; the queries of all together.
    """
    worst = AttackResult(first.x_adv, first.success, first.margin, first.queries)
    for other in others:
        better = other.success & ~worst.success
        better |= (other.success == worst.success) & (other.margin < worst.margin)
        rows = better.reshape(-1, *[1] * (worst.x_adv.ndim - 1))
        worst = AttackResult(
            jnp.where(rows, other.x_adv, worst.x_adv),
            worst.success | other.success,
            jnp.where(better, other.margin, worst.margin),
            worst.queries + other.queries,
        )
    return worst


class Iterate(NamedTuple):
    """An image on the way of an attack, and what the model says of it.

    Attributes:
      x: the image, or a tuple of it and how it was made.
      fools: whether the attack has reached its aim.
      loss: value of the attack's loss.
      margin: logit of the label minus the largest other.
    """

    x: Any
    fools: Bool[Array, '']
    loss: Float[Array, '']
    margin: Float[Array, '']


def logits_of(forward: Forward, variables: Variables, x: Float[Array, '...']) -> Array:
    """Logits `[K]` of one image, in single precision at least."""
    logits = forward(variables, x[None])[0][0]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def predicted_classes(logits: Float[Array, 'batch classes']) -> Int[Array, ' batch']:
    """Class of the largest logit, -1 where one is NaN: such logits show no class, not the first."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1)).astype(jnp.int32)


def fooled(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, ''] | None = None
) -> Bool[Array, '']:
    """Whether logits show another class than the label, or the target if there is one.

    Logits that are not numbers show nothing.
    """
    predicted = logits.argmax()
    reached = predicted != y if target is None else predicted == target
    return reached & ~jnp.isnan(logits).any()


def judge(x: Array, logits: Array, y: Array, loss: Array, target: Array | None = None) -> Iterate:
    """An image with its logits and loss as an iterate."""
    return Iterate(x, fooled(logits, y, target), loss, label_margin(logits, y))


def choose(condition: Bool[Array, ''], one: Iterate, other: Iterate) -> Iterate:
    """`one` if the condition holds, else `other`; any pytrees of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def stronger(new: Iterate, old: Iterate) -> Iterate:
    """The iterate that fools, or else has the larger loss, or else the smaller margin."""
    better = (new.fools & ~old.fools) | ((new.fools == old.fools) & _louder(new, old))
    return choose(better, new, old)


def louder(new: Iterate, old: Iterate) -> Iterate:
    """The iterate that has the larger loss, or else the smaller margin, whether it fools or not."""
    return choose(_louder(new, old), new, old)


def _louder(new: Iterate, old: Iterate) -> Array:
    # Where float32 losses no longer differ, the margins still do.
    return (new.loss > old.loss) | ((new.loss == old.loss) & (new.margin < old.margin))

"""Losses that attacks maximise, for the logits of one example.

An untargeted loss is a function `loss(logits, y)`, a targeted one `loss(logits, y, target)`, from
logits `[K]`, a label and a class to a scalar that grows as the attack gets closer to its aim. Any
such function can be given to an attack in place of a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from neurosens import _validate

Loss: TypeAlias = Callable[..., Float[Array, '']]

_TINY = 1e-12


def largest_other(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """The largest logit of any class but `y`."""
    return jnp.where(jnp.arange(logits.shape[-1]) == y, -jnp.inf, logits).max()


def label_margin(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """Logit of the label minus the largest other; negative if the example is misclassified."""
    return logits[y] - largest_other(logits, y)


def cross_entropy(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """logsumexp(z) - z_y."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def _largest(logits: Float[Array, ' classes'], count: int) -> Float[Array, ' count']:
    """The largest logits in order, one by one: `top_k` would gather a batch split over devices."""
    found = []
    for _ in range(count):
        place = logits.argmax()
        found.append(logits[place])
        logits = jnp.where(jnp.arange(logits.shape[-1]) == place, -jnp.inf, logits)
    return jnp.stack(found)


def margin(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """Max over c != y of z_c - z_y (Carlini & Wagner 2017, without a floor)."""
    return -label_margin(logits, y)


def dlr(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6): invariant to z -> a z + b, a > 0.

    -(z_y - max over c != y of z_c) / (z_(1) - z_(3)), with z_(k) the k-th largest logit.

    Args:
      logits: of at least 3 classes.
      y: the label.

    Returns:
      The loss.

    Raises:
      ValueError: there are fewer than 3 classes.
    """
    _check_classes('dlr', logits, 3)
    largest = _largest(logits, 3)
    return -label_margin(logits, y) / (largest[0] - largest[2] + _TINY)


def scaled_cross_entropy(logits: Float[Array, ' classes'], y: Int[Array, '']) -> Float[Array, '']:
    """Cross-entropy of the logits divided by their range, which does not saturate.

    The gradient of the cross-entropy vanishes in float32 where logits are large; this one is the
    same for z and a z, a > 0.
    """
    return cross_entropy(logits / (logits.max() - logits.min() + _TINY), y)


def targeted_cross_entropy(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, '']
) -> Float[Array, '']:
    """Minus the cross-entropy of the target class."""
    del y
    return -cross_entropy(logits, target)


def targeted_margin(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, '']
) -> Float[Array, '']:
    """z_target - z_y."""
    return logits[target] - logits[y]


def lead(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, '']
) -> Float[Array, '']:
    """z_target minus the largest other logit: positive exactly where the target is reached.

    The targeted margin is positive where the target is ahead of the label, though a third class be
    ahead of both; for searches that stop at 0 only this one will do.
    """
    del y
    return label_margin(logits, target)


def targeted_dlr(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, '']
) -> Float[Array, '']:
    """Targeted difference of logits ratio (Croce & Hein 2020, eq. 7).

    -(z_y - z_target) / (z_(1) - (z_(3) + z_(4)) / 2), with z_(k) the k-th largest logit.

    Args:
      logits: of at least 4 classes.
      y: the label.
      target: the class aimed at.

    Returns:
      The loss.

    Raises:
      ValueError: there are fewer than 4 classes.
    """
    _check_classes('targeted dlr', logits, 4)
    largest = _largest(logits, 4)
    scale = largest[0] - (largest[2] + largest[3]) / 2 + _TINY
    return (logits[target] - logits[y]) / scale


def targeted_scaled_cross_entropy(
    logits: Float[Array, ' classes'], y: Int[Array, ''], target: Int[Array, '']
) -> Float[Array, '']:
    """Minus the `scaled_cross_entropy` of the target class."""
    del y
    return -scaled_cross_entropy(logits, target)


UNTARGETED: dict[str, Loss] = {
    'cross_entropy': cross_entropy,
    'margin': margin,
    'dlr': dlr,
    'scaled_cross_entropy': scaled_cross_entropy,
}
TARGETED: dict[str, Loss] = {
    'cross_entropy': targeted_cross_entropy,
    'margin': targeted_margin,
    'dlr': targeted_dlr,
    'scaled_cross_entropy': targeted_scaled_cross_entropy,
    'lead': lead,
}


def named(loss: str | Loss, *, targeted: bool = False) -> Loss:
    """Looks up a loss.

    Args:
      loss: a name of `UNTARGETED` (if `targeted`, of `TARGETED`), or a function, which is returned
        as it is.
      targeted: whether the loss takes a target class.

    Returns:
      A function of logits and label, and of the target if there is one.

    Raises:
      ValueError: the name is unknown.
    """
    if callable(loss):
        return loss
    known = TARGETED if targeted else UNTARGETED
    if loss not in known:
        raise ValueError(_validate.unknown('loss', loss, tuple(known)))
    return known[loss]


def _check_classes(name: str, logits: Array, least: int) -> None:
    if logits.shape[-1] < least:
        raise ValueError(
            f'The loss {name} needs at least {least} classes, the model has {logits.shape[-1]}; '
            "use 'margin' or 'cross_entropy'."
        )

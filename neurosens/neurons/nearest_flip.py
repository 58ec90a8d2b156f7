"""Delta of one example from the derivatives of its logits.

Of all classes that the change of a neuron can make the largest, the one that the smallest change
does, in either direction: few classes in straight-line code, many in a loop over pieces of it, and
those whose derivatives come a chunk at a time as they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNREACHABLE = -1

# Classes compared in one piece of straight-line code; more are compared in a loop over such pieces.
_CLASSES_AT_ONCE = 16
# Margins below this count as ties.
_SMALLEST_MARGIN = 1e-30
# Room for the change of 0 that tied logits need.
_SMALLEST_ROOM = 1e-20


class Sensitivity(NamedTuple):
    """The smallest change of each neuron that changes the prediction.

    Attributes:
      delta: Delta(i, x) in units of the activation, signed, `[B, N]`; infinite where no change in
        the range does it, 0 where the two largest logits are equal, NaN where a logit is.
      flips_to: the class it changes to, int32 `[B, N]`; -1 where there is none.
    """

    delta: Float[Array, 'batch neurons']
    flips_to: Int[Array, 'batch neurons']


class _Nearest(NamedTuple):
    """Per neuron, the largest 1 / change in either direction and the class it belongs to."""

    up: Array
    up_class: Array
    down: Array
    down_class: Array


def nearest_flip(
    gradients: Float[Array, 'classes neurons'],
    logits: Float[Array, ' classes'],
    room_below: Float[Array, ' neurons'] | float = math.inf,
    room_above: Float[Array, ' neurons'] | float = math.inf,
) -> Sensitivity:
    """Delta of every neuron of one example whose logits are linear in each of them.

    With the weights W of a last linear layer as `gradients` this is the closed form of Suri and
    Evans; with the derivatives of the logits at any layer it is the first-order measure.

    Args:
      gradients: derivative of each logit with respect to each neuron `[K, N]`.
      logits: the logits `[K]`.
      room_below: how far each neuron can fall `[N]`, at least 0; behind a ReLU its activation.
      room_above: how far each neuron can rise `[N]`.

    Returns:
      Per neuron Delta and the class it flips to; of classes that changes equal to rounding reach,
      one.
    """
    dtype = jnp.promote_types(jnp.result_type(gradients, logits), jnp.float32)
    gradients, logits = jnp.asarray(gradients, dtype), jnp.asarray(logits, dtype)
    classes, neurons = gradients.shape
    if classes <= 2 * _CLASSES_AT_ONCE:
        inverse = _inverse_margins(logits)
        return _of_few(gradients, inverse, logits, room_below, room_above)
    own = gradients[logits.argmax()]
    padded = jnp.pad(gradients, ((0, -classes % _CLASSES_AT_ONCE), (0, 0)))

    def piece(numbers: Array) -> Array:
        return padded[numbers] - own

    return nearest_flip_in_pieces(
        piece, logits, neurons, room_below, room_above, size=_CLASSES_AT_ONCE
    )


def nearest_flip_in_pieces(
    slopes_of: Callable[[Int[Array, ' size']], Float[Array, 'size neurons']],
    logits: Float[Array, ' classes'],
    neurons: int,
    room_below: Float[Array, ' neurons'] | float = math.inf,
    room_above: Float[Array, ' neurons'] | float = math.inf,
    *,
    size: int,
) -> Sensitivity:
    """`nearest_flip` where the derivatives come a few classes at a time.

    Args:
      slopes_of: from `size` numbers of classes, some of them perhaps past the last, to the
        derivatives of their logits less those of the predicted class.
      logits: the logits `[K]`, in float32 or wider.
      neurons: N.
      room_below: as of `nearest_flip`.
      room_above: likewise.
      size: classes at a time.

    Returns:
      As of `nearest_flip`.
    """
    best = _nothing_yet(neurons, logits.dtype)
    best = _compare_in_pieces(best, slopes_of, _inverse_margins(logits), size)
    return _from_nearest(best, logits, room_below, room_above)


def _of_few(
    gradients: Array,
    inverse: Array,
    logits: Array,
    room_below: Array | float,
    room_above: Array | float,
) -> Sensitivity:
    """Delta in straight-line code, in two passes over the classes.

    XLA computes each output in a loop of its own. So the first pass finds the change alone, and the
    second the class from the change alone, not both with all of the work of the other.
    """
    classes, neurons = gradients.shape
    predicted = logits.argmax()
    own = gradients[predicted]
    up = down = jnp.zeros(neurons, gradients.dtype)
    for number in range(classes):
        rate = (gradients[number] - own) * inverse[number]
        up, down = jnp.maximum(up, rate), jnp.maximum(down, -rate)
    up, down = _in_range(up, down, room_below, room_above)
    delta = _change(jnp.where(up >= down, up, -down), logits)
    # What the change must add to the margin of a class; without bound for the predicted one.
    needed = (1 - 8 * jnp.finfo(delta.dtype).eps) / inverse
    # A change of 0, whose sign is its direction, reaches the classes that are tied.
    step = jnp.where(delta == 0, jnp.copysign(_SMALLEST_ROOM, delta), delta)
    # Read again, from other values: one row with two readers would be written out per example.
    minus_own = (-gradients)[predicted]
    flips_to = jnp.full(neurons, UNREACHABLE, jnp.int32)
    for number in reversed(range(classes)):
        gained = (gradients[number] + minus_own) * step
        flips_to = jnp.where(gained >= needed[number], number, flips_to)
    return Sensitivity(delta, jnp.where(jnp.isfinite(delta), flips_to, UNREACHABLE))


def _inverse_margins(logits: Array) -> Array:
    """1 / (z_y - z_c) of each class c, 0 of the predicted one.

    The smallest change m_c / (W[c, i] - W[y, i]) is that of the largest inverse, which is a product
    in place of a division for every class.
    """
    predicted = logits.argmax()
    margins = jnp.maximum(logits[predicted] - logits, _SMALLEST_MARGIN)
    return jnp.where(jnp.arange(len(logits)) == predicted, 0.0, 1 / margins)


def _nothing_yet(neurons: int, dtype: Any) -> _Nearest:
    zeros, nothing = jnp.zeros(neurons, dtype), jnp.full(neurons, UNREACHABLE, jnp.int32)
    return _Nearest(zeros, nothing, zeros, nothing)


def _compare(best: _Nearest, number: Array | int, slope: Array, inverse: Array) -> _Nearest:
    """Takes in one class, by the derivative of its logit less that of the predicted class `[N]`."""
    rate = slope * inverse
    number = jnp.int32(number)
    return _Nearest(
        jnp.maximum(best.up, rate),
        jnp.where(rate > best.up, number, best.up_class),
        jnp.maximum(best.down, -rate),
        jnp.where(-rate > best.down, number, best.down_class),
    )


def _compare_in_pieces(
    best: _Nearest, slopes_of: Callable[[Array], Array], inverse: Array, size: int
) -> _Nearest:
    """Takes in all classes in a loop over equal pieces of straight-line code.

    Args:
      best: nothing yet.
      slopes_of: from `size` numbers of classes, some of them perhaps past the last, to slopes
        `[size, N]`.
      inverse: of the margin of each class.
      size: classes in a piece.

    Returns:
      The best of all classes.
    """
    # A class whose inverse margin is 0 never wins.
    inverse = jnp.pad(inverse, (0, -len(inverse) % size))

    def piece(best: _Nearest, numbers: Array) -> tuple[_Nearest, None]:
        slopes = slopes_of(numbers)
        for place in range(size):
            best = _compare(best, numbers[place], slopes[place], inverse[numbers[place]])
        return best, None

    return jax.lax.scan(piece, best, jnp.arange(len(inverse)).reshape(-1, size))[0]


def _from_nearest(
    best: _Nearest, logits: Array, room_below: Array | float, room_above: Array | float
) -> Sensitivity:
    """Delta from the best of all classes in either direction."""
    up, down = _in_range(best.up, best.down, room_below, room_above)
    upwards = up >= down
    delta = _change(jnp.where(upwards, up, -down), logits)
    flips_to = jnp.where(upwards, best.up_class, best.down_class)
    return Sensitivity(delta, jnp.where(jnp.isfinite(delta), flips_to, UNREACHABLE))


def _in_range(
    up: Array, down: Array, room_below: Array | float, room_above: Array | float
) -> tuple[Array, Array]:
    """The inverse changes, 0 where the change has no room."""
    # All in inverse changes, so that there is one division and one pass over memory. A change that
    # ends exactly at the border of the range must not be lost to rounding.
    enough = 1 - 8 * jnp.finfo(up.dtype).eps
    up, down = (
        rate
        if isinstance(room, float) and math.isinf(room)
        else jnp.where(rate * jnp.maximum(room, _SMALLEST_ROOM) >= enough, rate, 0.0)
        for rate, room in ((up, room_above), (down, room_below))
    )
    return up, down


def _change(rate: Array, logits: Array) -> Array:
    """The changes of which these are the inverse: signed 0 of ties, NaN where a logit is."""
    tied = jnp.abs(rate) > jnp.finfo(rate.dtype).eps / _SMALLEST_MARGIN
    rate = jnp.where(tied, jnp.copysign(jnp.inf, rate), rate)
    # Nothing behind the division: it is what XLA does not repeat for what is computed from it.
    return 1 / jnp.where(jnp.isnan(logits).any(), jnp.nan, rate)

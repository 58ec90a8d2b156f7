"""Threat models: the perturbations that an attacker may use, for one example.

A threat is a norm ball of radius eps around the clean image, intersected with the box of valid
pixels. Under l0 the pixels that change are counted, all channels of one together; that "ball" is
not convex, and only attacks that project steps onto it can use it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate

NORMS = ('linf', 'l2', 'l1', 'l0')
# The norm by which a gradient bounds how far a perturbation of the threat's norm changes a value.
DUAL = {'linf': 'l1', 'l2': 'l2', 'l1': 'linf'}
# Share of the pixels that a steepest l1 step moves: one pixel at a time is slow to get anywhere
# (Tramer & Boneh 2019, https://arxiv.org/abs/1904.13000, move the largest hundredth).
SPARSE_SHARE = 0.01


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['eps'], meta_fields=['norm', 'bounds']
)
@dataclasses.dataclass(frozen=True)
class Threat:
    """A norm ball intersected with the box of valid pixels.

    A pytree whose only leaf is `eps`: jitted attacks are compiled once for all radii.

    Attributes:
      norm: `'linf'`, `'l2'`, `'l1'` or `'l0'`.
      eps: radius per image, in the units of the pixels; infinite for attacks that look for the
        smallest perturbation.
      bounds: smallest and largest pixel value.

    Raises:
      ValueError: the norm is unknown, or eps or the bounds are out of range.
    """

    norm: str
    eps: float | Float[Array, '']
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(_validate.unknown('norm', self.norm, NORMS))
        # Attacks that look for the smallest perturbation take an infinite radius.
        if isinstance(self.eps, numbers.Real) and self.eps != math.inf:
            _validate.check_range('eps', float(self.eps), low=0)
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f'bounds are {self.bounds!r}; the first must be below the second.')


def project(
    threat: Threat, clean: Float[Array, '...'], moved: Float[Array, '...']
) -> Float[Array, '...']:
    """Moves an image into the ball around the clean one and into the box.

    For linf and l1 this is the exact Euclidean projection onto the intersection; for l2 the ball
    comes first and the box second, the order of AutoAttack, which is inside both sets. For l0 the
    pixels that stay changed are those whose return would move the image furthest (Croce & Hein
    2019, https://arxiv.org/abs/1909.05040, section 3.1); of equal ones the first.

    Args:
      threat: the ball and the box.
      clean: one image, inside the box.
      moved: one image of the same shape.

    Returns:
      An image inside the ball and the box.
    """
    if threat.norm == 'linf':
        moved = jnp.clip(moved, clean - threat.eps, clean + threat.eps)
    elif threat.norm == 'l1':
        moved = _project_l1(clean, moved, threat.eps, threat.bounds)
    elif threat.norm == 'l0':
        lost = jnp.square(moved - jnp.clip(moved, *threat.bounds))
        kept = _largest_pixels(jnp.square(moved - clean) - lost, threat.eps)
        moved = jnp.where(kept, moved, clean)
    else:
        change = moved - clean
        size = jnp.linalg.norm(change.ravel())
        # Written so that a radius of 0 gives the clean image, not 0 / 0.
        moved = clean + change * jnp.minimum(1.0, threat.eps / jnp.where(size > 0, size, 1.0))
    return jnp.clip(moved, *threat.bounds)


def _project_l1(
    clean: Float[Array, '...'],
    moved: Float[Array, '...'],
    eps: float | Float[Array, ''],
    bounds: tuple[float, float],
) -> Float[Array, '...']:
    """The nearest point of an l1 ball within a box (Croce & Hein 2021, AutoAttack for l1).

    A pixel that wants to move by u in its direction, where the box leaves it c, moves by
    clip(u - t, 0, c), with one t >= 0 for all pixels, the smallest such that the moves add up to
    eps at most. The search runs over s = max(u) - t: differences from the largest wish keep the
    precision of the moves, where t itself, near the largest wish, would be rounded too coarsely.
    Sorting the breakpoints would find t too, with more work on every device.
    """
    low, high = bounds
    # As vectors: XLA:CPU is slow at sums over several short axes.
    shape, clean, moved = clean.shape, clean.ravel(), moved.ravel()
    wish = jnp.abs(moved - clean)
    room = jnp.where(moved > clean, high - clean, clean - low)
    largest = wish.max()
    behind = largest - wish

    def moves(reach: Array) -> Array:
        return jnp.clip(reach - behind, 0, room)

    reach = largest_float(lambda reach: moves(reach).sum() <= eps, wish.dtype)
    moved_by = jnp.where(reach < largest, moves(reach), jnp.minimum(wish, room))
    return (clean + jnp.sign(moved - clean) * moved_by).reshape(shape)


def _pixels(values: Float[Array, '...']) -> Float[Array, ' pixels channels']:
    """Values of one image by pixel: the last axis of images holds the channels."""
    return values.reshape(-1, values.shape[-1] if values.ndim == 3 else 1)


def _largest_pixels(
    values: Float[Array, '...'], count: float | Float[Array, '']
) -> Bool[Array, '...']:
    """Marks the given number of pixels whose values add up to most over the channels."""
    order = jnp.argsort(_pixels(values).sum(-1), descending=True, stable=True)
    # By rank and not by the value of the last: equal pixels must not be too many.
    chosen = jnp.argsort(order) < jnp.floor(jnp.asarray(count))
    return jnp.broadcast_to(chosen[:, None], _pixels(values).shape).reshape(values.shape)


def require_ball(attack: str, threat: Threat) -> None:
    """Raises a ValueError for an attack that needs a norm where the threat counts pixels.

    Args:
      attack: its name.
      threat: its threat.
    """
    if threat.norm not in DUAL:
        raise ValueError(
            f'{attack} works in {", ".join(DUAL)}, not in {threat.norm}; there use pgd, or another '
            'attack that projects its steps.'
        )


def inside(
    threat: Threat,
    clean: Float[Array, '...'],
    moved: Float[Array, '...'],
    tolerance: float = 1e-5,
) -> Bool[Array, '']:
    """Whether an image lies in the ball and the box, up to a tolerance in pixel units."""
    change = moved - clean
    size = length(threat.norm, change)
    low, high = threat.bounds
    in_box = (moved.min() >= low - tolerance) & (moved.max() <= high + tolerance)
    return (size <= threat.eps + tolerance) & in_box


def length(norm: str, change: Float[Array, '...']) -> Float[Array, '']:
    """The norm of a perturbation.

    Args:
      norm: `'linf'`, `'l2'`, `'l1'` or `'l0'`.
      change: the perturbation of one image.

    Returns:
      Its length, in the units of the pixels; for l0 the number of changed pixels.
    """
    if norm == 'linf':
        return jnp.abs(change).max()
    if norm == 'l0':
        return (_pixels(change) != 0).any(-1).sum().astype(change.dtype)
    return jnp.linalg.norm(change.ravel(), ord=2 if norm == 'l2' else 1)


def random_start(
    threat: Threat, clean: Float[Array, '...'], key: PRNGKeyArray
) -> Float[Array, '...']:
    """A random image of the ball, uniformly distributed before the box cuts it.

    Args:
      threat: the ball and the box.
      clean: one image.
      key: randomness.

    Returns:
      An image inside the ball and the box.
    """
    if threat.norm == 'linf':
        change = jax.random.uniform(key, clean.shape, clean.dtype, -1.0, 1.0) * threat.eps
    elif threat.norm == 'l1':
        # Exponential sizes over their sum and one more of them are uniform in the ball.
        size_key, rest_key, sign_key = jax.random.split(key, 3)
        size = jax.random.exponential(size_key, clean.shape, clean.dtype)
        total = size.sum() + jax.random.exponential(rest_key, (), clean.dtype)
        change = jax.random.rademacher(sign_key, clean.shape, clean.dtype) * size / total
        change = change * threat.eps
    elif threat.norm == 'l0':
        # Random values in as many random pixels as may change.
        place_key, value_key = jax.random.split(key)
        places = jax.random.uniform(place_key, _pixels(clean)[:, :1].shape)
        places = jnp.broadcast_to(places, _pixels(clean).shape).reshape(clean.shape)
        value = jax.random.uniform(value_key, clean.shape, clean.dtype, *threat.bounds)
        change = jnp.where(_largest_pixels(places, threat.eps), value - clean, 0)
    else:
        # A normal direction at radius eps U^(1/n) is uniform in the ball.
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, clean.shape, clean.dtype)
        direction /= jnp.linalg.norm(direction.ravel())
        radius = jax.random.uniform(radius_key, (), clean.dtype) ** (1.0 / clean.size)
        change = direction * radius * threat.eps
    return jnp.clip(clean + change, *threat.bounds)


def steepest_ascent(
    threat: Threat,
    gradient: Float[Array, '...'],
    *,
    share: float | Float[Array, ''] = SPARSE_SHARE,
) -> Float[Array, '...']:
    """The direction of unit norm in which a linear function rises fastest.

    Args:
      threat: its norm.
      gradient: gradient of the function at one image.
      share: for l1, the share of the pixels that move, at least one pixel. Only a single one is
        truly steepest, but steps of several by the same amount get further where the function is
        not linear. Pixels of equal gradient move together.

    Returns:
      sign(g) for linf, g / ||g||_2 for l2, sign(g) on the largest |g| over their number for l1, and
      for l0, whose projection decides which pixels move, g / ||g||_1; 0 where the gradient is 0.
    """
    if threat.norm == 'linf':
        return jnp.sign(gradient)
    if threat.norm == 'l1':
        magnitude = jnp.abs(gradient)
        staying = jnp.floor((1 - jnp.asarray(share)) * gradient.size).astype(jnp.int32)
        count = gradient.size - jnp.clip(staying, 0, gradient.size - 1)
        moving = (magnitude >= kth_largest(magnitude, count)) & (magnitude > 0)
        return jnp.where(moving, jnp.sign(gradient), 0) / jnp.maximum(moving.sum(), 1)
    # Scaled first: squares of the tiny gradients of a confident model are 0 in float32.
    largest = jnp.abs(gradient).max()
    gradient = gradient / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(gradient.ravel(), ord=1 if threat.norm == 'l0' else 2)
    return gradient / jnp.where(norm > 0, norm, 1.0)


def default_step(
    threat: Threat, shape: tuple[int, ...], share: float | Array
) -> float | Float[Array, '']:
    """How long a step is where the caller names no length.

    Args:
      threat: the ball and the box.
      shape: shape of one image.
      share: the length as a share of eps.

    Returns:
      That length. Under l0, where only pixels at a bound of the box do what they can, one that
      moves values by three widths of the box on average, whatever eps is.
    """
    if threat.norm == 'l0':
        return 3.0 * math.prod(shape) * (threat.bounds[1] - threat.bounds[0])
    return share * threat.eps


def kth_largest(values: Float[Array, '...'], k: Int[Array, '']) -> Float[Array, '']:
    """The k-th largest of non-negative values, for a traced k.

    Args:
      values: non-negative values of any shape, without NaN.
      k: rank, from 1 for the largest.

    Returns:
      One of the values.
    """
    values = values.ravel()
    return largest_float(lambda value: (values >= value).sum() >= k, values.dtype)


def largest_float(holds: Callable[[Float[Array, '']], Bool[Array, '']], dtype: Any) -> Array:
    """The largest non-negative float for which a condition holds, if it holds up to a point.

    The bits of non-negative floats are integers of the same order, which are found bit by bit: 31
    evaluations for float32, and exact.

    Args:
      holds: the condition; true up to some value and false above it.
      dtype: a floating dtype.

    Returns:
      The value, a scalar of the dtype; 0 if the condition never holds.
    """
    width = jnp.finfo(dtype).bits
    kind = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[width]
    most = jax.lax.bitcast_convert_type(jnp.asarray(jnp.finfo(dtype).max, dtype), kind)

    def set_bit(position: Array, found: Array) -> Array:
        higher = found | (jnp.ones((), kind) << (width - 2 - position).astype(kind))
        value = jax.lax.bitcast_convert_type(jnp.minimum(higher, most), dtype)
        return jnp.where((higher <= most) & holds(value), higher, found)

    found = jax.lax.fori_loop(0, width - 1, set_bit, jnp.zeros((), kind))
    return jax.lax.bitcast_convert_type(found, dtype)

"""Threat models: the perturbations that an attacker may use, for one example.

A threat is a norm ball of radius eps around the clean image, intersected with the box of valid
pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from neurosens import _validate

NORMS = ('linf', 'l2')


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['eps'], meta_fields=['norm', 'bounds']
)
@dataclasses.dataclass(frozen=True)
class Threat:
    """A norm ball intersected with the box of valid pixels.

    A pytree whose only leaf is `eps`: jitted attacks are compiled once for all radii.

    Attributes:
      norm: `'linf'` or `'l2'`.
      eps: radius per image, in the units of the pixels.
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
        if isinstance(self.eps, (int, float)):
            _validate.check_range('eps', self.eps, low=0)
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f'bounds are {self.bounds!r}; the first must be below the second.')


def project(
    threat: Threat, clean: Float[Array, '...'], moved: Float[Array, '...']
) -> Float[Array, '...']:
    """Moves an image into the ball around the clean one and into the box.

    For linf this is the exact projection; for l2 the ball comes first and the box second, the
    order of AutoAttack, which is inside both sets.

    Args:
      threat: the ball and the box.
      clean: one image, inside the box.
      moved: one image of the same shape.

    Returns:
      An image inside the ball and the box.
    """
    if threat.norm == 'linf':
        moved = jnp.clip(moved, clean - threat.eps, clean + threat.eps)
    else:
        change = moved - clean
        size = jnp.linalg.norm(change.ravel())
        # Written so that a radius of 0 gives the clean image, not 0 / 0.
        moved = clean + change * jnp.minimum(1.0, threat.eps / jnp.where(size > 0, size, 1.0))
    return jnp.clip(moved, *threat.bounds)


def inside(
    threat: Threat,
    clean: Float[Array, '...'],
    moved: Float[Array, '...'],
    tolerance: float = 1e-5,
) -> Bool[Array, '']:
    """Whether an image lies in the ball and the box, up to a tolerance in pixel units."""
    change = moved - clean
    size = jnp.abs(change).max() if threat.norm == 'linf' else jnp.linalg.norm(change.ravel())
    low, high = threat.bounds
    in_box = (moved.min() >= low - tolerance) & (moved.max() <= high + tolerance)
    return (size <= threat.eps + tolerance) & in_box


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
    else:
        # A normal direction at radius eps U^(1/n) is uniform in the ball.
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, clean.shape, clean.dtype)
        direction /= jnp.linalg.norm(direction.ravel())
        radius = jax.random.uniform(radius_key, (), clean.dtype) ** (1.0 / clean.size)
        change = direction * radius * threat.eps
    return jnp.clip(clean + change, *threat.bounds)


def steepest_ascent(threat: Threat, gradient: Float[Array, '...']) -> Float[Array, '...']:
    """The direction of unit norm in which a linear function rises fastest.

    Args:
      threat: its norm.
      gradient: gradient of the function at one image.

    Returns:
      sign(g) for linf, g / ||g||_2 for l2; 0 where the gradient is 0.
    """
    if threat.norm == 'linf':
        return jnp.sign(gradient)
    # Scaled first: squares of the tiny gradients of a confident model are 0 in float32.
    largest = jnp.abs(gradient).max()
    gradient = gradient / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(gradient.ravel())
    return gradient / jnp.where(norm > 0, norm, 1.0)

"""Rotations and translations: images that only move (Engstrom et al. 2019).

No norm bounds these perturbations: every pixel may change, though the picture stays the same to us.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.objective import objective
from neurosens.attacks.result import Iterate, choose, stronger
from neurosens.forward import Forward, Variables


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['degrees', 'shift'], meta_fields=['bounds']
)
@dataclasses.dataclass(frozen=True)
class Motion:
    """Rotations about the middle and translations up to a limit; what moves in is black.

    A pytree of `degrees` and `shift`: jitted attacks are compiled once for all limits.

    Attributes:
      degrees: largest angle, to either side; 30 in the paper.
      shift: largest translation along each axis as a share of its length; 0.1 in the paper.
      bounds: smallest and largest pixel value; the smallest is black.

    Raises:
      ValueError: a limit is out of range, or the bounds are not in order.
    """

    degrees: float | Float[Array, ''] = 30.0
    shift: float | Float[Array, ''] = 0.1
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, high in (('degrees', 180), ('shift', 1)):
            if isinstance(getattr(self, name), (int, float)):
                _validate.check_range(name, getattr(self, name), low=0, high=high)
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f'bounds are {self.bounds!r}; the first must be below the second.')


class SpatialResult(NamedTuple):
    """What `spatial` found, per example.

    Attributes:
      x_adv: the strongest image found `[B, height, width, channels]`.
      success: whether it is misclassified `[B]`.
      margin: logit of the label minus the largest other, on `x_adv` `[B]`.
      queries: forward passes made `[B]`.
      degrees: its angle, counterclockwise, in degrees `[B]`.
      translation: its translation down and to the right, in pixels `[B, 2]`.
    """

    x_adv: Float[Array, 'batch height width channels']
    success: Bool[Array, ' batch']
    margin: Float[Array, ' batch']
    queries: Int[Array, ' batch']
    degrees: Float[Array, ' batch']
    translation: Float[Array, 'batch 2']


def moved(
    x: Float[Array, 'height width channels'],
    degrees: float | Float[Array, ''],
    translation: Float[Array, '2'],
    black: float = 0.0,
) -> Float[Array, 'height width channels']:
    """One image, rotated about its middle and then translated, with bilinear interpolation.

    Args:
      x: the image.
      degrees: angle, counterclockwise as seen with the first row on top.
      translation: down and to the right, in pixels.
      black: value of what lies outside of the image.

    Returns:
      An image of the same shape.
    """
    height, width, _ = x.shape
    middle = jnp.asarray([(height - 1) / 2, (width - 1) / 2], x.dtype)
    angle = jnp.deg2rad(jnp.asarray(degrees, x.dtype))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
    down = rows - middle[0] - translation[0]
    right = columns - middle[1] - translation[1]
    # Where each pixel comes from: the motion undone.
    places = [
        middle[0] + cosine * down + sine * right,
        middle[1] - sine * down + cosine * right,
    ]

    def sample(channel: Array) -> Array:
        return ndimage.map_coordinates(channel, places, order=1, mode='constant', cval=black)

    return jax.vmap(sample, -1, -1)(x)


def spatial_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'height width channels'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Motion,
    angles: int | Int[Array, ''] = 31,
    shifts: int | Int[Array, ''] = 5,
    draws: int | Int[Array, ''] = 0,
) -> SpatialResult:
    """The search for one example: the function that `spatial` maps over a batch.

    It has the arguments and errors of `spatial`, with `x` one image and `y` its label; `angles`,
    `shifts` and `draws` may be traced. Returns one image and scalars.
    """
    if x.ndim != 3:
        raise ValueError(
            f'An image has shape {x.shape}; spatial needs [height, width, channels] each.'
        )
    look, _ = objective(forward, variables, y, losses.cross_entropy)
    sides = jnp.asarray(x.shape[:2], x.dtype)

    def on_grid(number: Array) -> Array:
        """From -1 to 1 for the angle and both translations; 0 where there is a single value."""
        places = jnp.stack(
            [number // (shifts * shifts), number // shifts % shifts, number % shifts]
        )
        counts = jnp.stack([jnp.asarray(angles), jnp.asarray(shifts), jnp.asarray(shifts)])
        return jnp.where(counts > 1, 2 * places / jnp.maximum(counts - 1, 1) - 1, 0)

    def judged(image: Array, degrees: Array, translation: Array, key: PRNGKeyArray) -> Iterate:
        """An iterate that carries its motion beside its image."""
        iterate = look(image, key)
        return iterate._replace(x=(image, degrees, translation))

    def attempt(number: Array, best: Iterate) -> Iterate:
        own = jax.random.fold_in(key, number)
        drawn = jax.random.uniform(own, (3,), x.dtype, -1, 1)
        part = jnp.where(jnp.asarray(draws) > 0, drawn, on_grid(number).astype(x.dtype))
        degrees, translation = part[0] * threat.degrees, part[1:] * threat.shift * sides
        image = jnp.clip(moved(x, degrees, translation, threat.bounds[0]), *threat.bounds)
        return stronger(judged(image.astype(x.dtype), degrees, translation, own), best)

    count = jnp.where(jnp.asarray(draws) > 0, draws, angles * shifts * shifts)
    clean = judged(x, jnp.zeros((), x.dtype), jnp.zeros(2, x.dtype), key)
    best = choose(clean.fools, clean, jax.lax.fori_loop(0, count, attempt, clean))
    image, degrees, translation = best.x
    return SpatialResult(image, best.fools, best.margin, 1 + count, degrees, translation)


def spatial(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch height width channels'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Motion,
    angles: int = 31,
    shifts: int = 5,
    draws: int = 0,
    index: Int[Array, ' batch'] | None = None,
) -> SpatialResult:
    """The worst rotation and translation of each image, by trying a grid or random ones.

    Engstrom et al. 2019 (https://arxiv.org/abs/1712.02779): the loss has so many local maxima in
    these three numbers that gradients find little, and an exhaustive search is cheap. By default
    their grid of 31 angles and 5 x 5 translations, 775 forward passes, jit-compiled.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, height, width, channels]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of `draws`.
      threat: how far images may turn and move.
      angles: angles of the grid from -degrees to degrees, at least 1; an odd number has 0.
      shifts: translations of the grid along each axis, at least 1; an odd number has 0.
      draws: if not 0, that many random motions in place of the grid (the "worst of 10").
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example the motion of largest cross-entropy, misclassified if any is.

    Raises:
      ValueError: a number is out of range, images are not finite, out of bounds or without height,
        width and channels, or a label is no class.
    """
    _validate.check_whole('angles', angles)
    _validate.check_whole('shifts', shifts)
    _validate.check_whole('draws', draws, low=0)
    return attack_batch(
        spatial_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        shared={'angles': angles, 'shifts': shifts, 'draws': draws},
    )

"""Attacks that look for the smallest perturbation: their result, and robustness curves from it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neurosens.attacks.result import label_margin, logits_of
from neurosens.attacks.threat import Threat
from neurosens.forward import Forward, Variables


class MinimumResult(NamedTuple):
    """What an attack that minimises the perturbation found, per example (or for one).

    It has the fields of `AttackResult`, for the radius of the threat.

    Attributes:
      x_adv: the nearest misclassified image found if its distance is at most eps, else the clean
        one `[B, ...]`.
      success: whether it is `[B]`.
      margin: logit of the label minus the largest other, on `x_adv` `[B]`.
      queries: forward passes made `[B]`.
      distance: norm of the smallest perturbation found, whatever eps is `[B]`: 0 where the clean
        image is misclassified (with a target: classified as it), infinite where nothing was found.
    """

    x_adv: Float[Array, 'batch ...']
    success: Bool[Array, ' batch']
    margin: Float[Array, ' batch']
    queries: Int[Array, ' batch']
    distance: Float[Array, ' batch']


def within(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    nearest: Float[Array, '...'],
    distance: Float[Array, ''],
    threat: Threat,
    queries: Int[Array, ''],
) -> MinimumResult:
    """The result of one example, from the nearest misclassified image found.

    Args:
      forward: the model.
      variables: its variables.
      x: the clean image.
      y: its label.
      nearest: the nearest misclassified image, anything if there is none.
      distance: its distance, infinite if there is none.
      threat: whose eps decides on success.
      queries: forward passes made, with the one that this function makes.

    Returns:
      The result.
    """
    # A radius may be infinite, too.
    success = jnp.isfinite(distance) & (distance <= threat.eps)
    x_adv = jnp.where(success, nearest, x)
    margin = label_margin(logits_of(forward, variables, x_adv), y)
    return MinimumResult(x_adv, success, margin, queries, distance)


def robust_accuracy(
    distance: Float[np.ndarray, ' examples'], eps: Float[np.ndarray, ' radii']
) -> Float[np.ndarray, ' radii']:
    """The curve of robust accuracy against the radius, from one run of a minimum-norm attack.

    Args:
      distance: smallest perturbation found of each image `[N]`, 0 where misclassified.
      eps: radii `[R]`.

    Returns:
      Share of images that no perturbation found within each radius fools `[R]`; the clean accuracy
      at radius 0.
    """
    distance = np.sort(np.asarray(distance))
    return 1 - np.searchsorted(distance, np.asarray(eps), side='right') / len(distance)


class Median(NamedTuple):
    """A median with its bootstrap interval.

    Attributes:
      value: the median.
      low: 2.5 % quantile of the medians of samples drawn with replacement.
      high: 97.5 % quantile.
    """

    value: float
    low: float
    high: float


def median_distance(
    distance: Float[np.ndarray, ' examples'], *, samples: int = 2000, seed: int = 0
) -> Median:
    """The median of distances, with a 95 % bootstrap interval.

    Args:
      distance: smallest perturbation found of each image `[N]`; may be infinite.
      samples: how many samples of the same size are drawn.
      seed: seed of the drawing.

    Returns:
      Median and interval, in the units of the distances.

    Raises:
      ValueError: there is no distance.
    """
    distance = np.asarray(distance, np.float64)
    if not distance.size:
        raise ValueError('There is no distance to take the median of.')
    chosen = np.random.default_rng(seed).integers(0, distance.size, (samples, distance.size))
    ordered = np.sort(distance[chosen], axis=1)
    # Lower medians: between a finite and an infinite distance there is no middle.
    medians = ordered[:, (distance.size - 1) // 2]
    low, high = np.quantile(medians, (0.025, 0.975), method='nearest')
    middle = np.sort(distance)[(distance.size - 1) // 2]
    return Median(float(middle), float(low), float(high))

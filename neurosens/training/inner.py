"""The inner maximisation of adversarial training, on a batch against the model being trained.

Unlike the attacks of `neurosens.attacks` it works on a whole batch, so that a model may be attacked
with the statistics of its batch, returns its last iterate, and moves images that are misclassified
already too: what adversarial training is defined with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens.attacks import Threat, project, random_start, steepest_ascent
from neurosens.convolution import with_fast_input_gradients

Images = Float[Array, 'batch ...']
# From images to one loss per image.
BatchLoss = Callable[[Images], Float[Array, ' batch']]


def start(threat: Threat, x: Images, key: PRNGKeyArray) -> Images:
    """Random images of the balls around a batch, by the place in the batch."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
    return jax.vmap(random_start, (None, 0, 0))(threat, x, keys)


def moved(threat: Threat, x: Images, current: Images, gradient: Images, size: float) -> Images:
    """One steepest step of a batch, and back into ball and box."""

    def one(x: Array, current: Array, gradient: Array) -> Array:
        return project(threat, x, current + size * steepest_ascent(threat, gradient))

    return jax.vmap(one)(x, current, gradient)


def maximize(
    loss: BatchLoss, x: Images, first: Images, *, threat: Threat, steps: int, step_size: float
) -> Images:
    """Projected steepest ascent.

    Args:
      loss: what every image's change should raise; it may depend on the whole batch.
      x: clean images.
      first: where to start.
      threat: the perturbations allowed.
      steps: gradient steps.
      step_size: their length in the threat's norm.

    Returns:
      The last iterate, of which no gradient is taken.
    """
    gradient = jax.grad(with_fast_input_gradients(lambda images: loss(images).sum()))

    def step(_: Array, current: Images) -> Images:
        return moved(threat, x, current, gradient(current), step_size)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, first))


def maximize_steepest(
    loss: BatchLoss,
    x: Images,
    *,
    threats: Sequence[Threat],
    steps: int,
    step_sizes: Sequence[float],
) -> Images:
    """Steepest descent over several balls at once (Maini, Wong & Kolter 2020, MSD).

    Each step tries the step of every threat and keeps, for each image, the one of largest loss.

    Args:
      loss: what every image's change should raise.
      x: clean images, where it starts.
      threats: the balls.
      steps: steps.
      step_sizes: the length of a step in each norm.

    Returns:
      The last iterate, inside one of the balls, of which no gradient is taken.
    """
    fast = with_fast_input_gradients(lambda images: loss(images).sum())
    gradient = jax.grad(fast)

    def step(_: Array, current: Images) -> Images:
        slope = gradient(current)
        tried = jnp.stack(
            [
                moved(threat, x, current, slope, size)
                for threat, size in zip(threats, step_sizes, strict=True)
            ]
        )
        losses = jax.lax.map(loss, tried)
        return jnp.take_along_axis(
            tried, losses.argmax(0).reshape(1, -1, *[1] * (x.ndim - 1)), axis=0
        )[0]

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, x))

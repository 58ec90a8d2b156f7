"""Bounds and controls of inverse perturbation, for evaluation only.

Those named oracles are no defence: each needs the clean twin of an attacked image, the true class,
or both. They say how much a move of a given size could recover at best, and how much any move does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.attacks.losses import label_margin
from neurosens.defenses.inverse_perturbation import (
    Parameters,
    direction_example,
    normalize,
)
from neurosens.defenses.inverse_perturbation.settings import check_classes
from neurosens.forward import Forward, Variables

NAMES = (
    'identity',
    'random',
    'random, oracle sign',
    'class direction',
    'influence, oracle',
    'true logit, oracle',
    'true margin, oracle',
)


@jax.jit
def moved(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    x_adv: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    rho: Float[Array, ''] | float,
    parameters: Parameters,
    index: Int[Array, ' batch'] | None = None,
) -> dict[str, Float[Array, 'batch ...']]:
    """Attacked images after moves of one size along different directions, jit-compiled.

    Args:
      forward: the model.
      variables: its variables.
      x: clean images with pixels in [0, 1] `[B, ...]`.
      x_adv: the same images attacked.
      y: true classes `[B]`.
      key: of the random directions.
      rho: size of the moves, root mean square per pixel.
      parameters: of the calibration: directions of classes, and the settings of the influence
        direction.
      index: identity of each example `[B]`, so that random directions do not depend on batches; by
        default its place in this batch.

    Returns:
      Images in [0, 1] `[B, ...]` for each of `NAMES`:

      - `identity`: unmoved;
      - `random`: along a normal direction;
      - `random, oracle sign`: the same, or against it where that does not give the true class, so
        that it recovers whatever `random` does;
      - `class direction`: along the first calibrated direction of the class that the attacked image
        is taken for, as the defence moves it;
      - `influence, oracle`: the direction of the *clean* image's predicted class, with the sign
        that gives that class; with settings of `layers` behind the last convolution the first
        released program of Chen et al. 2021;
      - `true logit, oracle`: along the gradient of the true class's logit at the attacked image;
      - `true margin, oracle`: along the gradient of that logit minus the largest other: about what
        any move of this size can do, to first order.

    Raises:
      LayerError: a layer of the settings cannot be tapped.
      ValueError: front and tail do not fit into a layer, or the model has another number of classes
        than the calibration.
    """
    if index is None:
        index = jnp.arange(len(x))
    logits = jax.eval_shape(lambda x: forward(variables, x)[0], x)
    check_classes(parameters, logits.shape[-1])

    def predict(image: Array) -> Array:
        return forward(variables, image[None])[0][0].argmax()

    def example(x: Array, x_adv: Array, y: Array, index: Array) -> dict[str, Array]:
        def step(direction: Array) -> Array:
            return jnp.clip(x_adv + rho * direction, 0, 1)

        def either(direction: Array, right: Array) -> Array:
            return step(jnp.where(right, 1, -1) * direction)

        own = parameters.directions[predict(x_adv), 0]
        noise = normalize(jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype))
        clean = direction_example(forward, variables, x, settings=parameters.settings)
        influence = clean.direction.astype(x.dtype)
        # The program judges before it clips.
        flips = predict(x_adv + rho * influence) == clean.logits.argmax()

        def logit(image: Array) -> Array:
            return forward(variables, image[None])[0][0][y]

        def margin(image: Array) -> Array:
            return label_margin(forward(variables, image[None])[0][0], y)

        images = (
            x_adv,
            step(noise),
            either(noise, predict(step(noise)) == y),
            step(own.astype(x.dtype)),
            either(influence, flips),
            step(normalize(jax.grad(logit)(x_adv))),
            step(normalize(jax.grad(margin)(x_adv))),
        )
        return dict(zip(NAMES, images))

    results: Any = jax.vmap(example)(jnp.asarray(x), jnp.asarray(x_adv), jnp.asarray(y), index)
    return results

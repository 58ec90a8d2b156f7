"""The function of one image that an attack climbs, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.attacks.adaptive import redraw
from neurosens.attacks.losses import Loss
from neurosens.attacks.result import Iterate, judge, logits_of
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables

# From an image and a key (which only random models use) to what the model says of the image.
Look: TypeAlias = Callable[[Array, PRNGKeyArray], Iterate]
Climb: TypeAlias = Callable[[Array, PRNGKeyArray], tuple[Float[Array, '...'], Iterate]]


def objective(
    forward: Forward,
    variables: Variables,
    y: Int[Array, ''],
    loss: Loss,
    *,
    target: Int[Array, ''] | None = None,
    draws: int = 1,
    redrawn: bool = True,
) -> tuple[Look, Climb]:
    """What a model says of an image, without and with the gradient of a loss.

    Args:
      forward: the model.
      variables: its variables.
      y: label of the image.
      loss: `loss(logits, y)`, or `loss(logits, y, target)` if there is a target.
      target: the class aimed at.
      draws: draws of a random model per call, whose losses, gradients and logits are averaged.
      redrawn: whether each call sees fresh draws of a random model, or that of its own key.

    Returns:
      `look(x, key) -> iterate` and `climb(x, key) -> (gradient of the loss, iterate)`.
    """
    aim = (y,) if target is None else (y, target)

    def evaluate(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        logits = logits_of(redraw(forward, key) if redrawn else forward, variables, x)
        return loss(logits, *aim), logits

    def differentiate(x: Array, key: PRNGKeyArray) -> tuple[tuple[Array, Array], Array]:
        fast = with_fast_input_gradients(lambda x: evaluate(x, key))
        return jax.value_and_grad(fast, has_aux=True)(x)

    def averaged(function: Callable, x: Array, key: PRNGKeyArray) -> tuple:
        if draws == 1:
            return function(x, key)
        # One after the other: a draw needs as much memory as the whole network.
        keys = jax.random.split(key, draws)
        return jax.tree.map(lambda v: v.mean(0), jax.lax.map(lambda k: function(x, k), keys))

    def look(x: Array, key: PRNGKeyArray) -> Iterate:
        value, logits = averaged(evaluate, x, key)
        return judge(x, logits, y, value, target)

    def climb(x: Array, key: PRNGKeyArray) -> tuple[Array, Iterate]:
        (value, logits), gradient = averaged(differentiate, x, key)
        return gradient, judge(x, logits, y, value, target)

    return look, climb


def unseen(look: Look, x: Array, key: PRNGKeyArray) -> Iterate:
    """Stands for an image until the model has seen it: an iterate of zeros that fools no one."""
    kinds = jax.eval_shape(look, x, key)
    return jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds)._replace(x=x)


def drawn_logits(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    key: PRNGKeyArray,
    index: Int[Array, ' batch'],
) -> Float[Array, 'batch classes']:
    """Logits of a batch, in which draws of a random model follow the example, not its batch.

    Args:
      forward: the model.
      variables: its variables.
      x: images `[B, ...]`.
      key: randomness of a random model.
      index: identity of each example `[B]`.

    Returns:
      The logits, in single precision at least.
    """

    def one(image: Array, own: PRNGKeyArray) -> Array:
        return logits_of(redraw(forward, own), variables, image)

    return jax.vmap(one)(x, jax.vmap(jax.random.fold_in, (None, 0))(key, index))

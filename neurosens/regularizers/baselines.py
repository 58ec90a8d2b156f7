"""Penalties to compare with: the gradient of the loss, and the size of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from neurosens import _validate
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables
from neurosens.regularizers.regularizer import (
    POSITIONS,
    Regularizer,
    hidden,
    mean_over_layers,
    single,
)

ORDERS = (1, 2)


def input_gradient(*, order: int = 2) -> Regularizer:
    """The gradient of the cross-entropy with respect to the image (Drucker & LeCun 1992).

    Args:
      order: 2 for the mean over images of ||grad_x CE||_2^2, 1 for that of ||grad_x CE||_1.

    Returns:
      The regularizer; it logs nothing besides.

    Raises:
      ValueError: the order is neither 1 nor 2.
    """
    _check_order(order)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del key

        # Of the whole batch, whose examples have nothing to do with each other in evaluation mode:
        # mapped over examples, the rewritten kernel gradient is wrong on several devices.
        def loss(x: Array) -> Array:
            logits = single(forward(variables, x)[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

        gradient = single(jax.grad(with_fast_input_gradients(loss))(x))
        total = (gradient**2).sum() if order == 2 else jnp.abs(gradient).sum()
        return total / x.shape[0], {}

    return regularizer


def activation_norm(
    *, order: int = 1, layers: Sequence[str] | None = None, position: str = 'post'
) -> Regularizer:
    """The mean size of activations: of |a|, or of a^2, over entries, layers and images.

    Args:
      order: 1 or 2.
      layers: as of `activation_sensitivity`.
      position: `'post'`, what the layers return, or `'pre'`, what enters them.

    Returns:
      The regularizer; it logs the part of each layer under its name.

    Raises:
      ValueError: a choice is unknown.
    """
    _check_order(order)
    _validate.check_choice('position', position, POSITIONS)
    _validate.check_layers(layers)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del y, key

        def example(x: Array) -> dict[str, Array]:
            values = hidden(forward, variables, x, layers, position)
            return {
                name: ((value**2) if order == 2 else jnp.abs(value)).mean()
                for name, value in values.items()
            }

        means = {name: part.mean() for name, part in jax.vmap(example)(x).items()}
        return mean_over_layers(means), means

    return regularizer


def _check_order(order: int) -> None:
    if order not in ORDERS:
        raise ValueError(f'order is {order!r}; it must be 1 or 2.')

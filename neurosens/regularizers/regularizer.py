"""The call form of regularizers, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.forward import (
    EVERY_INPUT,
    EVERY_NONLINEARITY,
    EVERY_NONLINEARITY_INPUT,
    EVERY_OUTPUT,
    Forward,
    Variables,
    is_nonlinearity,
)

POSITIONS = ('post', 'pre')


class Regularizer(Protocol):
    """A differentiable penalty; it sees the model in evaluation mode (running statistics)."""

    def __call__(
        self,
        forward: Forward,
        variables: Variables,
        x: Float[Array, 'batch ...'],
        y: Int[Array, ' batch'],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ''], Mapping[str, Float[Array, '']]]:
        """Computes the penalty of a batch and scalars to log."""


def keys_of(key: PRNGKeyArray, x: Float[Array, 'batch ...']) -> PRNGKeyArray:
    """A key for each example, by its place in the batch: on any number of devices the same."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))


def single(values: Array) -> Array:
    """Values in single precision at least, in which penalties are summed."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def hidden(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    layers: Sequence[str] | None,
    position: str = 'post',
) -> dict[str, Array]:
    """Hidden activations of one example.

    Args:
      forward: the model.
      variables: its variables.
      x: one input.
      layers: as of `hidden_taps`.
      position: as of `hidden_taps`.

    Returns:
      By layer its activation, in single precision at least.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: layers are not named and no module has the name of a nonlinearity.
    """
    tapped = forward(variables, x[None], taps=hidden_taps(layers, position))[1]
    return {name: value[0] for name, value in hidden_of(tapped, layers, position).items()}


def hidden_taps(layers: Sequence[str] | None, position: str) -> tuple[str, ...]:
    """The taps for hidden activations.

    Args:
      layers: names of layers; None for every nonlinearity that is a module, by its name.
      position: `'post'` for what the layers return, `'pre'` for what enters them.

    Returns:
      Names, or patterns.
    """
    if layers is None:
        # The first alone would leave out nonlinearities that cannot be tapped, without a word.
        if position == 'pre':
            return EVERY_INPUT, EVERY_NONLINEARITY_INPUT
        return EVERY_OUTPUT, EVERY_NONLINEARITY
    return tuple(f'{name}:in' if position == 'pre' else name for name in layers)


def selected(
    tapped: Mapping[str, Array], layers: Sequence[str] | None, position: str
) -> dict[str, Array]:
    """Hidden activations among tapped ones, as the model computes them.

    Args:
      tapped: what `hidden_taps` of these layers gave.
      layers: as there, like the position.
      position: `'pre'` names what enters a layer by the layer alone.

    Returns:
      By layer its activation.

    Raises:
      ValueError: layers are not named and no module has the name of a nonlinearity.
    """
    if layers is None:
        tapped = {name: value for name, value in tapped.items() if is_nonlinearity(name)}
        if not tapped:
            raise ValueError(
                'No layer of this model has the name of a nonlinearity (act, relu, ...); name the '
                'layers to regularize.'
            )
    if position == 'pre':
        return {name.removesuffix(':in'): value for name, value in tapped.items()}
    return dict(tapped)


def hidden_of(
    tapped: Mapping[str, Array], layers: Sequence[str] | None, position: str
) -> dict[str, Array]:
    """The same in single precision at least."""
    return {name: single(value) for name, value in selected(tapped, layers, position).items()}


def mean_square(values: Array) -> Float[Array, '']:
    """Mean of the squares of all entries."""
    return (values**2).mean()


def zeros_of(values: Mapping[str, Array]) -> dict[str, Array]:
    """Which entries of activations are 0."""
    return {name: value == 0 for name, value in values.items()}


def mean_over_layers(parts: Mapping[str, Float[Array, '']]) -> Float[Array, '']:
    """Mean of one number per layer."""
    return jnp.stack(list(parts.values())).mean()

"""The call form of regularizers, and what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.forward import EVERY_INPUT, EVERY_OUTPUT, Forward, Variables

POSITIONS = ('post', 'pre')
# Names of modules that are nonlinearities, such as `stage1_block1/act1`, `act3_2` and `final_act`.
_NONLINEARITY = re.compile(
    r'(^|_)(act|relu|gelu|silu|swish|elu|selu|celu|tanh|softplus)(\d+(_\d+)*)?$'
)


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
    return {name: value[0] for name, value in hidden_of(tapped, layers).items()}


def hidden_taps(layers: Sequence[str] | None, position: str) -> tuple[str, ...]:
    """The taps for hidden activations.

    Args:
      layers: names of layers; None for every nonlinearity that is a module, by its name.
      position: `'post'` for what the layers return, `'pre'` for what enters them.

    Returns:
      Names or a pattern.
    """
    if layers is None:
        return (EVERY_INPUT if position == 'pre' else EVERY_OUTPUT,)
    return tuple(f'{name}:in' if position == 'pre' else name for name in layers)


def hidden_of(tapped: Mapping[str, Array], layers: Sequence[str] | None) -> dict[str, Array]:
    """Hidden activations among tapped ones.

    Args:
      tapped: what `hidden_taps` of these layers gave.
      layers: as there.

    Returns:
      By layer its activation, in single precision at least.

    Raises:
      ValueError: layers are not named and no module has the name of a nonlinearity.
    """
    named = {name.removesuffix(':in'): value for name, value in tapped.items()}
    if layers is None:
        named = {
            name: value
            for name, value in named.items()
            if _NONLINEARITY.search(name.rpartition('/')[2])
        }
        if not named:
            raise ValueError(
                'No layer of this model has the name of a nonlinearity (act, relu, ...); name the '
                'layers to regularize.'
            )
    return {name: single(value) for name, value in named.items()}


def mean_square(values: Array) -> Float[Array, '']:
    """Mean of the squares of all entries."""
    return (values**2).mean()


def zeros_of(values: Mapping[str, Array]) -> dict[str, Array]:
    """Which entries of activations are 0."""
    return {name: value == 0 for name, value in values.items()}


def mean_over_layers(parts: Mapping[str, Float[Array, '']]) -> Float[Array, '']:
    """Mean of one number per layer."""
    return jnp.stack(list(parts.values())).mean()

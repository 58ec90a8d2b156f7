"""Passes over a whole batch with their derivatives, which training can share with its objective.

A regularizer that runs and differentiates the model on whole batches through these functions can
use the pass that the objective of training makes anyway (a `SharedPass` in place of the model).
Others work on one image at a time, and need a pass of their own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float

from neurosens.convolution import with_fast_input_gradients, with_fast_pooling
from neurosens.forward import Forward, Variables

Images: TypeAlias = Float[Array, 'batch ...']
# From logits and activations to what is differentiated.
Read: TypeAlias = Callable[[Array, Mapping[str, Array]], Any]


class SharedPass(abc.ABC):
    """A `Forward` whose pass over one batch is shared, derivatives and all."""

    @abc.abstractmethod
    def __call__(
        self,
        variables: Variables,
        x: Images,
        edits: Mapping[str, Any] = {},
        taps: Collection[str] = (),
    ) -> tuple[Array, dict[str, Array]]:
        """Logits and activations; see `Forward`."""

    @abc.abstractmethod
    def linearize(
        self, variables: Variables, x: Images, read: Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Images], Any]]:
        """See the function of this name."""

    @abc.abstractmethod
    def vjp(
        self, variables: Variables, x: Images, read: Read, taps: Collection[str]
    ) -> tuple[Any, Callable[[Any], Images]]:
        """See the function of this name."""


def linearize(
    forward: Forward, variables: Variables, x: Images, read: Read, taps: Collection[str] = ()
) -> tuple[Any, Callable[[Images], Any]]:
    """Runs a model on a batch, for derivatives along directions of the images.

    Args:
      forward: the model.
      variables: its variables.
      x: images `[B, ...]`.
      read: from logits `[B, K]` and activations by layer to a pytree of arrays.
      taps: names of layers.

    Returns:
      What `read` returns, and a function from a direction `[B, ...]` to its derivative.
    """
    if isinstance(forward, SharedPass):
        return forward.linearize(variables, x, read, taps)
    fast = with_fast_pooling(lambda x: read(*forward(variables, x, taps=taps)))
    return jax.linearize(fast, x)


def vjp(
    forward: Forward, variables: Variables, x: Images, read: Read, taps: Collection[str] = ()
) -> tuple[Any, Callable[[Any], Images]]:
    """Runs a model on a batch, for gradients with respect to the images.

    Args:
      forward: as of `linearize`, like the other arguments.
      variables: its variables.
      x: images `[B, ...]`.
      read: from logits and activations to a pytree of arrays.
      taps: names of layers.

    Returns:
      What `read` returns, and a function from its cotangents to the gradient `[B, ...]`.
    """
    if isinstance(forward, SharedPass):
        return forward.vjp(variables, x, read, taps)
    fast = with_fast_input_gradients(lambda x: read(*forward(variables, x, taps=taps)))
    values, pull = jax.vjp(fast, x)
    return values, lambda cotangents: pull(cotangents)[0]


def each(function: Callable[[Any], Any], directions: Any) -> Any:
    """Applies the derivative of a batch to one direction after the other.

    `vmap` over directions would put their axis before that of the images: devices that share the
    images would gather all of them for every convolution, and each do the work of all.

    Args:
      function: from a direction, or a cotangent, of a batch to a pytree.
      directions: pytree of arrays `[S, B, ...]`.

    Returns:
      The results, stacked `[S, B, ...]`.
    """
    if len(jax.tree.leaves(directions)[0]) == 1:
        only = function(jax.tree.map(lambda value: value[0], directions))
        return jax.tree.map(lambda value: value[None], only)
    return jax.lax.map(function, directions)

"""The call form of training objectives.

objective(module, variables, x, y, key) -> (loss, Outcome)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.forward import Variables


class Outcome(NamedTuple):
    """What an objective computed besides its loss.

    Attributes:
      logits: training-mode logits `[B, K]`, from which the training accuracy is taken.
      updates: new values of the mutable collections, such as `{'batch_stats': ...}`.
      metrics: further scalars to log, by name.
    """

    logits: Float[Array, 'batch classes']
    updates: Mapping[str, Any]
    metrics: Mapping[str, Float[Array, '']]


class Objective(Protocol):
    """A differentiable training loss."""

    def __call__(
        self,
        module: nn.Module,
        variables: Variables,
        x: Float[Array, 'batch ...'],
        y: Int[Array, ' batch'],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ''], Outcome]:
        """Computes the mean loss of a batch and its outcome."""


def run_training_mode(
    module: nn.Module, variables: Variables, x: Float[Array, 'batch ...'], key: PRNGKeyArray
) -> tuple[Float[Array, 'batch classes'], Mapping[str, Any]]:
    """Runs a module with batch statistics and dropout.

    Args:
      module: a model of `neurosens.models`, or any Linen module that takes `train`.
      variables: its variables.
      x: images `[B, H, W, C]`.
      key: randomness of dropout.

    Returns:
      `(logits [B, K], new values of the collections other than 'params')`.
    """
    mutable = [collection for collection in variables if collection != 'params']
    logits, updates = module.apply(variables, x, train=True, mutable=mutable, rngs={'dropout': key})
    return logits, updates

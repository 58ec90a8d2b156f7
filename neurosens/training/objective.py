"""The call form of training objectives.

objective(module, variables, x, y, key) -> (loss, Outcome)

A sixth argument `taps`, where it is not None, says that regularizers share the objective's pass
over the clean images, and which activations they want of it. An objective that is a `Replayed` one
besides takes each batch several times in a row, at images that the training step moves by the
gradient of the same backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens.attacks import Threat
from neurosens.forward import LinenForward, Variables


class Outcome(NamedTuple):
    """What an objective computed besides its loss.

    Attributes:
      logits: training-mode logits `[B, K]`, from which the training accuracy is taken.
      updates: new values of the mutable collections, such as `{'batch_stats': ...}`.
      metrics: further scalars to log, by name.
      tapped: activations of the layers asked for, of the clean images in training mode.
      clean_logits: the logits of that pass, or None without one.
      attacked: the images that its attack found, or None without one; of several those that
        `logits` are of.
      terms: what the loss is the sum of, by name, if it is one of several terms.
    """

    logits: Float[Array, 'batch classes']
    updates: Mapping[str, Any]
    metrics: Mapping[str, Float[Array, '']]
    tapped: Mapping[str, Array] = {}
    clean_logits: Float[Array, 'batch classes'] | None = None
    attacked: Float[Array, 'batch ...'] | None = None
    terms: Mapping[str, Float[Array, '']] = {}


class Objective(Protocol):
    """A differentiable training loss."""

    def __call__(
        self,
        module: nn.Module,
        variables: Variables,
        x: Float[Array, 'batch ...'],
        y: Int[Array, ' batch'],
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Float[Array, ''], Outcome]:
        """Computes the mean loss of a batch and its outcome.

        Raises:
          ValueError: `taps` is not None, and the objective runs no clean images in training mode.
        """


@dataclasses.dataclass(frozen=True)
class Replayed:
    """An objective at images that are attacked while it is minimised (Shafahi et al. 2019, "free").

    Each batch is taken `replays` times. Every time, one backward pass gives the gradient for the
    parameters and that for the images, which moves the perturbation of the next time; the next
    batch starts from the perturbation that the last one ended with. It stays in the ball; images
    are cut to the box where they are seen.

    Attributes:
      objective: of the perturbed images.
      threat: the perturbations allowed.
      step_size: length of a step in the threat's norm.
      replays: times in a row that each batch is taken.
    """

    objective: Objective
    threat: Threat
    step_size: float
    replays: int

    def __call__(
        self,
        module: nn.Module,
        variables: Variables,
        x: Float[Array, 'batch ...'],
        y: Int[Array, ' batch'],
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Float[Array, ''], Outcome]:
        """The objective of perturbed images."""
        loss, outcome = self.objective(module, variables, x, y, key, taps)
        return loss, outcome._replace(attacked=x)


def refuse_taps(taps: Collection[str] | None) -> None:
    """Raises a ValueError where an objective without a clean pass is to share it."""
    if taps is not None:
        raise ValueError(
            "A regularizer shares the objective's pass over clean images, but this objective runs "
            "none in training mode; use 'standard', 'trades', 'mart' or 'pgd' with a clean_share, "
            "or leave out 'shared'."
        )


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
    logits, _, updates = tap_training_mode(module, variables, x, key, ())
    return logits, updates


def tap_training_mode(
    module: nn.Module,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    key: PRNGKeyArray,
    taps: Collection[str],
) -> tuple[Float[Array, 'batch classes'], dict[str, Array], dict[str, Any]]:
    """The same with activations.

    Args:
      module: as of `run_training_mode`, like the next three.
      variables: its variables.
      x: images `[B, H, W, C]`.
      key: randomness of dropout.
      taps: names of layers.

    Returns:
      `(logits [B, K], {layer name: activation}, new values of the other collections)`.

    Raises:
      LayerError: a layer cannot be tapped.
    """
    mutable = [collection for collection in variables if collection != 'params']
    forward = LinenForward(module, {'train': True})
    return forward.apply(variables, x, taps=taps, mutable=mutable, rngs={'dropout': key})

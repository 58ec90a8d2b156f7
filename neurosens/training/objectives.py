"""What training minimises: a registry of objectives, and the call form of regularizers.

An objective is a function

    objective(module, variables, x, y, key) -> (loss, Outcome)

that runs the module in training mode on images `[B, ...]` in [0, 1]. The loss is the mean over the
global batch. Factories in `OBJECTIVES` build one from its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.linen as nn
import jax
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.forward import Forward, Variables


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


ObjectiveFactory: TypeAlias = Callable[..., Objective]
RegularizerFactory: TypeAlias = Callable[..., Regularizer]


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


def standard(*, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on clean images.

    Args:
      label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).

    Returns:
      The objective.

    Raises:
      ValueError: `label_smoothing` is outside [0, 1).
    """
    _validate.check_range('label_smoothing', label_smoothing, low=0, high=1, high_open=True)

    def objective(
        module: nn.Module, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Outcome]:
        logits, updates = run_training_mode(module, variables, x, key)
        targets = jax.nn.one_hot(y, logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, Outcome(logits, updates, {})

    return objective


OBJECTIVES: Mapping[str, ObjectiveFactory] = {'standard': standard}
REGULARIZERS: Mapping[str, RegularizerFactory] = {}


def create(
    kind: str, name: str, options: Mapping[str, Any], registry: Mapping[str, Callable[..., Any]]
) -> Any:
    """Builds a registered objective or regularizer from its options.

    Args:
      kind: `'objective'` or `'regularizer'`, for messages.
      name: its registered name.
      options: keyword arguments of its factory.
      registry: where it is registered.

    Returns:
      What the factory returns.

    Raises:
      ValueError: the name or an option is unknown, a required option is missing, or a value is out
        of range.
    """
    if name not in registry:
        raise ValueError(_validate.unknown(kind, name, registry))
    parameters = inspect.signature(registry[name]).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(_validate.unknown(f'{kind} {name} option', option, parameters))
    missing = [
        option
        for option, parameter in parameters.items()
        if parameter.default is parameter.empty and option not in options
    ]
    if missing:
        raise ValueError(f'The {kind} {name!r} needs the option {missing[0]!r}; give it a value.')
    return registry[name](**options)

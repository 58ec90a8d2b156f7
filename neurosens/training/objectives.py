"""What training minimises: registries of objectives and of regularizers.

An objective is a function

    objective(module, variables, x, y, key) -> (loss, Outcome)

that runs the module in training mode on images `[B, ...]` in [0, 1]. The loss is the mean over the
global batch. Factories in `OBJECTIVES` build one from its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import optax
from jaxtyping import Array, PRNGKeyArray

from neurosens import _validate, regularizers
from neurosens.forward import Variables
from neurosens.regularizers import Regularizer
from neurosens.training import adversarial, multi_norm
from neurosens.training.objective import (
    Objective,
    Outcome,
    Replayed,
    run_training_mode,
    tap_training_mode,
)

__all__ = [
    'OBJECTIVES',
    'REGULARIZERS',
    'Objective',
    'Outcome',
    'Regularizer',
    'Replayed',
    'create',
    'run_training_mode',
    'standard',
]

ObjectiveFactory: TypeAlias = Callable[..., Objective]
RegularizerFactory: TypeAlias = Callable[..., Regularizer]


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
        module: nn.Module,
        variables: Variables,
        x: Array,
        y: Array,
        key: PRNGKeyArray,
        taps: Collection[str] | None = None,
    ) -> tuple[Array, Outcome]:
        logits, tapped, updates = tap_training_mode(module, variables, x, key, taps or ())
        targets = jax.nn.one_hot(y, logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, Outcome(logits, updates, {}, tapped, logits)

    return objective


OBJECTIVES: Mapping[str, ObjectiveFactory] = {
    'standard': standard,
    'pgd': adversarial.pgd,
    'fgsm_rs': adversarial.fgsm_rs,
    'free': adversarial.free,
    'trades': adversarial.trades,
    'mart': adversarial.mart,
    'multi_norm': multi_norm.multi_norm,
}
REGULARIZERS: Mapping[str, RegularizerFactory] = {
    'activation_norm': regularizers.activation_norm,
    'activation_sensitivity': regularizers.activation_sensitivity,
    'direct_sensitivity': regularizers.direct_sensitivity,
    'input_gradient': regularizers.input_gradient,
    'jacobian': regularizers.jacobian,
    'jacobian_root': regularizers.jacobian_root,
    'neuron_contribution': regularizers.neuron_contribution,
    'sensitivity_and_jacobian': regularizers.sensitivity_and_jacobian,
}


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
    _validate.check_choice(kind, name, registry)
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

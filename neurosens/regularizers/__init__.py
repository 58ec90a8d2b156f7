"""Regularizers: differentiable penalties of one call form, for any `Forward`.

penalty, metrics = regularizer(forward, variables, x, y, key)

`forward` is the model in evaluation mode: penalties see the running statistics of BatchNorm, so
that an image's penalty does not depend on the others of its batch, but for the root of a batch's
Jacobians and the neurons' sizes of direct sensitivity.
"""

from neurosens.regularizers.activation_sensitivity import (
    activation_sensitivity,
    sensitivity_and_jacobian,
)
from neurosens.regularizers.baselines import activation_norm, input_gradient
from neurosens.regularizers.jacobian import jacobian, jacobian_root, squared_jacobian_norm
from neurosens.regularizers.neuron_contribution import (
    contribution,
    direct_sensitivity,
    neuron_contribution,
    weight_difference,
)
from neurosens.regularizers.regularizer import Regularizer

__all__ = [
    'Regularizer',
    'activation_norm',
    'activation_sensitivity',
    'contribution',
    'direct_sensitivity',
    'input_gradient',
    'jacobian',
    'jacobian_root',
    'neuron_contribution',
    'sensitivity_and_jacobian',
    'squared_jacobian_norm',
    'weight_difference',
]

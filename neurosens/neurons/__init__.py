"""What single neurons do: measures for any layer of any Flax classifier.

    result = measure(forward, variables, x, ..., layer=NAME, unit='channel' | 'unit')

Each measure is jit-compiled and works on batches that are split over devices. Those that take one
neuron, class or direction after another do so in chunks; beneath those of single examples stands
the function of one example that is mapped over the batch (`..._example`).
"""

from neurosens.neurons import correlation, filtering, kernels, units
from neurosens.neurons.ablation import (
    Ablation,
    Fragility,
    Response,
    ablation,
    ablation_example,
    fragility,
    response,
    without_neurons,
)
from neurosens.neurons.agreement import Agreement, agreement
from neurosens.neurons.agreement import markdown as agreement_markdown
from neurosens.neurons.agreement import rows as agreement_rows
from neurosens.neurons.agreement import table as agreement_table
from neurosens.neurons.influence import (
    Partition,
    class_influence,
    influence,
    influence_example,
    labels,
    partition,
)
from neurosens.neurons.input_gradients import (
    Estimate,
    GradientNorms,
    input_gradient_norms,
    input_gradient_norms_example,
    probe_example,
    probe_gradients,
)
from neurosens.neurons.layers import NeuronLayer, default_layers, describe
from neurosens.neurons.logit_gradients import logit_gradients, logit_gradients_example
from neurosens.neurons.nearest_flip import Sensitivity, nearest_flip
from neurosens.neurons.ranking import mean_where_finite, ranking, scaled_sensitivity
from neurosens.neurons.sensitivity import (
    check_closed_form,
    closed_form,
    sensitivity,
    sensitivity_example,
)
from neurosens.neurons.shift import (
    Shift,
    Targeting,
    TargetingReport,
    shift,
    shift_example,
    target,
    targeting,
    targeting_report,
)
from neurosens.neurons.statistics import (
    Statistics,
    Summary,
    activation_summary,
    from_summary,
    merge,
    statistics,
)
from neurosens.neurons.tail import Cut, LayerFacts, cut, layer_facts

__all__ = [
    'Ablation',
    'Agreement',
    'Cut',
    'Estimate',
    'Fragility',
    'GradientNorms',
    'LayerFacts',
    'NeuronLayer',
    'Partition',
    'Response',
    'Sensitivity',
    'Shift',
    'Statistics',
    'Summary',
    'Targeting',
    'TargetingReport',
    'ablation',
    'ablation_example',
    'activation_summary',
    'agreement',
    'agreement_markdown',
    'agreement_rows',
    'agreement_table',
    'check_closed_form',
    'class_influence',
    'closed_form',
    'correlation',
    'cut',
    'default_layers',
    'describe',
    'filtering',
    'fragility',
    'from_summary',
    'influence',
    'influence_example',
    'kernels',
    'input_gradient_norms',
    'input_gradient_norms_example',
    'labels',
    'layer_facts',
    'logit_gradients',
    'logit_gradients_example',
    'mean_where_finite',
    'merge',
    'nearest_flip',
    'partition',
    'probe_example',
    'probe_gradients',
    'ranking',
    'response',
    'scaled_sensitivity',
    'sensitivity',
    'sensitivity_example',
    'shift',
    'shift_example',
    'statistics',
    'target',
    'targeting',
    'targeting_report',
    'units',
    'without_neurons',
]

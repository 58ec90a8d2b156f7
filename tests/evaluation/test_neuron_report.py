"""What reports derive from measures of neurons, by hand for three neurons and two images."""

import dataclasses

import numpy as np
import pytest

from neurosens import data, evaluation, neurons
from neurosens.evaluation import neuron_report
from neurosens.neurons import filtering, tail
from neurosens.neurons.statistics import from_summary, summarize

ROOT = np.sqrt(2)
# The second neuron is dead.
ACTIVATION = np.array([[1, 0, 0], [3, 0, 4]], np.float32)


@pytest.fixture(scope='module')
def report():
    labels = np.array([0, 1], np.int32)
    clean = neurons.Response(
        np.array([0.5, 0, 0]), np.array([0.3, 0.1, 0.2]), np.array([1.0, 2, 3]), 1.0
    )
    attacked = neurons.Response(
        np.array([0, 0.5, 0]), np.array([0.6, 0.5, 0.4]), np.array([4.0, 5, 6]), 0.5
    )
    norms = np.array([[1, 0, 2], [3, 0, 2]], np.float32)
    relative = np.array([[0.5, 0, 1], [1, 0, 1]], np.float32)
    shift = neurons.Shift(norms, norms, relative, np.log(norms + 1))
    steps = np.array([0.0, 0.5, 1.0])
    curve = filtering.Curve(steps, 1 - steps, 0.8 * (1 - steps), np.zeros(3), 0.8, 0.4)
    layer = evaluation.LayerReport(
        layer=neurons.NeuronLayer(
            'head:in', (3,), 'channel', 3, None, tail.LayerFacts((3,), True, True)
        ),
        statistics=from_summary(summarize(ACTIVATION)),
        peak=ACTIVATION,
        method='closed_form',
        delta=np.array([[2, 1, -4], [-1, np.inf, np.inf]], np.float32),
        flips_to=np.array([[1, 2, 1], [0, -1, -1]], np.int32),
        influence=np.array([[1, -2, 0], [3, 4, -1]], np.float32),
        front=1,
        tail=1,
        clean=clean,
        attacked=attacked,
        fragility=neurons.fragility(clean.accuracy),
        attacked_fragility=neurons.fragility(attacked.accuracy, 0.1),
        targeting={
            score: neurons.targeting_report(
                neurons.target(shift, score), labels, clean.accuracy, 10
            )
            for score in ('l2', 'relative_l2')
        },
        shift=np.array([0.1, 0, -0.2]),
        gradient=np.array([[4, 0, 1], [12, 0, 1]], np.float32),
        gradient_error=np.zeros((2, 3), np.float32),
        gradient_l1=np.array([[2, 0, 1], [4, 0, 1]], np.float32),
        gradient_linf=np.array([[1, 0, 1], [2, 0, 1]], np.float32),
        curves={'minmax': curve},
    )
    return evaluation.NeuronReport(
        data.info('digits'), 'test', labels, labels, 'FGSM, linf eps 0.1', (layer,)
    )


def close(values, expected):
    np.testing.assert_allclose(np.asarray(values, np.float64), expected, rtol=1e-6)


def test_importance_is_larger_where_a_neuron_matters_more(report):
    found = report.layers[0].importance()
    assert set(found) == {
        'sensitivity',
        'influence',
        'ablation',
        'ablation_attacked',
        'targeting',
        'targeting_relative',
        'input_gradient',
    }
    # Medians of 1 / (|Delta| / std): std is sqrt 2, 0 and sqrt 8; what flips nothing counts 0.
    close(found['sensitivity'], [(1 / ROOT + ROOT) / 2, 0, 1 / ROOT / 2])
    close(found['influence'], [2, 3, 0.5])
    close(found['ablation'], [0.3, 0.1, 0.2])
    close(found['ablation_attacked'], [0.6, 0.5, 0.4])
    close(found['targeting'], [2, 0, 2])
    close(found['targeting_relative'], [0.75, 0, 1])
    close(found['input_gradient'], [2 * ROOT, 0, 1])


def test_arrays_of_a_layer(report):
    found = evaluation.neuron_arrays(report, report.layers[0])
    close(found['peak_activation'], ACTIVATION)
    close(found['mean'], [2, 0, 2])
    close(found['std'], [ROOT, 0, 2 * ROOT])
    close(found['zero_share'], [0, 1, 0.5])
    # (Delta - mean) / std where finite; a dead neuron has none.
    close(found['mean_scaled_delta'], [-1.5 / ROOT, np.nan, -3 / ROOT])
    assert found['sensitivity_rank'].tolist() == [1, 2, 0]
    close(found['class_influence'][:2], [[1, -2, 0], [3, 4, -1]])
    assert np.isnan(found['class_influence'][2:]).all()
    assert found['influence_groups'].tolist() == [1, 0, -1]
    assert found['class_influence_groups'][:2].tolist() == [[1, -1, 0], [0, 1, -1]]
    assert not found['class_influence_groups'][2:].any()
    close(found['ablation_accuracy'], [0.5, 0, 0])
    close(found['ablation_loss'], [0.3, 0.1, 0.2])
    close(found['ablation_margin'], [1, 2, 3])
    close(found['ablation_accuracy_attacked'], [0, 0.5, 0])
    close(found['ablation_loss_attacked'], [0.6, 0.5, 0.4])
    close(found['ablation_margin_attacked'], [4, 5, 6])
    assert found['fragile'].tolist() == [True, False, False]
    assert found['fragile_attacked'].tolist() == [False, True, False]
    assert found['fragile_rule_attacked'] == 'd_k > 0.1'
    close(found['target_l2'], [2, 0, 2])
    assert found['target_histogram_l2'].tolist() == [1, 0, 1]
    assert found['target_class_histogram_l2'][:3].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    close(found['shift'], [0.1, 0, -0.2])
    close(found['filtering_minmax'], [[0, 1, 0.8, 0], [0.5, 0.5, 0.4, 0], [1, 0, 0, 0]])
    close(found['filtering_minmax_baselines'], [0.8, 0.4])
    # Relative accuracy is the share present; under attack nothing is left of it.
    close(found['filtering_minmax_scores'] + 1, [1, 0.5, 0.5])


def test_columns_of_the_table_of_neurons(report):
    found = neuron_report.per_neuron(report, report.layers[0])
    close(found['median_absolute_delta'], [1.5, np.inf, np.inf])
    close(found['median_scaled_distance'], [1.5 / ROOT, np.inf, np.inf])
    close(found['unreachable_share'], [0, 0.5, 0.5])
    close(found['mean_influence'], [2, 1, -0.5])
    close(found['input_gradient'], [2 * ROOT, 0, 1])
    close(found['input_gradient_l1'], [3, 0, 1])
    close(found['input_gradient_linf'], [1.5, 0, 1])


def test_images_without_logits_are_left_out_of_medians(report):
    (layer,) = report.layers
    undefined = np.concatenate([layer.delta, np.full((1, 3), np.nan, np.float32)])
    flips_to = np.full((3, 3), -1, np.int32)
    other = evaluation.LayerReport(
        layer.layer, layer.statistics, layer.peak, '', undefined, flips_to
    )
    found = neuron_report.per_neuron(report, other)
    close(found['median_absolute_delta'], [1.5, np.inf, np.inf])
    close(found['median_scaled_distance'], [1.5 / ROOT, np.inf, np.inf])
    close(other.importance()['sensitivity'], layer.importance()['sensitivity'])


def test_agreement_of_measures(report):
    (layer,) = report.layers
    # A constant neuron is left out, where it is known to be one.
    fewer = dataclasses.replace(layer, varying=np.array([True, False, True]))
    assert fewer.agreement.neurons == 2
    assert dataclasses.replace(layer, varying=np.zeros(3, bool)).agreement is None
    found = layer.agreement
    assert found.neurons == 3
    place = found.names.index
    # Ranks of sensitivity 3 1 2, of ablation 3 1 2, of influence 2 3 1.
    assert found.rho[place('sensitivity'), place('ablation')] == pytest.approx(1)
    assert found.rho[place('sensitivity'), place('influence')] == pytest.approx(-0.5)
    assert found.overlap[place('sensitivity'), place('influence')] == 0
    assert found.overlap[place('sensitivity'), place('input_gradient')] == 1

"""The report on neurons holds what the functions of `neurosens.neurons` give, batch by batch."""

import jax
import numpy as np
import pytest

from neurosens import config, data, evaluation, models, neurons, parallel
from neurosens.attacks import Threat, fgsm
from neurosens.data import digits
from neurosens.forward import LinenForward
from neurosens.neurons import filtering

IMAGES, EPS = 10, 0.1


@pytest.fixture(scope='module')
def source():
    images, labels = digits.read_split('test')
    return data.ArrayDataset(images[:IMAGES], labels[:IMAGES], data.info('digits'))


@pytest.fixture(scope='module')
def model(source):
    """A convolutional network whose head is fitted to the images, so that most are right."""
    module = models.create('cnn', num_classes=10, features=(2,), hidden=())
    forward, x = LinenForward(module), data.to_float(source.images)
    variables = module.init(jax.random.key(0), x)
    features = forward(variables, x, taps=('head:in',))[1]['head:in']
    targets = np.eye(10, dtype=np.float32)[source.labels]
    kernel = np.linalg.lstsq(features, targets, rcond=0.1)[0]
    params = {**variables['params'], 'head': {'kernel': kernel, 'bias': np.zeros(10, np.float32)}}
    return forward, {'params': params}, x


def measure(model, source, *measures, layer, **settings):
    """The report of one layer, and the whole one, from batches of which the last is padded."""
    settings = config.Neurons(measures, (layer,), batch_size=4, limit=0, **settings)
    mesh = parallel.data_mesh(1)
    report = evaluation.measure_neurons(
        model[0],
        parallel.replicate(mesh, model[1]),
        source,
        mesh,
        settings,
        jax.random.key(1),
        split='test',
        eps=EPS,
    )
    assert [found.layer.name for found in report.layers] == [layer]
    return report.layers[0], report


@jax.jit
def accuracies(forward, variables, x, y):
    """Accuracy on clean images, and on those that FGSM makes."""
    attacked = fgsm(forward, variables, x, y, jax.random.key(0), threat=Threat('linf', EPS)).x_adv
    return [(forward(variables, images)[0].argmax(-1) == y).mean() for images in (x, attacked)]


def test_filtering_sweeps_every_threshold_of_the_kernel_behind_a_layer(model, source):
    forward, variables, x = model
    layer, report = measure(model, source, 'filtering', layer='act1', thresholds=4)
    assert layer.layer.kernel_layer == 'conv1'
    assert set(layer.curves) == set(filtering.KINDS)
    kernel = variables['params']['conv1']['kernel']
    clean, attacked = accuracies(forward, variables, x, source.labels)
    assert clean == pytest.approx((report.predictions == report.labels).mean())
    assert attacked < clean
    for kind, curve in layer.curves.items():
        np.testing.assert_array_equal(curve.alphas, filtering.thresholds(kernel, 4))
        assert curve.baseline_clean == pytest.approx(clean)
        assert curve.baseline_adversarial == pytest.approx(attacked)
        for values in (curve.present, curve.clean, curve.adversarial):
            assert values.shape == (4,)
        for place, alpha in enumerate(curve.alphas):
            filtered, removed, total = filtering.filter_variables(
                variables, alpha, kind, layer='conv1'
            )
            expected = accuracies(forward, filtered, x, source.labels)
            found = curve.clean[place], curve.adversarial[place]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            assert curve.present[place] == pytest.approx(1 - removed / total)
    assert layer.delta is None and layer.gradient is None


def test_without_probes_gradients_are_exact(model, source):
    layer, _ = measure(model, source, 'input_gradients', layer='conv1', probes=0)
    norms = neurons.input_gradient_norms(*model, layer='conv1')
    assert layer.gradient.shape == (IMAGES, 2)
    np.testing.assert_allclose(layer.gradient, norms.l2**2, rtol=1e-5)
    np.testing.assert_array_equal(layer.gradient_error, np.zeros((IMAGES, 2)))
    probed, _ = measure(model, source, 'input_gradients', layer='conv1', probes=2)
    assert not np.allclose(probed.gradient, layer.gradient, rtol=1e-2)
    assert probed.gradient_error.any()


def test_single_units_of_a_convolution_to_first_order(model, source):
    settings = {'method': 'first_order', 'unit': 'unit'}
    layer, report = measure(model, source, 'sensitivity', layer='conv1', **settings)
    assert (layer.layer.unit, layer.layer.shape) == ('unit', (8, 8, 2))
    assert layer.layer.neurons == 8 * 8 * 2
    assert layer.method == 'first_order'
    expected = neurons.sensitivity(*model, layer='conv1', **settings)
    reached = np.isfinite(expected.delta)
    assert 0.1 < reached.mean() < 1
    np.testing.assert_array_equal(np.isfinite(layer.delta), reached)
    np.testing.assert_allclose(layer.delta, expected.delta, rtol=1e-3)
    np.testing.assert_array_equal(layer.flips_to == -1, ~reached)
    # What sensitivity brings along.
    values = np.float64(model[0](model[1], model[2], taps=('conv1',))[1]['conv1'])
    values = values.reshape(IMAGES, 128)
    assert layer.statistics.count == IMAGES
    np.testing.assert_allclose(layer.statistics.mean, values.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.peak, values, rtol=1e-5, atol=1e-7)
    assert '128 neurons' in evaluation.neuron_table(report)

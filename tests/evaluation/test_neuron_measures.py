"""The report on neurons holds what the functions of `neurosens.neurons` give, batch by batch."""

import jax
import numpy as np
import pytest

from neurosens import attacks, config, data, evaluation, models, neurons, parallel
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


def report_on(model, source, settings, **options):
    """The whole report, from a single device."""
    mesh = parallel.data_mesh(1)
    variables = parallel.replicate(mesh, model[1])
    problem = (model[0], variables, source, mesh, settings, jax.random.key(1))
    return evaluation.measure_neurons(*problem, split='test', eps=EPS, **options)


def measure(model, source, *measures, layer, **settings):
    """The report of one layer, and the whole one, from batches of which the last is padded."""
    settings = config.Neurons(measures, (layer,), batch_size=4, limit=0, **settings)
    report = report_on(model, source, settings)
    assert [found.layer.name for found in report.layers] == [layer]
    return report.layers[0], report


@jax.jit
def accuracies(forward, variables, x, y):
    """Accuracy on clean images, and on those that FGSM makes."""
    attacked = fgsm_images(forward, variables, x, y)
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
    np.testing.assert_allclose(layer.gradient_l1, norms.l1, rtol=1e-5)
    np.testing.assert_allclose(layer.gradient_linf, norms.linf, rtol=1e-5)
    probed, _ = measure(model, source, 'input_gradients', layer='conv1', probes=2)
    assert not np.allclose(probed.gradient, layer.gradient, rtol=1e-2)
    assert probed.gradient_error.any() and probed.gradient_l1 is None


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


@jax.jit
def fgsm_images(forward, variables, x, y):
    return fgsm(forward, variables, x, y, jax.random.key(0), threat=Threat('linf', EPS)).x_adv


@pytest.fixture(scope='module')
def attacked(model, source):
    return fgsm_images(*model, source.labels)


def test_ablation_is_that_of_clean_and_of_attacked_images(model, source, attacked):
    layer, _ = measure(model, source, 'ablation', layer='act1', fragile='0.05')
    forward, variables, x = model
    for images, found, label in (
        (x, layer.clean, layer.fragility),
        (attacked, layer.attacked, layer.attacked_fragility),
    ):
        expected = neurons.response(
            neurons.ablation(forward, variables, images, source.labels, layer='act1')
        )
        assert found.intact_accuracy == expected.intact_accuracy
        for name in ('accuracy', 'loss', 'margin'):
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6
            )
        assert label.rule == 'd_k > 0.05'
        np.testing.assert_array_equal(label.fragile, found.accuracy > 0.05)
    assert layer.clean.intact_accuracy > layer.attacked.intact_accuracy


def test_ablation_by_weights_takes_the_filters_behind_a_layer(model, source):
    layer, _ = measure(model, source, 'ablation', layer='act1', ablation='weights')
    expected = neurons.response(
        neurons.ablation(*model, source.labels, layer='conv1', mode='weights')
    )
    np.testing.assert_allclose(layer.clean.loss, expected.loss, rtol=1e-4, atol=1e-6)
    masked, _ = measure(model, source, 'ablation', layer='act1')
    # Without a normalisation between them, no filter is no activation.
    np.testing.assert_allclose(layer.clean.loss, masked.clean.loss, rtol=1e-4, atol=1e-6)


def test_ablation_by_weights_needs_filters(model, source):
    with pytest.raises(ValueError, match=r"'activation'"):
        measure(model, source, 'targeting', layer='head:in', ablation='weights')


def test_shift_and_targeting_follow_the_images_that_the_attack_moves(model, source):
    forward, variables, x = model
    # Those that are misclassified are left alone.
    labels = np.where(np.arange(IMAGES) < 3, (source.labels + 1) % 10, source.labels)
    mislabelled = data.ArrayDataset(source.images, labels, source.info)
    layer, _ = measure(model, mislabelled, 'targeting', layer='act1')
    attacked = fgsm_images(forward, variables, x, labels)
    moved = np.asarray((attacked != x).reshape(IMAGES, -1).any(-1))
    assert moved.sum() == IMAGES - 3
    change = [
        np.float64(forward(variables, images, taps=('act1',))[1]['act1'])[moved]
        for images in (x, attacked)
    ]
    expected = (change[1] - change[0]).mean((1, 2)).mean(0)
    np.testing.assert_allclose(layer.shift, expected, rtol=1e-4, atol=1e-6)
    # Targets are those of the feature maps in front of the nonlinearity.
    maps = [
        np.float64(forward(variables, images, taps=('conv1',))[1]['conv1'])[moved]
        for images in (x, attacked)
    ]
    scores = np.sqrt(((maps[1] - maps[0]) ** 2).sum((1, 2)))
    found = layer.targeting['l2']
    np.testing.assert_allclose(found.mean_score, scores.mean(0), rtol=1e-4)
    np.testing.assert_array_equal(found.histogram, np.bincount(scores.argmax(1), minlength=2))
    assert set(layer.targeting) == set(evaluation.layer_measures.TARGET_SCORES)


def test_quantiles_are_off_by_at_most_a_bin_of_the_histogram(model, source):
    layer, report = measure(model, source, 'statistics', layer='act1')
    values = np.float64(model[0](model[1], model[2], taps=('act1',))[1]['act1']).reshape(-1, 2)
    arrays = evaluation.neuron_report.arrays(report, layer)
    levels = evaluation.neuron_report.QUANTILES
    np.testing.assert_array_equal(arrays['quantile_levels'], levels)
    spread = values.max(0) - values.min(0)
    for level, row in zip(levels, arrays['quantiles']):
        low = np.quantile(values, level, axis=0, method='lower')
        high = np.quantile(values, level, axis=0, method='higher')
        # Bins are a power of two wide, at least 64 of them over the range.
        assert (row >= low - spread / 32).all() and (row <= high + spread / 32).all()
    np.testing.assert_allclose(arrays['zero_share'], (values == 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(arrays['std'], values.std(0, ddof=1), rtol=1e-4)


def test_influence_on_probabilities_and_its_groups(model, source):
    settings = {'score': 'probability', 'front': 2, 'tail': 3}
    layer, report = measure(model, source, 'influence', layer='head:in', **settings)
    expected = neurons.influence(*model, layer='head:in', score='probability')
    np.testing.assert_allclose(layer.influence, expected, rtol=1e-4, atol=1e-7)
    logits, _ = measure(model, source, 'influence', layer='head:in')
    assert not np.allclose(logits.influence, layer.influence, rtol=1e-2)
    mean = layer.influence.mean(0)
    groups = evaluation.neuron_report.per_neuron(report, layer)['influence_groups']
    assert (groups == 1).sum() == 2 and (groups == -1).sum() == 3
    assert mean[groups == 1].min() >= mean[groups == 0].max()
    assert mean[groups == -1].max() <= mean[groups == 0].min()
    of_classes = evaluation.neuron_arrays(report, layer)['class_influence_groups']
    assert of_classes.shape == (10, layer.layer.neurons)
    for label, row in enumerate(of_classes):
        rows = report.labels == label
        assert (row == 1).sum() == (2 if rows.any() else 0)
        if rows.any():
            assert row[layer.influence[rows].mean(0).argmax()] == 1


def test_a_small_layer_is_grouped_as_far_as_it_goes(model, source):
    for front, expected in ((1, [-1, 1]), (9, [1, 1])):
        layer, report = measure(model, source, 'influence', layer='act1', front=front, tail=5)
        groups = evaluation.neuron_arrays(report, layer)['influence_groups']
        assert sorted(groups) == expected


def test_agreement_counts_as_many_neurons_as_asked(model, source):
    names = ('influence', 'ablation')
    layer, _ = measure(model, source, *names, layer='act1', agreement_top=2)
    assert layer.agreement.top_k == 2
    assert measure(model, source, *names, layer='act1')[0].agreement.top_k == 1
    # There are no more than two.
    layer, _ = measure(model, source, *names, layer='act1', agreement_top=5)
    assert layer.agreement.top_k == 2


def test_filtering_of_the_network_reaches_every_kernel(model, source, tmp_path):
    forward, variables, x = model
    layer, report = measure(model, source, 'network_filtering', layer='act1', thresholds=3)
    assert not layer.curves and set(report.curves) == set(filtering.KINDS)
    for kind, curve in report.curves.items():
        np.testing.assert_array_equal(curve.alphas, [-1, 0, 1])
        for place, alpha in enumerate(curve.alphas):
            filtered, removed, total = filtering.filter_variables(variables, alpha, kind)
            expected = accuracies(forward, filtered, x, source.labels)
            found = curve.clean[place], curve.adversarial[place]
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f'{kind} {alpha}')
            assert float(curve.present[place]) == pytest.approx(
                1 - float(removed) / total, abs=1e-6
            )
    written = {path.name for path in evaluation.write_neurons(report, tmp_path)}
    assert {'%network.npz', '%network-filtering_curves.png'} <= written
    arrays = np.load(tmp_path / 'neurons' / '%network.npz')
    assert arrays['filtering_minmax'].shape == (3, 4)
    assert 'filtering the whole network' in evaluation.neuron_table(report)
    facts = evaluation.neuron_facts(report)
    assert set(facts) >= {f'neurons/network/filtering_{kind}_clean' for kind in filtering.KINDS}


def test_probes_of_all_layers_are_those_of_each(model, source):
    settings = config.Neurons(
        ('input_gradients',), ('conv1', 'head:in'), batch_size=4, limit=0, probes=3
    )
    shown = []
    report = report_on(model, source, settings, progress=lambda name: shown.append(name) or iter)
    assert shown == ['predictions', 'input_gradients'], 'one pass for both'
    expected = neurons.probe_gradients(
        *model, jax.random.key(1), probes=3, layers=('conv1', 'head:in')
    )
    for found in report.layers:
        estimate = expected[found.layer.name]
        np.testing.assert_allclose(found.gradient, estimate.value, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            found.gradient_error, estimate.standard_error, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize('direction', ['forward', 'reverse'])
def test_the_exact_search_stops_at_its_limit(model, source, direction):
    options = {'layer': 'act1', 'method': 'exact', 'direction': direction}
    far = np.asarray(neurons.sensitivity(*model, **options).delta)
    limit = float(np.median(np.abs(far[np.isfinite(far)])))
    found, report = measure(model, source, 'sensitivity', search_limit=limit, **options)
    expected = neurons.sensitivity(*model, limit=limit, **options)
    np.testing.assert_allclose(found.delta, expected.delta, rtol=1e-3)
    reached = np.isfinite(found.delta)
    assert 0 < reached.mean() < 1 and np.abs(found.delta[reached]).max() <= limit
    assert report.layers[0].method == 'exact'


@pytest.mark.parametrize('ranking', ['scaled', 'absolute', 'scaled_absolute'])
def test_neurons_are_ranked_by_the_score_asked_for(model, source, ranking):
    settings = {'ranking': ranking, 'attack_neurons': 2, 'attack_steps': 1}
    layer, report = measure(model, source, 'attack', layer='head:in', **settings)
    mean, std = layer.statistics.mean, layer.statistics.std()
    score = np.asarray(neurons.scaled_sensitivity(layer.delta, mean, std, ranking))
    order = neurons.ranking(neurons.mean_where_finite(score))
    rank = evaluation.neuron_arrays(report, layer)['sensitivity_rank']
    np.testing.assert_array_equal(rank[order], np.arange(layer.layer.neurons))
    np.testing.assert_array_equal(layer.through.neurons, neurons.ranking(score)[:, :2])


def test_images_that_show_no_class_are_not_attacked_through_neurons(model, source):
    forward, variables, x = model
    head = {**variables['params']['head'], 'bias': np.full(10, np.nan, np.float32)}
    broken = {'params': {**variables['params'], 'head': head}}
    settings = {'ranking': 'scaled', 'attack_neurons': 2, 'attack_steps': 1}
    layer, report = measure((forward, broken, x), source, 'attack', layer='head:in', **settings)
    assert (report.predictions == -1).all()
    assert not layer.through.success.any() and not layer.through.pgd.any()


def test_attacks_through_neurons_take_the_settings(model, source):
    settings = {
        'attack_neurons': 3,
        'attack_steps': 3,
        'attack_norm': 'linf',
        'attack_eps': 0.1,
        'attack_start': 'random',
        'attack_restarts': 2,
        'attack_weight': 0.5,
        'attack_keep': 'loss',
    }
    layer, report = measure(model, source, 'attack', layer='head:in', **settings)
    forward, variables, x = model
    chosen, change = attacks.easiest_neurons(
        layer.delta, layer.statistics.mean, layer.statistics.std(), 3
    )
    options = {'start': 'random', 'restarts': 2, 'weight': 0.5, 'keep': 'loss'}
    results = [
        attacks.neuron_attack(
            forward,
            variables,
            x,
            report.predictions,
            jax.random.key(1),
            threat=Threat('linf', 0.1),
            neurons=chosen,
            delta=change,
            steps=3,
            **changed,
        )
        for changed in (options, {})
    ]
    np.testing.assert_array_equal(layer.through.neurons, chosen)
    np.testing.assert_allclose(layer.through.gain, results[0].gain, rtol=1e-4, atol=1e-6)
    assert not np.allclose(layer.through.gain, results[1].gain, rtol=1e-2)


def test_statistics_can_be_those_of_whole_splits(model, source):
    images, labels = digits.read_split('train')
    train = data.ArrayDataset(images[:7], labels[:7], data.info('digits'))
    settings = config.Neurons(('sensitivity',), ('head:in',), batch_size=4, limit=6)
    (layer,) = report_on(model, source, settings, population=(train, source)).layers
    forward, variables, x = model
    everything = np.concatenate([data.to_float(images[:7]), x])
    values = np.float64(forward(variables, everything, taps=('head:in',))[1]['head:in'])
    assert layer.statistics.count == 7 + IMAGES
    np.testing.assert_allclose(layer.statistics.mean, values.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.statistics.std(), values.std(0, ddof=1), rtol=1e-5)
    alone = np.ptp(values[7:13], axis=0) > 0
    np.testing.assert_array_equal(layer.varying, alone)
    # Everything else is that of the images measured.
    assert layer.delta.shape == (6, layer.layer.neurons)
    np.testing.assert_allclose(layer.peak, values[7:13], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ('measures', 'settings'),
    [
        (('sensitivity',), {'layer': 'act1', 'method': 'first_order'}),
        (('ablation', 'influence'), {'layer': 'act1'}),
        (('input_gradients',), {'layer': 'act1', 'probes': 0}),
    ],
)
def test_the_chunk_changes_nothing(model, source, measures, settings):
    whole, _ = measure(model, source, *measures, **settings)
    parts, report = measure(model, source, *measures, **settings, chunk=1)
    others = evaluation.neuron_arrays(report, parts)
    for name, values in evaluation.neuron_arrays(report, whole).items():
        if values.dtype.kind == 'f':
            np.testing.assert_allclose(others[name], values, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(others[name], values)


def test_every_pass_over_the_images_has_a_bar_of_its_own(model, source):
    shown = {}

    def progress(name):
        def wrap(batches):
            for batch in batches:
                shown[name] = shown.get(name, 0) + 1
                yield batch

        return wrap

    settings = config.Neurons(('influence', 'ablation'), ('act1', 'head:in'), batch_size=4, limit=9)
    report_on(model, source, settings, progress=progress)
    names = [
        f'{layer} {kind}' for layer in ('act1', 'head:in') for kind in ('influence', 'ablation')
    ]
    assert shown == dict.fromkeys(['predictions', *names], 3)

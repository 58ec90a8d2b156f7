"""The files about neurons hold what was measured, and the plots bear what can go wrong."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from neurosens import data, evaluation, neurons
from neurosens.evaluation import (
    files,
    layer_measures,
    measure_plots,
    neuron_distances,
    neuron_files,
    neuron_report,
    sensitivity_plots,
    top_neuron_plots,
)
from neurosens.neurons import filtering, tail
from neurosens.neurons.statistics import from_summary, summarize

IMAGES, CLASSES = 24, 10
# Fields of a layer's report by the measure that fills them.
FIELDS = {
    'statistics': ('statistics', 'peak'),
    'sensitivity': ('statistics', 'peak', 'method', 'delta', 'flips_to'),
    'influence': ('influence', 'front', 'tail'),
    'ablation': ('clean', 'attacked', 'fragility', 'attacked_fragility'),
    'targeting': ('targeting', 'shift', 'clean', 'attacked', 'fragility', 'attacked_fragility'),
    'input_gradients': ('gradient', 'gradient_error', 'gradient_l1', 'gradient_linf'),
    'filtering': ('curves',),
    'attack': ('statistics', 'peak', 'method', 'delta', 'flips_to', 'through'),
}


def make_layer(name, count, seed, labels):
    random = np.random.default_rng(seed)
    shape = (IMAGES, count)
    activation = np.maximum(random.normal(0.3, 1, shape), 0).astype(np.float32)
    delta = (random.choice([-1, 1], shape) * random.lognormal(size=shape)).astype(np.float32)
    delta[random.random(shape) < 0.1] = np.inf
    flips_to = np.where(np.isinf(delta), -1, random.integers(0, CLASSES, shape)).astype(np.int32)
    responses = [
        neurons.Response(values, 3 * values + 0.01, 5 * values, 0.9)
        for values in random.integers(-1, 4, (2, count)) / IMAGES
    ]
    scores = random.exponential(size=shape)
    shift = neurons.Shift(scores - 1, scores, scores / 2, np.log(scores))
    targeting = {
        score: neurons.targeting_report(
            neurons.target(shift, score),
            labels,
            responses[0].accuracy,
            CLASSES,
            norms=random.exponential(size=count),
            permutations=99,
        )
        for score in layer_measures.TARGET_SCORES
    }
    alphas, present = np.linspace(-1, 1, 5), np.linspace(1, 0, 5)
    curves = {
        'minmax': filtering.Curve(alphas, present, 0.9 * present, 0.5 * present, 0.9, 0.5),
        # Nothing is right under attack, so that two scores are not defined.
        'maxmin': filtering.Curve(alphas, present[::-1], present, 0 * present, 0.9, 0.0),
    }
    ranks = min(count, 5)
    through = evaluation.ThroughNeurons(
        'l2 eps 0.5, 50 steps',
        random.permuted(np.tile(np.arange(count), (IMAGES, 1)), axis=1)[:, :ranks],
        random.random((IMAGES, ranks)) < 0.3,
        random.random((IMAGES, ranks)) < 0.2,
        random.exponential(size=(IMAGES, ranks)),
        random.random(IMAGES) < 0.6,
    )
    facts = tail.LayerFacts((4, 4, count), True, False)
    return evaluation.LayerReport(
        neurons.NeuronLayer(name, facts.shape, 'channel', count, 'stage1/conv', facts),
        from_summary(summarize(activation)),
        activation,
        'first_order',
        delta,
        flips_to,
        random.normal(size=shape).astype(np.float32),
        1,
        2,
        responses[0],
        responses[1],
        neurons.fragility(responses[0].accuracy),
        neurons.fragility(responses[1].accuracy),
        targeting,
        scores.mean(0),
        *random.exponential(size=(4, *shape)).astype(np.float32),
        curves,
        through,
    )


def only(layer, *measures):
    """The layer's report with nothing but some measures."""
    fields = {name: getattr(layer, name) for measure in measures for name in FIELDS[measure]}
    return evaluation.LayerReport(layer.layer, **fields)


def make_report(counts=(6, 4), seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, IMAGES).astype(np.int32)
    layers = [
        make_layer(name, count, seed + count, labels)
        for name, count in zip(('stage1/act:in', 'head:in'), counts)
    ]
    return evaluation.NeuronReport(
        data.info('digits'), 'test', labels, (labels + (labels < 2)) % CLASSES, 'FGSM', (*layers,)
    )


def with_layers(report, *layers):
    return dataclasses.replace(report, layers=layers)


@pytest.fixture(scope='module')
def report():
    whole = make_report()
    first, second = whole.layers
    return with_layers(whole, first, only(second, 'sensitivity', 'influence'))


@pytest.fixture(scope='module')
def pictures():
    values = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 1))
    return dict(enumerate(values.astype(np.uint8)))


@pytest.fixture(scope='module')
def written(report, pictures, tmp_path_factory):
    """An evaluation beside a second model, over an older one."""
    directory = tmp_path_factory.mktemp('report')
    (directory / 'neurons').mkdir()
    for name in ('act9.npz', 'old.csv', 'act9-targeting.png', 'notes.txt'):
        (directory / 'neurons' / name).touch()
    other = make_report((6, 3), seed=5)
    other = with_layers(other, *(only(layer, 'sensitivity') for layer in other.layers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('neurosens.evaluation.plots._DPI', 30)
        paths = evaluation.write_neurons(
            report, directory, images=pictures, top=1, compare=('robust', other)
        )
    return directory / 'neurons', paths, other


def draw(figure):
    """Draws a figure in a size that shows nothing but whether it can be drawn."""
    figure.savefig(io.BytesIO(), format='png', dpi=25)
    return figure


def lines(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_file_names_say_the_layer():
    assert neuron_files.layer_file_name('stage1/act:in') == 'stage1.act-in'
    assert neuron_files.layer_file_name('act1') == 'act1'
    names = ['a/b', 'a.b', 'a:b', 'a-b', 'a%2Eb']
    assert len({neuron_files.layer_file_name(name) for name in names}) == len(names)


def test_arrays_are_those_of_the_report(written, report):
    directory, _, other = written
    for suffix, source in (('', report), ('-compare', other)):
        for name, layer in zip(('stage1.act-in', 'head-in'), source.layers):
            expected = evaluation.neuron_arrays(source, layer)
            with np.load(directory / f'{name}{suffix}.npz') as found:
                assert set(found) == set(expected)
                for key, values in expected.items():
                    np.testing.assert_array_equal(found[key], values)


def test_table_of_all_neurons_is_exact(written, report):
    rows = lines(written[0] / 'neurons.csv')
    assert [row['neuron'] for row in rows] == [*map(str, range(6)), *map(str, range(4))]
    start, names, rules = 0, set(), {'fragile_rule', 'fragile_rule_attacked'}
    for layer in report.layers:
        columns = neuron_report.per_neuron(report, layer)
        names |= set(columns)
        part = rows[start : start + layer.layer.neurons]
        start += len(part)
        assert {row['layer'] for row in part} == {layer.layer.name}
        for name, values in columns.items():
            np.testing.assert_array_equal([float(row[name]) for row in part], values)
        for name, label in (
            ('fragile_rule', layer.fragility),
            ('fragile_rule_attacked', layer.attacked_fragility),
        ):
            assert {row[name] for row in part} == {'' if label is None else label.rule}
        for name in set(rows[0]) - set(columns) - {'layer', 'neuron', *rules}:
            assert {row[name] for row in part} == {''}, 'what was not measured is blank'
    assert set(rows[0]) == names | {'layer', 'neuron', *rules}


def test_targeting_has_every_correlation(written, report):
    rows = lines(written[0] / 'targeting.csv')
    for layer in report.layers:
        of_layer = [row for row in rows if row['layer'] == layer.layer.name]
        every = {
            (score, of, control)
            for score, found in layer.targeting.items()
            for of in ('mean_score', 'histogram')
            for control in ('', 'filter_norm')
            if not control or found.score_partial is not None
        }
        assert {(row['score'], row['of'], row['control']) for row in of_layer} == every
        assert len(of_layer) == len(every)
        for row in of_layer:
            found = layer.targeting[row['score']]
            name = f'{row["of"]}_{"partial" if row["control"] else "correlation"}'
            value = getattr(found, name.replace('mean_', ''))
            assert float(row['rho']) == pytest.approx(value.value, nan_ok=True)
            assert float(row['p_value']) == pytest.approx(value.p_value, nan_ok=True)


def test_agreement_has_every_pair_of_every_layer(written, report):
    rows = lines(written[0] / 'agreement.csv')
    assert len(rows) == 8 * 7 // 2 + 1
    agreement = report.layers[1].agreement
    assert rows[-1]['layer'] == 'head:in' and rows[-1]['first'] == 'sensitivity'
    assert float(rows[-1]['rho']) == agreement.rho[0, 1]


def test_every_plot_is_there_and_nothing_old(written):
    directory, paths, _ = written
    plots = {
        'stage1.act-in': [
            'sensitivity_curve',
            'sensitivity_histogram',
            'measure_scatter',
            'measure_heatmap',
            'top_neurons',
            'targeting',
            'attack',
            'filtering_curves',
        ],
        'head-in': [
            'sensitivity_curve',
            'sensitivity_histogram',
            'measure_scatter',
            'measure_heatmap',
            'top_neurons',
        ],
    }
    expected = {f'{layer}-{plot}.png' for layer, names in plots.items() for plot in names}
    assert {path.name for path in paths if path.suffix == '.png'} == expected
    assert {path.name for path in directory.iterdir()} == {path.name for path in paths} | {
        'notes.txt'
    }
    for name in expected:
        with Image.open(directory / name) as picture:
            assert min(picture.size) > 50
            low, high = picture.convert('L').getextrema()
            assert low < 100 and high == 255


@pytest.mark.parametrize('measure', FIELDS)
def test_every_measure_is_optional(measure, report, pictures, tmp_path):
    one = with_layers(report, only(report.layers[0], measure))
    wanted = {
        'statistics': [],
        'sensitivity': [
            'measure_heatmap',
            'sensitivity_curve',
            'sensitivity_histogram',
            'top_neurons',
        ],
        'influence': ['measure_heatmap'],
        'ablation': ['measure_heatmap', 'measure_scatter', 'targeting'],
        'targeting': ['measure_heatmap', 'measure_scatter', 'targeting'],
        'input_gradients': ['measure_heatmap'],
        'filtering': ['filtering_curves'],
        'attack': [
            'attack',
            'measure_heatmap',
            'sensitivity_curve',
            'sensitivity_histogram',
            'top_neurons',
        ],
    }[measure]
    plots = neuron_files._plots(one, one.layers[0], {'a': one.layers[0]}, pictures, 1)
    drawn = {name: draw(function()) for name, function in plots}
    assert sorted(drawn) == wanted
    assert '6 neurons' in evaluation.neuron_table(one)
    if measure == 'statistics':
        paths = evaluation.write_neurons(one, tmp_path)
        assert {path.name for path in paths} == {'neurons.csv', 'stage1.act-in.npz'}


def test_comparison_leaves_out_what_the_other_model_lacks(report, tmp_path):
    other = with_layers(report, only(report.layers[0], 'influence'))
    mine = with_layers(report, *(only(layer, 'statistics') for layer in report.layers))
    paths = evaluation.write_neurons(mine, tmp_path, compare=('this model', other))
    assert [path.name for path in paths if 'compare' in path.name] == ['stage1.act-in-compare.npz']


def test_models_of_one_name_are_both_drawn(report):
    layer = report.layers[0]
    name = neuron_files._other_name('a', layer, 'a', layer)
    figure = sensitivity_plots.sensitivity_histogram({'a': layer, name: layer})
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(':')[0] for label in labels] == ['a', 'a (compared)']


def test_error_leaves_the_files_of_before(tmp_path):
    (tmp_path / 'a').write_text('old')

    def fail():
        with files.WholeFiles(tmp_path) as output:
            output.path('a').write_text('new')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('a', 'old')]


# ------------------------------------------------------------------------------------ what is drawn


def test_shown_images_are_the_wanted_ones(report, pictures):
    layer = report.layers[0]
    used = []

    class Recorder(dict):
        def __getitem__(self, key):
            used.append(key)
            return super().__getitem__(key)

    top_neuron_plots.top_neurons(report, layer, Recorder(pictures), 3, per_neuron=2)
    assert sorted(set(used)) == evaluation.images_wanted(layer, 3, per_neuron=2)
    first = neuron_distances.most_sensitive(layer, 1)[0]
    assert (
        np.nanmin(neuron_distances.median_distance(layer))
        == (neuron_distances.median_distance(layer)[first])
    )
    assert used[:4] == [
        *np.argsort(-layer.peak[:, first], kind='stable')[:2],
        *np.argsort(np.abs(layer.delta[:, first]), kind='stable')[:2],
    ]
    with pytest.raises(ValueError, match='images_wanted'):
        top_neuron_plots.top_neurons(report, layer, {}, 3)


def test_nothing_is_wanted_without_sensitivity(report):
    layer = report.layers[0]
    assert evaluation.images_wanted(only(layer, 'statistics', 'influence'), 3) == []
    assert evaluation.images_wanted(layer, 0) == []


def test_colour_images_with_long_class_names(report):
    info = data.info('cifar10')
    flips = np.where(report.layers[0].flips_to < 0, -1, 7)
    colour = dataclasses.replace(report, info=info)
    layer = dataclasses.replace(report.layers[0], flips_to=flips)
    images = {place: np.full(info.image_shape, place, np.uint8) for place in range(IMAGES)}
    figure = draw(top_neuron_plots.top_neurons(colour, layer, images, 2))
    assert any('→ horse' in text.get_text() for text in figure.texts)


def test_unreachable_neurons_stand_above_the_curve(report):
    layer = report.layers[0]
    delta = np.abs(layer.delta)
    delta[:, :2] = np.inf
    layer = dataclasses.replace(layer, delta=delta)
    strip, axes = draw(sensitivity_plots.sensitivity_curve({'model': layer})).axes
    # A line for the medians; the others are of the band.
    assert strip.lines[0].get_xdata().tolist() == [5, 6]
    heights = axes.lines[0].get_ydata()
    np.testing.assert_allclose(heights, np.sort(neuron_distances.median_distance(layer))[:4])
    legend = strip.figure.legends[0].get_texts()[0].get_text()
    assert 'median ∞ for 2 of 6 neurons' in legend


def test_histogram_has_every_finite_pair(report):
    layer = report.layers[0]
    figure = draw(sensitivity_plots.sensitivity_histogram({'model': layer}))
    outline = figure.axes[0].patches[0].get_xy()
    # The outline runs forth along the bars; each has two corners.
    heights = outline[1 : 1 + 2 * 45 : 2, 1]
    assert heights.sum() == pytest.approx(100 * np.isfinite(layer.delta).mean())
    share = np.isinf(layer.delta).mean()
    assert f'{share:.1%} unreachable' in figure.legends[0].get_texts()[0].get_text()


def test_constant_neurons_are_left_out_of_scatter_plots(report):
    layer = report.layers[0]
    varying = np.arange(layer.layer.neurons) != 2
    figure = draw(measure_plots.measure_scatter(dataclasses.replace(layer, varying=varying)))
    assert '5 of 6 neurons' in figure.get_suptitle()
    panel = figure.axes[0]
    places = np.concatenate([group.get_offsets() for group in panel.collections])
    assert len(places) == 5
    measures = list(layer.importance().values())
    rho = neurons.correlation.spearman(*(values[varying] for values in measures[:2]))
    assert panel.get_title() == f'ρ = {rho:+.2f}'
    whole = draw(measure_plots.measure_scatter(layer))
    assert sum(len(group.get_offsets()) for group in whole.axes[0].collections) == 6


def test_heatmap_is_in_the_order_of_the_first_measure(report):
    layer = report.layers[0]
    figure = draw(measure_plots.measure_heatmap(layer))
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (8, 6)
    assert shown[0].tolist() == sorted(shown[0], reverse=True)
    order = [int(text.get_text()) for text in figure.axes[0].get_xticklabels()]
    influence = layer.importance()['influence']
    assert influence[order].argsort().tolist() == shown[1].argsort().tolist()


def damaged(layer, delta):
    """The layer with some Delta, a dead neuron and one whose activation was infinite."""
    activation = layer.peak.copy()
    activation[:, 0] = 0
    activation[3, 1] = np.inf
    return dataclasses.replace(
        layer, delta=delta, peak=activation, statistics=from_summary(summarize(activation))
    )


@pytest.mark.parametrize('value', [np.inf, np.nan, 'mixed'])
def test_plots_bear_what_is_not_finite(value, pictures):
    report = make_report((6,))
    layer = only(report.layers[0], 'sensitivity', 'influence')
    if value == 'mixed':
        delta = layer.delta.copy()
        delta[:, 2], delta[:, 3], delta[4], delta[5] = np.inf, np.nan, np.nan, 0.0
    else:
        delta = np.full_like(layer.delta, value)
    layer = damaged(layer, delta)
    report = with_layers(report, layer)
    for _, function in neuron_files._plots(report, layer, {'a': layer}, pictures, 3):
        draw(function())
    table = evaluation.neuron_table(report)
    assert 'constant: 1 of 6' in table
    if value in (np.inf, np.nan):
        assert 'No neuron flips a prediction.' in table
        assert evaluation.images_wanted(layer, 3) == []


def test_many_neurons_share_columns_and_bands():
    report = make_report((600,))
    layer = report.layers[0]
    heatmap = draw(measure_plots.measure_heatmap(layer))
    assert heatmap.axes[0].images[0].get_array().shape == (8, 300)
    draw(sensitivity_plots.sensitivity_curve({'a': layer, 'b': make_report((30,)).layers[0]}))
    draw(measure_plots.targeting(layer))


def test_plots_name_what_they_lack(report):
    nothing = evaluation.LayerReport(report.layers[0].layer)
    for plot in (
        measure_plots.measure_scatter,
        measure_plots.measure_heatmap,
        measure_plots.targeting,
        lambda layer: measure_plots.filtering_curves(layer.curves, layer.layer.name),
        lambda layer: sensitivity_plots.sensitivity_curve({'a': layer}),
        lambda layer: top_neuron_plots.top_neurons(report, layer, {}, 1),
    ):
        with pytest.raises(ValueError, match='stage1/act:in'):
            plot(nothing)


# ----------------------------------------------------------------------------------- terminal


def test_terminal_table_has_what_was_found(report):
    text = evaluation.neuron_table(report)
    first, second = text.split('\n\n\n')
    layer = report.layers[0]
    assert first.startswith('stage1/act:in: 6 neurons')
    fragile = layer.fragility
    assert f'fragile: {fragile.fragile.sum()} of 6 on clean images ({fragile.rule}' in first
    blocks = first.split('\n\n')
    # Of these all lines are equally long.
    for block in blocks[1:5]:
        assert len({len(line) for line in block.splitlines()}) == 1
    chosen = neuron_distances.most_sensitive(layer, 5)
    assert [line.split()[1] for line in blocks[1].splitlines()[2:]] == [*map(str, chosen)]
    assert f'{neuron_distances.median_distance(layer)[chosen[0]]:.4g}' in blocks[1].splitlines()[2]
    found = layer.targeting['l2']
    assert f'{found.score_correlation.value:+.3f}' in blocks[2].splitlines()[2]
    assert f'{found.score_partial.p_value:.2g}' in blocks[2].splitlines()[2]
    summary = layer.through.summary()
    success = layer.through.success
    np.testing.assert_array_equal(summary.counts, [1, 4, 5])
    expected = [success[:, :count].any(1).mean() for count in (1, 4, 5)]
    expected += [layer.through.pgd.mean(), layer.through.reached.mean()]
    for share in expected:
        assert f' {share:.2%}' in blocks[3]
    assert blocks[3].endswith(f'{success.sum(1).mean():.2f}')
    assert 'fragile' in blocks[4] and 'not defined' in blocks[4]
    assert "Spearman's rho over 4 neurons" in second and 'targeting' not in second

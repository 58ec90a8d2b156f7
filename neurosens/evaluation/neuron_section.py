"""What single neurons do, as a section of the report's page."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from neurosens.evaluation import neuron_distances, neuron_tables
from neurosens.evaluation.html_page import Block, Figure, Section, Table
from neurosens.evaluation.neuron_files import NETWORK, layer_file_name
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport

# Neurons of each layer in the page's table.
_SHOWN = 20
# For each plot its caption, and what it shows for those who cannot see it.
_PLOTS = {
    'sensitivity_curve': (
        'Neurons in the order of their sensitivity: the smallest change that flips a prediction, '
        'in standard deviations; medians and quantiles over images.',
        'Sorted curve of |Delta| / std over neurons.',
    ),
    'sensitivity_histogram': (
        'How large the smallest changes are, over all pairs of image and neuron.',
        'Histogram of |Delta| / std over pairs of image and neuron.',
    ),
    'measure_scatter': (
        "Each measure against each other one, as ranks of the neurons, with Spearman's rho.",
        'Scatter matrix of the ranks of neurons by each measure; the table of agreement has rho.',
    ),
    'measure_heatmap': (
        'All measures of each neuron, in the order of the first one.',
        'Heat map of neurons by measures.',
    ),
    'top_neurons': (
        'The most sensitive neurons, with the images that excite them most and those whose '
        'prediction they flip first.',
        'Rows of images beside the most sensitive neurons.',
    ),
    'targeting': (
        'Which neurons the attack targets, beside what accuracy is lost without them.',
        'Plots of targeting and of nodal-dropout responses; the table has their correlations.',
    ),
    'attack': (
        'Attacks through single neurons: how often they change a prediction, by number and by rank '
        'of the neuron.',
        'Curve and bars of the success of attacks through neurons; the table has the numbers.',
    ),
    'filtering_curves': (
        'Accuracy while weights are filtered out by their values.',
        'Curves of accuracy against the share of weights; the table has the scores.',
    ),
}


def neuron_section(
    report: NeuronReport,
    files: Iterable[pathlib.Path] = (),
    *,
    compare: tuple[str, NeuronReport] | None = None,
) -> Section:
    """The section on neurons of the page `index.html`.

    Args:
      report: the report.
      files: what `write_neurons` wrote; its plots are shown.
      compare: name and report of a second model, as of `write_neurons`.

    Returns:
      A table of all layers and, for each, tables as far as they were measured, and its plots.
    """
    pictures = {path.stem: path for path in files if path.suffix == '.png'}
    layers = [
        Section(layer.layer.name, list(_layer(report, layer, pictures))) for layer in report.layers
    ]
    if report.curves:
        table = neuron_tables.filtering_table(report.curves, 'all kernels')
        shown = _figures(NETWORK, 'The whole network', pictures)
        layers.append(Section('The whole network', [Table(*table), *shown]))
    lead = (
        f'Measured on the first {len(report.labels):,} images of {report.info.name} '
        f'{report.split}; where they are attacked, by {report.attack}. Delta is the smallest '
        'change of a neuron that changes the prediction for an image. neurons/neurons.csv has '
        'every neuron, and the .npz of a layer every image.'
    )
    return Section('Neurons', [lead, _overview(report, compare), *layers])


def _overview(report: NeuronReport, compare: tuple[str, NeuronReport] | None) -> Table:
    """All layers of one or two models, a row for each."""
    models = [('this model', report), *([compare] if compare is not None else [])]
    rows = [
        [layer.layer.name, *([name] if compare is not None else []), *_facts(layer)]
        for name, one in models
        for layer in one.layers
    ]
    columns = ['neurons', 'Delta by', 'median |Delta| / std', 'unreachable', 'fragile']
    model = ['model'] if compare is not None else []
    caption = (
        'Layers. Unreachable: pairs of image and neuron in which no change flips the prediction; '
        'fragile: neurons whose removal costs accuracy, by the rule given with the layer.'
    )
    return Table(caption, ['layer', *model, *columns], rows)


def _facts(layer: LayerReport) -> list[str]:
    cells = [f'{layer.layer.neurons:,}', layer.method.replace('_', ' ') or '–', '–', '–', '–']
    if layer.delta is not None:
        if neuron_distances.defined(layer):
            cells[2] = f'{np.median(neuron_distances.distances(layer)):.4g}'
        cells[3] = f'{np.isinf(layer.delta).mean():.2%}'
    if layer.fragility is not None:
        cells[4] = f'{int(layer.fragility.fragile.sum()):,}'
    return cells


def _layer(
    report: NeuronReport, layer: LayerReport, pictures: Mapping[str, pathlib.Path]
) -> Iterator[Block]:
    yield from neuron_tables.headline(report, layer)
    if neuron_tables.nothing_flips(layer):
        yield 'No neuron flips a prediction.'
    for table in neuron_tables.tables(layer, _SHOWN):
        yield Table(*table)
    agreement = layer.agreement
    if agreement is not None:
        yield Table(*neuron_tables.agreement_table(agreement))
    yield from _figures(layer_file_name(layer.layer.name), layer.layer.name, pictures)


def _figures(base: str, subject: str, pictures: Mapping[str, pathlib.Path]) -> Iterator[Figure]:
    """The plots whose names begin with `base` and a hyphen."""
    base = f'{base}-'
    for name, path in pictures.items():
        plot = name.removeprefix(base)
        # Another layer's plots may begin alike, but no plot has a hyphen in its name.
        if name.startswith(base) and '-' not in plot:
            caption, alternative = _PLOTS.get(plot, (plot.replace('_', ' '),) * 2)
            yield Figure(path.read_bytes(), caption, f'{subject}: {alternative}')

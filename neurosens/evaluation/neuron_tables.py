"""What single neurons of a layer do, as tables of text for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from neurosens import neurons
from neurosens.evaluation import measure_plots, neuron_distances
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport, ThroughNeurons
from neurosens.neurons import filtering

_CORRELATIONS = (
    ('mean score', 'score_correlation', 'score_partial'),
    ('histogram', 'histogram_correlation', 'histogram_partial'),
)


class NeuronTable(NamedTuple):
    """A table of text.

    Attributes:
      caption: what it shows, in a sentence.
      header: names of the columns, the first of which names the rows.
      body: cells of each row.
    """

    caption: str
    header: list[str]
    body: list[list[str]]


def headline(report: NeuronReport, layer: LayerReport) -> list[str]:
    """A layer in a few lines.

    Args:
      report: the whole report.
      layer: one of its layers.

    Returns:
      Its size and how Delta was computed; constant neurons if there are any; fragile neurons with
      the rule that calls them so, as far as they were measured.
    """
    facts = layer.layer
    kind = f' ({facts.unit}s of {" x ".join(map(str, facts.shape))})' if facts.shape else ''
    line = f'{facts.name}: {facts.neurons} neurons{kind}, {len(report.labels):,} images'
    lines = [line + (f'; Delta: {layer.method}' if layer.method else '')]
    if layer.statistics is not None:
        constant = int((layer.statistics.std() == 0).sum())
        if constant:
            lines.append(f'constant: {constant} of {facts.neurons}')
    for images, response, label in (
        ('clean images', layer.clean, layer.fragility),
        (f'images under {report.attack}', layer.attacked, layer.attacked_fragility),
    ):
        if response is not None and label is not None:
            lines.append(
                f'fragile: {int(label.fragile.sum())} of {facts.neurons} on {images} '
                f'({label.rule}; accuracy {response.intact_accuracy:.2%})'
            )
    return lines


def tables(layer: LayerReport, shown: int) -> Iterator[NeuronTable]:
    """The tables of a layer, as far as their measures are there.

    Args:
      layer: report of the layer.
      shown: neurons in the first of them, at most.

    Yields:
      The neurons that are most sensitive (or that matter most by the first measure), correlations
      of targeting with the nodal-dropout responses d_k, success of attacks through single neurons,
      and filtering scores.
    """
    if layer.importance() and not nothing_flips(layer):
        yield _most_important(layer, shown)
    if layer.targeting:
        yield _targeting(layer)
    if layer.through is not None:
        yield _through(layer.through)
    if layer.curves:
        yield filtering_table(layer.curves, str(layer.layer.kernel_layer))


def nothing_flips(layer: LayerReport) -> bool:
    """Whether Delta was measured and no neuron changes any prediction."""
    return layer.delta is not None and not neuron_distances.most_sensitive(layer, 1)


def agreement_table(agreement: neurons.Agreement) -> NeuronTable:
    """How far measures agree, pair by pair.

    Args:
      agreement: of a layer.

    Returns:
      Rank correlations above the diagonal, overlaps of the neurons that matter most below it.
    """

    def cell(i: int, j: int) -> str:
        if i == j:
            return '–'
        return f'{agreement.overlap[i, j]:.2f}' if i > j else f'{agreement.rho[i, j]:+.2f}'

    names = list(agreement.names)
    body = [[name, *(cell(i, j) for j in range(len(names)))] for i, name in enumerate(names)]
    caption = (
        f"Agreement of measures. Above the diagonal: Spearman's rho over {agreement.neurons} "
        f'neurons; below: overlap of the top {agreement.top_k} (by chance {agreement.chance:.2f}).'
    )
    return NeuronTable(caption, ['measure', *names], body)


def _most_important(layer: LayerReport, shown: int) -> NeuronTable:
    # The columns are few enough for a terminal; the files have more.
    values: dict[str, np.ndarray] = {}
    first, *_ = measures = layer.importance()
    if layer.delta is not None:
        values['|Delta|/std'] = neuron_distances.median_distance(layer)
        values['unreachable'] = np.isinf(layer.delta).mean(0)
        chosen = neuron_distances.most_sensitive(layer, shown)
        title = 'most sensitive'
        caption = 'Neurons whose smallest changes flip a prediction, the most sensitive first.'
    else:
        chosen = np.argsort(-measures[first], kind='stable')[:shown].tolist()
        title = f'most {first.replace("_", " ")}'
        caption = f'Neurons that matter most by {first.replace("_", " ")}.'
    if layer.clean is not None:
        values['d_k'] = layer.clean.accuracy
    if layer.attacked is not None:
        values['d_k attacked'] = layer.attacked.accuracy
    for label, measure in (
        ('|influence|', 'influence'),
        ('targeting', 'targeting'),
        ('gradient', 'input_gradient'),
    ):
        if measure in measures:
            values[label] = measures[measure]
    body = [
        [f'neuron {neuron}', *(f'{column[neuron]:.4g}' for column in values.values())]
        for neuron in chosen
    ]
    return NeuronTable(caption, [title, *values], body)


def _targeting(layer: LayerReport) -> NeuronTable:
    body = []
    for score, targeting in layer.targeting.items():
        for kind, raw, partial in _CORRELATIONS:
            cells = [*_cells(getattr(targeting, raw)), *_cells(getattr(targeting, partial))]
            body.append([f'{score} {kind}', *cells])
    header = ['targeting against d_k', 'rho', 'p', 'rho given norms', 'p']
    caption = (
        'Do attacks target the neurons that accuracy depends on? Rank correlations of targeting '
        'with the loss of accuracy d_k, plain and given the norms of the filters.'
    )
    return NeuronTable(caption, header, body)


def _through(through: ThroughNeurons) -> NeuronTable:
    """Shares of predictions changed, by attacks of one budget."""
    summary = through.summary()
    columns = {
        f'easiest {count}' if count > 1 else 'easiest': share
        for count, share in zip(summary.counts.tolist(), summary.broken.tolist())
    }
    columns |= {'PGD': through.pgd.mean(), 'Delta reached': summary.reached}
    cells = [f'{share:.2%}' for share in columns.values()]
    body = [[f'changed, {through.attack}', *cells, f'{summary.mean_successes:.2f}']]
    caption = 'Share of predictions that attacks through the easiest neurons change, beside PGD.'
    return NeuronTable(caption, ['through neurons', *columns, 'neurons that do'], body)


def _cells(found: neurons.correlation.Correlation | None) -> list[str]:
    if found is None or np.isnan(found.value):
        return ['-', '-']
    return [f'{found.value:+.3f}', f'{found.p_value:.2g}']


def filtering_table(curves: Mapping[str, filtering.Curve], filtered: str) -> NeuronTable:
    """Filtering scores and what they call the weights.

    Args:
      curves: a sweep by each kind of filter.
      filtered: what is filtered, in words.

    Returns:
      A row for each kind of filter.
    """
    body = [
        [kind, *(measure_plots.verdict(score) for score in filtering.scores(curve))]
        for kind, curve in curves.items()
    ]
    caption = (
        'Accuracy while weights are filtered out by value, relative to the share of weights left: '
        'below -0.05 is fragile, above 0.05 antifragile.'
    )
    header = [f'filtering {filtered}', *filtering.Scores._fields]
    return NeuronTable(caption, header, body)

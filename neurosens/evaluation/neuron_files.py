"""Reports of what single neurons do: arrays, CSV files, plots, and a table for the terminal."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from neurosens import neurons
from neurosens.evaluation import (
    files,
    measure_plots,
    neuron_distances,
    neuron_report,
    plots,
    sensitivity_plots,
    through_plots,
    top_neuron_plots,
)
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport, ThroughNeurons
from neurosens.evaluation.report import aligned
from neurosens.neurons import filtering

# Neurons of each layer in the terminal's table.
_SHOWN = 5
_CORRELATIONS = (
    ('mean score', 'score_correlation', 'score_partial'),
    ('histogram', 'histogram_correlation', 'histogram_partial'),
)


def layer_file_name(layer: str) -> str:
    """A layer's name as the beginning of file names.

    Args:
      layer: name of the layer, such as `'stage1/act:in'`.

    Returns:
      The name without what separates directories, `'stage1.act-in'`; other names, other results.
    """
    apart = layer.replace('%', '%25').replace('.', '%2E').replace('-', '%2D')
    return apart.replace('/', '.').replace(':', '-')


def write_neurons(
    report: NeuronReport,
    directory: str | pathlib.Path,
    *,
    images: Mapping[int, UInt8[np.ndarray, 'height width channels']] | None = None,
    top: int = 5,
    compare: tuple[str, NeuronReport] | None = None,
    name: str = 'this model',
) -> list[pathlib.Path]:
    """Writes everything measured of a model's neurons into the subdirectory `neurons`.

    For each layer `<layer>.npz` (its arrays, as of `neuron_report.arrays`) and plots
    `<layer>-<plot>.png`, as far as their measures are there; for all layers `neurons.csv` (one line
    per neuron, empty cells where a layer lacks a measure), `agreement.csv` (how far the measures
    agree, one line per layer and pair of them) and `agreement.md` (the same as tables). The files
    appear once all of them are whole, and those of an earlier evaluation go.

    Args:
      report: the report.
      directory: where the subdirectory goes; made if need be.
      images: images by position, at least those of `neuron_distances.images_wanted` of every layer;
        without them there is no plot of the most sensitive neurons.
      top: how many neurons that plot shows.
      compare: name and report of a second model, of which `<layer>-compare.npz` is written beside
        the layer of the same place in `report`, and whose sensitivity is drawn into its plots.
      name: the model's name in plots.

    Returns:
      The files written.
    """
    directory = pathlib.Path(directory) / 'neurons'
    with files.WholeFiles(directory) as output:
        _write_csv(output.path('neurons.csv'), list(_neuron_lines(report)))
        agreement = list(_agreement_lines(report))
        if agreement:
            _write_csv(output.path('agreement.csv'), agreement)
            output.path('agreement.md').write_text(_agreement_tables(report), encoding='utf-8')
        for place, layer in enumerate(report.layers):
            base = layer_file_name(layer.layer.name)
            _write_arrays(output.path(f'{base}.npz'), report, layer)
            models = {name: layer}
            if compare is not None and place < len(compare[1].layers):
                other = compare[1].layers[place]
                _write_arrays(output.path(f'{base}-compare.npz'), compare[1], other)
                models[_other_name(name, layer, compare[0], other)] = other
            for plot, draw in _plots(report, layer, models, images, top):
                plots.save(draw(), output.path(f'{base}-{plot}.png'))
    for pattern in ('*.npz', '*.csv', '*.md', '*.png'):
        for stale in set(directory.glob(pattern)) - set(output.written):
            stale.unlink()
    return output.written


def _other_name(name: str, layer: LayerReport, other_name: str, other: LayerReport) -> str:
    if other.layer.name != layer.layer.name:
        other_name = f'{other_name}, {other.layer.name}'
    return f'{other_name} (compared)' if other_name == name else other_name


def _plots(
    report: NeuronReport,
    layer: LayerReport,
    models: Mapping[str, LayerReport],
    images: Mapping[int, np.ndarray] | None,
    top: int,
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """The plots for which there are measures, by name."""
    comparable = {
        name: one
        for name, one in models.items()
        if one.delta is not None and one.statistics is not None
    }
    measures = len(layer.importance())
    if layer.delta is not None and comparable:
        yield 'sensitivity_curve', lambda: sensitivity_plots.sensitivity_curve(comparable)
        yield 'sensitivity_histogram', lambda: sensitivity_plots.sensitivity_histogram(comparable)
    if measures > 1:
        yield 'measure_scatter', lambda: measure_plots.measure_scatter(layer)
    if measures:
        yield 'measure_heatmap', lambda: measure_plots.measure_heatmap(layer)
    if images is not None and neuron_distances.images_wanted(layer, top):
        yield 'top_neurons', lambda: top_neuron_plots.top_neurons(report, layer, images, top)
    if layer.targeting or (layer.clean is not None and layer.attacked is not None):
        yield 'targeting', lambda: measure_plots.targeting(layer, report.attack)
    if layer.through is not None:
        yield 'attack', lambda: through_plots.through_neurons(layer)
    if layer.curves:
        yield 'filtering_curves', lambda: measure_plots.filtering_curves(layer, report.attack)


def _write_arrays(path: pathlib.Path, report: NeuronReport, layer: LayerReport) -> None:
    # By a path, NumPy would add a suffix to its name.
    with path.open('wb') as file:
        np.savez_compressed(file, **neuron_report.arrays(report, layer))  # type: ignore[arg-type]


def _neuron_lines(report: NeuronReport) -> Iterator[dict[str, Any]]:
    """Lines of `neurons.csv`, all of the same columns."""
    tables = []
    for layer in report.layers:
        columns = neuron_report.per_neuron(report, layer)
        # Flags are 0 and 1 in every language; `tolist` because NumPy's floats print in other ways.
        tables.append({name: (values + 0).tolist() for name, values in columns.items()})
    names = dict.fromkeys(name for table in tables for name in table)
    for layer, table in zip(report.layers, tables):
        for neuron in range(layer.layer.neurons):
            cells = {name: table[name][neuron] if name in table else '' for name in names}
            if 'fragile' in names:
                cells['fragile_rule'] = '' if layer.fragility is None else layer.fragility.rule
            yield {'layer': layer.layer.name, 'neuron': neuron, **cells}


def _agreement_lines(report: NeuronReport) -> Iterator[dict[str, Any]]:
    for layer in report.layers:
        agreement = layer.agreement()
        for row in neurons.agreement_rows(agreement) if agreement is not None else ():
            yield {'layer': layer.layer.name, **row}


def _agreement_tables(report: NeuronReport) -> str:
    """One Markdown table per layer with at least two measures."""
    tables = []
    for layer in report.layers:
        agreement = layer.agreement()
        if agreement is not None:
            tables.append(f'## {layer.layer.name}\n\n{neurons.agreement_markdown(agreement)}\n')
    return '\n'.join(tables)


def _write_csv(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else ['layer', 'neuron'])
        writer.writeheader()
        writer.writerows(lines)


# ------------------------------------------------------------------------------------- terminal


def neuron_table(report: NeuronReport) -> str:
    """The report as aligned text, as far as its measures are there.

    Args:
      report: the report.

    Returns:
      For each layer a headline, its fragile neurons and the rule that calls them so, the neurons
      that are most sensitive (or that matter most by the first measure), correlations of targeting
      with the nodal-dropout responses d_k, success of attacks through single neurons, filtering
      scores, and how far measures agree.
    """
    return '\n\n\n'.join('\n\n'.join(_blocks(report, layer)) for layer in report.layers)


def _blocks(report: NeuronReport, layer: LayerReport) -> Iterator[str]:
    """Paragraphs about a layer."""
    yield '\n'.join(_headline(report, layer))
    if layer.importance():
        yield '\n'.join(_most_important(report, layer))
    if layer.targeting:
        yield '\n'.join(_targeting(layer))
    if layer.through is not None:
        yield '\n'.join(_through(layer.through))
    if layer.curves:
        yield '\n'.join(_filtering(layer))
    agreement = layer.agreement()
    if agreement is not None:
        yield neurons.agreement_table(agreement)


def _headline(report: NeuronReport, layer: LayerReport) -> Iterator[str]:
    facts = layer.layer
    kind = f' ({facts.unit}s of {" x ".join(map(str, facts.shape))})' if facts.shape else ''
    line = f'{facts.name}: {facts.neurons} neurons{kind}, {len(report.labels):,} images'
    yield line + (f'; Delta: {layer.method}' if layer.method else '')
    if layer.statistics is not None:
        constant = int((layer.statistics.std() == 0).sum())
        if constant:
            yield f'constant: {constant} of {facts.neurons}'
    for images, response, label in (
        ('clean images', layer.clean, layer.fragility),
        (f'images under {report.attack}', layer.attacked, layer.attacked_fragility),
    ):
        if response is not None and label is not None:
            yield (
                f'fragile: {int(label.fragile.sum())} of {facts.neurons} on {images} '
                f'({label.rule}; accuracy {response.intact_accuracy:.2%})'
            )


def _most_important(report: NeuronReport, layer: LayerReport) -> list[str]:
    # The columns are few enough for a terminal; the files have more.
    values: dict[str, np.ndarray] = {}
    first, *_ = measures = layer.importance()
    if layer.delta is not None:
        values['|Delta|/std'] = neuron_distances.median_distance(layer)
        values['unreachable'] = np.isinf(layer.delta).mean(0)
        chosen = neuron_distances.most_sensitive(layer, _SHOWN)
        title = 'most sensitive'
    else:
        chosen = np.argsort(-measures[first], kind='stable')[:_SHOWN].tolist()
        title = f'most {first.replace("_", " ")}'
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
    if not chosen:
        return ['No neuron flips a prediction.']
    body = [
        [f'neuron {neuron}', *(f'{column[neuron]:.4g}' for column in values.values())]
        for neuron in chosen
    ]
    return aligned([title, *values], body)


def _targeting(layer: LayerReport) -> list[str]:
    body = []
    for score, targeting in layer.targeting.items():
        for kind, raw, partial in _CORRELATIONS:
            cells = [*_cells(getattr(targeting, raw)), *_cells(getattr(targeting, partial))]
            body.append([f'{score} {kind}', *cells])
    header = ['targeting against d_k', 'rho', 'p', 'rho given norms', 'p']
    return aligned(header, body)


def _through(through: ThroughNeurons) -> list[str]:
    """Shares of predictions changed, by attacks of one budget."""
    summary = through.summary()
    columns = {
        f'easiest {count}' if count > 1 else 'easiest': share
        for count, share in zip(summary.counts.tolist(), summary.broken.tolist())
    }
    columns |= {'PGD': through.pgd.mean(), 'Delta reached': summary.reached}
    cells = [f'{share:.2%}' for share in columns.values()]
    body = [[f'changed, {through.attack}', *cells, f'{summary.mean_successes:.2f}']]
    return aligned(['through neurons', *columns, 'neurons that do'], body)


def _cells(found: neurons.correlation.Correlation | None) -> list[str]:
    if found is None or np.isnan(found.value):
        return ['-', '-']
    return [f'{found.value:+.3f}', f'{found.p_value:.2g}']


def _filtering(layer: LayerReport) -> list[str]:
    body = [
        [kind, *(measure_plots.verdict(score) for score in filtering.scores(curve))]
        for kind, curve in layer.curves.items()
    ]
    return aligned([f'filtering {layer.layer.kernel_layer}', *filtering.Scores._fields], body)

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
    neuron_tables,
    plots,
    sensitivity_plots,
    through_plots,
    top_neuron_plots,
)
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport
from neurosens.evaluation.report import aligned

# Begins the names of files on the whole network: no layer's do so, see `layer_file_name`.
NETWORK = '%network'
# Neurons of each layer in the terminal's table.
_SHOWN = 5


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
    agree, one line per layer and pair of them), `agreement.md` (the same as tables) and
    `targeting.csv` (how far an attack targets fragile neurons, by each score). Filtering of the
    whole network is in `%network.npz` and a plot of that name. The files appear once all of them
    are whole, and those of an earlier evaluation go.

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
        targeting = list(_targeting_lines(report))
        if targeting:
            _write_csv(output.path('targeting.csv'), targeting)
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
        if report.curves:
            _write_network(output, report)
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
        title = f'{layer.layer.name}: weights of {layer.layer.kernel_layer}'
        yield (
            'filtering_curves',
            lambda: measure_plots.filtering_curves(layer.curves, title, report.attack),
        )


def _write_network(output: files.WholeFiles, report: NeuronReport) -> None:
    with output.path(f'{NETWORK}.npz').open('wb') as file:
        np.savez_compressed(file, **neuron_report.curve_arrays(report.curves))  # type: ignore[arg-type]
    figure = measure_plots.filtering_curves(
        report.curves, 'Weights of the whole network', report.attack
    )
    plots.save(figure, output.path(f'{NETWORK}-filtering_curves.png'))


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
            for name, label in (
                ('fragile', layer.fragility),
                ('fragile_attacked', layer.attacked_fragility),
            ):
                if name in names:
                    rule = name.replace('fragile', 'fragile_rule')
                    cells[rule] = '' if label is None else label.rule
            yield {'layer': layer.layer.name, 'neuron': neuron, **cells}


def _agreement_lines(report: NeuronReport) -> Iterator[dict[str, Any]]:
    for layer in report.layers:
        agreement = layer.agreement
        for row in neurons.agreement_rows(agreement) if agreement is not None else ():
            yield {'layer': layer.layer.name, **row}


def _targeting_lines(report: NeuronReport) -> Iterator[dict[str, Any]]:
    for layer in report.layers:
        for score, found in layer.targeting.items():
            for of, control, value in (
                ('mean_score', '', found.score_correlation),
                ('histogram', '', found.histogram_correlation),
                ('mean_score', 'filter_norm', found.score_partial),
                ('histogram', 'filter_norm', found.histogram_partial),
            ):
                if value is not None:
                    yield {
                        'layer': layer.layer.name,
                        'score': score,
                        'of': of,
                        'control': control,
                        'rho': value.value,
                        'p_value': value.p_value,
                        'neurons': value.count,
                    }


def _agreement_tables(report: NeuronReport) -> str:
    """One Markdown table per layer with at least two measures."""
    tables = []
    for layer in report.layers:
        agreement = layer.agreement
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
      scores, and how far measures agree; then filtering scores of the whole network.
    """
    parts = ['\n\n'.join(_blocks(report, layer)) for layer in report.layers]
    if report.curves:
        table = neuron_tables.filtering_table(report.curves, 'the whole network')
        parts.append('\n'.join(aligned(table.header, table.body)))
    return '\n\n\n'.join(parts)


def _blocks(report: NeuronReport, layer: LayerReport) -> Iterator[str]:
    """Paragraphs about a layer."""
    yield '\n'.join(neuron_tables.headline(report, layer))
    if neuron_tables.nothing_flips(layer):
        yield 'No neuron flips a prediction.'
    for table in neuron_tables.tables(layer, _SHOWN):
        yield '\n'.join(aligned(table.header, table.body))
    agreement = layer.agreement
    if agreement is not None:
        yield neurons.agreement_table(agreement)

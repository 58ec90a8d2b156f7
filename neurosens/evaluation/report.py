"""Reports of an evaluation: a table for the terminal, JSON, CSV, plots and a page of all."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from neurosens import metrics
from neurosens.evaluation import (
    files,
    html_page,
    masking_report,
    plots,
    report_page,
    training_plots,
)
from neurosens.evaluation.robustness import RobustnessReport


def _proportion(flags: np.ndarray) -> metrics.Interval:
    return metrics.wilson_interval(int(flags.sum()), len(flags))


def rows(report: RobustnessReport) -> list[tuple[str, metrics.Interval, int]]:
    """Every accuracy of a report with its 95 % Wilson interval.

    Args:
      report: an evaluation.

    Returns:
      `(key, interval, number of images)` for the keys `clean_accuracy`,
      `robust_accuracy/<attack>-<norm>-<eps>`, `robust_accuracy/worst-<norm>-<eps>` (an image counts
      if no attack fools it), of attacks that aim at a class
      `target_rate/<attack>-<norm>-<eps>` (the share of images taken for it) and
      `class_accuracy/<class>`.
    """
    predictions = report.predictions
    result = [('clean_accuracy', _proportion(predictions.correct), len(predictions.labels))]
    for outcome in report.outcomes:
        robust = ~outcome.attacked.success
        result.append((f'robust_accuracy/{outcome.name}', _proportion(robust), len(robust)))
    if len({outcome.attack for outcome in report.outcomes}) > 1:
        for eps in dict.fromkeys(outcome.eps for outcome in report.outcomes):
            robust = report.worst_case(eps)
            name = f'robust_accuracy/worst-{report.outcomes[0].norm}-{eps:.3g}'
            result.append((name, _proportion(robust), len(robust)))
    for outcome in report.outcomes:
        reached = outcome.attacked.reached
        if reached is not None:
            result.append((f'target_rate/{outcome.name}', _proportion(reached), len(reached)))
    for label, name in enumerate(report.info.class_names):
        members = predictions.labels == label
        if members.any():
            interval = _proportion(predictions.correct[members])
            result.append((f'class_accuracy/{name}', interval, int(members.sum())))
    return result


def table(report: RobustnessReport) -> str:
    """The report as aligned text, accuracies in per cent, and what was found of masking."""
    everything = rows(report)
    main = [row for row in everything if row[0].startswith(('clean', 'robust_accuracy/'))]
    aimed = [row for row in everything if row[0].startswith('target_rate/')]
    classes = [row for row in everything if row[0].startswith('class_accuracy/')]
    # A hundred classes do not fit a screen: the best and worst tell the story, the CSV has all.
    if len(classes) > 20:
        classes = sorted(classes, key=lambda row: row[1].value)
        classes = classes[:5] + classes[-5:]
    columns = ['accuracy', '95 % interval', 'images']
    lines = aligned(['', *columns], [_cells(row) for row in main])
    if aimed:
        header = ['taken for the target', 'share', *columns[1:]]
        lines += ['', *aligned(header, [_cells(row) for row in aimed])]
    lines += ['', *aligned(['class', *columns], [_cells(row) for row in classes])]
    found = report.median_distances()
    if found:
        cells = [[name, *(f'{value:.4g}' for value in median)] for name, median in found.items()]
        lines += ['', *aligned(['median distance', 'value', 'low', 'high'], cells)]
        relative = report.relative_distances()
        if relative:
            cells = [[name, f'{value:.4g}'] for name, value in relative.items()]
            lines += ['', *aligned(['mean distance / norm of the image', 'value'], cells)]
    for outcome in report.outcomes:
        lines += [f'{outcome.name}: {warning}' for warning in outcome.warnings]
    for diagnosis in report.diagnoses:
        lines += ['', masking_report.masking_table(diagnosis)]
    if report.undiagnosed:
        lines += ['', report.undiagnosed]
    return '\n'.join(lines)


def _cells(row: tuple[str, metrics.Interval, int]) -> list[str]:
    key, interval, count = row
    label = key.split('/')[-1].replace('clean_accuracy', 'clean')
    span = f'{interval.low * 100:6.2f} - {interval.high * 100:6.2f}'
    return [label, f'{interval.value * 100:.2f}', span, f'{count:,}']


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table: first column to the left, all others to the right.

    Args:
      header: names of the columns.
      body: cells of each line.

    Returns:
      The header, a rule, and one line for each of `body`, all of one length.
    """
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = '-' * (sum(widths) + 3 * (len(widths) - 1))

    def align(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        return '   '.join([first, *rest])

    return [align(header), rule, *map(align, body)]


def results(report: RobustnessReport, facts: dict[str, Any]) -> dict[str, Any]:
    """The report as one flat dict of JSON values.

    Args:
      report: an evaluation.
      facts: what was evaluated, such as the step and the config; comes first.

    Returns:
      `facts`, `images`, `warnings/<attack>-<norm>-<eps>` where there are any, `clean_loss` (None
      where it is not finite), and for each key of `rows` its value and, as `<key>/low` and
      `<key>/high`, its interval;
      `queries/<attack>-<norm>-<eps>`, the mean number of forward passes for an image;
      `median_distance/<attack>-<norm>`, with its interval, of attacks that look for the smallest
      perturbation, and `relative_distance/<attack>-<norm>`, their mean share of the image's norm,
      None where infinite; then what was found of masking, as of
      `masking_report.masking_facts`, or why it was not looked for as `masking/undiagnosed`.
    """
    flat: dict[str, Any] = dict(facts)
    flat['images'] = len(report.predictions.labels)
    warnings = {o.name: list(o.warnings) for o in report.outcomes if o.warnings}
    flat.update({f'warnings/{name}': texts for name, texts in warnings.items()})
    loss = float(report.predictions.loss.astype('float64').mean())
    flat['clean_loss'] = loss if math.isfinite(loss) else None
    for key, interval, _ in rows(report):
        flat[key] = interval.value
        flat[f'{key}/low'] = interval.low
        flat[f'{key}/high'] = interval.high
    for outcome in report.outcomes:
        if outcome.attacked.queries is not None:
            flat[f'queries/{outcome.name}'] = float(outcome.attacked.queries.mean())
    for name, median in report.median_distances().items():
        for part, value in zip(('', '/low', '/high'), median):
            flat[f'median_distance/{name}{part}'] = value if math.isfinite(value) else None
    for name, mean in report.relative_distances().items():
        flat[f'relative_distance/{name}'] = mean if math.isfinite(mean) else None
    flat.update(masking_report.masking_facts(report.diagnoses))
    if report.undiagnosed:
        flat['masking/undiagnosed'] = report.undiagnosed
    return flat


# Files that not every report has.
_CHANGING = (
    'examples-*.png',
    'autoattack*.csv',
    'distances.csv',
    'masking.csv',
    'accuracy_against_eps.png',
    'training.png',
)


def write(
    report: RobustnessReport,
    directory: str | pathlib.Path,
    facts: dict[str, Any],
    training_log: Sequence[Mapping[str, Any]] = (),
    *,
    sections: Sequence[html_page.Section] = (),
    provenance: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Writes `results.json`, `results.csv`, the plots, and `index.html`, which shows all of them.

    For each ensemble `<attack>-<norm>-<eps>.csv` says which of its runs broke each image,
    `distances.csv` the smallest perturbation of each image that each attack found, where one looked
    for it, and `masking.csv` what was found of gradient masking. Each file appears only when it is
    whole.

    Args:
      report: an evaluation.
      directory: where they go; made if need be.
      facts: as in `results`.
      training_log: lines of the training's `metrics.jsonl`, drawn in `training.png`.
      sections: more of the page, such as `neuron_section` makes.
      provenance: how the report came about, for the page: `command` and, by names, versions,
        devices and the like.

    Returns:
      The files written.
    """
    directory = pathlib.Path(directory)
    flat = results(report, facts)
    with files.WholeFiles(directory) as output:
        text = json.dumps(flat, indent=2) + '\n'
        output.path('results.json').write_text(text, encoding='utf-8')
        with output.path('results.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['measurement', 'value', 'low', 'high', 'images'])
            for key, interval, count in rows(report):
                writer.writerow([key, *interval, count])
        for outcome in report.outcomes:
            if outcome.broken_by:
                with output.path(f'{outcome.name}.csv').open('w', newline='') as file:
                    writer = csv.writer(file)
                    writer.writerow(['image', 'label', 'broken_by'])
                    labels = report.predictions.labels.tolist()
                    writer.writerows(zip(range(len(labels)), labels, outcome.broken_by))
        distances = report.distances()
        if distances:
            with output.path('distances.csv').open('w', newline='') as file:
                writer = csv.writer(file)
                writer.writerow(['image', 'label', *distances])
                columns = (values.tolist() for values in distances.values())
                labels = report.predictions.labels.tolist()
                writer.writerows(zip(range(len(labels)), labels, *columns))
        if report.diagnoses:
            masking_report.write_masking(report.diagnoses, output.path('masking.csv'))
        pictures = {}
        for name, figure in _figures(report, training_log):
            path = output.path(name)
            plots.save(figure, path)
            pictures[name] = path.read_bytes()
        page = report_page.report_page(
            report, flat, pictures, sections=sections, provenance=provenance
        )
        # The last one, so that the page never shows what is not beside it yet.
        output.path('index.html').write_text(page, encoding='utf-8')
    # What an earlier evaluation with other attacks left would pass for this one's.
    for pattern in _CHANGING:
        for stale in set(directory.glob(pattern)) - set(output.written):
            stale.unlink()
    return output.written


def put_in_place(fresh: str | pathlib.Path, directory: str | pathlib.Path) -> None:
    """Puts a whole report in the place of an earlier one, what that alone has being removed.

    Args:
      fresh: where the report was written, on the same disk; its files move.
      directory: where it goes; made if need be. Files that are of no report stay, but for those in
        `neurons/`, which is the report's own.
    """
    fresh, directory = pathlib.Path(fresh), pathlib.Path(directory)
    names = {path.relative_to(fresh) for path in fresh.rglob('*') if path.is_file()}
    # The page last, so that it never shows what is not beside it yet.
    for name in sorted(names, key=lambda name: (name.name == 'index.html', name)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).replace(directory / name)
    for pattern in (*_CHANGING, *files.OF_A_DEFENSE, 'neurons/*'):
        for path in directory.glob(pattern):
            if path.is_file() and path.relative_to(directory) not in names:
                path.unlink()
    with contextlib.suppress(OSError):
        # Only where nothing is left in it.
        (directory / 'neurons').rmdir()


def _strongest_radius(report: RobustnessReport) -> list:
    largest = max((outcome.eps for outcome in report.outcomes), default=0.0)
    return [outcome for outcome in report.outcomes if outcome.eps == largest]


def _figures(
    report: RobustnessReport, training_log: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Figure]]:
    """The plots by their file names."""
    yield 'class_accuracy.png', plots.class_accuracy(report)
    if report.outcomes:
        yield 'accuracy_against_eps.png', plots.accuracy_against_eps(report)
    if any('loss' in line for line in training_log):
        yield 'training.png', training_plots.training_curves(training_log)
    for outcome in _strongest_radius(report):
        if len(outcome.attacked.x):
            yield f'examples-{outcome.name}.png', plots.example_grid(report, outcome)

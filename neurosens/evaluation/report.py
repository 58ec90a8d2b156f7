"""Reports of an evaluation: a table for the terminal, JSON, CSV and plots."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neurosens import metrics
from neurosens.evaluation import files, masking, plots, training_plots
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
      if no attack fools it) and `class_accuracy/<class>`.
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
    for label, name in enumerate(report.info.class_names):
        members = predictions.labels == label
        if members.any():
            interval = _proportion(predictions.correct[members])
            result.append((f'class_accuracy/{name}', interval, int(members.sum())))
    return result


def table(report: RobustnessReport) -> str:
    """The report as aligned text, accuracies in per cent, and what was found of masking."""
    everything = rows(report)
    main = [row for row in everything if not row[0].startswith('class_accuracy/')]
    classes = [row for row in everything if row[0].startswith('class_accuracy/')]
    # A hundred classes do not fit a screen: the best and worst tell the story, the CSV has all.
    if len(classes) > 20:
        classes = sorted(classes, key=lambda row: row[1].value)
        classes = classes[:5] + classes[-5:]
    columns = ['accuracy', '95 % interval', 'images']
    lines = aligned(['', *columns], [_cells(row) for row in main])
    lines += ['', *aligned(['class', *columns], [_cells(row) for row in classes])]
    for outcome in report.outcomes:
        lines += [f'{outcome.name}: {warning}' for warning in outcome.warnings]
    if report.diagnosis is not None:
        lines += ['', masking.masking_table(report.diagnosis)]
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
      `facts`, `images`, `warnings/<attack>-<norm>-<eps>` where there are any, `clean_loss`, and for
      each key of `rows` its value and, as `<key>/low` and `<key>/high`, its interval; then what was
      found of masking, as of `masking.masking_facts`.
    """
    flat: dict[str, Any] = dict(facts)
    flat['images'] = len(report.predictions.labels)
    warnings = {o.name: list(o.warnings) for o in report.outcomes if o.warnings}
    flat.update({f'warnings/{name}': texts for name, texts in warnings.items()})
    flat['clean_loss'] = float(report.predictions.loss.astype('float64').mean())
    for key, interval, _ in rows(report):
        flat[key] = interval.value
        flat[f'{key}/low'] = interval.low
        flat[f'{key}/high'] = interval.high
    if report.diagnosis is not None:
        flat.update(masking.masking_facts(report.diagnosis))
    return flat


def write(
    report: RobustnessReport,
    directory: str | pathlib.Path,
    facts: dict[str, Any],
    training_log: Sequence[Mapping[str, Any]] = (),
) -> list[pathlib.Path]:
    """Writes `results.json`, `results.csv` and the plots.

    For each ensemble `<attack>-<norm>-<eps>.csv` says which of its runs broke each image, and
    `masking.csv` what was found of gradient masking. Each file appears only when it is whole.

    Args:
      report: an evaluation.
      directory: where they go; made if need be.
      facts: as in `results`.
      training_log: lines of the training's `metrics.jsonl`, drawn in `training.png`.

    Returns:
      The files written.
    """
    directory = pathlib.Path(directory)
    with files.WholeFiles(directory) as output:
        text = json.dumps(results(report, facts), indent=2) + '\n'
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
        if report.diagnosis is not None:
            masking.write_masking(report.diagnosis, output.path('masking.csv'))
        plots.save(plots.class_accuracy(report), output.path('class_accuracy.png'))
        if report.outcomes:
            figure = plots.accuracy_against_eps(report)
            plots.save(figure, output.path('accuracy_against_eps.png'))
        if any('loss' in line for line in training_log):
            figure = training_plots.training_curves(training_log)
            plots.save(figure, output.path('training.png'))
        for outcome in _strongest_radius(report):
            if len(outcome.attacked.x):
                figure = plots.example_grid(report, outcome)
                plots.save(figure, output.path(f'examples-{outcome.name}.png'))
    # Examples of an earlier evaluation with other attacks would pass for this one's.
    for pattern in ('examples-*.png', 'autoattack*.csv', 'masking.csv'):
        for stale in set(directory.glob(pattern)) - set(output.written):
            stale.unlink()
    return output.written


def _strongest_radius(report: RobustnessReport) -> list:
    largest = max((outcome.eps for outcome in report.outcomes), default=0.0)
    return [outcome for outcome in report.outcomes if outcome.eps == largest]

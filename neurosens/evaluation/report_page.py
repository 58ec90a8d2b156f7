"""The report of an evaluation as a page of HTML that holds all of it."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neurosens import config as config_lib
from neurosens import metrics
from neurosens.evaluation.html_page import (
    Block,
    Code,
    Figure,
    Folded,
    Notes,
    Section,
    Table,
    Values,
    check_table,
    page,
)
from neurosens.evaluation.masking import Diagnosis
from neurosens.evaluation.robustness import AttackOutcome, RobustnessReport

# Longer tables are folded away below the plot that shows the same.
_LONG = 20


def report_page(
    report: RobustnessReport,
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    sections: Sequence[Section] = (),
    provenance: Mapping[str, str] | None = None,
) -> str:
    """The page `index.html` of a report.

    Args:
      report: an evaluation.
      results: what `results.json` holds, as of `neurosens.evaluation.results`.
      pictures: the PNG files of the report by their names.
      sections: more of the page, between accuracy and training.
      provenance: how the report came about; its `command` is shown as such.

    Returns:
      An HTML document that needs no other file.
    """
    config = results.get('config', {})
    model = config.get('model', 'Model')
    title = f'{model} on {report.info.name} {report.split}'
    warnings = [f'{o.name}: {warning}' for o in report.outcomes for warning in o.warnings]
    lead: list[Block] = [_summary(report, results), _most_important(report)]
    if warnings:
        lead.append(Notes('Robustness may be overestimated', warnings))
    parts = [_accuracy(report, results, pictures)]
    if report.diagnoses:
        parts.append(masking_section('Signs of gradient masking', report.diagnoses))
    if report.undiagnosed:
        parts.append(Section('Signs of gradient masking', [report.undiagnosed]))
    parts += sections
    if 'training.png' in pictures:
        parts.append(_training(pictures['training.png']))
    parts.append(_origin(results, provenance or {}))
    return page(title, lead, parts)


def masking_section(title: str, diagnoses: Sequence[Diagnosis]) -> Section:
    """What diagnoses of gradient masking found, as a section of the page.

    Args:
      title: of the section.
      diagnoses: what was found at each radius, of the same images.

    Returns:
      A table for each radius, with one row for each check; what failed stands at the top of the
      page too, once for all radii where it did.
    """
    failed: dict[str, list[str]] = {}
    for diagnosis in diagnoses:
        for check in diagnosis.checks:
            if check.verdict == 'warn':
                failed.setdefault(check.message, []).append(f'{diagnosis.eps:.3g}')
    notes = [
        f'At {diagnoses[0].norm} eps {_listed(radii)}: {message}'
        for message, radii in failed.items()
    ]
    return Section(
        title,
        [
            'Attacks that mislead themselves make a model look robust. Each check compares attacks '
            f'on {diagnoses[0].images:,} images; up to {diagnoses[0].slack} of them may go the '
            'wrong way by chance.',
            *map(_checks_at, diagnoses),
        ],
        [Notes(title, notes)] if notes else [],
    )


def _checks_at(diagnosis: Diagnosis) -> Table:
    return check_table(
        f'Checks at {diagnosis.norm} eps {diagnosis.eps:.3g}',
        [
            (
                check.name.replace('_', ' '),
                check.verdict,
                ', '.join(
                    f'{name.replace("_", " ")} {value:.4g}' for name, value in check.figures.items()
                ),
                check.message,
            )
            for check in diagnosis.checks
        ],
    )


# ------------------------------------------------------------------------------------ summary


def _summary(report: RobustnessReport, results: Mapping[str, Any]) -> str:
    clean = _interval(report.predictions.correct)
    model = results.get('config', {}).get('model', 'The model')
    origin = [f'step {results["step"]}'] if 'step' in results else []
    origin += [results['workdir']] if 'workdir' in results else []
    where = f' ({" of ".join(origin)})' if origin else ''
    text = (
        f'{model}{where} classifies {clean.value:.2%} of the '
        f'{len(report.predictions.labels):,} images of {report.info.name} {report.split} '
        f'correctly (95 % interval {_span(clean)} %).'
    )
    radii = _radii(report)
    if not radii:
        return f'{text} It was not attacked.'
    worst = [f'{report.worst_case(eps).mean():.2%} at {eps:.3g}' for eps in radii]
    attacks = _attacks(report)
    by = f'{attacks[0]} is' if len(attacks) == 1 else f'all of {_listed(attacks)} are'
    norm = report.outcomes[0].norm
    return (
        f'{text} When {by} tried on each image, {_listed(worst)} stay right ({norm} radius, '
        'pixels in [0, 1]).'
    )


def _most_important(report: RobustnessReport) -> Values:
    clean = _interval(report.predictions.correct)
    count = f'{_span(clean)} %, {len(report.predictions.labels):,} images'
    items = [('clean accuracy', f'{clean.value:.2%}', count)]
    for eps in _radii(report):
        worst = _interval(report.worst_case(eps))
        norm = report.outcomes[0].norm
        label = f'robust accuracy, {norm} eps {eps:.3g}'
        remark = f'{_span(worst)} %; {_strongest(report, eps)}'
        items.append((label, f'{worst.value:.2%}', remark))
    return Values(items)


def _strongest(report: RobustnessReport, eps: float) -> str:
    """Which attacks leave the lowest accuracy at a radius, in words."""
    left = {o.attack: (~o.attacked.success).mean() for o in report.outcomes if o.eps == eps}
    names = [name for name, value in left.items() if value == min(left.values())]
    if len(left) == 1:
        return f'under {names[0]}'
    few = _listed(names) if len(names) < 4 else f'{len(names)} of {len(left)} attacks'
    return f'strongest: {few}'


def _radii(report: RobustnessReport) -> list[float]:
    return list(dict.fromkeys(outcome.eps for outcome in report.outcomes))


def _attacks(report: RobustnessReport) -> list[str]:
    return list(dict.fromkeys(outcome.attack for outcome in report.outcomes))


def _listed(words: Sequence[str]) -> str:
    return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))


def _interval(flags: np.ndarray) -> metrics.Interval:
    return metrics.wilson_interval(int(flags.sum()), len(flags))


def _span(interval: metrics.Interval) -> str:
    return f'{interval.low * 100:.2f}–{interval.high * 100:.2f}'


def share_text(interval: metrics.Interval) -> str:
    """A share and its interval in per cent, such as `'95.33 (90.68–97.72)'`."""
    return f'{interval.value * 100:.2f} ({_span(interval)})'


# ----------------------------------------------------------------------------------- accuracy


def _accuracy(
    report: RobustnessReport, results: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> Section:
    predictions = report.predictions
    clean = [
        ['accuracy (%)', f'{predictions.accuracy * 100:.2f}'],
        ['95 % interval', _span(_interval(predictions.correct))],
        ['images', f'{len(predictions.labels):,}'],
        ['mean loss', '–' if results['clean_loss'] is None else f'{results["clean_loss"]:.4g}'],
    ]
    blocks: list[Block] = [Table('Clean images', ['measurement', 'value'], clean)]
    if report.outcomes:
        blocks.append(_attack_table(report))
        blocks += _target_table(report)
    if 'accuracy_against_eps.png' in pictures:
        blocks.append(
            Figure(
                pictures['accuracy_against_eps.png'],
                'Accuracy under each attack against its radius, with 95 % Wilson bands; radius 0 '
                'is clean.',
                'Curves of accuracy against the radius of each attack; the table has the numbers.',
            )
        )
    if report.distances():
        blocks.append(_distance_table(report))
    blocks += [_ensemble(outcome) for outcome in report.outcomes if outcome.broken_by]
    examples = list(_examples(report, pictures))
    if examples:
        blocks.append(Section('Adversarial examples', examples))
    blocks.append(_classes(report, pictures))
    return Section('Accuracy', blocks)


def _attack_table(report: RobustnessReport) -> Table:
    """A row for each attack, a column for each radius."""
    radii, attacks = _radii(report), _attacks(report)
    robust = {
        (o.attack, o.eps): share_text(_interval(~o.attacked.success)) for o in report.outcomes
    }
    rows = [[attack, *(robust.get((attack, eps), '–') for eps in radii)] for attack in attacks]
    if len(attacks) > 1:
        worst = (share_text(_interval(report.worst_case(eps))) for eps in radii)
        rows.append(['worst of all, for each image', *worst])
    norm = report.outcomes[0].norm
    caption = (
        f'Accuracy in % under attack, in brackets its 95 % Wilson interval; {norm}, '
        f'{len(report.predictions.labels):,} images'
    )
    return Table(caption, ['attack', *(f'eps {eps:.3g}' for eps in radii)], rows)


def _target_table(report: RobustnessReport) -> list[Table]:
    """The same of the share of images taken for the class aimed at; none if no attack aims."""
    radii = _radii(report)
    shares = {
        (o.attack, o.eps): share_text(_interval(o.attacked.reached))
        for o in report.outcomes
        if o.attacked.reached is not None
    }
    if not shares:
        return []
    rows = [
        [attack, *(shares.get((attack, eps), '–') for eps in radii)] for attack in _attacks(report)
    ]
    caption = (
        'Images taken for the class that the attack aims at, in %, in brackets the 95 % Wilson '
        f'interval; {report.outcomes[0].norm}. The accuracy above counts any class as an error but '
        'the label.'
    )
    return [Table(caption, ['attack', *(f'eps {eps:.3g}' for eps in radii)], rows)]


def _distance_table(report: RobustnessReport) -> Table:
    """A row for each attack that looks for the smallest perturbation."""
    relative = report.relative_distances()
    rows = [
        [name, f'{value:.4g}', f'{low:.4g} – {high:.4g}', f'{relative.get(name, math.nan):.4g}']
        for name, (value, low, high) in report.median_distances().items()
    ]
    caption = (
        'Median over images of the smallest perturbation found, whatever the radius, with its 95 % '
        'bootstrap interval, and its mean share of the norm of the image (rho_adv); 0 counts for '
        'images that need none. distances.csv has every image.'
    )
    columns = ['attack', 'median distance', '95 % interval', 'mean / norm of the image']
    return Table(caption, columns, rows)


def _ensemble(outcome: AttackOutcome) -> Table:
    """How many images each run of an ensemble broke."""
    total = len(outcome.broken_by)
    rows = [
        [_RUNS.get(run, run), f'{count:,}', f'{100 * count / total:.2f}']
        for run, count in collections.Counter(outcome.broken_by).most_common()
    ]
    return Table(f'{outcome.name}: what broke each image first', ['run', 'images', '%'], rows)


_RUNS = {'': 'none: robust', 'clean': 'none needed: misclassified as it is'}


def _examples(report: RobustnessReport, pictures: Mapping[str, bytes]) -> Iterator[Figure]:
    for outcome in report.outcomes:
        name = f'examples-{outcome.name}.png'
        if name in pictures:
            yield Figure(
                pictures[name],
                f'{outcome.attack}, {outcome.norm} eps {outcome.eps:.3g}: clean images, '
                'perturbations (stretched around grey) and attacked images; below them the '
                'predicted class, green where it is right.',
                f'The first {len(outcome.attacked.x)} images before and after {outcome.attack}, '
                'with the perturbation between them.',
            )


def _classes(report: RobustnessReport, pictures: Mapping[str, bytes]) -> Section:
    predictions, radii = report.predictions, _radii(report)
    survivors = [predictions.correct, *(report.worst_case(eps) for eps in radii)]
    rows = []
    for label, name in enumerate(report.info.class_names):
        members = predictions.labels == label
        if members.any():
            shares = [share_text(_interval(flags[members])) for flags in survivors]
            rows.append([name, f'{int(members.sum()):,}', *shares])
    worst = ', and under the worst attack for each image,' if radii else ''
    table = Table(
        f'Accuracy in % of each class on clean images{worst} with 95 % Wilson intervals',
        ['class', 'images', 'clean', *(f'eps {eps:.3g}' for eps in radii)],
        rows,
    )
    blocks: list[Block] = []
    if 'class_accuracy.png' in pictures:
        blocks.append(
            Figure(
                pictures['class_accuracy.png'],
                'Clean accuracy of each class with 95 % Wilson intervals; the line is that of all '
                'images.',
                'Bars of clean accuracy by class; the table has the numbers.',
            )
        )
    blocks.append(table if len(rows) <= _LONG else Folded(f'All {len(rows)} classes', [table]))
    return Section('Classes', blocks)


# ------------------------------------------------------------------------- training and origin


def _training(picture: bytes) -> Section:
    figure = Figure(
        picture,
        'How training went, from metrics.jsonl: loss, accuracy, and penalties where there are any.',
        'Curves of loss and accuracy over the steps of training; metrics.jsonl has the numbers.',
    )
    return Section('Training', [figure])


def _origin(results: Mapping[str, Any], provenance: Mapping[str, str]) -> Section:
    """What it takes to make the report again, and every number in it."""
    blocks: list[Block] = []
    if 'command' in provenance:
        blocks.append(Code(provenance['command']))
    rows = [[name, value] for name, value in provenance.items() if name != 'command']
    if rows:
        blocks.append(Table('Made with', ['what', 'value'], rows))
    config = list(_settings(results.get('config', {})))
    if config:
        table = Table('Settings, as --config.KEY=VALUE', ['key', 'value'], config)
        blocks.append(Folded(f'All {len(config)} settings of the model and evaluation', [table]))
    numbers = [
        [key, json.dumps(value, ensure_ascii=False)]
        for key, value in results.items()
        if key != 'config'
    ]
    table = Table('The contents of results.json, without the settings', ['key', 'value'], numbers)
    blocks.append(Folded(f'All {len(numbers)} results, in full precision', [table]))
    return Section('Reproduction', blocks)


def _settings(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """The keys and values of a config as the command line takes them."""
    for name, value in config.items():
        # Other dicts, such as options, are values themselves.
        group = dataclasses.is_dataclass(getattr(_DEFAULTS, name, None))
        for key, each in value.items() if group else [('', value)]:
            yield [f'{name}.{key}' if key else name, str(each) or "''"]


_DEFAULTS = config_lib.Config()

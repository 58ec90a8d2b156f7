"""What a defence is worth, as a section of the report's page."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np

from neurosens import metrics
from neurosens.evaluation.defense_outcomes import GROUPS, DefenseReport
from neurosens.evaluation.defense_report import EXAMPLES, defense_rows, radii, rates, shift_rows
from neurosens.evaluation.html_page import Block, Figure, Notes, Section, Table, Values
from neurosens.evaluation.report_page import masking_section, share_text

# For each plot its caption, and what it shows for those who cannot see it.
_PLOTS = {
    'defense': (
        'Worst-case accuracy against the radius, with 95 % Wilson bands: without the defence, '
        'under attacks that do not know it, and under all attacks.',
        'Curves of accuracy against the radius; the table has the numbers.',
    ),
    'defense_controls': (
        'Share of the fooling images that moves of each size recover: controls of the defence.',
        'Curves of recovered images against the size of the move; the table has the numbers.',
    ),
    'defense_shifts': (
        'How the attack, and random noise of its l2 size before clipping, change front, middle and '
        'tail neurons, over images.',
        'Box plots of the change of neurons by group; the table has the means.',
    ),
}


def defense_section(report: DefenseReport, files: Iterable[pathlib.Path] = ()) -> Section:
    """The section on a defence of the page `index.html`.

    Args:
      report: of the defence.
      files: what `write_defense` wrote; its plots are shown.

    Returns:
      What the defence costs, accuracies with and without it, which images it recovers, and plots.
    """
    title = f'Defence: {report.defense.replace("_", " ")}'
    blocks: list[Block] = [
        f'{report.passes} forward passes an image, {report.cost:.2f} × the time of the undefended '
        'model. Static attacks are made on the undefended model, adaptive ones with knowledge of '
        'the defence; an image withstands a radius only where no attack of any kind succeeds.',
        *_warnings(report),
        Table('How it was calibrated, and what that found', ['what', 'value'], _origin(report)),
        Table(
            'Accuracy in % of the defended model, unless it says undefended, with 95 % Wilson '
            f'intervals; {len(report.defended.labels):,} images',
            ['measurement', 'accuracy'],
            [[key, share_text(interval)] for key, interval, _ in defense_rows(report)],
        ),
    ]
    recovered = [[name, str(rate), rate.lost_text] for name, rate in rates(report).items()]
    if recovered:
        caption = (
            'Recovered, in %, of what fooled the undefended model, with 95 % Wilson intervals, and '
            'images lost of what it withstood'
        )
        blocks.append(Table(caption, ['attack', 'recovered', 'lost'], recovered))
    for moves in report.moves:
        sizes = list(next(iter(moves.controls.values())))
        blocks.append(
            Table(
                f'Recovered, in %, of what {moves.attack} fooled, by moves of size rho',
                ['move', *(f'rho {size:g}' for size in sizes)],
                [
                    [name, *(_percent(by_size[size]) for size in sizes)]
                    for name, by_size in moves.controls.items()
                ],
            )
        )
        blocks.append(
            Table(
                f'Mean change of neurons under {moves.attack}, in units of the mean |activation| '
                'of the layer',
                ['layer', *GROUPS],
                shift_rows(moves, _mean),
            )
        )
    if report.uncontrolled:
        blocks.append(report.uncontrolled)
    for path in files:
        if path.suffix == '.png':
            caption, alternative = _described(path.stem)
            blocks.append(Figure(path.read_bytes(), caption, alternative))
    lead = [_verdict(report, title), *_warnings(report, title)]
    if report.diagnoses:
        masked = masking_section('Signs of gradient masking by the defence', report.diagnoses)
        blocks.append(masked._replace(lead=()))
        lead += masked.lead
    if report.undiagnosed:
        blocks.append(report.undiagnosed)
    return Section(title, blocks, lead)


def _origin(report: DefenseReport) -> list[list[str]]:
    """Settings of the calibration, and what it found."""
    parts = (report.settings, report.calibration, report.found)
    return [[name.replace('_', ' '), str(value)] for part in parts for name, value in part.items()]


def _verdict(report: DefenseReport, title: str) -> Values:
    """Accuracy through the defence, and under all attacks beside that without it."""
    items = []
    for norm, eps in [('', 0.0), *radii(report)]:
        flags = report.worst_case(eps) if norm else report.defended.correct
        before = report.undefended_worst_case(eps) if norm else report.undefended.correct
        share = metrics.wilson_interval(int(flags.sum()), len(flags))
        remark = f'{100 * share.low:.2f}–{100 * share.high:.2f} %'
        # Without a static attack it is not known what the undefended model withstands.
        if not norm or any(o.fooled is not None for o in report.outcomes if o.eps == eps):
            remark += f'; undefended {before.mean():.2%}'
        what = f'all attacks, {norm} eps {eps:.3g}' if norm else 'clean'
        items.append((f'{title}, {what}', f'{share.value:.2%}', remark))
    return Values(items)


def _described(stem: str) -> tuple[str, str]:
    """Caption of a picture, and what it shows."""
    if stem.startswith(EXAMPLES):
        attack = stem.removeprefix(EXAMPLES)
        return (
            f'{attack}, made on the defended model: clean images, perturbations (stretched around '
            'grey) and attacked images; below them the class that the defended model predicts, '
            'green where it is right.',
            f'The first images before and after {attack}, with the perturbation between them.',
        )
    return _PLOTS.get(stem, (stem.replace('_', ' '),) * 2)


def _warnings(report: DefenseReport, title: str = '') -> list[Block]:
    texts = [f'{name}: {text}' for name, found in report.warnings.items() for text in found]
    heading = f'{title}: robustness may be overestimated' if title else ''
    return [Notes(heading or 'Robustness may be overestimated', texts)] if texts else []


def _percent(share: float) -> str:
    return '–' if np.isnan(share) else f'{share * 100:.1f}'


def _mean(values: np.ndarray) -> str:
    return f'{np.mean(values):+.3f}' if len(values) else '–'

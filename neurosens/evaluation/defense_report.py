"""Reports of a defence: a table for the terminal, flat facts, CSV and plots."""

from __future__ import annotations

import csv
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from neurosens import metrics
from neurosens.evaluation import files, masking_report, plots, robustness
from neurosens.evaluation.defense_outcomes import (
    ADAPTIVE,
    GROUPS,
    STATIC,
    DefenseReport,
    Moves,
    radii,
)
from neurosens.evaluation.report import aligned

# Names of pictures of attacked images begin so; see `files.OF_A_DEFENSE`.
EXAMPLES = 'defense_examples-'


def _proportion(flags: np.ndarray) -> metrics.Interval:
    return metrics.wilson_interval(int(flags.sum()), len(flags))


def defense_rows(report: DefenseReport) -> list[tuple[str, metrics.Interval, int]]:
    """Every accuracy of the report with its 95 % Wilson interval.

    Args:
      report: of a defence.

    Returns:
      `(key, interval, number of images)` for the keys `undefended/clean_accuracy`,
      `clean_accuracy`, `undefended/<attack>-<norm>-<eps>` (the static attacks before the defence),
      `static/...`, `adaptive/...`, `worst/undefended-<norm>-<eps>`, `worst/static-<norm>-<eps>` and
      `worst/all-<norm>-<eps>` (an image counts if no attack, of any kind, fools the model).
    """
    images = len(report.defended.labels)
    result = [
        ('undefended/clean_accuracy', _proportion(report.undefended.correct), images),
        ('clean_accuracy', _proportion(report.defended.correct), images),
    ]
    for outcome in report.outcomes:
        if outcome.undefended is not None:
            robust = report.undefended.correct & ~outcome.undefended
            name = outcome.name.removeprefix(f'{STATIC}/')
            result.append((f'undefended/{name}', _proportion(robust), images))
        result.append((outcome.name, _proportion(~outcome.success), images))
    for norm, eps in radii(report):
        if any(outcome.fooled is not None for outcome in report.outcomes):
            robust = report.undefended_worst_case(eps)
            result.append((f'worst/undefended-{norm}-{eps:.3g}', _proportion(robust), images))
        for label, kinds in (('static', (STATIC,)), ('all', (STATIC, ADAPTIVE))):
            robust = report.worst_case(eps, kinds)
            result.append((f'worst/{label}-{norm}-{eps:.3g}', _proportion(robust), images))
    return result


class Rate(NamedTuple):
    """Defence success rate against one attack, and what the defence costs.

    Attributes:
      recovered: images that the defended model gets right, clean and attacked, of those fooled.
      fooled: attacked images that the undefended model gets wrong, of those it gets right clean.
      interval: recovered / fooled with its 95 % Wilson interval; None where nothing was fooled.
      lost: images that the defended model gets wrong, clean or attacked, of those withstood.
      withstood: images that the undefended model gets right, clean and attacked.
    """

    recovered: int
    fooled: int
    interval: metrics.Interval | None
    lost: int
    withstood: int

    def __str__(self) -> str:
        """Such as `'14.3 (4.0 - 39.9), 2 of 14'`, in per cent."""
        if self.interval is None:
            return '-'
        value, low, high = (100 * part for part in self.interval)
        return f'{value:.1f} ({low:.1f} - {high:.1f}), {self.recovered:,} of {self.fooled:,}'

    @property
    def lost_text(self) -> str:
        """Such as `'3 of 46'`."""
        return f'{self.lost:,} of {self.withstood:,}' if self.withstood else '-'


# Columns of a table of them.
RATES = (
    'recovered of what fooled the undefended model',
    '% (95 % interval), images',
    'lost of what it withstood, images',
)


def rates(report: DefenseReport) -> dict[str, Rate]:
    """Defence success rate against each static attack, by its name."""
    found = {}
    for outcome in report.outcomes:
        if outcome.fooled is not None and outcome.undefended is not None:
            recovered = int((outcome.fooled & ~outcome.success).sum())
            fooled = int(outcome.fooled.sum())
            interval = metrics.wilson_interval(recovered, fooled) if fooled else None
            withstood = report.undefended.correct & ~outcome.undefended
            lost = int((withstood & outcome.success).sum())
            name = outcome.name.removeprefix(f'{STATIC}/')
            found[name] = Rate(recovered, fooled, interval, lost, int(withstood.sum()))
    return found


def defense_table(report: DefenseReport) -> str:
    """The report as aligned text, in per cent."""
    lines = [
        f'{report.defense}: {report.passes} forward passes an image, '
        f'{report.cost:.2f} x the time of the undefended model'
    ]
    body = []
    for key, interval, count in defense_rows(report):
        span = f'{interval.low * 100:6.2f} - {interval.high * 100:6.2f}'
        body.append([key, f'{interval.value * 100:.2f}', span, f'{count:,}'])
    lines += aligned(
        ['defended, unless it says undefended', 'accuracy', '95 % interval', 'images'], body
    )
    found = rates(report)
    if found:
        body = [[name, str(rate), rate.lost_text] for name, rate in found.items()]
        lines += ['', *aligned(RATES, body)]
    for moves in report.moves:
        sizes = list(next(iter(moves.controls.values())))
        body = [
            [name, *(_percent(by_size[size]) for size in sizes)]
            for name, by_size in moves.controls.items()
        ]
        header = [f'recovered of {moves.attack} by a move of rho', *map(str, sizes)]
        lines += ['', *aligned(header, body)]
        body = shift_rows(moves, _mean)
        header = [f'mean change under {moves.attack}', *GROUPS]
        lines += ['', *aligned(header, body)]
    if report.uncontrolled:
        lines += ['', report.uncontrolled]
    missed = _missed(report)
    if missed:
        body = [[name.partition('/')[2], f'{count:,}'] for name, count in missed.items()]
        lines += ['', *aligned(['images that fall, but not along gradients', 'images'], body)]
    for name, warnings in report.warnings.items():
        lines += [f'{name}: {warning}' for warning in warnings]
    for diagnosis in report.diagnoses:
        lines += ['', 'the defended model:', masking_report.masking_table(diagnosis)]
    if report.undiagnosed:
        lines += ['', f'the defended model: {report.undiagnosed}']
    return '\n'.join(lines)


def shift_rows(moves: Moves, text: Callable[[np.ndarray], str]) -> list[list[str]]:
    """Rows of the table of shifts: each layer, under the attack and under noise of its size.

    Args:
      moves: at one radius.
      text: what to show of the changes over images.

    Returns:
      For each row the layer, and what noise is called, and the changes of `GROUPS`.
    """
    return [
        [f'{layer}{label}', *(text(by_layer[layer][group]) for group in GROUPS)]
        for layer in moves.shifts
        for label, by_layer in (('', moves.shifts), (', noise of this size', moves.noise))
    ]


def _of_moves(moves: Moves) -> dict[str, float | None]:
    """Shares of controls and mean changes of neurons by their keys, None where no image counts."""
    attack = moves.attack.removeprefix(f'{STATIC}/')
    found: dict[str, float | None] = {}
    for name, by_size in moves.controls.items():
        for size, share in by_size.items():
            found[f'control/{attack}/{name}/{size:g}'] = None if np.isnan(share) else share
    for kind, by_layer in (('shift', moves.shifts), ('noise_shift', moves.noise)):
        for layer, by_group in by_layer.items():
            for group, values in by_group.items():
                mean = float(np.mean(values)) if len(values) else None
                found[f'{kind}/{attack}/{layer}/{group}'] = mean
    return found


def _missed(report: DefenseReport) -> dict[str, int]:
    """How many images fall at each radius, but to no attack along gradients."""
    found = {}
    for norm, eps in radii(report):
        missed = report.missed_by_gradients(eps)
        if missed is not None:
            found[f'missed_by_gradients/{norm}-{eps:.3g}'] = int(missed.sum())
    return found


def _percent(share: float) -> str:
    return '-' if np.isnan(share) else f'{share * 100:.1f}'


def _mean(values: np.ndarray) -> str:
    return f'{np.mean(values):+.3f}' if len(values) else '-'


def defense_facts(report: DefenseReport) -> dict[str, Any]:
    """The report under flat keys `defense/...`, for `results.json`."""
    flat: dict[str, Any] = {
        'defense/name': report.defense,
        'defense/settings': report.settings,
        'defense/calibration': dict(report.calibration),
        'defense/found': dict(report.found),
        'defense/images': len(report.defended.labels),
        'defense/passes': report.passes,
        'defense/relative_cost': report.cost,
    }
    for key, interval, _ in defense_rows(report):
        flat[f'defense/{key}'] = interval.value
        flat[f'defense/{key}/low'] = interval.low
        flat[f'defense/{key}/high'] = interval.high
    for name, rate in rates(report).items():
        key = f'defense/success_rate/{name}'
        flat[key] = None if rate.interval is None else rate.interval.value
        if rate.interval is not None:
            flat[f'{key}/low'], flat[f'{key}/high'] = rate.interval.low, rate.interval.high
        flat[f'{key}/recovered'], flat[f'{key}/fooled'] = rate.recovered, rate.fooled
        flat[f'{key}/lost'], flat[f'{key}/withstood'] = rate.lost, rate.withstood
    for name, warnings in report.warnings.items():
        flat[f'defense/warnings/{name}'] = list(warnings)
    flat |= {f'defense/{key}': count for key, count in _missed(report).items()}
    for moves in report.moves:
        flat |= {f'defense/{key}': value for key, value in _of_moves(moves).items()}
    found = masking_report.masking_facts(report.diagnoses)
    flat.update({f'defense/{key}': value for key, value in found.items()})
    if report.undiagnosed:
        flat['defense/masking/undiagnosed'] = report.undiagnosed
    return flat


def write_defense(report: DefenseReport, directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes `defense.csv`, `defense_masking.csv` and the plots, each only when it is whole.

    Args:
      report: of a defence.
      directory: where they go; made if need be.

    Returns:
      The files written.
    """
    with files.WholeFiles(directory) as output:
        with output.path('defense.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['measurement', 'value', 'low', 'high', 'images'])
            for key, interval, count in defense_rows(report):
                writer.writerow([key, *interval, count])
            for name, rate in rates(report).items():
                cells = ('', '', '') if rate.interval is None else rate.interval
                writer.writerow([f'success_rate/{name}', *cells, rate.fooled])
                writer.writerow([f'lost/{name}', rate.lost, '', '', rate.withstood])
            for key, count in _missed(report).items():
                writer.writerow([key, count, '', '', len(report.defended.labels)])
            for moves in report.moves:
                for key, value in _of_moves(moves).items():
                    cell = '' if value is None else value
                    writer.writerow([key, cell, '', '', _fooled(moves)])
            writer.writerow(['passes', report.passes, '', '', ''])
            writer.writerow(['relative_cost', report.cost, '', '', ''])
        if report.diagnoses:
            masking_report.write_masking(report.diagnoses, output.path('defense_masking.csv'))
        if report.outcomes:
            plots.save(accuracy_figure(report), output.path('defense.png'))
        if report.moves:
            plots.save(control_figure(report), output.path('defense_controls.png'))
        if any(fooled for fooled, _ in _shown(report)):
            plots.save(shift_figure(report), output.path('defense_shifts.png'))
        for outcome in strongest_with_examples(report):
            assert report.adaptive is not None
            figure = plots.example_grid(report.adaptive, outcome)
            plots.save(figure, output.path(f'{EXAMPLES}{outcome.name}.png'))
    # What an earlier evaluation of another defence left would pass for this one's.
    for pattern in files.OF_A_DEFENSE:
        for stale in set(pathlib.Path(directory).glob(pattern)) - set(output.written):
            stale.unlink()
    return output.written


def accuracy_figure(report: DefenseReport) -> Figure:
    """Worst-case accuracy against the radius: undefended, static and adaptive attacks."""
    figure = Figure(figsize=(5.5, 3.8), layout='constrained')
    axes = figure.subplots()
    eps = [radius for _, radius in radii(report)]

    curves = [
        ('defended, attacks that do not know it', report.defended.correct,
         [report.worst_case(radius, (STATIC,)) for radius in eps]),
        ('defended, all attacks', report.defended.correct,
         [report.worst_case(radius) for radius in eps]),
    ]  # fmt: skip
    if any(outcome.fooled is not None for outcome in report.outcomes):
        curves.insert(
            0,
            (
                'undefended',
                report.undefended.correct,
                [report.undefended_worst_case(radius) for radius in eps],
            ),
        )
    for (label, clean, flags), color in zip(curves, plots.COLORS):
        intervals = np.array([_proportion(f) for f in (clean, *flags)]) * 100
        axes.plot([0, *eps], intervals[:, 0], marker='o', markersize=4, color=color, label=label)
        axes.fill_between(
            [0, *eps], intervals[:, 1], intervals[:, 2], color=color, alpha=0.15, linewidth=0
        )
    axes.set_xlabel(f'{report.outcomes[0].norm} radius eps, pixels in [0, 1]')
    axes.set_ylabel('accuracy (%)')
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f'{report.defense}, {len(report.defended.labels):,} images')
    plots.style(axes)
    return figure


def control_figure(report: DefenseReport) -> Figure:
    """Share of the fooling images that moves of each size recover, one panel for each radius."""
    count = len(report.moves)
    figure = Figure(figsize=(4.6 * count, 3.8), layout='constrained')
    panels = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axes, moves in zip(panels, report.moves):
        for (name, by_size), color in zip(moves.controls.items(), itertools.cycle(plots.COLORS)):
            sizes = list(by_size)
            axes.plot(
                range(len(sizes)),
                [100 * by_size[size] for size in sizes],
                '--' if 'oracle' in name else '-',
                marker='o' if 'oracle' in name else 's',
                markersize=4,
                color=color,
                label=name,
            )
        axes.set_xticks(range(len(sizes)), [f'{size:g}' for size in sizes])
        axes.set_xlabel('size of the move rho, rms per pixel')
        axes.set_ylim(-2, 102)
        axes.set_title(moves.attack, fontsize=9)
        plots.style(axes)
    panels[0].set_ylabel('recovered (%)')
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc='outside lower center', ncols=3, frameon=False, fontsize=8)
    return figure


def _shown(report: DefenseReport) -> list[tuple[int, tuple[str, str]]]:
    """How many images each panel of `shift_figure` has, and its attack and layer."""
    return [
        (_fooled(moves), (moves.attack, layer)) for moves in report.moves for layer in moves.shifts
    ]


def strongest_with_examples(report: DefenseReport) -> list[robustness.AttackOutcome]:
    """Of each radius the attack on the defended model that succeeds most often and has images.

    Images that were made on another model are left out.

    Args:
      report: of a defence.

    Returns:
      One outcome for each radius where there is one.
    """
    strongest: dict[float, robustness.AttackOutcome] = {}
    for outcome in report.adaptive.outcomes if report.adaptive is not None else ():
        best = strongest.get(outcome.eps)
        made_here = len(outcome.attacked.x) and not outcome.attack.startswith('transfer')
        if made_here and (
            best is None or outcome.attacked.success.sum() > best.attacked.success.sum()
        ):
            strongest[outcome.eps] = outcome
    return list(strongest.values())


def _fooled(moves: Moves) -> int:
    return len(next(iter(moves.shifts.values()))['front'])


def shift_figure(report: DefenseReport) -> Figure:
    """How attacks, and noise of their size, change front, middle and tail neurons, over images."""
    shown = [place for fooled, place in _shown(report) if fooled]
    by_attack = {moves.attack: moves for moves in report.moves}
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout='constrained')
    for axes, (attack, layer) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown):
        moves = by_attack[attack]
        made = (
            ('attack', moves.shifts, plots.COLORS[0]),
            ('noise of its size', moves.noise, '0.5'),
        )
        for side, (label, by_layer, color) in enumerate(made):
            axes.boxplot(
                [by_layer[layer][group] for group in GROUPS],
                positions=[place + 0.4 * side - 0.2 for place in range(len(GROUPS))],
                widths=0.3,
                showfliers=False,
                medianprops={'color': color},
                boxprops={'color': color},
                manage_ticks=False,
            )
            axes.plot([], [], color=color, label=label)
        axes.set_xticks(range(len(GROUPS)), GROUPS)
        axes.legend(frameon=False, fontsize=8)
        axes.axhline(0, color='0.5', linewidth=1)
        axes.set_ylabel('change of a neuron / mean |activation|')
        axes.set_title(f'{layer}, {attack}', fontsize=9)
        plots.style(axes)
    return figure

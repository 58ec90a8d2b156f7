"""Diagnoses of gradient masking as text, as facts and as a file."""

from __future__ import annotations

import csv
import functools
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from neurosens.evaluation.masking import Diagnosis

# Columns of figures and advice in the table.
_TEXT_WIDTH = 76


def masking_table(diagnosis: Diagnosis) -> str:
    """A diagnosis as text: a line of verdict and figures for each check, and advice under warnings.

    Args:
      diagnosis: what `diagnose` found.

    Returns:
      Lines without a newline at the end.
    """
    count = diagnosis.slack
    title = (
        f'gradient masking, {diagnosis.norm} {diagnosis.eps:.3g}, {diagnosis.images:,} images; '
        f'up to {count} may differ by chance'
    )
    lines = [title, '-' * len(title)]
    width = max(len(check.name) for check in diagnosis.checks)
    wrap = functools.partial(textwrap.wrap, width=_TEXT_WIDTH)
    for check in diagnosis.checks:
        figures = ', '.join(f'{name} {value:.4g}' for name, value in check.figures.items())
        text = [] if check.passed is None else wrap(figures)
        text += [] if check.passed else wrap(check.message)
        lines.append(f'{check.verdict:<4}   {check.name:<{width}}   {text[0]}')
        lines += [' ' * (width + 10) + line for line in text[1:]]
    return '\n'.join(lines)


def masking_facts(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """Diagnoses under flat keys, for `results.json`.

    Args:
      diagnoses: what `diagnose` found, each of another threat.

    Returns:
      `masking/passed`, whether no check warns at any radius; for each diagnosis, under
      `masking/<norm>-<eps>/`, its own `passed`, `images`, `slack` and `eps`; for each check
      `<check>` (true, false, or None where it does not apply), `<check>/<figure>`, and
      `<check>/message` for those that warn or do not apply. Nothing where there is no diagnosis.
    """
    if not diagnoses:
        return {}
    facts: dict[str, Any] = {'masking/passed': all(each.passed for each in diagnoses)}
    for diagnosis in diagnoses:
        found: dict[str, Any] = {
            'passed': diagnosis.passed,
            'images': diagnosis.images,
            'slack': diagnosis.slack,
            'eps': diagnosis.eps,
        }
        for check in diagnosis.checks:
            found[check.name] = check.passed
            found.update({f'{check.name}/{key}': v for key, v in check.figures.items()})
            if not check.passed:
                found[f'{check.name}/message'] = check.message
        facts.update({f'masking/{diagnosis.name}/{key}': value for key, value in found.items()})
    return facts


def write_masking(diagnoses: Sequence[Diagnosis], path: pathlib.Path) -> None:
    """Writes diagnoses as CSV: one line for each figure, and one for a check without any.

    Args:
      diagnoses: what `diagnose` found, each of another threat.
      path: the file.
    """
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['norm', 'eps', 'check', 'verdict', 'figure', 'value', 'message'])
        for diagnosis in diagnoses:
            threat = [diagnosis.norm, diagnosis.eps]
            for check in diagnosis.checks:
                figures: Mapping[str, Any] = check.figures or {'': ''}
                for name, value in figures.items():
                    writer.writerow(
                        [*threat, check.name, check.verdict, name, value, check.message]
                    )

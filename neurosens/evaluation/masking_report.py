"""A diagnosis of gradient masking as text, as facts and as a file."""

from __future__ import annotations

import csv
import functools
import pathlib
import textwrap
from collections.abc import Mapping
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


def masking_facts(diagnosis: Diagnosis) -> dict[str, Any]:
    """A diagnosis under flat keys, for `results.json`.

    Args:
      diagnosis: what `diagnose` found.

    Returns:
      `masking/passed`, `masking/images`, `masking/slack`, `masking/norm` and `masking/eps`; for
      each check `masking/<check>` (true, false, or None where it does not apply) and
      `masking/<check>/<figure>`; and `masking/<check>/advice` for those that warn.
    """
    facts: dict[str, Any] = {
        'masking/passed': diagnosis.passed,
        'masking/images': diagnosis.images,
        'masking/slack': diagnosis.slack,
        'masking/norm': diagnosis.norm,
        'masking/eps': diagnosis.eps,
    }
    for check in diagnosis.checks:
        facts[f'masking/{check.name}'] = check.passed
        facts.update({f'masking/{check.name}/{key}': v for key, v in check.figures.items()})
        if check.passed is False:
            facts[f'masking/{check.name}/advice'] = check.message
    return facts


def write_masking(diagnosis: Diagnosis, path: pathlib.Path) -> None:
    """Writes a diagnosis as CSV: one line for each figure, and one for a check without any.

    Args:
      diagnosis: what `diagnose` found.
      path: the file.
    """
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['check', 'verdict', 'figure', 'value', 'message'])
        for check in diagnosis.checks:
            figures: Mapping[str, Any] = check.figures or {'': ''}
            for name, value in figures.items():
                writer.writerow([check.name, check.verdict, name, value, check.message])

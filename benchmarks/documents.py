"""Generated blocks of a Markdown document, each between a pair of markers.

    <!-- begin NAME -->
    ...
    <!-- end NAME -->

What stands outside of the markers is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MARKER = re.compile(r'<!--\s*(begin|end)\s+(\S+)\s*-->')


class MarkerError(ValueError):
    """The markers of a document are damaged, or those of a block are missing."""


def blocks(text: str) -> dict[str, tuple[int, int]]:
    """Finds the blocks of a document.

    Args:
        text: of the document.

    Returns:
        By name, where the content between the markers begins and ends.

    Raises:
        MarkerError: a marker has no partner, stands inside another block, occurs twice, or does not
            have a line of its own.
    """
    found: dict[str, tuple[int, int]] = {}
    opened = ''
    start = 0
    for marker in _MARKER.finditer(text):
        kind, name = marker.groups()
        line = text.count('\n', 0, marker.start()) + 1
        whole = text.splitlines()[line - 1].strip()
        if whole != marker.group():
            raise MarkerError(f'The marker of line {line} shares its line: {whole!r}.')
        if kind == 'begin':
            if opened:
                raise MarkerError(
                    f'The block {name!r} begins in line {line}, inside the block {opened!r}.'
                )
            if name in found:
                raise MarkerError(f'The block {name!r} begins a second time in line {line}.')
            opened, start = name, marker.end()
        else:
            if name != opened:
                raise MarkerError(f'The block {name!r} ends in line {line} but has not begun.')
            found[name] = start, marker.start()
            opened = ''
    if opened:
        raise MarkerError(f'The block {opened!r} does not end.')
    return found


def check(text: str, names: Iterable[str]) -> None:
    """Raises a `MarkerError` unless the markers are sound and there is a block of each name."""
    found = blocks(text)
    missing = [name for name in names if name not in found]
    if missing:
        raise MarkerError(
            f'There are no markers for {", ".join(missing)}: '
            f'add <!-- begin {missing[0]} --> and <!-- end {missing[0]} -->.'
        )


def replaced(text: str, contents: Mapping[str, str]) -> str:
    """Replaces the contents of blocks.

    Args:
        text: of the document.
        contents: new contents by name.

    Returns:
        The document; all but these contents is as it was.

    Raises:
        MarkerError: markers are damaged or missing.
    """
    check(text, contents)
    found = blocks(text)
    # From the end, so that earlier places stay where they are.
    for name in sorted(contents, key=lambda name: found[name], reverse=True):
        start, end = found[name]
        text = f'{text[:start]}\n{contents[name].strip()}\n{text[end:]}'
    return text

"""Sentences for the mistakes users make: each names the value and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection
from typing import Any


def check_whole(name: str, value: Any, *, low: int = 1, high: int | None = None) -> None:
    """Raises a ValueError if `value` is no integer from `low` to `high`: 7.0 counts no loops."""
    check_range(name, value, low=low, high=high)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(
            f'{name} is {value!r}; it must be a whole number, such as {max(low, int(value))}.'
        )


def check_flag(name: str, value: object) -> None:
    """Raises a ValueError if `value` is no bool: the text 'no' would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} is {value!r}; it must be True or False.')


def check_choice(name: str, value: object, valid: Collection[str]) -> None:
    """Raises a ValueError with the valid names if `value`, of whatever type, is none of them."""
    if not isinstance(value, str) or value not in valid:
        raise ValueError(unknown(name, value, valid))


def check_labels(low: int, high: int, classes: int) -> None:
    """Raises a ValueError unless the smallest and the largest label are classes of a model."""
    if low < 0 or high >= classes:
        raise ValueError(
            f'Label {low if low < 0 else high} is not one of the {classes} classes of the model, '
            f'which are counted from 0 to {classes - 1}; give labels of this model.'
        )


def check_layer(layer: object) -> None:
    """Raises a ValueError if `layer` cannot be the name of a layer."""
    if not isinstance(layer, str):
        raise ValueError(f"layer is {layer!r}; it must be the name of one, such as 'head:in'.")


def check_layers(layers: object) -> None:
    """Raises a ValueError if `layers` is neither None nor a list of at least one name."""
    if layers is None:
        return
    if isinstance(layers, str):
        raise ValueError(
            f'layers is {layers!r}; it must be a list of names: ({layers!r},) for one.'
        )
    if not isinstance(layers, Collection) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"layers is {layers!r}; it must be a list of names, such as ('act1',).")
    if not len(layers):
        raise ValueError(
            f'layers is {layers!r}; name at least one, or leave it out for every nonlinearity.'
        )


def unknown(kind: str, value: object, valid: Collection[str]) -> str:
    """Says that `value` names nothing of this `kind`, and what does.

    Args:
      kind: what was to be named, such as `'model'`.
      value: the name given.
      valid: every valid name.

    Returns:
      One sentence with the closest valid names, or all of them if none is close.
    """
    close = difflib.get_close_matches(str(value), valid, n=3, cutoff=0.5)
    # A short list is shown whole: the one that was meant need not look alike.
    if close and len(valid) > 6:
        return f'Unknown {kind} {value!r}; the closest names are {", ".join(close)}.'
    return f'Unknown {kind} {value!r}; valid names are {", ".join(valid) or "none"}.'


def check_range(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises a ValueError that names the range if `value` is no finite number inside it."""
    try:
        if isinstance(value, str):
            raise TypeError
        float(value)
    except (TypeError, ValueError):
        raise ValueError(f'{name} is {value!r}; it must be a number.') from None
    above = low is None or (value > low if low_open else value >= low)
    below = high is None or (value < high if high_open else value <= high)
    if above and below and math.isfinite(value):
        return
    bounds = [] if math.isfinite(value) else ['finite']
    if low is not None:
        bounds.append(f'{"greater than" if low_open else "at least"} {low:.12g}')
    if high is not None:
        bounds.append(f'{"less than" if high_open else "at most"} {high:.12g}')
    raise ValueError(f'{name} is {value!r}; it must be {", ".join(bounds)}.')

"""Do different measures of the same neurons agree, and on which ones?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from neurosens import _validate
from neurosens.neurons import correlation


class Agreement(NamedTuple):
    """How far M measures of N neurons agree, pair by pair.

    Attributes:
      names: the measures, in the order given.
      rho: Spearman's rank correlation of each pair `[M, M]`; NaN where it is not defined.
      p_value: two-sided, by permutation of the neurons `[M, M]`; NaN where that is not defined, and
        without permutations.
      overlap: share of the neurons that matter most by one measure that do so by the other
        `[M, M]`, in [0, 1].
      top_k: how many neurons count as those that matter most.
      chance: the overlap that two unrelated measures have in the mean, `top_k / N`.
      neurons: number of neurons N.
    """

    names: tuple[str, ...]
    rho: Float[np.ndarray, 'measures measures']
    p_value: Float[np.ndarray, 'measures measures']
    overlap: Float[np.ndarray, 'measures measures']
    top_k: int
    chance: float
    neurons: int


def agreement(
    measures: Mapping[str, correlation.Values],
    *,
    top_k: int | None = None,
    permutations: int = 1000,
) -> Agreement:
    """Compares measures of the same neurons, each with each.

    Args:
      measures: for each name, one value per neuron `[N]`, larger where the neuron matters more.
        A pair's rank correlation leaves out neurons of which a value is not finite; NaN never
        counts as large.
      top_k: how many neurons count as those that matter most, from 1 to N; by default a tenth of
        them, at least 1.
      permutations: how many p-values are made of, see `permutation_test`; 0 leaves them out.

    Returns:
      Rank correlations and overlaps of all pairs, and the overlap expected by chance.

    Raises:
      ValueError: there are fewer than 2 measures, their lengths differ, or `top_k` is out of range.
    """
    if len(measures) < 2:
        raise ValueError(
            f'{len(measures)} measures were given ({", ".join(measures) or "none"}); agreement '
            'needs at least 2.'
        )
    arrays = {name: np.asarray(values, np.float64) for name, values in measures.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes):
        listed = ', '.join(f'{name} {array.shape}' for name, array in arrays.items())
        raise ValueError(
            f'The measures have shapes {listed}; give one value per neuron, for the same neurons, '
            'in arrays of one axis.'
        )
    count = shapes.pop()[0]
    if top_k is None:
        top_k = max(1, round(count / 10))
    _validate.check_whole('top_k', top_k, high=count)
    size = len(arrays)
    rho, p_value, overlap = (np.full((size, size), np.nan) for _ in range(3))
    values = list(arrays.values())
    for i, j in itertools.combinations_with_replacement(range(size), 2):
        if permutations and i != j:
            found = correlation.permutation_test(values[i], values[j], permutations=permutations)
            rho[i, j] = rho[j, i] = found.value
            p_value[i, j] = p_value[j, i] = found.p_value
        else:
            rho[i, j] = rho[j, i] = correlation.spearman(values[i], values[j])
        overlap[i, j] = overlap[j, i] = correlation.overlap(values[i], values[j], top_k)
    return Agreement(tuple(arrays), rho, p_value, overlap, top_k, top_k / count, count)


def rows(result: Agreement) -> list[dict[str, str | float]]:
    """One row per pair of measures, in the order of the upper triangle, for a CSV file.

    Args:
      result: what `agreement` returned.

    Returns:
      Dicts with the keys `first`, `second` (names), `rho`, `p_value`, `overlap`, `chance`, `top_k`,
      `neurons`.
    """
    return [
        {
            'first': result.names[i],
            'second': result.names[j],
            'rho': float(result.rho[i, j]),
            'p_value': float(result.p_value[i, j]),
            'overlap': float(result.overlap[i, j]),
            'chance': result.chance,
            'top_k': result.top_k,
            'neurons': result.neurons,
        }
        for i, j in itertools.combinations(range(len(result.names)), 2)
    ]


def table(result: Agreement) -> str:
    """The agreement as an aligned text table: rank correlations above, overlaps below the diagonal.

    Args:
      result: what `agreement` returned.

    Returns:
      A caption, a header in which the measures are numbered, and one line per measure, joined by
      newlines.
    """
    names = [f'{number} {name}' for number, name in enumerate(result.names, start=1)]
    header = ['', *(str(number) for number in range(1, len(names) + 1))]
    lines = [header, *([name, *cells] for name, cells in zip(names, _cells(result)))]
    label = max(len(line[0]) for line in lines)
    width = max(len(cell) for line in lines for cell in line[1:])
    aligned = [
        '  '.join([line[0].ljust(label), *(cell.rjust(width) for cell in line[1:])])
        for line in lines
    ]
    return '\n'.join([_caption(result), *aligned])


def markdown(result: Agreement) -> str:
    """The same as `table`, as a Markdown table with its caption below.

    Args:
      result: what `agreement` returned.

    Returns:
      Lines joined by newlines.
    """
    names = [name.replace('|', r'\|') for name in result.names]
    lines = [['', *names], ['---', *('---:' for _ in names)]]
    lines += [[name, *cells] for name, cells in zip(names, _cells(result))]
    return '\n'.join([*(f'| {" | ".join(line)} |' for line in lines), '', _caption(result)])


def _cells(result: Agreement) -> list[list[str]]:
    size = len(result.names)

    def cell(i: int, j: int) -> str:
        if i == j:
            return '-'
        if i > j:
            return f'{result.overlap[i, j]:.2f}'
        return 'nan' if np.isnan(result.rho[i, j]) else f'{result.rho[i, j]:+.2f}'

    return [[cell(i, j) for j in range(size)] for i in range(size)]


def _caption(result: Agreement) -> str:
    return (
        f"Upper triangle: Spearman's rho over {result.neurons} neurons. Lower triangle: overlap of "
        f'the top {result.top_k} (by chance {result.chance:.2f}).'
    )

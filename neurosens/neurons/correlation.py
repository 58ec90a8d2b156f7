"""Rank correlation between measures of neurons, with permutation p-values, on the host.

Every function takes one value per neuron, `[N]`. Pairs of which a value is not finite (NaN or
infinite) are left out first; `Correlation.count` says how many remain. Equal values share their
mean rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from neurosens import _validate

Values: TypeAlias = ArrayLike | Sequence[float]

# Entries of one block of permuted ranks: 8 MiB of float64.
_BLOCK = 2**20
# Statistics that differ by less count as tied, so that rounding does not decide a comparison.
_TIE = 1e-10


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A correlation coefficient and how surprising it is if there is no association.

    Attributes:
      value: the coefficient, in [-1, 1]; NaN where it is not defined.
      p_value: two-sided permutation p-value, in (0, 1]; NaN with `value`.
      count: number of neurons that entered, those of finite values.
    """

    value: float
    p_value: float
    count: int


def spearman(a: Values, b: Values) -> float:
    """Spearman's rank correlation of two measures.

    Args:
      a: one value per neuron `[N]`.
      b: the other measure of the same neurons `[N]`.

    Returns:
      The coefficient in [-1, 1], over the pairs of finite values; NaN where fewer than 3 pairs are
      finite or one side is constant.

    Raises:
      ValueError: the measures are not of one length.
    """
    a, b = _finite(a, b)
    if a.size < 3 or _constant(a) or _constant(b):
        return float('nan')
    # Imported where it is used: it takes as long to import as JAX.
    import scipy.stats

    return float(scipy.stats.spearmanr(a, b).statistic)


def permutation_test(
    a: Values, b: Values, *, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Spearman's rank correlation with a two-sided permutation p-value.

    The neurons of one side are permuted at random; the p-value is
    `(1 + #{|rho of a permutation| >= |rho|}) / (1 + permutations)`, which is valid at any number of
    permutations (Phipson & Smyth 2010). Memory does not grow with the number of permutations.

    Args:
      a: one value per neuron `[N]`.
      b: the other measure of the same neurons `[N]`.
      permutations: number of random permutations, at least 1.
      seed: seed of the permutations.

    Returns:
      The coefficient, its p-value and the number of pairs; NaN as in `spearman`.

    Raises:
      ValueError: the measures are not of one length, or `permutations` is below 1.
    """
    _validate.check_whole('permutations', permutations)
    a, b = _finite(a, b)
    value = spearman(a, b)
    if np.isnan(value):
        return Correlation(value, value, a.size)
    no_controls = np.zeros((a.size, 0))
    p_value = _p_value(_ranks(a), _ranks(b), no_controls, permutations, seed)
    return Correlation(value, p_value, a.size)


def partial_spearman(
    a: Values,
    b: Values,
    control: Values | Sequence[Values],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Spearman's partial correlation: what two measures share beyond what a third one explains.

    The ranks of both measures are regressed on the ranks of the controls (with an intercept), and
    the coefficient is Pearson's correlation of the residuals. The p-value permutes the residuals of
    `a` after Freedman & Lane (1983): each permutation is added to the fit, regressed on the
    controls anew and correlated with the residuals of `b`; p is formed as in `permutation_test`.

    Args:
      a: one value per neuron `[N]`.
      b: the other measure of the same neurons `[N]`.
      control: what to control for, such as the norm of each filter: `[N]`, or several, `[Q, N]`.
      permutations: number of random permutations, at least 1.
      seed: seed of the permutations.

    Returns:
      The coefficient, its p-value and the number of neurons of which every value is finite. NaN
      where fewer than 3 + (number of independent controls) remain, or where the controls explain
      the ranks of one side entirely (a constant side included).

    Raises:
      ValueError: the arrays are not of one length, or `permutations` is below 1.
    """
    _validate.check_whole('permutations', permutations)
    if isinstance(control, (list, tuple)) and any(np.ndim(one) for one in control):
        controls = list(control)
    else:
        controls = list(np.atleast_2d(np.asarray(control, np.float64)))
    a, b, *controls = _finite(a, b, *controls)
    undefined = Correlation(float('nan'), float('nan'), a.size)
    if a.size < 3:
        return undefined
    basis = _basis([_ranks(one) for one in controls], a.size)
    if a.size < 3 + basis.shape[1]:
        return undefined
    residuals = []
    for ranks in (_ranks(a), _ranks(b)):
        residual = ranks - basis @ (basis.T @ ranks)
        # What is left of a side that the controls explain entirely is rounding, not information.
        if np.linalg.norm(residual) <= 1e-9 * max(1.0, float(np.linalg.norm(ranks))):
            return undefined
        residuals.append(residual)
    x, y = residuals
    value = float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))
    return Correlation(value, _p_value(x, y, basis, permutations, seed), a.size)


def overlap(a: Values, b: Values, k: int) -> float:
    """Share of the k largest entries of one measure that are among the k largest of the other.

    Args:
      a: one value per neuron `[N]`.
      b: the other measure of the same neurons `[N]`.
      k: size of both sets, from 1 to N.

    Returns:
      The size of the intersection divided by k. Of equal values those of lower index are taken. A
      NaN is never among the largest, so that a measure of fewer than k other values cannot reach 1.
      By chance, the share is k / N.

    Raises:
      ValueError: the measures are not of one length, or k is out of range.
    """
    a, b = _same_length(a, b)
    _validate.check_whole('k', k, high=a.size)
    return np.intersect1d(_largest(a, k), _largest(b, k)).size / k


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-values, kind='stable')[:k]  # NaN sorts last.
    return order[~np.isnan(values[order])]


def _same_length(*arrays: Values) -> list[np.ndarray]:
    converted = [np.asarray(array, np.float64) for array in arrays]
    shapes = [array.shape for array in converted]
    if any(len(shape) != 1 for shape in shapes) or len(set(shapes)) > 1:
        raise ValueError(
            f'The measures have shapes {", ".join(map(str, shapes))}; give one value per neuron, '
            'for the same neurons, in arrays of one axis.'
        )
    return converted


def _finite(*arrays: Values) -> list[np.ndarray]:
    """The entries at which every array is finite."""
    converted = _same_length(*arrays)
    keep = np.all([np.isfinite(array) for array in converted], axis=0)
    return [array[keep] for array in converted]


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _ranks(values: np.ndarray) -> Float[np.ndarray, ' neurons']:
    """Ranks, shifted to mean 0: exact multiples of 1/2."""
    import scipy.stats

    return scipy.stats.rankdata(values) - (values.size + 1) / 2


def _basis(controls: Sequence[np.ndarray], count: int) -> Float[np.ndarray, 'neurons rank']:
    """Orthonormal columns that span the centred ranks of the controls, redundant ones dropped."""
    if not controls:
        return np.zeros((count, 0))
    columns = np.stack(controls, axis=1)
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-10 * max(1.0, float(singular.max()))]


def _p_value(
    x: Float[np.ndarray, ' neurons'],
    y: Float[np.ndarray, ' neurons'],
    basis: Float[np.ndarray, 'neurons rank'],
    permutations: int,
    seed: int,
) -> float:
    """Permutes `x`, of mean 0; `y` is orthogonal to the constant and to `basis`."""
    generator = np.random.default_rng(seed)
    squared = x @ x
    observed = abs(x @ y) / np.sqrt(squared)
    tie = _TIE * np.linalg.norm(y)
    block = max(1, _BLOCK // x.size)
    extreme = 0
    for start in range(0, permutations, block):
        shape = (min(block, permutations - start), x.size)
        permuted = generator.permuted(np.broadcast_to(x, shape), axis=1)
        # Regressing a permutation on the controls shortens it and leaves its product with `y`.
        explained = ((permuted @ basis) ** 2).sum(axis=1)
        length = np.sqrt(np.maximum(squared - explained, 0))
        statistic = np.divide(
            np.abs(permuted @ y), length, out=np.zeros(shape[0]), where=length > 1e-9
        )
        extreme += int((statistic >= observed - tie).sum())
    return (1 + extreme) / (1 + permutations)

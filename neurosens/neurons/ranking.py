"""Rankings of neurons by sensitivity, easiest to flip first (Suri & Evans 2020)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from neurosens import _validate

KINDS = ('scaled', 'absolute', 'scaled_absolute')


def scaled_sensitivity(
    delta: Float[ArrayLike, '... neurons'],
    mean: Float[ArrayLike, ' neurons'] | None,
    std: Float[ArrayLike, ' neurons'] | None,
    kind: str = 'scaled',
) -> Float[Array, '... neurons']:
    """Delta on a scale that neurons of different spread share.

    Args:
      delta: Delta(i, x) of every neuron `[..., N]`, as of `sensitivity`.
      mean: mean activation of each neuron over a data set `[N]`; only `'scaled'` needs it.
      std: its standard deviation `[N]`, with ddof 1 in the paper; `'absolute'` can do without.
      kind: `'scaled'`: (Delta - mean) / std, the paper's s(i, x), which puts large falls first.
        `'absolute'`: |Delta|. `'scaled_absolute'`: |Delta| / std. The last two are ours.

    Returns:
      The score `[..., N]`, smaller where a neuron is easier to flip; infinite where Delta is, and
      for a neuron of standard deviation 0, which never moves.

    Raises:
      ValueError: the kind is unknown, or needs a statistic that is None.
    """
    if kind not in KINDS:
        raise ValueError(_validate.unknown('kind', kind, KINDS))
    delta = jnp.asarray(delta)
    if std is None or (mean is None and kind == 'scaled'):
        if kind == 'absolute':
            return jnp.abs(delta)
        missing = 'std' if std is None else 'mean'
        raise ValueError(f"The {missing} is None; kind {kind!r} needs it, 'absolute' does not.")
    std = jnp.asarray(std, delta.dtype)
    distance = delta - jnp.asarray(mean, delta.dtype) if kind == 'scaled' else jnp.abs(delta)
    alive = std > 0
    score = distance / jnp.where(alive & (kind != 'absolute'), std, 1)
    return jnp.where(alive & ~jnp.isinf(delta), score, jnp.where(jnp.isnan(delta), delta, jnp.inf))


def ranking(score: Float[Array, '... neurons']) -> Int[Array, '... neurons']:
    """Neurons from the easiest to the hardest to flip.

    Args:
      score: a score per neuron, smaller where easier `[..., N]`.

    Returns:
      Indices in ascending order of the score, int32 `[..., N]`; the lowest index first where scores
      are equal, NaN last.
    """
    return jnp.argsort(score, axis=-1, stable=True).astype(jnp.int32)


def mean_where_finite(
    score: Float[np.ndarray, 'examples neurons'],
) -> Float[np.ndarray, ' neurons']:
    """The summary of a neuron over a data set: its mean score where that is finite.

    Args:
      score: a score per example and neuron, such as scaled Delta `[M, N]`.

    Returns:
      float64 `[N]`; NaN for a neuron whose score is never finite.
    """
    score = np.asarray(score, np.float64)
    finite = np.isfinite(score)
    total = np.where(finite, score, 0.0).sum(0)
    number = finite.sum(0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)

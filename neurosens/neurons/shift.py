"""How an attack moves the neurons of a layer, and which of them it targets.

After Pravin et al. 2021 (https://arxiv.org/abs/2201.12347), who name an adversarial targeting
algorithm without giving it; the scores below are ours: with F_k the feature map of filter k,
Delta_k(x) = F_k(x') - F_k(x), scored by its norm, by its norm relative to that of F_k(x), or by the
mean of log |Delta_k|.

On the output of the first convolution Delta_k is linear in the perturbation and bounded by
eps ||w_k||_1, so that absolute scores are largely a function of the filter's norm. Correlations
with fragility therefore come with the partial one that controls for it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.neurons import correlation, tail, units

SCORES = ('l2', 'relative_l2', 'mean_log')
# Changes below this count as this large, so that logarithms and quotients stay finite.
SMALLEST_CHANGE = 1e-12
# A silent neuron is compared to this share of the mean norm of its layer.
SMALLEST_REFERENCE = 1e-3


class Shift(NamedTuple):
    """What an attack does to each neuron of a layer.

    Attributes:
      mean: mean change over the neuron's positions, signed `[B, N]`.
      l2: Euclidean norm of the change over its positions `[B, N]`.
      relative_l2: that norm over the norm of the clean activation, which counts as at least a
        thousandth of the layer's mean norm for the example `[B, N]`.
      mean_log: mean of log |change| over its positions `[B, N]`.
    """

    mean: Float[Array, 'batch neurons']
    l2: Float[Array, 'batch neurons']
    relative_l2: Float[Array, 'batch neurons']
    mean_log: Float[Array, 'batch neurons']


def shift_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    x_adv: Float[Array, '...'],
    *,
    layer: str,
    unit: str = 'channel',
) -> Shift:
    """The shift of every neuron of a layer for one example.

    The function that `shift` maps over a batch; it has its arguments and errors, with `x` and
    `x_adv` one input each, and returns arrays `[N]`.
    """
    units.check_unit(unit)
    clean = tail.tap(forward, variables, x, layer)
    clean = clean.astype(jnp.promote_types(clean.dtype, jnp.float32))
    change = tail.tap(forward, variables, x_adv, layer).astype(clean.dtype) - clean
    positions = clean.size // units.count(clean.shape, unit)
    size = jnp.sqrt(units.pool(change**2, unit))
    reference = jnp.sqrt(units.pool(clean**2, unit))
    reference = jnp.maximum(reference, SMALLEST_REFERENCE * reference.mean())
    logarithm = jnp.log(jnp.maximum(jnp.abs(change), SMALLEST_CHANGE))
    return Shift(
        units.pool(change, unit) / positions,
        size,
        size / jnp.maximum(reference, SMALLEST_CHANGE),
        units.pool(logarithm, unit) / positions,
    )


@functools.partial(jax.jit, static_argnames=('layer', 'unit'))
def shift(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    x_adv: Float[Array, 'batch ...'],
    *,
    layer: str,
    unit: str = 'channel',
) -> Shift:
    """How far each neuron's activation moves between two versions of the inputs, jit-compiled.

    Args:
      forward: the model.
      variables: its variables.
      x: clean inputs `[B, ...]`.
      x_adv: the same inputs attacked, or otherwise changed.
      layer: name of the layer.
      unit: `'channel'` or `'unit'`.

    Returns:
      Mean change, norm, relative norm and mean logarithm, `[B, N]` each, in units of the
      activation. Changes below 1e-12 count as 1e-12 in the logarithm.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: the unit is unknown.
    """
    example = functools.partial(shift_example, forward, variables, layer=layer, unit=unit)
    return jax.vmap(example)(jnp.asarray(x), jnp.asarray(x_adv))


class Targeting(NamedTuple):
    """Which neurons an attack targets.

    Attributes:
      scores: the score t_k of each neuron `[B, N]`.
      targeted: the neuron of largest score, the first of equal ones, int32 `[B]`.
    """

    scores: Float[Array, 'batch neurons']
    targeted: Int[Array, ' batch']


def targeting(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    x_adv: Float[Array, 'batch ...'],
    *,
    layer: str,
    unit: str = 'channel',
    score: str = 'l2',
) -> Targeting:
    """Scores how strongly an attack moves each neuron, and names the one it moves most.

    Args:
      forward: the model.
      variables: its variables.
      x: clean inputs `[B, ...]`.
      x_adv: the same inputs attacked.
      layer: name of the layer; in the setting of Pravin et al. the first convolution, before its
        normalisation.
      unit: `'channel'` or `'unit'`.
      score: `'l2'`, `'relative_l2'` or `'mean_log'`, see `Shift`.

    Returns:
      Scores and the targeted neuron of each example.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: a choice is unknown.
    """
    return target(shift(forward, variables, x, x_adv, layer=layer, unit=unit), score)


def target(moved: Shift, score: str = 'l2') -> Targeting:
    """`targeting` of a shift that is known already; it has its arguments and errors."""
    if score not in SCORES:
        raise ValueError(_validate.unknown('score', score, SCORES))
    scores = getattr(moved, score)
    return Targeting(scores, jnp.argmax(scores, -1).astype(jnp.int32))


class TargetingReport(NamedTuple):
    """Where an attack aims over a data set, and how that goes with fragility.

    Attributes:
      mean_score: mean t_k over the examples `[N]`.
      histogram: how often each neuron is the targeted one `[N]`.
      class_histogram: the same per label `[K, N]`.
      score_correlation: Spearman correlation of `mean_score` with the responses d_k.
      histogram_correlation: Spearman correlation of `histogram` with d_k.
      score_partial: `score_correlation` controlling for the norm of the filters.
      histogram_partial: `histogram_correlation` controlling for it.
    """

    mean_score: Float[np.ndarray, ' neurons']
    histogram: Int[np.ndarray, ' neurons']
    class_histogram: Int[np.ndarray, 'classes neurons']
    score_correlation: correlation.Correlation
    histogram_correlation: correlation.Correlation
    score_partial: correlation.Correlation | None
    histogram_partial: correlation.Correlation | None


def targeting_report(
    result: Targeting,
    y: Int[np.ndarray, ' examples'],
    responses: Float[np.ndarray, ' neurons'],
    num_classes: int,
    *,
    norms: Float[np.ndarray, ' neurons'] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> TargetingReport:
    """Relates the neurons that an attack targets to the neurons a classifier cannot do without.

    Args:
      result: targeting of M examples.
      y: their labels, int `[M]`.
      responses: nodal-dropout responses d_k `[N]`.
      num_classes: number of classes K.
      norms: norm of each filter, to control for `[N]`; without it there are no partial
        correlations.
      permutations: permutations behind each p-value.
      seed: their seed.

    Returns:
      Histograms, and Spearman correlations with permutation p-values.
    """
    scores, targeted = np.asarray(result.scores, np.float64), np.asarray(result.targeted)
    neurons = scores.shape[1]
    mean_score = scores.mean(0)
    by_class = np.zeros((num_classes, neurons), np.int64)
    np.add.at(by_class, (np.asarray(y), targeted), 1)
    histogram = by_class.sum(0)
    options = {'permutations': permutations, 'seed': seed}

    def partial(values: np.ndarray) -> correlation.Correlation | None:
        if norms is None:
            return None
        return correlation.partial_spearman(values, responses, norms, **options)

    return TargetingReport(
        mean_score,
        histogram,
        by_class,
        correlation.permutation_test(mean_score, responses, **options),
        correlation.permutation_test(histogram, responses, **options),
        partial(mean_score),
        partial(histogram),
    )

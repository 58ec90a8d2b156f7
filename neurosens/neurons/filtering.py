"""Synaptic filtering: which parameters of a model are fragile, robust or antifragile.

Weights of the convolution and dense kernels are set to zero by value, threshold by threshold, and
accuracy is compared with the share of weights that are still present (Pravin, Martino, Nicosia &
Ojha 2024, "Fragility, robustness and antifragility in deep learning", Artificial Intelligence). The
filters and the two sweeps are theirs; the scores and their threshold tau are ours.

    alphas = thresholds(kernels.by_layer(variables)['conv1'])
    responses = filtering_responses(
        forward, variables, x, y, alphas=alphas, kind='minmax', layer='conv1', attack=attack
    )
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.neurons import kernels

KINDS = ('minmax', 'maxmin', 'pulse')

_PULSES = 25


class Responses(NamedTuple):
    """Which examples a model classifies correctly at each threshold.

    Attributes:
      clean: on the images given, `[B, T]`.
      adversarial: on images attacked anew at each threshold, `[B, T]`; None without an attack.
    """

    clean: Bool[Array, 'batch thresholds']
    adversarial: Bool[Array, 'batch thresholds'] | None


class Curve(NamedTuple):
    """A sweep over thresholds, on the host.

    Attributes:
      alphas: the thresholds `[T]`, rising or falling.
      present: share of the swept weights that the filter leaves, `[T]` in [0, 1].
      clean: accuracy on clean images `[T]` in [0, 1].
      adversarial: accuracy under an attack on the filtered model `[T]`; NaN where not measured.
      baseline_clean: accuracy on clean images with nothing removed.
      baseline_adversarial: accuracy under attack with nothing removed; NaN where not measured.
    """

    alphas: Float[np.ndarray, ' thresholds']
    present: Float[np.ndarray, ' thresholds']
    clean: Float[np.ndarray, ' thresholds']
    adversarial: Float[np.ndarray, ' thresholds']
    baseline_clean: float
    baseline_adversarial: float


class Scores(NamedTuple):
    """What a sweep says of the filtered weights: see `classify`.

    Attributes:
      clean: mean of relative clean accuracy minus the share of weights present.
      adversarial: the same of relative accuracy under attack.
      difference: mean of relative accuracy under attack minus relative clean accuracy.
    """

    clean: float
    adversarial: float
    difference: float


# ----------------------------------------------------------------------------------- filters


def _check(kind: str, width: ArrayLike | None) -> None:
    if kind not in KINDS:
        raise ValueError(_validate.unknown('kind of filter', kind, KINDS))
    if isinstance(width, (int, float)):
        _validate.check_range('width', width, low=0, low_open=True)


def _at_least_float32(values: ArrayLike) -> Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _pulse_width(theta: Array) -> Array:
    wide = _at_least_float32(theta)
    return (wide.max() - wide.min()) / _PULSES


def _default_width(chosen: Mapping[str, Array], layer: str | None) -> ArrayLike:
    # A sweep of the whole model has one width, as it has one threshold.
    return 2 / _PULSES if layer is None else _pulse_width(chosen[layer])


def _removed(theta: Array, alpha: ArrayLike, kind: str, width: ArrayLike) -> Bool[Array, '...']:
    """Where a filter removes a weight."""
    # Compared in float32 even if the weights are narrower: rounding a threshold would move weights
    # from one side to the other.
    theta, alpha, width = map(_at_least_float32, (theta, alpha, width))
    if kind == 'minmax':
        return theta <= alpha
    if kind == 'maxmin':
        return theta >= alpha
    return (theta >= alpha - width / 2) & (theta < alpha + width / 2)


def filter_kernel(
    theta: Float[Array, '...'],
    alpha: float | Float[Array, ''],
    kind: str,
    width: float | Float[Array, ''] | None = None,
) -> Float[Array, '...']:
    """Sets to zero the weights that a filter removes, by their signed values.

    Args:
      theta: weights of any shape.
      alpha: the threshold, in the units of the weights; may be traced.
      kind: `'minmax'` removes theta <= alpha, `'maxmin'` theta >= alpha and `'pulse'`
        alpha - width / 2 <= theta < alpha + width / 2.
      width: width of a pulse, above 0, in the units of the weights; (max - min) / 25 by default.
        Without effect on the other kinds.

    Returns:
      The remaining weights, of the same shape and dtype.

    Raises:
      ValueError: the kind is unknown or the width not above 0.
    """
    _check(kind, width)
    theta = jnp.asarray(theta)
    width = _pulse_width(theta) if width is None else width
    return jnp.where(_removed(theta, alpha, kind, width), 0, theta).astype(theta.dtype)


def filter_variables(
    variables: Variables,
    alpha: float | Float[Array, ''],
    kind: str,
    *,
    layer: str | None = None,
    width: float | Float[Array, ''] | None = None,
) -> tuple[Variables, Int[Array, ''], int]:
    """Filters the kernel of one layer, or every kernel of a model; biases and norms stay.

    Args:
      variables: a Linen variable dict or an NNX state.
      alpha: the threshold, in the units of the weights; may be traced.
      kind: see `filter_kernel`.
      layer: name of a convolution or dense layer; by default all of them.
      width: width of a pulse; by default (max - min) / 25 of the layer's kernel, or 2 / 25 if all
        layers are filtered. Without effect on the other kinds.

    Returns:
      `(variables, removed, total)`: the filtered variables in the structure given, the number of
      weights that the filter takes (those that were 0 before included) and the number of weights
      in the kernels filtered.

    Raises:
      ValueError: the kind is unknown, the width not above 0, or there is no such layer.
    """
    _check(kind, width)
    chosen = kernels.chosen(variables, layer)
    pulse = jnp.asarray(_default_width(chosen, layer) if width is None else width)
    total = sum(kernel.size for kernel in chosen.values())
    removed = _count_removed(chosen, alpha, kind, pulse)

    def apply(name: str, kernel: Array) -> Array:
        return filter_kernel(kernel, alpha, kind, pulse) if name in chosen else kernel

    return kernels.replaced(apply, variables), removed, total


def _count_removed(
    chosen: Mapping[str, Array], alpha: ArrayLike, kind: str, width: ArrayLike
) -> Int[Array, '']:
    masks = [_removed(kernel, alpha, kind, width) for kernel in chosen.values()]
    return jnp.stack([mask.sum(dtype=jnp.int32) for mask in masks]).sum()


# ------------------------------------------------------------------------------------ sweeps


def thresholds(theta: Float[Array, '...'], count: int = 25) -> Float[np.ndarray, ' thresholds']:
    """Equally spaced thresholds over the range of one layer's weights: a local sweep.

    Args:
      theta: the kernel, of any shape.
      count: number of thresholds, at least 3.

    Returns:
      Float32 thresholds `[count]` from the smallest to the largest weight, both exact. Reverse them
      for a `'maxmin'` sweep in which removal increases; the scores do not depend on it.

    Raises:
      ValueError: `count` is below 3, or the weights are all equal or not finite.
    """
    _validate.check_whole('count', count, low=3)
    values = np.asarray(theta, np.float32)
    low, high = (values.min(), values.max()) if values.size else (np.nan, np.nan)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(
            f'The weights range from {low:g} to {high:g}, which leaves nothing to sweep; give a '
            'kernel of finite weights that differ.'
        )
    return np.linspace(low, high, count, dtype=np.float32)


def global_thresholds(count: int = 25) -> Float[np.ndarray, ' thresholds']:
    """Equally spaced thresholds from -1 to 1: a sweep of all layers with one threshold.

    Args:
      count: number of thresholds, at least 3.

    Returns:
      Float32 thresholds `[count]`. Weights beyond them are not reached.

    Raises:
      ValueError: `count` is below 3.
    """
    _validate.check_whole('count', count, low=3)
    return np.linspace(-1, 1, count, dtype=np.float32)


def removing_nothing(kind: str) -> float:
    """The threshold at which a filter removes nothing: put in front of a sweep, it is the baseline.

    Args:
      kind: see `filter_kernel`.

    Returns:
      Minus infinity, or infinity for `'maxmin'`.

    Raises:
      ValueError: the kind is unknown.
    """
    _check(kind, None)
    return float('inf') if kind == 'maxmin' else float('-inf')


def _checked_thresholds(
    variables: Variables, alphas: ArrayLike, kind: str, layer: str | None, width: ArrayLike | None
) -> Array:
    _check(kind, width)
    kernels.chosen(variables, layer)
    alphas = jnp.asarray(alphas)
    if alphas.ndim != 1:
        raise ValueError(
            f'alphas has shape {alphas.shape}; give thresholds in an array of one axis.'
        )
    return alphas


def present_shares(
    variables: Variables,
    alphas: Float[Array, ' thresholds'],
    kind: str,
    *,
    layer: str | None = None,
    width: float | Float[Array, ''] | None = None,
) -> Float[np.ndarray, ' thresholds']:
    """Share of the swept weights that a filter leaves at each threshold.

    Args:
      variables: a Linen variable dict or an NNX state.
      alphas: thresholds `[T]`.
      kind: see `filter_kernel`.
      layer: name of a convolution or dense layer; by default all of them.
      width: width of a pulse; see `filter_variables`.

    Returns:
      Shares `[T]` in [0, 1] of the weights in the kernels swept, not of the whole model. A weight
      that is 0 of itself counts as present until the filter takes it.

    Raises:
      ValueError: as in `filter_variables`, or `alphas` has not one axis.
    """
    alphas = _checked_thresholds(variables, alphas, kind, layer, width)
    removed = _removed_counts(variables, alphas, width, kind=kind, layer=layer)
    total = sum(kernel.size for kernel in kernels.chosen(variables, layer).values())
    return 1 - np.asarray(removed) / total


@functools.partial(jax.jit, static_argnames=('kind', 'layer'))
def _removed_counts(
    variables: Variables, alphas: Array, width: Array | None, *, kind: str, layer: str | None
) -> Int[Array, ' thresholds']:
    chosen = kernels.chosen(variables, layer)
    if width is None:
        width = jnp.asarray(_default_width(chosen, layer))
    return jax.lax.map(lambda alpha: _count_removed(chosen, alpha, kind, width), alphas)


Attack = Callable[[Forward, Variables, Array, Array], Array]


def filtering_responses(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    *,
    alphas: Float[Array, ' thresholds'],
    kind: str,
    layer: str | None = None,
    width: float | Float[Array, ''] | None = None,
    attack: Attack | None = None,
    mask: Bool[Array, ' batch'] | None = None,
) -> Responses:
    """Which images a model classifies correctly while its weights are filtered, jit-compiled.

    One compiled program runs all thresholds, one after the other, which bounds memory: it is the
    kernels that differ, so that the whole batch goes through each. The batch may be split over
    devices; every example stays on its own.

    Args:
      forward: the model.
      variables: its variables, a Linen variable dict or an NNX state.
      x: images `[B, ...]`.
      y: labels `[B]`.
      alphas: thresholds `[T]` in the units of the weights; other values of them are not compiled
        anew.
      kind: see `filter_kernel`.
      layer: name of the layer that is filtered; by default every kernel of the model.
      width: width of a pulse; see `filter_variables`.
      attack: from `(forward, filtered variables, x, y)` to attacked images `[B, ...]`; it sees the
        model as filtered. Give the same function object to every call, or each is compiled anew; a
        `jax.tree_util.Partial` may bind arrays first, and new values of those are not compiled
        anew.
      mask: which rows are examples and not padding `[B]`; the responses of the others are False.

    Returns:
      Per example and threshold, whether the class of largest logit is the label.

    Raises:
      ValueError: the kind is unknown, the width not above 0, there is no such layer, or `alphas`
        has not one axis.
    """
    alphas = _checked_thresholds(variables, alphas, kind, layer, width)
    if attack is not None and not isinstance(attack, jax.tree_util.Partial):
        attack = jax.tree_util.Partial(attack)
    return _responses(forward, variables, x, y, alphas, width, attack, mask, kind=kind, layer=layer)


@functools.partial(jax.jit, static_argnames=('kind', 'layer'))
def _responses(
    forward: Forward,
    variables: Variables,
    x: Array,
    y: Array,
    alphas: Array,
    width: Array | None,
    attack: Attack | None,
    mask: Array | None,
    *,
    kind: str,
    layer: str | None,
) -> Responses:
    if width is None:
        width = jnp.asarray(_default_width(kernels.chosen(variables, layer), layer))

    def respond(alpha: Array) -> Responses:
        filtered, _, _ = filter_variables(variables, alpha, kind, layer=layer, width=width)

        def correct(images: Array) -> Array:
            right = forward(filtered, images)[0].argmax(-1) == y
            return right if mask is None else right & mask

        adversarial = None if attack is None else correct(attack(forward, filtered, x, y))
        return Responses(correct(x), adversarial)

    return jax.tree.map(jnp.transpose, jax.lax.map(respond, alphas))


# ------------------------------------------------------------------------------------ scores


def scores(curve: Curve) -> Scores:
    """Integrates a sweep: how much better or worse than in proportion a model bears removal.

    Thresholds are scaled to [0, 1] in the direction in which removal increases and accuracies are
    divided by their value with nothing removed; then, by Simpson's rule,

        clean = integral(accuracy - present),
        adversarial = integral(accuracy under attack - present),
        difference = integral(accuracy under attack - accuracy).

    So a model whose accuracy falls in proportion to its weights scores 0, one that loses nothing
    until the end up to 0.5. The order in which the thresholds are listed does not matter.

    Args:
      curve: a sweep of at least 3 thresholds.

    Returns:
      The three scores. A score that needs an accuracy whose baseline is 0, or which was not
      measured, is NaN: there is nothing relative to which it could fall.

    Raises:
      ValueError: the arrays of the curve are not of one length of at least 3, or its thresholds
        neither only rise nor only fall.
    """
    arrays = [np.asarray(array, np.float64) for array in curve[:4]]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < 3:
        raise ValueError(
            f'The curve has arrays of shape {", ".join(map(str, shapes))}; give one value per '
            'threshold, at 3 thresholds or more.'
        )
    steps = np.diff(arrays[0])
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            f'The thresholds {arrays[0].tolist()} neither only rise nor only fall; sort them, '
            'without repetition.'
        )
    if arrays[1][0] < arrays[1][-1]:
        arrays = [array[::-1] for array in arrays]
    alphas, present, clean, adversarial = arrays
    scaled = (alphas - alphas[0]) / (alphas[-1] - alphas[0])
    clean = _relative(clean, float(curve.baseline_clean))
    adversarial = _relative(adversarial, float(curve.baseline_adversarial))

    # Imported where it is used, because it takes long.
    import scipy.integrate

    def integral(values: np.ndarray) -> float:
        return float(scipy.integrate.simpson(values, x=scaled))

    return Scores(
        integral(clean - present), integral(adversarial - present), integral(adversarial - clean)
    )


def _relative(accuracy: np.ndarray, baseline: float) -> np.ndarray:
    return accuracy / baseline if baseline > 0 else np.full_like(accuracy, np.nan)


def classify(score: float, tau: float = 0.05) -> Literal['fragile', 'robust', 'antifragile']:
    """Names what a score says.

    Args:
      score: one of `Scores`.
      tau: half the width of the band around 0 that is called robust, at least 0.

    Returns:
      `'fragile'` below -tau, `'antifragile'` above tau, `'robust'` between (both ends included).

    Raises:
      ValueError: the score is NaN, which no label describes, or `tau` is out of range.
    """
    _validate.check_range('tau', tau, low=0)
    if np.isnan(score):
        raise ValueError(
            f'score is {score!r}, as it is where the accuracy with nothing removed is 0 or was not '
            'measured; classify only scores that are defined.'
        )
    if score < -tau:
        return 'fragile'
    return 'antifragile' if score > tau else 'robust'

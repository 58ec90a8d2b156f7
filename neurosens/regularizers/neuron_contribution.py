"""Regularizers of the sensitivity of neurons: that of Suri & Evans, and one of Delta.

"One Neuron to Fool Them All", https://arxiv.org/abs/2003.09372, section on regularization.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.threat import kth_largest
from neurosens.forward import Forward, Variables
from neurosens.neurons import chunks, tail, units
from neurosens.neurons.logit_gradients import logit_gradients_of_cut
from neurosens.neurons.sensitivity import check_closed_form
from neurosens.regularizers.regularizer import Regularizer

# Classes at once in comparisons of all pairs, which bounds their memory.
_CLASSES = 16
SCALES = ('rms', 'none')


def _weights_of_largest(
    values: Float[Array, '... neurons'], top: int
) -> Float[Array, '... neurons']:
    """Weights that make a sum of non-negative values the mean of the `top` largest of a row.

    Values equal to the smallest that counts share what is left of it. That one is found by
    counting: `top_k` would gather a batch that is split over devices, and sorting takes longer.
    """
    rows = jax.lax.stop_gradient(values).reshape(-1, values.shape[-1])
    top = min(top, values.shape[-1])
    last = jax.vmap(lambda row: kth_largest(row, jnp.int32(top)))(rows)[:, None]
    above, equal = rows > last, rows == last
    left = top - above.sum(-1, keepdims=True)
    shares = jnp.where(equal, left / jnp.maximum(equal.sum(-1, keepdims=True), 1), 0.0)
    weights = jnp.where(above, 1.0, shares) / top
    return weights.astype(values.dtype).reshape(values.shape)


def _mean_of_largest(values: Float[Array, '... neurons'], top: int) -> Float[Array, '...']:
    """Mean of the `top` largest of non-negative values along the last axis."""
    return (_weights_of_largest(values, top) * values).sum(-1)


def weight_difference(weights: Float[Array, 'classes neurons'], top: int) -> Float[Array, '']:
    """T1: the largest over pairs of classes of mean(top_k_i |W[a, i] - W[b, i]|).

    Args:
      weights: W, one row per class.
      top: k.

    Returns:
      The term.
    """
    weights = jnp.asarray(weights)
    fixed = jax.lax.stop_gradient(weights)

    def of_class(index: Array) -> tuple[Array, Array]:
        gaps = _mean_of_largest(jnp.abs(fixed[index] - fixed), top)
        return gaps.max(), gaps.argmax()

    # Only the pair that counts is differentiated: of all of them nothing is kept for that.
    largest, partner = chunks.map_chunks(of_class, weights.shape[0], _CLASSES)
    one = largest.argmax()
    return _mean_of_largest(jnp.abs(weights[one] - weights[partner[one]]), top)


def contribution(
    weights: Float[Array, 'classes neurons'],
    features: Float[Array, ' neurons'],
    y: Int[Array, ''],
    top: int,
) -> Float[Array, '']:
    """T2 of one image: mean over classes c of mean(top_k_i |h_i (W[y, i] - W[c, i])| / sum_j h_j).

    The sum is meant of features that are at least 0, as behind a ReLU. Of both signs (GELU, tanh)
    it may come near 0, which makes the term large, and the sign of a negative sum is lost.

    Args:
      weights: W, one row per class.
      features: h, what the last layer is given.
      y: the label; as a class c it adds 0 and is counted.
      top: k.

    Returns:
      The term; 0 where the features add up to 0.
    """
    weights, total = jnp.asarray(weights), features.sum()
    shares = jnp.where(total == 0, 0.0, features / jnp.where(total == 0, 1.0, total))
    parts = jnp.abs(shares * (weights[y] - weights))
    return _mean_of_largest(parts, top).mean()


def neuron_contribution(
    *,
    weight_difference_weight: float = 10.0,
    contribution_weight: float = 100.0,
    top: int = 16,
    layer: str = 'head:in',
) -> Regularizer:
    """d1 T1 + d2 T2 of Suri & Evans 2020: no neuron may decide between two classes alone.

    T2 divides by the sum of the neurons, which are those of a ReLU in the paper. Where the layer
    cannot be shown to be at least 0, as behind a GELU, a warning says so when the program is made:
    watch `contribution`, leave T2 out by a `contribution_weight` of 0, or take
    `direct_sensitivity`, which is for neurons of any sign.

    Args:
      weight_difference_weight: d1, weight of T1, see `weight_difference`.
      contribution_weight: d2, weight of T2, the mean of `contribution` over images.
      top: k, over how many of the largest neurons means are taken.
      layer: the layer whose neurons h count; the logits must be an affine function of it, as of the
        input of the last layer.

    Returns:
      The regularizer; it logs `weight_difference` (T1) and `contribution` (T2).

    Raises:
      ValueError: a number is out of range; when called, the logits are no affine function of the
        layer.
    """
    _validate.check_range('weight_difference_weight', weight_difference_weight, low=0)
    _validate.check_range('contribution_weight', contribution_weight, low=0)
    _validate.check_whole('top', top)
    _validate.check_layer(layer)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del key
        image = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        facts = tail.layer_facts(forward, variables, image, layer)
        check_closed_form(facts, layer)
        if contribution_weight and not facts.nonnegative:
            warnings.warn(
                f'Layer {layer!r} may be negative, and T2 of neuron_contribution divides by its '
                'sum, which may come near 0; set contribution_weight to 0, or use '
                'direct_sensitivity.',
                stacklevel=2,
            )
        # The weights are the same for every image: none is run to find them.
        weights = _logit_gradients(tail.cut(forward, variables, jnp.zeros(image.shape), layer))

        # The whole batch at once, so that a pass that has been made already can be shared.
        features = forward(variables, x, taps=(layer,))[1][layer]
        features = features.reshape(x.shape[0], -1).astype(weights.dtype)
        shares = jax.vmap(contribution, (None, 0, 0, None))(weights, features, y, top)
        found = {
            'weight_difference': weight_difference(weights, top),
            'contribution': shares.mean(),
        }
        penalty = weight_difference_weight * found['weight_difference']
        return penalty + contribution_weight * found['contribution'], found

    return regularizer


def _logit_gradients(cut: tail.Cut, unit: str = 'unit') -> Float[Array, 'classes neurons']:
    """In one go, so that it can be differentiated again."""
    classes = jax.eval_shape(cut.logits, cut.activation).shape[0]
    return logit_gradients_of_cut(cut, unit=unit, direction='reverse', chunk=classes)


def direct_sensitivity(
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    top: int = 16,
    order: float = 8.0,
    floor: float = 0.1,
    scale: str = 'rms',
    valid_only: bool = False,
) -> Regularizer:
    """A smooth 1 / |Delta(i, x)|, to first order, of any layer: what T1 and T2 approximate (ours).

    With predicted class p, margins m_c = z_p - z_c and slopes d (z_c - z_p) / d h_i, the change of
    neuron i that makes c win is m_c / slope; its reciprocal, in units of the neuron's size, is

        q(c, i) = size_i |d (z_c - z_p) / d h_i| / (m_c + floor).

    Of each neuron the p-norm over classes counts, a smooth maximum at any scale (of |Delta| a
    smooth minimum: the nearest class), of these the mean over the k largest, and of those the mean
    over images, where misclassified ones count 0: there the nearest boundary should not be pushed
    away.

    Args:
      layer: the layer whose neurons count.
      unit: `'channel'` or `'unit'`.
      top: k.
      order: p, above 1; the norm is at least the largest q, and at most (classes - 1)^(1 / p) times
        as much.
      floor: added to margins, in units of logits; bounds q at the boundary.
      scale: `'rms'`, the root mean square of the neuron over the batch, which makes the penalty
        blind to factors moved between layers, or `'none'`.
      valid_only: leave out falls that would take a neuron below 0, of a channel at any position, as
        Delta of a rectified layer does. By default they count: which neurons can fall changes from
        image to image, the slopes that allow it do not.

    Returns:
      The regularizer; it logs `mean_distance`, the mean over the k neurons of 1 / q, without those
      that no class can be reached by, and over the images that are classified correctly and have
      such neurons; and `counted`, the share of these images in the batch. Where there are none,
      both are 0, and `mean_distance` says nothing.

    Raises:
      ValueError: a choice is unknown or a number out of range.
    """
    units.check_unit(unit)
    _validate.check_layer(layer)
    _validate.check_flag('valid_only', valid_only)
    _validate.check_whole('top', top)
    _validate.check_range('order', order, low=1, low_open=True)
    _validate.check_range('floor', floor, low=0, low_open=True)
    if scale not in SCALES:
        raise ValueError(_validate.unknown('scale', scale, SCALES))

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del key

        def example(x: Array) -> tuple[Array, Array, Array]:
            cut = tail.cut(forward, variables, x, layer)
            logits = cut.logits(cut.activation)
            return logits, _logit_gradients(cut, unit), cut.activation.astype(logits.dtype)

        logits, slopes, activations = jax.vmap(example)(x)
        size = _size(activations, unit) if scale == 'rms' else jnp.ones(slopes.shape[-1])

        def closeness(logits: Array, slopes: Array, lowest: Array) -> Array:
            predicted = logits.argmax()
            margins = (logits[predicted] - logits)[:, None]
            gains = slopes - slopes[predicted]
            reciprocal = size * jnp.abs(gains) / (margins + floor)
            reachable = (gains >= 0) | (margins <= lowest * -gains) | (not valid_only)
            own = jnp.arange(logits.shape[0])[:, None] == predicted
            return _smooth_maximum(jnp.where(reachable & ~own, reciprocal, 0.0), order)

        lowest = jax.vmap(functools.partial(_lowest, unit=unit))(activations)
        nearest = jax.vmap(closeness)(logits, slopes, lowest)
        reached = nearest > 0
        weights, correct = _weights_of_largest(nearest, top), logits.argmax(-1) == y
        inverse = 1 / jnp.where(reached, jax.lax.stop_gradient(nearest), 1.0)
        # Of each image the share of the k neurons that some class can be reached by.
        share = (weights * reached).sum(1)
        distance = jnp.where((weights > 0) & reached, weights * inverse, 0.0).sum(1)
        distance = distance / jnp.where(share > 0, share, 1.0)
        counted = correct & (share > 0)
        mean_distance = jnp.where(counted, distance, 0.0).sum() / jnp.maximum(counted.sum(), 1)
        largest = (weights * nearest).sum(1)
        # A NaN in place of the mean of nothing would end the training.
        found = {'mean_distance': mean_distance, 'counted': counted.mean()}
        return jnp.where(correct, largest, 0.0).mean(), found

    return regularizer


def _smooth_maximum(
    values: Float[Array, 'classes neurons'], order: float
) -> Float[Array, ' neurons']:
    """The p-norm over classes of values from 0 up; 0, with no gradient, where all are 0."""
    largest = jax.lax.stop_gradient(values.max(0))
    some = largest > 0
    scale = jnp.where(some, largest, 1.0)
    total = ((values / scale) ** order).sum(0)
    return jnp.where(some, scale * jnp.where(some, total, 1.0) ** (1 / order), 0.0)


def _lowest(activation: Float[Array, '...'], unit: str) -> Float[Array, ' neurons']:
    """Value of each neuron of one example; of a channel the smallest over its positions."""
    if units.are_channels(activation.shape, unit):
        return activation.min(tuple(range(activation.ndim - 1)))
    return activation.ravel()


def _size(activations: Float[Array, 'batch ...'], unit: str) -> Float[Array, ' neurons']:
    """Root mean square of each neuron over images, and of a channel over its positions."""
    if unit == 'unit' or activations.ndim == 2:
        squares = (activations**2).mean(0).reshape(-1)
    else:
        squares = (activations**2).mean(tuple(range(activations.ndim - 1)))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)

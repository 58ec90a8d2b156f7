"""Attacks through single neurons (Suri & Evans 2020, https://arxiv.org/abs/2003.09372).

"One Neuron to Fool Them All": move neuron i of an image by Delta(i, x), the change that alone would
change the prediction, and see how often the prediction changes indeed.

    delta = sensitivity(forward, variables, x).delta
    neurons, delta = easiest_neurons(delta, total.mean, total.std(), 16)
    aims = {'neurons': neurons, 'delta': delta}
    result = neuron_attack(forward, variables, x, y, key, threat=threat, **aims)
    neuron_attack_report(result)

with `y` the classes that the model itself predicts. The paper attacks the input of the last layer
in l2 balls; any other layer and the other norms are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.losses import cross_entropy
from neurosens.attacks.representation import (
    activation_and_logits,
    ascend,
    check_indices,
    check_steps,
    l2_norm,
)
from neurosens.attacks.result import Iterate, choose, judge, louder, stronger
from neurosens.attacks.threat import Threat, default_step, require_ball
from neurosens.forward import Forward, Variables
from neurosens.neurons import chunks, units
from neurosens.neurons.ranking import KINDS, ranking, scaled_sensitivity

KEEPS = ('misclassified', 'loss')

# Targets of smaller norm count as this large: where a neuron is to become 0, all depends on it.
_SMALLEST_TARGET = 1e-12
# A neuron that lacks this share of Delta, as rounding may take, has reached it.
_ROUNDING = 1e-5


class NeuronAttackResult(NamedTuple):
    """What the attacks through n neurons of each image found (for one image: without `[B]`).

    Attributes:
      x_adv: the strongest image found through each neuron `[B, n, ...]`; the clean one where it is
        misclassified already.
      success: whether `x_adv` is misclassified `[B, n]`.
      margin: logit of the class to leave minus the largest other, on `x_adv` `[B, n]`.
      reached: whether any iterate moved the neuron by at least delta, up to rounding, for a channel
        on average over its positions `[B, n]`.
      gain: the largest share of delta by which any iterate moved it `[B, n]`; at least 0, above 1
        where the neuron went further. Where delta is 0 there is nothing to reach, and where the
        clean image is misclassified nothing is attacked: `reached` is false and `gain` 0.
      queries: forward passes made for all neurons of an image together `[B]`.
    """

    x_adv: Float[Array, 'batch n ...']
    success: Bool[Array, 'batch n']
    margin: Float[Array, 'batch n']
    reached: Bool[Array, 'batch n']
    gain: Float[Array, 'batch n']
    queries: Int[Array, ' batch']


class _Best(NamedTuple):
    """The strongest iterate through a neuron, and the largest share of delta of any iterate."""

    iterate: Iterate
    gain: Array


def neuron_attack_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    neurons: Int[Array, ' n'],
    delta: Float[Array, ' n'],
    steps: int | Int[Array, ''],
    step_size: float | Float[Array, ''],
    weight: float | Float[Array, ''] = 10.0,
    restarts: int | Int[Array, ''] = 1,
    layer: str = 'head:in',
    unit: str = 'channel',
    start: str = 'clean',
    straight_layer: str | None = None,
    keep: str = 'misclassified',
    chunk: int | None = None,
) -> NeuronAttackResult:
    """The attacks on one example: the function that `neuron_attack` maps over a batch.

    It has the arguments and errors of `neuron_attack`, with `x` one image, `y` its class, and
    `neurons` and `delta` `[n]`; `steps`, `weight` and `restarts` may be traced, and `step_size` has
    no default. Returns arrays `[n, ...]`.
    """
    require_ball('neuron_attack', threat)
    units.check_unit(unit)
    if keep not in KEEPS:
        raise ValueError(_validate.unknown('keep', keep, KEEPS))
    better = louder if keep == 'loss' else stronger
    run = activation_and_logits(forward, variables, layer, straight_layer)
    features, logits = run(x, key)
    clean = judge(x, logits, y, cross_entropy(logits, y))
    positions = features.size // units.count(features.shape, unit)

    def attack(place: Array) -> _Best:
        # A chunk may run past the last neuron.
        neuron, change = (values.at[place].get(mode='clip') for values in (neurons, delta))
        change = change.astype(features.dtype)
        direction = units.direction(neuron, features.shape, unit, features.dtype)
        target = features + change * direction
        whole, part = (
            jnp.maximum(l2_norm(aim), _SMALLEST_TARGET) for aim in (target, target * direction)
        )

        def nearness(activation: Array) -> Array:
            off = activation - target
            return -(l2_norm(off) / whole + weight * l2_norm(off * direction) / part)

        def see(image: Array, _: Array, activation: Array, logits: Array) -> _Best:
            moved = ((activation - features) * direction).sum() / positions
            share = jnp.where(change == 0, 0.0, moved / jnp.where(change == 0, 1.0, change))
            return _Best(judge(image, logits, y, cross_entropy(logits, y)), share)

        def best_of(new: _Best, best: _Best) -> _Best:
            # Not `maximum`, which an iterate that is not a number would spoil for good.
            gain = jnp.where(new.gain > best.gain, new.gain, best.gain)
            return _Best(better(new.iterate, best.iterate), gain)

        return ascend(
            run,
            nearness,
            see,
            best_of,
            _Best(clean, jnp.zeros((), features.dtype)),
            x,
            # The randomness of a neuron does not depend on the others attacked.
            jax.random.fold_in(key, neuron),
            threat=threat,
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            start=start,
        )

    count = neurons.shape[0]
    found: _Best = chunks.map_chunks(attack, count, chunk or chunks.DEFAULT)
    kept = jax.vmap(choose, (None, None, 0))(clean.fools, clean, found.iterate)
    gain = jnp.where(clean.fools, 0.0, found.gain)
    queries = 1 + jnp.int32(count) * restarts * (steps + 1)
    return NeuronAttackResult(kept.x, kept.fools, kept.margin, gain >= 1 - _ROUNDING, gain, queries)


def neuron_attack(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    neurons: Int[Array, 'batch n'],
    delta: Float[Array, 'batch n'],
    layer: str = 'head:in',
    unit: str = 'channel',
    steps: int = 50,
    step_size: float | Float[Array, ''] | None = None,
    weight: float | Float[Array, ''] = 10.0,
    start: str = 'clean',
    restarts: int = 1,
    straight_layer: str | None = None,
    keep: str = 'misclassified',
    chunk: int | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> NeuronAttackResult:
    """Attacks each image through several neurons, one at a time (Suri & Evans 2020), jit-compiled.

    For neuron i with target t = h(x) + delta e_i it descends, by steepest steps within the threat,

        ||h(x') - t||_2 / ||t||_2  +  weight ||h_i(x') - t_i||_2 / ||t_i||_2

    where the second norm is over the positions of a channel (an absolute value in a dense layer).
    Images that are misclassified already come back unchanged. All pairs of
    images and neurons are one compiled program, which serves all radii, steps and weights.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: classes to leave `[B]`; in the paper those that the model predicts.
      key: randomness of the starts, and of a random model.
      threat: the perturbations allowed.
      neurons: the neurons to attack `[B, n]`, such as those of `easiest_neurons`; duplicates give
        equal results.
      delta: by how much to move each `[B, n]`, in units of the activation; finite.
      layer: name of the layer they belong to.
      unit: `'channel'` (the same change at every position) or `'unit'`.
      steps: gradient steps per restart, at least 1.
      step_size: length of a step in the threat's norm; 2.5 eps / steps by default.
      weight: weight of the neuron's own distance, at least 0; 10 in the paper.
      start: `'clean'` (the paper's) or `'random'` (uniform in the ball).
      restarts: independent runs, which only differ if the start or the model is random.
      straight_layer: name of a layer, such as the last ReLU, whose derivative is replaced by the
        identity: otherwise a neuron that is off gives no gradient. The paper does so for residual
        and dense networks. The layer is named by its module and keeps the shape.
      keep: which iterate is kept, `'misclassified'` (one that is, if there is any, and of those the
        one of largest cross-entropy) or `'loss'` (the paper's: that of largest cross-entropy, even
        where only another one is misclassified).
      chunk: neurons attacked at once for each image, 16 by default; bounds memory, never changes
        results beyond rounding.
      index: identity of each example `[B]`, such as its position in the data set: the same example
        gets the same randomness in any batch. By default its place in this batch.

    Returns:
      Per image and neuron the iterate kept, and whether the neuron reached its target.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a number or choice is out of range, a neuron does not exist, delta is not finite,
        images are not finite or out of bounds, or a label is no class.
    """
    check_steps(steps, restarts, start)
    if isinstance(weight, (int, float)):
        _validate.check_range('weight', weight, low=0)
    units.check_unit(unit)
    chunks.check_chunk(chunk)
    x, neurons, delta = jnp.asarray(x), jnp.asarray(neurons), jnp.asarray(delta)
    if neurons.ndim != 2 or neurons.shape != delta.shape or 0 in neurons.shape:
        raise ValueError(
            f'neurons have shape {neurons.shape} and delta {delta.shape}; both must be [B, n] with '
            'at least one neuron.'
        )
    if not isinstance(delta, jax.core.Tracer) and not bool(jnp.isfinite(delta).all()):
        raise ValueError(
            'delta has values that are not finite; easiest_neurons() replaces those of neurons '
            'that no change suffices for.'
        )
    check_indices(forward, variables, x, neurons, layer, unit)
    return attack_batch(
        neuron_attack_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'neurons': neurons, 'delta': delta},
        shared={
            'steps': steps,
            'step_size': default_step(threat, jnp.shape(x)[1:], 2.5 / steps)
            if step_size is None
            else step_size,
            'weight': weight,
            'restarts': restarts,
        },
        options={
            'layer': layer,
            'unit': unit,
            'start': start,
            'straight_layer': straight_layer,
            'keep': keep,
            'chunk': chunk,
        },
    )


def easiest_neurons(
    delta: Float[ArrayLike, 'batch neurons'],
    mean: Float[ArrayLike, ' neurons'] | None,
    std: Float[ArrayLike, ' neurons'] | None,
    count: int,
    *,
    by: str = 'scaled',
) -> tuple[Int[Array, 'batch n'], Float[Array, 'batch n']]:
    """The neurons of each image that are easiest to attack, and by how much to move them.

    Where no change of a neuron suffices (Delta is infinite or NaN), it gets the finite Delta of
    largest absolute value of its image, with its sign; where the image has none, 0, which the
    attack leaves the neuron at.

    Args:
      delta: Delta(i, x) of every neuron `[B, N]`, as of `neurosens.neurons.sensitivity`.
      mean: mean activation of each neuron over a data set `[N]`; not needed by absolute values.
      std: its standard deviation `[N]`; not needed if `by` is `'absolute'`.
      count: how many neurons n per image, from 1 to N.
      by: the kind of score that ranks them, see `neurosens.neurons.scaled_sensitivity`.

    Returns:
      Indices, the easiest first, int32 `[B, n]`, and the finite Delta of each `[B, n]`.

    Raises:
      ValueError: the kind is unknown, statistics are missing, or there are fewer neurons.
    """
    delta = jnp.asarray(delta)
    if delta.ndim != 2:
        raise ValueError(f'delta has shape {delta.shape}; it must be [B, N].')
    _validate.check_whole('count', count, high=delta.shape[1])
    if by not in KINDS:
        raise ValueError(_validate.unknown('kind', by, KINDS))
    needed = {'scaled': (mean, std), 'scaled_absolute': (std,)}.get(by, ())
    if any(values is None for values in needed):
        raise ValueError(
            f"by={by!r} needs the mean and std of each neuron; give them, or by='absolute'."
        )
    return _easiest(delta, mean, std, count=count, by=by)


@functools.partial(jax.jit, static_argnames=('count', 'by'))
def _easiest(
    delta: Array, mean: ArrayLike | None, std: ArrayLike | None, *, count: int, by: str
) -> tuple[Array, Array]:
    easiest = ranking(scaled_sensitivity(delta, mean, std, by))[:, :count]
    finite = jnp.where(jnp.isfinite(delta), delta, 0)
    farthest = jnp.abs(finite).argmax(1, keepdims=True)
    fallback = jnp.take_along_axis(finite, farthest, 1)
    chosen = jnp.take_along_axis(delta, easiest, 1)
    return easiest, jnp.where(jnp.isfinite(chosen), chosen, fallback)


class NeuronAttackReport(NamedTuple):
    """How attacks through single neurons fare over a data set.

    Attributes:
      counts: numbers n of easiest neurons, int `[C]`.
      broken: share of images that at least one of the n easiest neurons breaks `[C]`; for n = 1,
        that the easiest one breaks.
      mean_successes: mean number of neurons per image that break it.
      success_by_rank: share of images broken by the neuron of each rank, the easiest first `[n]`.
      reached: share of pairs of image and neuron where the neuron reached its delta.
    """

    counts: Int[np.ndarray, ' counts']
    broken: Float[np.ndarray, ' counts']
    mean_successes: float
    success_by_rank: Float[np.ndarray, ' n']
    reached: float


class NeuronSuccess(Protocol):
    """What a report needs to know of attacks through neurons, see `NeuronAttackResult`."""

    @property
    def success(self) -> Bool[Array | np.ndarray, 'images n']:
        """Whether the attack through each neuron succeeded."""

    @property
    def reached(self) -> Bool[Array | np.ndarray, 'images n']:
        """Whether the neuron reached its delta."""


def neuron_attack_report(
    result: NeuronSuccess, counts: Sequence[int] = (1, 4, 8, 16)
) -> NeuronAttackReport:
    """Summarizes attacks through the easiest neurons of each image.

    Images that are misclassified without an attack count as broken by every neuron, and their
    neurons as not at their delta; leave them out where this is not wanted.

    Args:
      result: of `neuron_attack` for M images, with the neurons of each from the easiest on.
      counts: numbers of easiest neurons, of any of which the success is asked.

    Returns:
      Shares and means.

    Raises:
      ValueError: there is no image, or a count exceeds the number of neurons attacked.
    """
    success, reached = np.asarray(result.success), np.asarray(result.reached)
    if not success.size:
        raise ValueError('There is no image to report on; attack at least one.')
    neurons = success.shape[1]
    if not all(1 <= count <= neurons for count in counts):
        raise ValueError(
            f'counts are {tuple(counts)}, but {neurons} neurons of each image were attacked; give '
            f'counts from 1 to {neurons}.'
        )
    return NeuronAttackReport(
        np.asarray(counts, np.int64),
        np.array([success[:, :count].any(1).mean() for count in counts], np.float64),
        float(success.sum(1).mean()),
        success.mean(0),
        float(reached.mean()),
    )

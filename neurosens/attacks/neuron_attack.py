"""Attacks on a representation: through one neuron, or on a layer or a neuron for its own sake.

The attack through single neurons follows Suri & Evans 2020, "One Neuron to Fool Them All"
(https://arxiv.org/abs/2003.09372): move neuron i of an image by Delta(i, x), the change that alone
would change the prediction, and see how often the prediction changes indeed.

    delta = sensitivity(forward, variables, x).delta
    neurons, delta = easiest_neurons(delta, total.mean, total.std(), 16)
    aims = {'neurons': neurons, 'delta': delta}
    result = neuron_attack(forward, variables, x, y, key, threat=threat, **aims)
    neuron_attack_report(result)

with `y` the classes that the model itself predicts. The paper attacks the input of the last layer
in l2 balls; any other layer, the other norms and the last two attacks here are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.adaptive import redraw
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.losses import cross_entropy
from neurosens.attacks.pgd import STARTS
from neurosens.attacks.result import AttackResult, Iterate, choose, judge, stronger
from neurosens.attacks.threat import Threat, project, random_start, steepest_ascent
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Edit, Forward, Variables
from neurosens.neurons import chunks, units
from neurosens.neurons.ranking import KINDS, ranking, scaled_sensitivity
from neurosens.neurons.tail import check_neurons

# Targets of smaller norm count as this large: where a neuron is to become 0, all depends on it.
_SMALLEST_TARGET = 1e-12
# A neuron that lacks this share of Delta, as rounding may take, has reached it.
_ROUNDING = 1e-5

# Activation and logits of one image, for a key that only random models use.
_Run = Callable[[Array, PRNGKeyArray], tuple[Array, Array]]


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


class ActivationResult(NamedTuple):
    """What an attack on the value of one neuron found, per example (or for one).

    It has the fields of `AttackResult`, though the attack does not aim at another class.

    Attributes:
      x_adv: the image of the most extreme value found `[B, ...]`.
      success: whether `x_adv` is misclassified `[B]`.
      margin: logit of the label minus the largest other, on `x_adv` `[B]`.
      queries: forward passes made `[B]`.
      before: the neuron's value on the clean image `[B]`, for a channel the sum over its positions.
      activation: its value on `x_adv` `[B]`.
    """

    x_adv: Float[Array, 'batch ...']
    success: Bool[Array, ' batch']
    margin: Float[Array, ' batch']
    queries: Int[Array, ' batch']
    before: Float[Array, ' batch']
    activation: Float[Array, ' batch']


class _Best(NamedTuple):
    """The strongest iterate through a neuron, and the largest share of delta of any iterate."""

    iterate: Iterate
    gain: Array


# ----------------------------------------------------------------------------- common machinery


def _runner(forward: Forward, variables: Variables, layer: str, straight_layer: str | None) -> _Run:
    """The model as a function of one image: activation of a layer and logits, at least float32."""

    def run(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        model = redraw(forward, key)
        edits = {} if straight_layer is None else _straight(model, variables, x, straight_layer)
        logits, tapped = model(variables, x[None], edits=edits, taps=(layer,))
        check_neurons(layer, tapped[layer])
        return _at_least_single(tapped[layer][0]), _at_least_single(logits[0])

    return run


def _straight(model: Forward, variables: Variables, x: Array, layer: str) -> Mapping[str, Edit]:
    """An edit that keeps what a layer returns and passes gradients straight to what enters it.

    An edit sees only one of the two, so what enters comes from a forward pass of its own. Up to the
    layer it is equal to the one that is edited, and XLA merges them.
    """
    entering = model(variables, x[None], taps=(f'{layer}:in',))[1][f'{layer}:in']

    def edit(value: Array) -> Array:
        if value.shape != entering.shape:
            raise ValueError(
                f'straight_layer {layer!r} maps shape {entering.shape} to {value.shape}; name a '
                'layer that keeps the shape, such as an activation.'
            )
        # For a ReLU exact: the difference is 0 or minus the first term.
        return entering + jax.lax.stop_gradient(value - entering)

    return {layer: edit}


def _at_least_single(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _norm(values: Array) -> Array:
    """The l2 norm of all entries, with gradient 0 at 0."""
    squares = (values**2).sum()
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _ascend(
    run: _Run,
    value: Callable[[Array], Array],
    see: Callable[[Array, Array, Array, Array], Any],
    keep: Callable[[Any, Any], Any],
    clean: Any,
    x: Float[Array, '...'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Array,
    step_size: float | Array,
    restarts: int | Array,
    start: str,
) -> Any:
    """Projected steepest ascent of a function of an activation, from one image.

    Args:
      run: the model.
      value: from the activation to what is ascended.
      see: from an iterate, its value, activation and logits to what is known of it.
      keep: of a new and an old `see`, what counts.
      clean: `see` of the clean image.
      x: the clean image.
      key: randomness.
      threat: the perturbations allowed.
      steps: steps per restart.
      step_size: their length.
      restarts: how many runs.
      start: `'clean'` or `'random'`.

    Returns:
      What counts of all iterates.
    """

    def evaluate(image: Array, key: PRNGKeyArray) -> tuple[Array, tuple[Array, Array]]:
        activation, logits = run(image, key)
        return value(activation), (activation, logits)

    def restart(number: Array, best: Any) -> Any:
        own = jax.random.fold_in(key, number)
        first = random_start(threat, x, own) if start == 'random' else x

        def step(number: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
            image, best = state
            own_key = jax.random.fold_in(own, number)
            fast = with_fast_input_gradients(lambda image: evaluate(image, own_key))
            (height, seen), gradient = jax.value_and_grad(fast, has_aux=True)(image)
            moved = project(threat, x, image + step_size * steepest_ascent(threat, gradient))
            return moved, keep(see(image, height, *seen), best)

        last, best = jax.lax.fori_loop(0, steps, step, (first, best))
        height, seen = evaluate(last, jax.random.fold_in(own, steps))
        return keep(see(last, height, *seen), best)

    return jax.lax.fori_loop(0, restarts, restart, clean)


@functools.partial(jax.jit, static_argnames=('layer', 'unit'))
def _count(forward: Forward, variables: Variables, x: Array, layer: str, unit: str) -> Array:
    """Number of neurons; nothing of the network is run for it, and it is traced only once."""
    activation = forward(variables, x, taps=(layer,))[1][layer]
    return jnp.int32(units.count(activation.shape[1:], unit))


def _check_steps(steps: int, restarts: int, start: str) -> None:
    if steps < 1 or restarts < 1:
        raise ValueError(f'steps is {steps} and restarts {restarts}; both must be at least 1.')
    if start not in STARTS:
        raise ValueError(f"start is {start!r}; it must be 'random' or 'clean'.")


def _check_indices(
    forward: Forward, variables: Variables, x: Array, neurons: Array, layer: str, unit: str
) -> None:
    """Raises a ValueError unless neurons are integers that exist; traced ones pass the latter."""
    if not jnp.issubdtype(neurons.dtype, jnp.integer):
        raise ValueError(f'neurons are of type {neurons.dtype}; they must be integer indices.')
    found = _count(forward, variables, x, layer, unit), neurons.min(), neurons.max()
    if any(isinstance(value, jax.core.Tracer) for value in found):
        return
    count, low, high = (int(value) for value in found)
    if low < 0 or high >= count:
        raise ValueError(
            f'neurons reach from {low} to {high}, but layer {layer!r} has {count} of them with '
            f'unit={unit!r}; give indices from 0 to {count - 1}.'
        )


# ------------------------------------------------------------------------- through single neurons


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
    chunk: int | None = None,
) -> NeuronAttackResult:
    """The attacks on one example: the function that `neuron_attack` maps over a batch.

    It has the arguments and errors of `neuron_attack`, with `x` one image, `y` its class, and
    `neurons` and `delta` `[n]`; `steps`, `weight` and `restarts` may be traced, and `step_size` has
    no default. Returns arrays `[n, ...]`.
    """
    units.check_unit(unit)
    run = _runner(forward, variables, layer, straight_layer)
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
            jnp.maximum(_norm(aim), _SMALLEST_TARGET) for aim in (target, target * direction)
        )

        def nearness(activation: Array) -> Array:
            off = activation - target
            return -(_norm(off) / whole + weight * _norm(off * direction) / part)

        def see(image: Array, _: Array, activation: Array, logits: Array) -> _Best:
            moved = ((activation - features) * direction).sum() / positions
            share = jnp.where(change == 0, 0.0, moved / jnp.where(change == 0, 1.0, change))
            return _Best(judge(image, logits, y, cross_entropy(logits, y)), share)

        def keep(new: _Best, best: _Best) -> _Best:
            # Not `maximum`, which an iterate that is not a number would spoil for good.
            gain = jnp.where(new.gain > best.gain, new.gain, best.gain)
            return _Best(stronger(new.iterate, best.iterate), gain)

        return _ascend(
            run,
            nearness,
            see,
            keep,
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
    chunk: int | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> NeuronAttackResult:
    """Attacks each image through several neurons, one at a time (Suri & Evans 2020), jit-compiled.

    For neuron i with target t = h(x) + delta e_i it descends, by steepest steps within the threat,

        ||h(x') - t||_2 / ||t||_2  +  weight ||h_i(x') - t_i||_2 / ||t_i||_2

    where the second norm is over the positions of a channel (an absolute value in a dense layer).
    Of all iterates it keeps one that is misclassified, if there is any, and of those the one of
    largest cross-entropy. Images that are misclassified already come back unchanged. All pairs of
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
      chunk: neurons attacked at once for each image, 16 by default; bounds memory, never changes
        results beyond rounding.
      index: identity of each example `[B]`, such as its position in the data set: the same example
        gets the same randomness in any batch. By default its place in this batch.

    Returns:
      Per image and neuron the iterate kept, and whether the neuron reached its target.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a number or choice is out of range, a neuron does not exist, delta is not finite,
        or images are not finite or out of bounds.
    """
    _check_steps(steps, restarts, start)
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
    _check_indices(forward, variables, x, neurons, layer, unit)
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
            'step_size': 2.5 * threat.eps / steps if step_size is None else step_size,
            'weight': weight,
            'restarts': restarts,
        },
        options={
            'layer': layer,
            'unit': unit,
            'start': start,
            'straight_layer': straight_layer,
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
    _validate.check_range('count', count, low=1, high=delta.shape[1])
    if by not in KINDS:
        raise ValueError(_validate.unknown('kind', by, KINDS))
    needed = {'scaled': (mean, std), 'scaled_absolute': (std,)}.get(by, ())
    if any(values is None for values in needed):
        raise ValueError(
            f"by={by!r} needs the mean and std of each neuron; give them, or by='absolute'."
        )
    zeros = jnp.zeros(delta.shape[1])
    return _easiest(
        delta,
        zeros if mean is None else jnp.asarray(mean),
        zeros if std is None else jnp.asarray(std),
        count=count,
        by=by,
    )


@functools.partial(jax.jit, static_argnames=('count', 'by'))
def _easiest(delta: Array, mean: Array, std: Array, *, count: int, by: str) -> tuple[Array, Array]:
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


def neuron_attack_report(
    result: NeuronAttackResult, counts: Sequence[int] = (1, 4, 8, 16)
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


# --------------------------------------------------------------------- on a layer or a neuron


def latent_attack_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''],
    step_size: float | Float[Array, ''],
    restarts: int | Int[Array, ''] = 1,
    layer: str = 'head:in',
    straight_layer: str | None = None,
) -> AttackResult:
    """The attack on one example: the function that `latent_attack` maps over a batch.

    It has the arguments and errors of `latent_attack`, with `x` one image and `y` its label;
    `steps` and `restarts` may be traced, and `step_size` has no default.
    """
    run = _runner(forward, variables, layer, straight_layer)
    features, logits = run(x, key)

    def distance(activation: Array) -> Array:
        return _norm(activation - features)

    def see(image: Array, value: Array, _: Array, logits: Array) -> Iterate:
        return judge(image, logits, y, value)

    clean = judge(x, logits, y, jnp.zeros((), features.dtype))
    best = _ascend(
        run,
        distance,
        see,
        stronger,
        clean,
        x,
        key,
        threat=threat,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        # The clean image has distance 0 and no gradient.
        start='random',
    )
    best = choose(clean.fools, clean, best)
    return AttackResult(best.x, best.fools, best.margin, 1 + restarts * (jnp.int32(steps) + 1))


def latent_attack(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    layer: str = 'head:in',
    steps: int = 20,
    step_size: float | Float[Array, ''] | None = None,
    restarts: int = 1,
    straight_layer: str | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Moves the activation h of a layer as far as possible from that of the image, jit-compiled.

    Projected steepest ascent of ||h(x') - h(x)||_2 from a random start; labels only judge the
    iterates. Images that are misclassified already come back unchanged.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the starts, and of a random model.
      threat: the perturbations allowed.
      layer: name of the layer.
      steps: gradient steps per restart, at least 1.
      step_size: length of a step in the threat's norm; 2.5 eps / steps by default.
      restarts: independent runs, of which the strongest iterate counts, at least 1.
      straight_layer: as of `neuron_attack`.
      index: identity of each example `[B]`; by default its place in this batch.

    Returns:
      Per example an iterate that fools, if any does, and the farthest of those.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a number is out of range, or images are not finite or out of bounds.
    """
    _check_steps(steps, restarts, 'random')
    return attack_batch(
        latent_attack_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        shared={
            'steps': steps,
            'step_size': 2.5 * threat.eps / steps if step_size is None else step_size,
            'restarts': restarts,
        },
        options={'layer': layer, 'straight_layer': straight_layer},
    )


def activation_attack_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    neuron: Int[Array, ''],
    sign: int | Int[Array, ''] = 1,
    steps: int | Int[Array, ''],
    step_size: float | Float[Array, ''],
    restarts: int | Int[Array, ''] = 1,
    layer: str,
    unit: str = 'channel',
    start: str = 'clean',
    straight_layer: str | None = None,
) -> ActivationResult:
    """The attack on one example: the function that `activation_attack` maps over a batch.

    It has the arguments and errors of `activation_attack`, with `x` one image, `y` its label and
    `neuron` one index; numbers may be traced, and `step_size` has no default.
    """
    units.check_unit(unit)
    run = _runner(forward, variables, layer, straight_layer)
    features, logits = run(x, key)
    direction = units.direction(neuron, features.shape, unit, features.dtype)

    def height(activation: Array) -> Array:
        return sign * (activation * direction).sum()

    def see(image: Array, value: Array, _: Array, logits: Array) -> Iterate:
        return judge(image, logits, y, value)

    def keep(new: Iterate, best: Iterate) -> Iterate:
        return choose(new.loss > best.loss, new, best)

    clean = judge(x, logits, y, height(features))
    best = _ascend(
        run,
        height,
        see,
        keep,
        clean,
        x,
        key,
        threat=threat,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        start=start,
    )
    queries = 1 + restarts * (jnp.int32(steps) + 1)
    return ActivationResult(
        best.x, best.fools, best.margin, queries, sign * clean.loss, sign * best.loss
    )


def activation_attack(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    layer: str,
    neuron: int | Int[Array, ' batch'],
    sign: int = 1,
    unit: str = 'channel',
    steps: int = 20,
    step_size: float | Float[Array, ''] | None = None,
    start: str = 'clean',
    restarts: int = 1,
    straight_layer: str | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> ActivationResult:
    """Raises or lowers the value of one neuron as far as possible, jit-compiled.

    Projected steepest ascent of the neuron's value: for a channel the sum over its positions.
    Labels only say whether the image found is misclassified; every image is attacked.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the starts, and of a random model.
      threat: the perturbations allowed.
      layer: name of the layer.
      neuron: index of the neuron, one for all or one for each image `[B]`.
      sign: 1 to raise its value, -1 to lower it.
      unit: `'channel'` or `'unit'`.
      steps: gradient steps per restart, at least 1.
      step_size: length of a step in the threat's norm; 2.5 eps / steps by default.
      start: `'clean'` or `'random'`; behind a ReLU a neuron that is off gives no gradient, then
        start at random or name a `straight_layer`.
      restarts: independent runs, of which the most extreme iterate counts, at least 1.
      straight_layer: as of `neuron_attack`.
      index: identity of each example `[B]`; by default its place in this batch.

    Returns:
      Per example the image of the most extreme value, and the value before and after.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a number or choice is out of range, the neuron does not exist, or images are not
        finite or out of bounds.
    """
    _check_steps(steps, restarts, start)
    units.check_unit(unit)
    if sign not in (1, -1):
        raise ValueError(f'sign is {sign!r}; it must be 1 to raise the neuron or -1 to lower it.')
    x, neurons = jnp.asarray(x), jnp.asarray(neuron)
    if neurons.ndim > 1:
        raise ValueError(f'neuron has shape {neurons.shape}; it must be one index, or [B].')
    _check_indices(forward, variables, x, neurons, layer, unit)
    return attack_batch(
        activation_attack_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'neuron': jnp.broadcast_to(neurons, x.shape[:1]) if not neurons.ndim else neurons},
        shared={
            'sign': sign,
            'steps': steps,
            'step_size': 2.5 * threat.eps / steps if step_size is None else step_size,
            'restarts': restarts,
        },
        options={
            'layer': layer,
            'unit': unit,
            'start': start,
            'straight_layer': straight_layer,
        },
    )

"""Attacks on a representation for its own sake: on a whole layer, or on the value of one neuron."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens.attacks.batches import attack_batch, check_batch
from neurosens.attacks.representation import (
    activation_and_logits,
    ascend,
    check_indices,
    check_steps,
    l2_norm,
)
from neurosens.attacks.result import AttackResult, Iterate, choose, judge, stronger
from neurosens.attacks.threat import Threat, default_step, require_ball
from neurosens.forward import Forward, Variables
from neurosens.neurons import units


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
    require_ball('latent_attack', threat)
    run = activation_and_logits(forward, variables, layer, straight_layer)
    features, logits = run(x, key)

    def distance(activation: Array) -> Array:
        return l2_norm(activation - features)

    def see(image: Array, value: Array, _: Array, logits: Array) -> Iterate:
        return judge(image, logits, y, value)

    clean = judge(x, logits, y, jnp.zeros((), features.dtype))
    best = ascend(
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
      ValueError: a number is out of range, images are not finite or out of bounds, or a label is no
        class.
    """
    check_steps(steps, restarts, 'random')
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
            'step_size': default_step(threat, jnp.shape(x)[1:], 2.5 / steps)
            if step_size is None
            else step_size,
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
    require_ball('activation_attack', threat)
    run = activation_and_logits(forward, variables, layer, straight_layer)
    features, logits = run(x, key)
    direction = units.direction(neuron, features.shape, unit, features.dtype)

    def height(activation: Array) -> Array:
        return sign * (activation * direction).sum()

    def see(image: Array, value: Array, _: Array, logits: Array) -> Iterate:
        return judge(image, logits, y, value)

    def keep(new: Iterate, best: Iterate) -> Iterate:
        return choose(new.loss > best.loss, new, best)

    clean = judge(x, logits, y, height(features))
    best = ascend(
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
      ValueError: a number or choice is out of range, the neuron does not exist, images are not
        finite or out of bounds, or a label is no class.
    """
    check_steps(steps, restarts, start)
    units.check_unit(unit)
    if sign not in (1, -1):
        raise ValueError(f'sign is {sign!r}; it must be 1 to raise the neuron or -1 to lower it.')
    x, neurons = jnp.asarray(x), jnp.asarray(neuron)
    check_batch(x, jnp.asarray(y))
    if neurons.ndim > 1:
        raise ValueError(f'neuron has shape {neurons.shape}; it must be one index, or [B].')
    check_indices(forward, variables, x, neurons, layer, unit)
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
            'step_size': default_step(threat, jnp.shape(x)[1:], 2.5 / steps)
            if step_size is None
            else step_size,
            'restarts': restarts,
        },
        options={
            'layer': layer,
            'unit': unit,
            'start': start,
            'straight_layer': straight_layer,
        },
    )

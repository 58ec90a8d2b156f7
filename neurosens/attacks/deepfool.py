"""DeepFool: step by step onto the nearest linearised boundary (Moosavi-Dezfooli et al. 2016)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.fab import to_hyperplane
from neurosens.attacks.minimum import MinimumResult, within
from neurosens.attacks.result import fooled, logits_of
from neurosens.attacks.threat import DUAL, Threat, length, require_ball
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables

_TINY = 1e-12


class _State(NamedTuple):
    x: Array
    change: Array
    fools: Array
    steps: Array


def deepfool_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''] = 50,
    overshoot: float | Float[Array, ''] = 0.02,
    classes: int | None = None,
    early_end: bool = False,
) -> MinimumResult:
    """DeepFool on one example: the function that `deepfool` maps over a batch.

    It has the arguments and errors of `deepfool`, with `x` one image and `y` its label; `steps` and
    `overshoot` may be traced. With `early_end` a batch of examples takes only as many steps as its
    slowest, for which devices that share it have to exchange whether they are done. Returns one
    image and scalars.
    """
    del key
    require_ball('deepfool', threat)
    dual = DUAL[threat.norm]
    logits_fast = with_fast_input_gradients(lambda image: logits_of(forward, variables, image))
    clean = logits_of(forward, variables, x)
    count = clean.shape[-1] if classes is None else min(classes, clean.shape[-1])
    # The classes nearest at the start, without the label itself. Sorted, since `top_k` would gather
    # a batch split over devices.
    others = jnp.where(jnp.arange(clean.shape[-1]) == y, -jnp.inf, clean)
    rivals = jnp.argsort(others, descending=True)[: count - 1]

    def step(state: _State) -> _State:
        logits, pull = jax.vjp(logits_fast, state.x)
        basis = jnp.eye(logits.shape[-1], dtype=logits.dtype)
        gradients = jax.vmap(lambda c: pull(basis[c] - basis[y])[0])(rivals)
        differences = logits[rivals] - logits[y]
        lengths = jax.vmap(lambda gradient: length(dual, gradient))(gradients)
        distances = jnp.abs(differences) / (lengths + _TINY)
        best = distances.argmin()
        gradient, size = gradients[best], lengths[best] + _TINY
        # Where the box takes a part of every step, or on the boundary itself, the distance alone
        # falls below what rounding leaves of it.
        least = 1e-4 * length(threat.norm, state.change)
        distance = jnp.maximum(
            distances[best], jnp.where(least > 0, least, 1e-4 * (distances[best] == 0))
        )
        if threat.norm == 'linf':
            direction = jnp.sign(gradient)
        else:
            direction = gradient / size
        if threat.norm == 'l1':
            # The steepest pixel alone would soon be black or white: the way within the box.
            change = to_hyperplane('l1', state.x, gradient, differences[best], threat.bounds)
            change = state.x - x + change
        else:
            change = state.change + distance * direction
        moved = jnp.clip(x + (1 + overshoot) * change, *threat.bounds).astype(x.dtype)
        fools = fooled(logits_of(forward, variables, moved), y)
        return _State(moved, change.astype(x.dtype), fools, state.steps + 1)

    def unfinished(state: _State) -> Array:
        return ~state.fools & (state.steps < steps)

    def advance(_: Array, state: _State) -> _State:
        done = state.fools
        return jax.tree.map(lambda old, new: jnp.where(done, old, new), state, step(state))

    start = _State(x, jnp.zeros_like(x), fooled(clean, y), jnp.int32(0))
    if early_end:
        end = jax.lax.while_loop(unfinished, step, start)
    else:
        end = jax.lax.fori_loop(0, steps, advance, start)
    distance = jnp.where(end.fools, length(threat.norm, end.x - x), jnp.inf)
    return within(forward, variables, x, y, end.x, distance, threat, 2 + 2 * end.steps)


def deepfool(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> MinimumResult:
    """DeepFool (Moosavi-Dezfooli et al. 2016), jit-compiled.

    Each step goes to the nearest boundary of the linearised model, until the prediction changes.
    Each device ends once all of its examples are misclassified; inside a caller's jit, where that
    could need exchange between devices, all steps are run.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: not used, as the attack has no randomness; there for the common call form.
      threat: norm and box of the perturbations; its eps, which may be infinite, decides on success.
      steps: largest number of steps, at least 1.
      overshoot: by how much of itself the whole perturbation is prolonged.
      classes: only that many classes of largest logit, the label among them; by default all, each
        of which costs a gradient per step.
      index: without effect.

    Returns:
      Per example the first misclassified image and its distance.

    Raises:
      ValueError: a number is out of range, images are not finite or out of bounds, or a label is no
        class.
    """
    _validate.check_whole('steps', steps)
    _validate.check_range('overshoot', overshoot, low=0)
    if classes is not None:
        _validate.check_whole('classes', classes, low=2)
    return attack_batch(
        deepfool_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        unbounded=True,
        index=index,
        shared={'steps': steps, 'overshoot': overshoot},
        options={'classes': classes, 'early_end': not isinstance(x, jax.core.Tracer)},
    )

"""The l2 attack of Carlini & Wagner 2017 (https://arxiv.org/abs/1608.04644)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.minimum import MinimumResult, within
from neurosens.attacks.result import fooled, logits_of
from neurosens.attacks.threat import Threat
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables

# Keeps the inverse of tanh finite for black and white pixels.
_SHRINK = 1 - 1e-6
_LARGEST_WEIGHT = 1e10


class _Run(NamedTuple):
    """One descent: the free variable, the state of Adam, whether it fooled, and the best so far."""

    free: Array
    adam: Any
    fools: Array
    nearest: Array
    squared: Array


class _Search(NamedTuple):
    """The binary search for the weight of the margin."""

    weight: Array
    low: Array
    high: Array
    nearest: Array
    squared: Array


def carlini_wagner_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''] = 1000,
    searches: int | Int[Array, ''] = 9,
    step_size: float | Float[Array, ''] = 0.01,
    initial_weight: float | Float[Array, ''] = 1e-3,
    confidence: float | Float[Array, ''] = 0.0,
    target: Int[Array, ''] | None = None,
) -> MinimumResult:
    """The attack on one example: the function that `carlini_wagner` maps over a batch.

    It has the arguments and errors of `carlini_wagner`, with `x` one image, `y` its label and
    `target` one class; numbers may be traced. Returns one image and scalars.
    """
    del key
    if threat.norm != 'l2':
        raise ValueError(f"carlini_wagner minimises the l2 norm; the threat's is {threat.norm!r}.")
    low, high = threat.bounds
    middle, half = (low + high) / 2, (high - low) / 2
    margin = losses.margin if target is None else losses.lead
    aim = (y,) if target is None else (y, target)
    adam = optax.adam(step_size)

    def image_of(free: Array) -> Array:
        return (middle + half * jnp.tanh(free)).astype(x.dtype)

    @with_fast_input_gradients
    def cost(free: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
        image = image_of(free)
        logits = logits_of(forward, variables, image)
        squared = ((image - x) ** 2).sum()
        lacking = jnp.maximum(confidence - margin(logits, *aim), 0)
        fools = fooled(logits, y, target) & (lacking == 0)
        return squared + weight * lacking, (squared, fools)

    start = jnp.arctanh(jnp.clip((x - middle) / half, -1, 1) * _SHRINK)

    def search(_: Array, state: _Search) -> _Search:
        def step(_: Array, run: _Run) -> _Run:
            (_, (squared, fools)), gradient = jax.value_and_grad(cost, has_aux=True)(
                run.free, state.weight
            )
            change, moments = adam.update(gradient, run.adam)
            nearer = fools & (squared < run.squared)
            return _Run(
                optax.apply_updates(run.free, change),
                moments,
                run.fools | fools,
                jnp.where(nearer, image_of(run.free), run.nearest),
                jnp.where(nearer, squared, run.squared),
            )

        begun = _Run(start, adam.init(start), jnp.asarray(False), state.nearest, state.squared)
        run = jax.lax.fori_loop(0, steps, step, begun)
        # The smallest weight that fools gives the smallest perturbation.
        lower = jnp.where(run.fools, state.low, state.weight)
        upper = jnp.where(run.fools, jnp.minimum(state.high, state.weight), state.high)
        bracketed = upper < _LARGEST_WEIGHT
        weight = jnp.where(bracketed, (lower + upper) / 2, state.weight * 10)
        return _Search(weight, lower, upper, run.nearest, run.squared)

    scalar = jnp.zeros((), start.dtype)
    begun = _Search(scalar + initial_weight, scalar, scalar + _LARGEST_WEIGHT, x, scalar + jnp.inf)
    end = jax.lax.fori_loop(0, searches, search, begun)
    clean = fooled(logits_of(forward, variables, x), y, target)
    nearest = jnp.where(clean, x, end.nearest)
    distance = jnp.where(clean, 0, jnp.sqrt(end.squared))
    queries = jnp.int32(2) + steps * searches
    return within(forward, variables, x, y, nearest, distance, threat, queries)


def carlini_wagner(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 1000,
    searches: int = 9,
    step_size: float = 0.01,
    initial_weight: float = 1e-3,
    confidence: float = 0.0,
    target: Int[Array, ' batch'] | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> MinimumResult:
    """The l2 attack of Carlini & Wagner 2017, jit-compiled.

    Adam minimises ||x' - x||^2 + c max(confidence - margin, 0) over the inverse tanh of x', which
    keeps x' inside the box; a binary search finds the smallest c that fools.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: not used, as the attack has no randomness; there for the common call form.
      threat: box of the perturbations, of norm `'l2'`; its eps, which may be infinite, decides on
        success.
      steps: steps of Adam for each c, at least 1.
      searches: how many c, at least 1.
      step_size: of Adam.
      initial_weight: the first c.
      confidence: by how much the logit of another class has to exceed the label's (that of the
        target: every other).
      target: classes aimed at `[B]`; success is then to be classified as them.
      index: without effect.

    Returns:
      Per example the nearest image that fools the model and its distance.

    Raises:
      ValueError: the norm is not l2, a number is out of range, images are not finite or out of
        bounds, or a label is no class.
    """
    _validate.check_whole('steps', steps)
    _validate.check_whole('searches', searches)
    _validate.check_range('step_size', step_size, low=0, low_open=True)
    _validate.check_range('initial_weight', initial_weight, low=0, low_open=True)
    _validate.check_range('confidence', confidence, low=0)
    return attack_batch(
        carlini_wagner_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        unbounded=True,
        index=index,
        each={'target': target},
        shared={
            'steps': steps,
            'searches': searches,
            'step_size': step_size,
            'initial_weight': initial_weight,
            'confidence': confidence,
        },
    )

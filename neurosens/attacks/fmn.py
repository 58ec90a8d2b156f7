"""FMN: the fast minimum-norm attack (Pintor et al. 2021, https://arxiv.org/abs/2102.12827)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.minimum import MinimumResult, within
from neurosens.attacks.objective import objective
from neurosens.attacks.threat import DUAL, Threat, length, project, require_ball
from neurosens.forward import Forward, Variables

_TINY = 1e-12


class _State(NamedTuple):
    x: Array
    radius: Array
    nearest: Array
    distance: Array


def fmn_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''] = 100,
    step_size: float | Float[Array, ''] = 1.0,
    last_step_size: float | Float[Array, ''] = 0.01,
    gamma: float | Float[Array, ''] = 0.05,
    last_gamma: float | Float[Array, ''] = 0.001,
    target: Int[Array, ''] | None = None,
) -> MinimumResult:
    """FMN on one example: the function that `fmn` maps over a batch.

    It has the arguments and errors of `fmn`, with `x` one image, `y` its label and `target` one
    class; numbers may be traced. Returns one image and scalars.
    """
    require_ball('fmn', threat)
    loss = losses.margin if target is None else losses.lead
    # Distances along the way must be of one and the same model.
    look, climb = objective(forward, variables, y, loss, target=target, redrawn=False)
    norm, bounds = threat.norm, threat.bounds

    def annealed(first: float | Array, last: float | Array, number: Array) -> Array:
        return last + (first - last) * (1 + jnp.cos(jnp.pi * number / steps)) / 2

    def nearest_of(state: _State, image: Array, fools: Array) -> _State:
        distance = length(norm, image - x)
        nearer = fools & (distance < state.distance)
        return state._replace(
            nearest=jnp.where(nearer, image, state.nearest),
            distance=jnp.where(nearer, distance, state.distance),
        )

    def step(number: Array, state: _State) -> _State:
        gradient, iterate = climb(state.x, key)
        state = nearest_of(state, state.x, iterate.fools)
        size = annealed(step_size, last_step_size, number)
        shrink = annealed(gamma, last_gamma, number)
        found = jnp.isfinite(state.distance)
        # Beyond the boundary the radius shrinks; before it, it grows: as far as the linearised
        # boundary while nothing was found yet, a little afterwards.
        reach = jnp.abs(iterate.loss) / (length(DUAL[norm], gradient) + _TINY)
        estimate = length(norm, state.x - x) + reach
        grown = jnp.where(found, state.radius * (1 + shrink), estimate)
        shrunk = jnp.minimum(state.radius * (1 - shrink), state.distance * (1 - shrink))
        radius = jnp.where(iterate.fools, shrunk, grown)
        radius = jnp.minimum(radius, state.distance)
        direction = gradient / (length('l2', gradient) + _TINY)
        moved = state.x + size * direction
        moved = project(Threat(norm, radius, bounds), x, moved).astype(x.dtype)
        return state._replace(x=moved, radius=radius.astype(x.dtype))

    infinite = jnp.asarray(jnp.inf, x.dtype)
    state = jax.lax.fori_loop(0, steps, step, _State(x, infinite, x, infinite))
    last = look(state.x, key)
    state = nearest_of(state, state.x, last.fools)
    queries = jnp.int32(2) + steps
    return within(forward, variables, x, y, state.nearest, state.distance, threat, queries)


def fmn(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 100,
    step_size: float = 1.0,
    last_step_size: float = 0.01,
    gamma: float = 0.05,
    last_gamma: float = 0.001,
    target: Int[Array, ' batch'] | None = None,
    index: Int[Array, ' batch'] | None = None,
) -> MinimumResult:
    """The fast minimum-norm attack (Pintor et al. 2021), jit-compiled.

    Gradient ascent on the margin in a ball whose radius shrinks where the image fools the model and
    grows where it does not; both by a factor that decays with a cosine.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: not used; FMN takes no random decisions, and a random model keeps its own draw.
      threat: norm and box of the perturbations; its eps, which may be infinite, decides on success.
      steps: gradient steps, at least 1.
      step_size: Euclidean length of the first step.
      last_step_size: of the last one.
      gamma: change of the radius in the first step, relative to it.
      last_gamma: in the last one.
      target: classes aimed at `[B]`; success is then to be classified as them.
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example the nearest image that fools the model and its distance.

    Raises:
      ValueError: a number is out of range, images are not finite or out of bounds, or a label is no
        class.
    """
    _validate.check_whole('steps', steps)
    _validate.check_range('step_size', step_size, low=0, low_open=True)
    _validate.check_range('last_step_size', last_step_size, low=0, low_open=True)
    _validate.check_range('gamma', gamma, low=0, high=1)
    _validate.check_range('last_gamma', last_gamma, low=0, high=1)
    return attack_batch(
        fmn_example,
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
            'step_size': step_size,
            'last_step_size': last_step_size,
            'gamma': gamma,
            'last_gamma': last_gamma,
        },
    )

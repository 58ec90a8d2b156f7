"""FAB: the fast adaptive boundary attack, which looks for the smallest perturbation.

Croce & Hein 2020, https://arxiv.org/abs/1907.02044.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.minimum import MinimumResult, within
from neurosens.attacks.result import fooled, logits_of
from neurosens.attacks.threat import DUAL, Threat, largest_float, length, require_ball
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, Variables

_TINY = 1e-12
_LEAST = 1e-8


def to_hyperplane(
    norm: str,
    point: Float[Array, '...'],
    normal: Float[Array, '...'],
    excess: Float[Array, ''],
    bounds: tuple[float, float],
    *,
    early_end: bool = False,
) -> Float[Array, '...']:
    """The smallest change that takes a point of the box to a hyperplane, without leaving the box.

    A pixel moves against the sign of the normal, by min(t s, room) with s = 1 for linf and |w| for
    l2; t is the root of a piecewise linear equation. For l1 the pixels of largest |w| move, as far
    as the box lets them. Where the hyperplane does not cross the box, all move as far as they can.

    Args:
      norm: what is smallest: `'linf'`, `'l2'` or `'l1'`.
      point: an image inside the box.
      normal: w, the normal of the hyperplane.
      excess: w . point - b, which the change has to take to 0.
      bounds: smallest and largest pixel value.
      early_end: look for t only as long as it takes, in linf and l2. In a batch all wait for the
        slowest, which devices that share one program would have to tell each other.

    Returns:
      The change, of the shape of the point.
    """
    # As vectors: XLA:CPU is slow at sums over several short axes.
    shape, point, normal = point.shape, point.ravel(), normal.ravel()
    side = jnp.where(excess >= 0, 1, -1).astype(point.dtype)
    normal, excess = side * normal, side * excess
    room = jnp.where(normal > 0, point - bounds[0], bounds[1] - point)
    room = jnp.where(normal != 0, jnp.maximum(room, 0), 0)
    # Scaled to what can move: squares of the tiny gradients of a confident model are 0 in float32.
    weight = jnp.where(room > 0, jnp.abs(normal), 0)
    largest = jnp.where(weight.max() > 0, weight.max(), 1)
    weight, excess = weight / largest, excess / largest
    # The gain of the whole room; more than that cannot be had.
    gain = weight * room
    if norm == 'l1':
        least = largest_float(
            lambda value: jnp.where(weight >= value, gain, 0).sum() >= excess, point.dtype
        )
        above, level = weight > least, weight == least
        rest = excess - jnp.where(above, gain, 0).sum()
        shared = jnp.where(level, gain, 0).sum()
        # Pixels of equal weight move by equal shares of their room.
        part = jnp.clip(rest / jnp.where(shared > 0, shared, 1), 0, 1)
        move = jnp.where(above, room, jnp.where(level, part * room, 0))
    else:
        speed = jnp.ones_like(weight) if norm == 'linf' else weight

        def next_time(time: Array) -> Array:
            """When the gain would suffice if no more pixels than by now came to a border."""
            capped = time * speed >= room
            rest = excess - jnp.where(capped, gain, 0).sum()
            rate = jnp.where(capped, 0, weight * speed).sum()
            return jnp.where(rate > 0, rest / jnp.where(rate > 0, rate, 1), time)

        if early_end:
            # Newton's method: the gain is concave in time, so that no round passes the root, and
            # there are only so many borders. Mostly under 10 rounds, against one per bit.
            # The last but one counts: with rounding the last may be before it.
            first = next_time(jnp.zeros((), point.dtype))
            time, _ = jax.lax.while_loop(
                lambda times: times[1] > times[0],
                lambda times: (times[1], next_time(times[1])),
                (jnp.zeros_like(first), first),
            )
        else:
            time = next_time(
                largest_float(
                    lambda time: (weight * jnp.minimum(time * speed, room)).sum() <= excess,
                    point.dtype,
                )
            )
        move = jnp.minimum(jnp.maximum(time, 0) * speed, room)
    move = jnp.where(gain.sum() > excess, move, room)
    return (-jnp.sign(normal) * move).reshape(shape)


class _State(NamedTuple):
    x: Array
    nearest: Array
    distance: Array


def fab_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Int[Array, ''] = 100,
    restarts: int | Int[Array, ''] = 1,
    target: Int[Array, ''] | None = None,
    alpha_max: float | Float[Array, ''] = 0.1,
    eta: float | Float[Array, ''] = 1.05,
    beta: float | Float[Array, ''] = 0.9,
    random_first: bool = False,
    early_end: bool = False,
) -> MinimumResult:
    """FAB on one example: the function that `fab` maps over a batch.

    It has the arguments and errors of `fab`, with `x` one image, `y` its label and `target` one
    class; numbers may be traced. `early_end` as of `to_hyperplane`. Returns one image and scalars.
    """
    require_ball('fab', threat)
    norm, bounds = threat.norm, threat.bounds
    way = functools.partial(to_hyperplane, early_end=early_end)
    logits_fast = with_fast_input_gradients(lambda image: logits_of(forward, variables, image))

    def boundary(image: Array) -> tuple[Array, Array]:
        """Value z_c - z_y and gradient for the class whose linearised boundary is nearest."""
        logits, pull = jax.vjp(logits_fast, image)
        classes = jnp.eye(logits.shape[-1], dtype=logits.dtype)
        if target is not None:
            return logits[target] - logits[y], pull(classes[target] - classes[y])[0]
        differences = logits - logits[y]
        gradients = jax.vmap(lambda cotangent: pull(cotangent)[0])(classes - classes[y])
        lengths = jax.vmap(lambda gradient: length(DUAL[norm], gradient))(gradients)
        distances = jnp.abs(differences) / (lengths + _TINY)
        best = jnp.where(jnp.arange(len(classes)) == y, jnp.inf, distances).argmin()
        return differences[best], gradients[best]

    def step(_: Array, state: _State) -> _State:
        value, gradient = boundary(state.x)
        # The boundary is where value + gradient . (v - x) = 0.
        offset = jnp.vdot(gradient, x - state.x)
        here = way(norm, state.x, gradient, value, bounds)
        there = way(norm, x, gradient, value + offset, bounds)
        size_here = jnp.maximum(length(norm, here), _LEAST)
        size_there = jnp.maximum(length(norm, there), _LEAST)
        alpha = jnp.clip(size_here / (size_here + size_there), 0, alpha_max)
        moved = (1 - alpha) * (state.x + eta * here) + alpha * (x + eta * there)
        moved = jnp.clip(moved, *bounds).astype(x.dtype)
        fools = fooled(logits_of(forward, variables, moved), y)
        distance = length(norm, moved - x)
        nearer = fools & (distance < state.distance)
        return _State(
            jnp.where(fools, x + beta * (moved - x), moved).astype(x.dtype),
            jnp.where(nearer, moved, state.nearest),
            jnp.where(nearer, distance, state.distance),
        )

    def restart(number: Array, found: _State) -> _State:
        own = jax.random.fold_in(key, number)
        radius = jnp.minimum(found.distance, threat.eps)
        radius = jnp.where(jnp.isfinite(radius), radius, bounds[1] - bounds[0]) / 2
        away = jnp.clip(x + radius * _direction(norm, x, own), *bounds).astype(x.dtype)
        start = away if random_first else jnp.where(number == 0, x, away)
        return jax.lax.fori_loop(0, steps, step, found._replace(x=start))

    clean = logits_of(forward, variables, x)
    none = _State(x, x, jnp.asarray(jnp.inf, x.dtype))
    found = jax.lax.fori_loop(0, restarts, restart, none)
    wrong = fooled(clean, y)
    distance = jnp.where(wrong, 0, found.distance)
    nearest = jnp.where(wrong, x, found.nearest)
    queries = jnp.int32(2) + restarts * steps * 2
    return within(forward, variables, x, y, nearest, distance, threat, queries)


def _direction(norm: str, x: Array, key: PRNGKeyArray) -> Array:
    """A random direction of length 1 in the norm."""
    if norm == 'linf':
        change = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    else:
        change = jax.random.normal(key, x.shape, x.dtype)
    return change / length(norm, change)


def fab(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 100,
    restarts: int = 1,
    target: Int[Array, ' batch'] | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    random_first: bool = False,
    index: Int[Array, ' batch'] | None = None,
) -> MinimumResult:
    """The fast adaptive boundary attack (Croce & Hein 2020), jit-compiled.

    Linearises the nearest decision boundary and goes beyond it, on a way biased towards the clean
    image. One gradient for each class and step, or a single one with a target.

    Args:
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of the restarts.
      threat: norm and box of the perturbations; its eps, which may be infinite, decides on success
        and bounds the random starts.
      steps: steps per restart, at least 1.
      restarts: runs, at least 1; the first from the clean image, the others from random places at
        half the smallest distance found.
      target: the class whose boundary is followed for each image `[B]` (FAB-T). Success is any
        class but the label.
      alpha_max: largest weight of the clean image.
      eta: how far beyond the boundary, at least 1.
      beta: how far a misclassified iterate stays from the clean image, at most 1.
      random_first: start at random already in the first run.
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example the nearest misclassified image and its distance.

    Raises:
      ValueError: a number is out of range, images are not finite or out of bounds, or a label is no
        class.
    """
    _validate.check_whole('steps', steps)
    _validate.check_whole('restarts', restarts)
    _validate.check_range('alpha_max', alpha_max, low=0, high=1)
    _validate.check_range('eta', eta, low=1)
    _validate.check_range('beta', beta, low=0, high=1)
    return attack_batch(
        fab_example,
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
            'restarts': restarts,
            'alpha_max': alpha_max,
            'eta': eta,
            'beta': beta,
        },
        options={'random_first': random_first, 'early_end': not isinstance(x, jax.core.Tracer)},
    )

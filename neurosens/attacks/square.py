"""Square attack: random search with the logits alone (Andriushchenko et al. 2020).

https://arxiv.org/abs/1912.00049; for l1 as in AutoAttack. Windows lie at places of their own in
each example, where the authors' program draws one place for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks import losses
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.objective import objective
from neurosens.attacks.result import AttackResult, Iterate, choose, stronger
from neurosens.attacks.threat import Threat, length, project, require_ball
from neurosens.forward import Forward, Variables

# The share of the image that a window covers is halved after so many queries of 10,000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12
# Keeps projected images inside the l1 ball in spite of rounding.
_L1_SLACK = 1 - 1e-6


def window_sides(
    queries: int, height: int, width: int, share: float, *, odd: bool, rescale: bool = False
) -> Int[np.ndarray, ' queries']:
    """The side of the window of each query.

    Args:
      queries: number of queries.
      height: of the image.
      width: of the image.
      share: share of the pixels in the first windows.
      odd: sides of l2 and l1: odd and at least 3.
      rescale: stretch the schedule of 10,000 queries over as many as there are.

    Returns:
      Sides in pixels, at most the shorter side of the image.
    """
    number = np.arange(queries)
    if rescale:
        number = number * 10_000 // queries
    halvings = (number[:, None] > np.array(_HALVINGS)).sum(1)
    sides = np.rint(np.sqrt(share / 2.0**halvings * height * width)).astype(int)
    sides = np.maximum(sides, 3 if odd else 1)
    if odd:
        sides += sides % 2 == 0
    shorter = min(height, width)
    return np.minimum(sides, shorter - (odd and shorter % 2 == 0)).astype(np.int32)


def bump(side: int, power: int) -> Float[np.ndarray, 'side side']:
    """The perturbation of a window for l2 and l1: two halves of opposite sign.

    Each half is a stack of centred rectangles that grow by a pixel on all sides and add 1/(k+1)^p.

    Args:
      side: side of the window, at least 2.
      power: p; 2 for l2 and 4 for l1.

    Returns:
      Values of l2 norm 1 (p = 2) or l1 norm 1 (p = 4).
    """
    norm = 2 if power == 2 else 1
    upper, lower = side // 2, side - side // 2
    values = np.concatenate([_pyramid(upper, side, power), -_pyramid(lower, side, power)])
    return values / np.linalg.norm(values.ravel(), norm)


def _pyramid(height: int, width: int, power: int) -> Float[np.ndarray, 'height width']:
    values = np.zeros((height, width))
    row, column = height // 2, width // 2
    for step in range(max(row, column) + 1):
        rows = slice(max(row - step, 0), row + step + 1)
        values[rows, max(column - step, 0) : column + step + 1] += 1.0 / (step + 1) ** power
    return values / np.linalg.norm(values.ravel(), 2 if power == 2 else 1)


class _State(NamedTuple):
    best: Iterate
    queries: Array


def square_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'height width channels'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    queries: int = 5000,
    share: float = 0.8,
    restarts: int | Int[Array, ''] = 1,
    loss: str | losses.Loss | None = None,
    target: Int[Array, ''] | None = None,
    rescale: bool = False,
) -> AttackResult:
    """Square attack on one example: the function that `square` maps over a batch.

    It has the arguments and errors of `square`, with `x` one image, `y` its label and `target` one
    class; `restarts` may be traced. Returns one image and scalars.
    """
    require_ball('square', threat)
    if x.ndim != 3:
        raise ValueError(
            f'An image has shape {x.shape}; Square needs [height, width, channels] each.'
        )
    if loss is None:
        loss = 'margin' if target is None else 'lead'
    loss = losses.named(loss, targeted=target is not None)
    look, _ = objective(forward, variables, y, loss, target=target)
    sparse = threat.norm != 'linf'
    height, width, _ = x.shape
    sides = window_sides(queries, height, width, share, odd=sparse, rescale=rescale)
    propose = _proposer(threat, x, sides)

    def restart(number: Array, overall: _State) -> _State:
        own = jax.random.fold_in(key, number)

        def query(number: Array, state: _State) -> _State:
            step_key = jax.random.fold_in(own, number)
            tried = look(propose(state.best.x, number, step_key), step_key)
            accept = ~state.best.fools & (tried.fools | (tried.loss > state.best.loss))
            count = state.queries + ~state.best.fools
            return _State(choose(accept, tried, state.best), count)

        start_key = jax.random.fold_in(own, queries)
        first = look(_start(threat, x, start_key), start_key)
        first = choose(overall.best.fools, overall.best, first)
        begun = _State(first, overall.queries + ~overall.best.fools)
        ended = jax.lax.fori_loop(0, queries - 1, query, begun)
        return ended._replace(best=stronger(ended.best, overall.best))

    clean = look(x, key)
    state = jax.lax.fori_loop(0, restarts, restart, _State(clean, jnp.int32(1)))
    best = choose(clean.fools, clean, state.best)
    return AttackResult(best.x, best.fools, best.margin, state.queries)


def _start(threat: Threat, x: Array, key: PRNGKeyArray) -> Array:
    """Vertical stripes for linf, a grid of signed bumps for l2 and l1."""
    height, width, channels = x.shape
    if threat.norm == 'linf':
        stripes = jax.random.rademacher(key, (1, width, channels), x.dtype)
        return project(threat, x, x + threat.eps * stripes)
    side = max(height // 5, 2)
    tile = jnp.asarray(bump(side, 2 if threat.norm == 'l2' else 4), x.dtype)
    rows, columns = height // side, width // side
    sign_key, turn_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (rows, columns, channels), x.dtype)
    turned = jax.random.bernoulli(turn_key, 0.5, (rows, columns, 1, 1))
    tiles = jnp.where(turned, tile.T, tile)
    grid = jnp.einsum('rcab,rck->racbk', tiles, signs)
    grid = grid.reshape(rows * side, columns * side, channels)
    before = (height - rows * side) // 2, (width - columns * side) // 2
    padding = [
        (low, total - used - low)
        for low, total, used in zip(before, (height, width), grid.shape[:2])
    ]
    return _normalized(threat, x, jnp.pad(grid, (*padding, (0, 0))))


def _normalized(threat: Threat, x: Array, change: Array) -> Array:
    """The image moved by as much of a change as the threat allows."""
    if threat.norm == 'l1':
        return project(Threat('l1', threat.eps * _L1_SLACK, threat.bounds), x, x + change)
    size = length('l2', change)
    return jnp.clip(x + change * (threat.eps / (size + _TINY)), *threat.bounds)


def _window(
    x: Array, side: Int[Array, ''], key: PRNGKeyArray
) -> tuple[Array, Array, Bool[Array, 'height width 1']]:
    """Corner of a window at a random place, and its mask."""
    height, width = x.shape[:2]
    row_key, column_key = jax.random.split(key)
    row = jax.random.randint(row_key, (), 0, height - side + 1)
    column = jax.random.randint(column_key, (), 0, width - side + 1)

    def covers(count: int, start: Array) -> Array:
        place = jnp.arange(count)
        return (place >= start) & (place < start + side)

    mask = covers(height, row)[:, None, None] & covers(width, column)[None, :, None]
    return row, column, mask


def _proposer(
    threat: Threat, x: Array, sides: Int[np.ndarray, ' queries']
) -> Callable[[Array, Array, PRNGKeyArray], Array]:
    """A function from the best image so far, the number of a query and a key to a new image."""
    height, width, channels = x.shape
    side_of = jnp.asarray(sides)
    if threat.norm == 'linf':

        def flip(image: Array, number: Array, key: PRNGKeyArray) -> Array:
            sign_key, place_key = jax.random.split(key)
            signs = jax.random.rademacher(sign_key, (channels,), x.dtype)
            mask = _window(x, side_of[number], place_key)[-1]
            return project(threat, x, image + 2 * threat.eps * jnp.where(mask, signs, 0))

        return flip

    squared = threat.norm == 'l2'
    known, which = np.unique(sides, return_inverse=True)
    # Each bump in the middle of a canvas twice as large, from which any place can be cut.
    canvas = np.zeros((len(known), 2 * height, 2 * width), np.float32)
    for place, side in enumerate(known):
        rows, columns = slice(height, height + side), slice(width, width + side)
        canvas[place, rows, columns] = bump(int(side), 2 if squared else 4)
    # And each of them turned.
    turned = np.zeros_like(canvas)
    for place, side in enumerate(known):
        rows, columns = slice(height, height + side), slice(width, width + side)
        turned[place, rows, columns] = canvas[place, rows, columns].T
    bumps, bump_of = jnp.asarray(np.stack([canvas, turned]), x.dtype), jnp.asarray(which)

    def by_channel(values: Array) -> Array:
        return jnp.sqrt((values**2).sum((0, 1))) if squared else jnp.abs(values).sum((0, 1))

    def move(image: Array, number: Array, key: PRNGKeyArray) -> Array:
        sign_key, turn_key, first_key, second_key = jax.random.split(key, 4)
        change = image - x
        row, column, first = _window(x, side_of[number], first_key)
        _, _, second = _window(x, side_of[number], second_key)
        turn = jax.random.bernoulli(turn_key).astype(jnp.int32)
        corner = (turn, bump_of[number], height - row, width - column)
        pattern = jax.lax.dynamic_slice(bumps, corner, (1, 1, height, width))[0, 0]
        signs = jax.random.rademacher(sign_key, (channels,), x.dtype)
        inside = jnp.where(first, change, 0)
        new = pattern[..., None] * signs + inside / (by_channel(inside) + _TINY)
        whole = length(threat.norm, change)
        freed = length(threat.norm, jnp.where(first | second, change, 0))
        # What the two windows held and what the image had left, shared out over its channels.
        if squared:
            budget = jnp.sqrt(jnp.maximum(threat.eps**2 - whole**2, 0) / channels + freed**2)
        else:
            budget = jnp.maximum(threat.eps - whole, 0) + channels * freed
        new = new / (by_channel(new) + _TINY) * budget
        return _normalized(threat, x, jnp.where(first, new, jnp.where(second, 0, change)))

    return move


def square(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch height width channels'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    queries: int = 5000,
    share: float = 0.8,
    restarts: int = 1,
    loss: str | losses.Loss | None = None,
    target: Int[Array, ' batch'] | None = None,
    rescale: bool = False,
    index: Int[Array, ' batch'] | None = None,
) -> AttackResult:
    """Square attack (Andriushchenko et al. 2020), jit-compiled: random search without gradients.

    Each query changes a square window of the best image so far and keeps it where the loss grows.
    An image that fools the model is kept as it is. Images that are misclassified already come back
    unchanged.

    Args:
      forward: the model to attack; only its logits are used.
      variables: its variables.
      x: images `[B, H, W, C]` inside the threat's bounds.
      y: labels `[B]`.
      key: randomness of windows and signs.
      threat: the perturbations allowed.
      queries: forward passes per restart, at least 1; compiled in.
      share: share of the pixels that the first windows cover, above 0 and at most 1.
      restarts: independent runs, at least 1.
      loss: what to maximise, a name of `losses.UNTARGETED` (with a target: `losses.TARGETED`) or a
        function; by default the margin, with a target its lead over all other classes.
      target: classes aimed at `[B]`; success is then to be classified as them.
      rescale: stretch the schedule of window sizes, made for 10,000 queries, over `queries`.
      index: identity of each example `[B]`, as of `pgd`.

    Returns:
      Per example an image that fools, or else that of largest loss; `queries` counts those up to
      success.

    Raises:
      ValueError: a number or choice is out of range, or images are not of 3 axes, not finite or out
        of bounds.
    """
    _validate.check_whole('queries', queries)
    _validate.check_whole('restarts', restarts)
    _validate.check_range('share', share, low=0, high=1, low_open=True)
    if loss is not None:
        losses.named(loss, targeted=target is not None)
    return attack_batch(
        square_example,
        forward,
        variables,
        x,
        y,
        key,
        threat=threat,
        index=index,
        each={'target': target},
        shared={'restarts': restarts},
        options={'queries': queries, 'share': share, 'loss': loss, 'rescale': rescale},
    )

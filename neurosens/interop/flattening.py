"""In which order layers behind a flatten take the features of a map.

PyTorch flattens feature maps channels first, Flax channels last, unless a module moves its channels
first itself. That is a reshape, which no call of a module shows: it is looked for in the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from neurosens.neurons import program

# How the values of an array are ordered. 0: features as in PyTorch, a map with its channels last.
# A positive number: a flattened map of so many channels, which come last; 1 is PyTorch's own order.
# A tuple: a map, by the places that its axes have where channels come last.
Order: TypeAlias = int | tuple[int, ...]
UNKNOWN = -1
# A map made out of features, of which PyTorch would have made one with its channels first.
UNFLATTENED = -2
_PREFIX = 'neurosens.interop/'


def marked(value: Array, path: str) -> Array:
    """The value, as the input of a layer that `orders` looks for."""
    return checkpoint_name(value, _PREFIX + path)


def orders(jaxpr: jex.Jaxpr) -> dict[str, int]:
    """In which order the inputs of layers come.

    Args:
      jaxpr: a program whose arguments are images `[B, H, W, C]`, and whose layers are marked.

    Returns:
      By path: the channels of the flattened map that a layer takes, 1 if they come first, as in
      PyTorch; 0 for features that are no flattened map, and for maps; `UNFLATTENED` for maps made
      out of features; `UNKNOWN` for features of a map that were joined, cut or exchanged.
    """
    found: dict[str, int] = {}
    _follow(jaxpr, [0] * len(jaxpr.invars), found)
    return found


def _follow(
    jaxpr: jex.Jaxpr, given: Sequence[Order | None], found: dict[str, int]
) -> list[Order | None]:
    """The orders of a program's results; None is that of arrays that no image has a part in."""
    known: dict[Any, Order | None] = dict(zip(jaxpr.invars, given))

    def order(atom: Any) -> Order | None:
        return None if isinstance(atom, jex.Literal) else known.get(atom)

    equation: Any
    for equation in jaxpr.eqns:
        inputs: list[Any] = [order(atom) for atom in equation.invars]
        if all(one is None for one in inputs):
            continue
        name = equation.params['name'] if equation.primitive.name == 'name' else ''
        if name.startswith(_PREFIX):
            (one,), (atom,) = inputs, equation.invars
            told = isinstance(one, int) and (atom.aval.ndim == 2 or one == UNFLATTENED)
            # A layer may be called again.
            found.setdefault(name.removeprefix(_PREFIX), one if told else 0)
        inner = program.inner_jaxpr(equation)
        if inner is not None:
            results = _follow(inner[0], inputs, found)
        else:
            results = [_order(equation, inputs, out.aval.shape) for out in equation.outvars]
        known.update(zip(equation.outvars, results))
    return [order(atom) for atom in jaxpr.outvars]


def _order(equation: Any, inputs: Sequence[Order | None], after: tuple[int, ...]) -> Order:
    """The order of a result of this shape."""
    operands = [
        (atom.aval.shape, order)
        for atom, order in zip(equation.invars, inputs)
        if order is not None
    ]
    before, order = operands[0]
    match equation.primitive.name:
        case 'conv_general_dilated':
            return 0
        case 'dot_general':
            return _contracted(equation, inputs, after)
        case 'reshape':
            return _reshaped(before, order, after)
        case 'transpose':
            return _transposed(order, equation.params['permutation'])
    changed = {_carried(before, order, after) for before, order in operands} - {0}
    return changed.pop() if len(changed) == 1 else UNKNOWN if changed else 0


def _carried(before: tuple[int, ...], order: Order, after: tuple[int, ...]) -> Order:
    """Of what takes each element by itself, or windows, parts or sums of several."""
    if not order or before == after or len(before) == len(after) > 2:
        return order
    # Sums of maps over positions are one number of each channel.
    return UNKNOWN if len(after) > 2 or len(before) == len(after) == 2 else 0


def _reshaped(before: tuple[int, ...], order: Order, after: tuple[int, ...]) -> Order:
    if min(len(before), len(after)) < 2:
        return 0
    if len(after) == 2 and after == (before[0], math.prod(before[1:])):
        return _flattened(before, order)
    if len(before) == 2 and len(after) > 2 and not order:
        return UNFLATTENED if math.prod(after[1:-1]) > 1 else 0
    channels = before[-1] if len(before) > 2 and not order else order
    return 0 if channels == after[-1] or not (order or len(before) > 2) else UNKNOWN


def _flattened(before: tuple[int, ...], order: Order) -> Order:
    if len(before) == 2:
        return order
    if not order:
        return before[-1]
    if order == (0, len(before) - 1, *range(1, len(before) - 1)):
        return 1
    return 0 if order == UNFLATTENED else UNKNOWN


def _transposed(order: Order, permutation: tuple[int, ...]) -> Order:
    places = order if isinstance(order, tuple) else tuple(range(len(permutation)))
    if order == UNFLATTENED:
        return 0 if tuple(permutation) == (0, *places[2:], 1) else UNKNOWN
    if len(places) < 3 or order == UNKNOWN:
        return UNKNOWN if order else 0
    return _plain(tuple(places[axis] for axis in permutation))


def _contracted(equation: Any, inputs: Sequence[Order | None], after: tuple[int, ...]) -> Order:
    """A weighted sum along one axis leaves another in its place; others are not told apart."""
    if len(after) < 3:
        return 0
    contracted, batch = equation.params['dimension_numbers']
    sides = [side for side, order in enumerate(inputs) if order is not None]
    shape, order = equation.invars[sides[0]].aval.shape, inputs[sides[0]]
    if len(sides) > 1 or batch[0] or len(contracted[0]) > 1 or len(shape) != len(after):
        return UNKNOWN
    if order in (UNKNOWN, UNFLATTENED):
        return UNKNOWN
    places = order if isinstance(order, tuple) else tuple(range(len(shape)))
    (axis,) = contracted[sides[0]]
    kept = places[:axis] + places[axis + 1 :]
    return _plain((*kept, places[axis]) if sides[0] == 0 else (places[axis], *kept))


def _plain(places: tuple[int, ...]) -> Order:
    return 0 if places == tuple(range(len(places))) else places

"""In which order layers behind a flatten take the features of a map.

PyTorch flattens feature maps channels first, Flax channels last, unless a module moves its channels
first itself. That is a reshape, which no call of a module shows: it is looked for in the program.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from neurosens.neurons import program

# How the values of an array are ordered. 0: features as in PyTorch, a map with its channels last.
# A positive number: a flattened map of so many channels, which come last; 1 is PyTorch's own order.
# A tuple: a map, by the places that its axes have in PyTorch, where channels come second.
Order: TypeAlias = int | tuple[int, ...]
UNKNOWN = -1
# A map made out of features, of which PyTorch would have made one with its channels first.
UNFLATTENED = -2
# A map whose axes are not known; features of it are `UNKNOWN`, but not one number of each channel.
_UNKNOWN_MAP = -3
# One number of each image in the place of all its features, which fits any order of theirs.
_REPEATED = -4
# An `_UNKNOWN_MAP` that was made out of features.
_REMADE = -5
# A map of which an axis was made of positions and channels, not in the order of PyTorch's axes.
MIXED = -6
# Maps whose axes have no places in PyTorch.
_PLACELESS = (UNFLATTENED, _UNKNOWN_MAP, _REMADE, MIXED)
_CHANNELS = 1
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
      out of features; `MIXED` for maps with channels made of positions, as PyTorch does not make
      them; `UNKNOWN` for features of a map that were joined, cut or exchanged.
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
            (one,) = inputs
            one = UNFLATTENED if one == _REMADE else one
            told = isinstance(one, int) and (one > 0 or one in (UNKNOWN, UNFLATTENED, MIXED))
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
    order = 0 if order == _REPEATED else order
    match equation.primitive.name:
        case 'conv_general_dilated':
            return 0
        case 'dot_general':
            return _contracted(equation, inputs, before, order, after)
        case 'reshape':
            return _reshaped(before, order, after)
        case 'transpose':
            return _transposed(order, equation.params['permutation'])
        case 'broadcast_in_dim':
            return _broadcast(before, order, equation.params['broadcast_dimensions'], after)
        case 'stack':
            others = [axis for axis in range(len(after)) if axis != equation.params['axis']]
            return _combined([(after, _inserted(*one, others, after)) for one in operands], after)
        case 'concatenate' | 'pad':
            return _combined(operands, after)
    if _of_features(order) and order != 1 and _exchanges(equation, len(before) - 1):
        return UNKNOWN
    axes = _removed_axes(equation)
    if axes and len(after) == len(before) - len(axes):
        return _without(before, order, axes)
    spread = [(one, _REPEATED if _alike(one, after) else order) for one, order in operands]
    if all(order == _REPEATED for _, order in spread):
        return _REPEATED
    return _combined([one for one in spread if one[1] != _REPEATED], after)


def _combined(operands: Sequence[tuple[tuple[int, ...], Order]], after: tuple[int, ...]) -> Order:
    """Of what takes each element by itself, or windows, parts or sums of several, or joins them."""
    changed = {_carried(before, order, after) for before, order in operands} - {0, _REPEATED}
    if len(changed) > 1:
        if any(map(_of_features, changed)):
            return UNKNOWN
        return max(map(_lost, changed), key=lambda order: order in (_REMADE, MIXED))
    if not changed:
        return 0
    (order,) = changed
    # Features of another layer have PyTorch's order, which that of a flattened map may not be.
    other = any(one == 0 and before[-1:] == after[-1:] for before, one in operands)
    exchanged = isinstance(order, int) and 1 < order < after[-1]
    return UNKNOWN if other and exchanged else order


def _alike(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether one number of each image is spread over all its features."""
    return len(before) == len(after) and math.prod(before[1:]) == 1 < math.prod(after[1:])


def _of_features(order: Order) -> bool:
    """Whether the last axis has features of a flattened map, or some axis may."""
    return isinstance(order, int) and (order > 0 or order == UNKNOWN)


def _carried(before: tuple[int, ...], order: Order, after: tuple[int, ...]) -> Order:
    if not order or before == after:
        return order
    if _of_features(order):
        if before[-1:] == after[-1:]:
            return order
        return UNKNOWN if len(after) > 1 else 0
    if len(before) == len(after):
        return order
    # Sums of maps over positions are one number of each channel.
    return _lost(order) if len(after) > 2 else 0


def _lost(order: Order) -> Order:
    """Of a map whose axes can no longer be told."""
    if order == MIXED:
        return MIXED
    return _REMADE if order in (UNFLATTENED, _REMADE) else _UNKNOWN_MAP


def _removed_axes(equation: Any) -> Sequence[int]:
    """Axes that a result may lack."""
    match equation.primitive.name:
        case 'squeeze':
            return equation.params['dimensions']
        case 'gather':
            return equation.params['dimension_numbers'].collapsed_slice_dims
        case 'unstack':
            return (equation.params['axis'],)
    return equation.params.get('axes') or ()


def _exchanges(equation: Any, axis: int) -> bool:
    """Whether values along this axis are put elsewhere, or summed up one after the other."""
    parameters = equation.params
    match equation.primitive.name:
        case 'rev':
            return axis in parameters['dimensions']
        case 'sort':
            return parameters['dimension'] == axis
        case 'gather':
            return axis in parameters['dimension_numbers'].start_index_map
        case 'cumsum' | 'cumprod' | 'cummax' | 'cummin' | 'cumlogsumexp':
            return parameters['axis'] == axis
    return False


def _without(before: tuple[int, ...], order: Order, axes: Collection[int]) -> Order:
    """Of one part, or a sum, along axes that are then gone."""
    kept = [axis for axis in range(len(before)) if axis not in axes]
    if _of_features(order):
        last = order != UNKNOWN and len(before) - 1 in kept
        return order if last else UNKNOWN if order == UNKNOWN and len(kept) > 1 else 0
    if len(kept) < 3:
        # One axis beside the batch.
        return 0
    if order in _PLACELESS:
        return _lost(order)
    places = _places(order, len(before))
    return _plain(tuple(places[axis] for axis in kept))


def _broadcast(
    before: tuple[int, ...], order: Order, dimensions: Sequence[int], after: tuple[int, ...]
) -> Order:
    """Of the same numbers along axes that are new, or were of size 1."""
    if all(size == 1 for size, axis in zip(before, dimensions) if axis):
        return _REPEATED
    return _inserted(before, order, dimensions, after)


def _inserted(
    before: tuple[int, ...], order: Order, dimensions: Sequence[int], after: tuple[int, ...]
) -> Order:
    """Of a value whose axes become these ones, among new ones."""
    if order == _REPEATED:
        return order
    last = dimensions[-1] == len(after) - 1 and before[-1] == after[-1]
    if _of_features(order):
        return order if last else UNKNOWN
    if order in _PLACELESS:
        return order if len(before) == len(after) else _lost(order)
    if not order and (last or len(before) < 3):
        return 0
    places = _places(order, len(before))
    new = [axis for axis in range(len(after)) if axis not in dimensions]
    missing = [place for place in range(len(after)) if place not in places]
    if len(new) != len(missing) or len(new) > 1:
        return _UNKNOWN_MAP
    placed = dict(zip((*dimensions, *new), (*places, *missing)))
    return _plain(tuple(placed[axis] for axis in range(len(after))))


def _reshaped(before: tuple[int, ...], order: Order, after: tuple[int, ...]) -> Order:
    again = len(before) == 2 and len(after) > 2 and order == after[-1]
    if _of_features(order) and before[-1:] == after[-1:] and not again:
        return order
    if min(len(before), len(after)) < 2:
        return 0
    if len(after) == 2 and after == (before[0], math.prod(before[1:])):
        return _flattened(before, order)
    if len(before) == 2 and not order:
        return UNFLATTENED if len(after) > 2 and math.prod(after[1:-1]) > 1 else 0
    if again or (not order and before[-1] == after[-1]):
        return 0
    # Channels stay apart from positions where they are grouped among themselves alone.
    grouped = before[-1] in itertools.accumulate(after[:0:-1], operator.mul)
    features = _of_features(order) or not (order or grouped) or len(after) == 2
    if isinstance(order, tuple) and not features and _mixes(before, order, after):
        return MIXED
    return UNKNOWN if features else _lost(order)


def _mixes(before: tuple[int, ...], places: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a reshape makes an axis of positions and channels that is not in PyTorch's order."""
    ours = _spans(before)
    for start, end in _spans(after):
        parts = [
            place for place, (low, high) in zip(places, ours) if max(low, start) < min(high, end)
        ]
        if _CHANNELS in parts and parts != sorted(parts):
            return True
    return False


def _spans(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Of each axis the step from one element to the next, and to the next of the axis before."""
    ends = [*itertools.accumulate(reversed(shape), operator.mul, initial=1)]
    return [*itertools.pairwise(ends)][::-1]


def _flattened(before: tuple[int, ...], order: Order) -> Order:
    if len(before) == 2:
        return order
    if not order:
        return before[-1]
    if isinstance(order, tuple):
        return 1 if list(order) == sorted(order) else UNKNOWN
    return 0 if order == UNFLATTENED else UNKNOWN


def _transposed(order: Order, permutation: tuple[int, ...]) -> Order:
    if order == UNFLATTENED:
        return 0 if tuple(permutation) == _places(0, len(permutation)) else _REMADE
    if _of_features(order):
        return UNKNOWN
    if len(permutation) < 3 or order in _PLACELESS:
        return order
    places = _places(order, len(permutation))
    return _plain(tuple(places[axis] for axis in permutation))


def _contracted(
    equation: Any,
    inputs: Sequence[Order | None],
    before: tuple[int, ...],
    order: Order,
    after: tuple[int, ...],
) -> Order:
    """A weighted sum along one axis leaves another in its place; others are not told apart."""
    if len(after) < 3:
        return 0
    contracted, batch = equation.params['dimension_numbers']
    sides = [side for side, order in enumerate(inputs) if order is not None]
    if any(_of_features(order) for order in inputs if order is not None):
        return UNKNOWN
    if order == MIXED:
        # The sum may be over the mixed channels, which leaves new ones.
        return _UNKNOWN_MAP
    if len(sides) > 1 or batch[0] or len(contracted[0]) > 1 or len(before) != len(after):
        return _lost(order)
    if order in _PLACELESS:
        return _lost(order)
    places = _places(order, len(before))
    (axis,) = contracted[sides[0]]
    kept = places[:axis] + places[axis + 1 :]
    return _plain((*kept, places[axis]) if sides[0] == 0 else (places[axis], *kept))


def _places(order: Order, dimensions: int) -> tuple[int, ...]:
    """The places in PyTorch of the axes of a map, which has its channels last or is a tuple."""
    return order if isinstance(order, tuple) else (0, *range(2, dimensions), _CHANNELS)


def _plain(places: tuple[int, ...]) -> Order:
    *others, last = places
    return 0 if last == _CHANNELS and others == sorted(others) else places

"""The part of a network behind a layer, when a single channel of that layer changes.

Behind a layer in either direction: the logits as a function of a channel, or, as pullbacks are
linear functions of cotangents, the input gradient as a function of a channel's cotangent.

A convolution or dense layer is linear, so its output after a change of one input channel is the
unchanged output plus what that channel's difference contributes: a C-th of the work, for C
channels. Up to the first such layer everything that treats channels apart (pooling, elementwise
functions, sums with other values, means over positions) is computed for the changed channel alone.
Only what comes after is run again in full.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from neurosens.neurons.program import Instruction, Later, Program, run

# Kernels with more taps than this are applied in full: each tap is an operation of the program.
_MOST_TAPS = 64


@dataclasses.dataclass(frozen=True)
class _Channel:
    """A value of which one channel differs from the unchanged one.

    Attributes:
      axis: the axis of the channels.
      values: the channel, with that axis of length 1.
    """

    axis: int
    values: Array


def of_channel(
    program: Program, activation: Float[Array, '... channels']
) -> Callable[[Int[Array, ''], Array], Array]:
    """The result of a program as a function of one channel of its argument.

    Args:
      program: from an activation to the logits, say, with calls inlined.
      activation: the activation of one example `[..., C]`; all but one of its channels keep it.

    Returns:
      A function of the channel's index and its values `[...]`, without the channel axis, to the
      program's result. What does not depend on the two is computed once, outside of maps and loops
      over them.
    """
    argument, output = program.argument, program.output
    base = run(program, activation)

    def result(index: Array, channel: Array) -> Array:
        changed: dict[Later, Any] = {
            argument: _Channel(activation.ndim - 1, channel[..., None].astype(activation.dtype))
        }
        for instruction in program.instructions:
            if any(isinstance(v, Later) and v in changed for v in instruction.inputs):
                results = _step(instruction, base, changed, index)
                changed.update(zip(instruction.outputs, results))
        if not isinstance(output, Later):
            return output
        return _whole(changed[output], base[output], index) if output in changed else base[output]

    return result


def _whole(value: Any, unchanged: Array, index: Array) -> Array:
    """A changed value as a plain array."""
    if not isinstance(value, _Channel):
        return value
    place = lax.broadcasted_iota(jnp.int32, unchanged.shape, value.axis)
    return jnp.where(place == index, value.values, unchanged)


def _step(
    instruction: Instruction,
    base: Mapping[Later, Array],
    changed: Mapping[Later, Any],
    index: Array,
) -> Sequence[Any]:
    """The results of one instruction: a changed channel where that is possible."""
    unchanged = [base[v] if isinstance(v, Later) else v for v in instruction.inputs]
    current = [
        changed.get(v, plain) if isinstance(v, Later) else plain
        for v, plain in zip(instruction.inputs, unchanged)
    ]
    for rule in (_elementwise, _rearranged, _pooled, _linear):
        result = rule(instruction, unchanged, current, base, index)
        if result is not None:
            return [result]
    inputs = (_whole(value, plain, index) for value, plain in zip(current, unchanged))
    return instruction.run(*inputs)


def _slice(array: Array, index: Array, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(array, index, 1, axis)


# Operations whose result at a place depends on their inputs at that place only.
_ELEMENTWISE = frozenset(
    {
        'abs', 'add', 'add_any', 'and', 'clamp', 'convert_element_type', 'copy', 'div', 'eq', 'erf',
        'exp', 'exp2', 'expm1', 'ge', 'gt', 'integer_pow', 'is_finite', 'le', 'log', 'log1p',
        'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'not', 'or', 'pow', 'rsqrt', 'select_n',
        'sign', 'sqrt', 'square', 'sub', 'tanh',
    }
)  # fmt: skip


def _elementwise(
    instruction: Instruction, unchanged: list, current: list, base: Mapping, index: Array
) -> _Channel | None:
    if instruction.primitive.name not in _ELEMENTWISE:
        return None
    axes = {value.axis for value in current if isinstance(value, _Channel)}
    shapes = [np.shape(plain) for plain in unchanged]
    # A value that changed as a whole leaves nothing to gain.
    dense = any(v is not u and not isinstance(v, _Channel) for v, u in zip(current, unchanged))
    if dense or len(axes) != 1 or len({len(shape) for shape in shapes if shape}) != 1:
        return None
    (axis,) = axes
    # Sizes of 1 are broadcast; a changed channel must remain one of as many.
    channels = max(shape[axis] for shape in shapes if shape)
    inputs = []
    for value, shape in zip(current, shapes):
        if isinstance(value, _Channel):
            if shape[axis] != channels:
                return None
            inputs.append(value.values)
        elif shape and shape[axis] > 1:
            inputs.append(_slice(jnp.asarray(value), index, axis))
        else:
            inputs.append(value)
    return _Channel(axis, instruction.run(*inputs)[0])


def _rearranged(
    instruction: Instruction, unchanged: list, current: list, base: Mapping, index: Array
) -> _Channel | None:
    """Operations that only move values, and keep the channels an axis of their own."""
    value, name, params = current[0], instruction.primitive.name, instruction.params
    if not isinstance(value, _Channel) or len(current) > 1:
        return None
    shape, axis = unchanged[0].shape, value.axis
    if name == 'broadcast_in_dim':
        target = list(params['shape'])
        new = params['broadcast_dimensions'][axis]
        if target[new] != shape[axis]:
            return None
        target[new] = 1
        return _Channel(
            new, lax.broadcast_in_dim(value.values, target, params['broadcast_dimensions'])
        )
    if name == 'squeeze' and axis not in params['dimensions']:
        new = axis - sum(dimension < axis for dimension in params['dimensions'])
        return _Channel(new, lax.squeeze(value.values, params['dimensions']))
    if name == 'transpose':
        new = params['permutation'].index(axis)
        return _Channel(new, lax.transpose(value.values, params['permutation']))
    if name == 'reshape' and params.get('dimensions') is None:
        target = list(params['new_sizes'])
        before, after = np.prod(shape[:axis], dtype=int), np.prod(shape[axis + 1 :], dtype=int)
        for new, size in enumerate(target):
            outer, inner = np.prod(target[:new], dtype=int), np.prod(target[new + 1 :], dtype=int)
            if size == shape[axis] and (outer, inner) == (before, after):
                target[new] = 1
                return _Channel(new, value.values.reshape(target))
    return None


def _pooled(
    instruction: Instruction, unchanged: list, current: list, base: Mapping, index: Array
) -> _Channel | None:
    """Sums, extremes and windows over positions."""
    value, name, params = current[0], instruction.primitive.name, instruction.params
    if not isinstance(value, _Channel) or len(current) > 1:
        return None
    axis = value.axis
    if name in ('reduce_sum', 'reduce_max', 'reduce_min') and axis not in params['axes']:
        new = axis - sum(dimension < axis for dimension in params['axes'])
        return _Channel(new, instruction.run(value.values)[0])
    if name in ('reduce_window_max', 'reduce_window_min', 'reduce_window_sum'):
        apart = (
            params['window_dimensions'][axis] == params['window_strides'][axis] == 1
            and tuple(params['padding'][axis]) == (0, 0)
            and params['base_dilation'][axis] == 1
        )
        return _Channel(axis, instruction.run(value.values)[0]) if apart else None
    return None


def _linear(
    instruction: Instruction, unchanged: list, current: list, base: Mapping, index: Array
) -> Array | None:
    """Convolutions and products: the unchanged result plus what the difference contributes."""
    name, params = instruction.primitive.name, instruction.params
    value = current[0]
    if not isinstance(value, _Channel) or len(current) != 2 or current[1] is not unchanged[1]:
        return None
    kernel = jnp.asarray(current[1])
    difference = value.values - _slice(unchanged[0], index, value.axis)
    result = base[instruction.outputs[0]]
    if name == 'dot_general':
        (left, right), (batch, _) = params['dimension_numbers']
        if batch or tuple(left) != (value.axis,):
            return None
        rows = _slice(kernel, index, right[0])
        return result + instruction.run(difference, rows)[0]
    if name == 'conv_general_dilated':
        return _convolution(params, kernel, value, difference, result, index)
    return None


def _convolution(
    params: Mapping[str, Any],
    kernel: Array,
    value: _Channel,
    difference: Array,
    result: Array,
    index: Array,
) -> Array | None:
    """Adds a one-channel convolution, tap by tap.

    As a convolution of its own it would have another kernel for every channel, which compilers
    treat as a grouped one, slowly on a CPU.
    """
    images, weights, outputs = params['dimension_numbers']
    window = [kernel.shape[axis] for axis in weights[2:]]
    simple = (
        params['feature_group_count'] == params['batch_group_count'] == 1
        and all(factor == 1 for factor in params['lhs_dilation'])
        and all(low >= 0 and high >= 0 for low, high in params['padding'])
        and np.prod(window) <= _MOST_TAPS
    )
    if not simple or images[1] != value.axis:
        return None
    # Batch and positions in front, the output channels last.
    rows = _slice(kernel, index, weights[1]).transpose((*weights[2:], weights[1], weights[0]))
    rows = rows.squeeze(-2)
    difference = difference.transpose((images[0], *images[2:], images[1]))
    spread = [(0, 0), *params['padding'], (0, 0)]
    difference = jnp.pad(difference, spread)
    sizes = [result.shape[axis] for axis in outputs[2:]]
    strides, holes = params['window_strides'], params['rhs_dilation']
    total = jnp.zeros((), result.dtype)
    for tap in itertools.product(*map(range, window)):
        start = [place * hole for place, hole in zip(tap, holes)]
        stop = [
            first + (size - 1) * stride + 1 for first, size, stride in zip(start, sizes, strides)
        ]
        seen = lax.slice(
            difference,
            (0, *start, 0),
            (difference.shape[0], *stop, 1),
            (1, *strides, 1),
        )
        total = total + seen.astype(result.dtype) * rows[tap].astype(result.dtype)
    order = (outputs[0], *outputs[2:], outputs[1])
    return result + total.transpose(np.argsort(order))

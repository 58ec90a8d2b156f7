"""A classifier cut in two at a layer: the activation, and the function from it to the logits.

Measures of neurons run the part of a network behind a layer many times and the part before it once.
The cut works on the traced program of any `Forward`, so no model has to be written in two halves:
what does not depend on the activation is evaluated when the cut is made (skip connections around
the layer included), and only the rest is run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives
from jaxtyping import Array, Float

from neurosens.forward import Forward, LayerError, Variables
from neurosens.neurons import channels
from neurosens.neurons.program import inner_jaxpr, result, specialize


class Cut(NamedTuple):
    """One example's way through a network, cut at a layer.

    Attributes:
      activation: the layer's activation for the example, `[..., C]`, in the model's own type.
      logits: the function from such an activation to float logits `[K]`.
      channel_logits: makes the function from the index of a channel and new values for it `[...]`
        to the logits: the same as `logits` of the activation with that channel replaced, for less
        work where the layer's outputs enter a convolution or a product. Make it outside of loops
        over channels; it cannot be differentiated.
    """

    activation: Float[Array, '... channels']
    logits: Callable[[Array], Float[Array, ' classes']]
    channel_logits: Callable[[], Callable[[Array, Array], Float[Array, ' classes']]]


class LayerFacts(NamedTuple):
    """What the traced program of a network says of a layer.

    Attributes:
      shape: shape of the activation of one example.
      nonnegative: whether it cannot be negative, whatever the input, as behind a ReLU. False means
        that this could not be shown.
      affine_tail: whether the logits are an affine function of it, with the same coefficients for
        every input: true of the input of a last linear layer, and of features that are only
        averaged on the way there.
    """

    shape: tuple[int, ...]
    nonnegative: bool
    affine_tail: bool


def cut(forward: Forward, variables: Variables, x: Float[Array, '...'], layer: str) -> Cut:
    """Cuts a network at a layer, for one example.

    Args:
      forward: the model.
      variables: its variables.
      x: one input.
      layer: name of the layer; its value after the forward's own edits.

    Returns:
      The activation, and the function from an activation to the logits. That function can be
      jitted, vmapped and differentiated.

    Raises:
      LayerError: the layer cannot be tapped, or is not floating-point.
    """
    activation = tap(forward, variables, x, layer)

    def rest(h: Array) -> Array:
        return _logits(forward, variables, x, layer, h)

    program = specialize(rest, activation)

    def logits(h: Array) -> Array:
        return result(program, h.astype(activation.dtype))

    def channel_logits() -> Callable[[Array, Array], Array]:
        return channels.of_channel(specialize(rest, activation, inline=True), activation)

    return Cut(activation, logits, channel_logits)


def tap(
    forward: Forward, variables: Variables, x: Float[Array, '...'], layer: str
) -> Float[Array, '... channels']:
    """A layer's activation for one example.

    Args:
      forward: the model.
      variables: its variables.
      x: one input.
      layer: name of the layer.

    Returns:
      The activation, without the batch axis.

    Raises:
      LayerError: the layer cannot be tapped, has no batch axis, or is not floating-point.
    """
    value = forward(variables, x[None], taps=(layer,))[1][layer]
    check_neurons(layer, value)
    return value[0]


def has_neurons(value: Array) -> bool:
    """Whether the value of a layer for a batch of one has a batch axis and is floating-point."""
    batched = value.ndim > 0 and value.shape[0] == 1
    return batched and jnp.issubdtype(value.dtype, jnp.floating)


def check_neurons(layer: str, value: Array) -> None:
    """Raises a LayerError unless the value of a layer for a batch of one `has_neurons`."""
    if value.ndim == 0 or value.shape[0] != 1:
        raise LayerError(
            f'Layer {layer!r} has shape {value.shape} for one example; it needs a leading batch '
            'axis to have neurons.'
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise LayerError(
            f'Layer {layer!r} is of type {value.dtype}; only floating-point layers have neurons.'
        )


def _logits(forward: Forward, variables: Variables, x: Array, layer: str, h: Array) -> Array:
    logits = forward(variables, x[None], edits={layer: lambda _: h[None]})[0][0]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


# -------------------------------------------------------------------------------- what is known


def layer_facts(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'] | jax.ShapeDtypeStruct,
    layer: str,
) -> LayerFacts:
    """What can be told of a layer from the program alone, without running it.

    Args:
      forward: the model.
      variables: its variables, or their shapes.
      x: one input, or its shape.
      layer: name of the layer.

    Returns:
      Shape, sign and whether the rest of the network is affine.

    Raises:
      LayerError: the layer cannot be tapped, or is not floating-point.
    """
    tapped = jax.make_jaxpr(lambda v, x: tap(forward, v, x, layer))(variables, x)
    (value,) = _signs(tapped.jaxpr, [_Sign(False) for _ in tapped.in_avals])
    activation = tapped.out_avals[0]
    argument = jax.ShapeDtypeStruct(activation.shape, activation.dtype)
    rest = jax.make_jaxpr(lambda v, x, h: _logits(forward, v, x, layer, h))(variables, x, argument)
    roles = [_FIXED] * (len(rest.in_avals) - 2) + [_INPUT, _LINEAR]
    (role,) = _roles(rest.jaxpr, roles)
    return LayerFacts(activation.shape, value.nonnegative, role != _OTHER)


_SAME_SIGN = frozenset(
    {
        'reshape',
        'broadcast_in_dim',
        'squeeze',
        'expand_dims',
        'transpose',
        'convert_element_type',
        'copy',
        'slice',
        'rev',
        'reduce_sum',
        'reduce_max',
        'reduce_min',
        'reduce_window_max',
        'reduce_window_sum',
        'reduce_precision',
        'gather',
        'dynamic_slice',
        'sqrt',
        'cumsum',
        'cumprod',
        'cummax',
    }
)
_ALL_NONNEGATIVE = frozenset(
    {
        'add',
        'add_any',
        'mul',
        'div',
        'min',
        'pad',
        'concatenate',
    }
)
_NEVER_NEGATIVE = frozenset(
    {
        'exp',
        'exp2',
        'abs',
        'logistic',
        'square',
    }
)


# Comparisons with 0, and the case of them in which what is compared is at least 0.
_COMPARISONS = {'gt': True, 'ge': True, 'lt': False, 'le': False}


@dataclasses.dataclass(frozen=True, eq=False)
class _Sign:
    """What is known of the sign of a value, which is compared by identity.

    Attributes:
      nonnegative: whether it is provably at least 0.
      compared: of a comparison with 0, what is compared, and the case in which that is at least 0.
    """

    nonnegative: bool
    compared: tuple[_Sign, bool] | None = None


def _signs(jaxpr: jex.Jaxpr, arguments: Sequence[_Sign]) -> list[_Sign]:
    """What is known of the sign of each output, given the same of the inputs."""
    known: dict[Any, _Sign] = {constant: _Sign(False) for constant in jaxpr.constvars}
    known.update(zip(jaxpr.invars, arguments))

    def read(atom: Any) -> _Sign:
        if isinstance(atom, jex.Literal):
            return _Sign(bool(np.all(np.asarray(atom.val) >= 0)))
        return known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        inner = inner_jaxpr(equation)
        if inner is not None:
            outputs = _signs(inner[0], values)
        elif equation.primitive.name in _COMPARISONS and _is_zero(equation.invars[1]):
            outputs = [_Sign(True, (values[0], _COMPARISONS[equation.primitive.name]))]
        else:
            outputs = [_Sign(sign) for sign in _nonnegative(equation, values)]
        known.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, jex.Literal) and not np.any(np.asarray(atom.val))


def _nonnegative(equation: Any, values: Sequence[_Sign]) -> list[bool]:
    """For each output of an operation whether it is provably at least 0."""
    inputs = [value.nonnegative for value in values]
    name = equation.primitive.name
    if name == 'max':
        return [any(inputs)]
    if name == 'clamp':
        # The upper limit wins over the lower one.
        return [inputs[0] and inputs[2]]
    if name == 'gather' and np.any(np.asarray(equation.params['fill_value'] or 0) < 0):
        return [False]
    if name == 'select_n':
        # Where what a comparison chooses is what it compares, in the case that is at least 0.
        source, case = values[0].compared or (None, False)
        return [
            all(
                value.nonnegative or (value is source and bool(number) == case)
                for number, value in enumerate(values[1:])
            )
        ]
    if name in ('scatter', 'scatter-add'):
        return [inputs[0] and inputs[2]]
    if name == 'integer_pow':
        return [equation.params['y'] % 2 == 0 or inputs[0]]
    if name in _NEVER_NEGATIVE:
        return [True]
    if name in _SAME_SIGN:
        return [inputs[0]]
    return [name in _ALL_NONNEGATIVE and all(inputs)] * len(equation.outvars)


# What a value is to the tail: independent of input and activation, dependent on the input, affine
# in the activation, or anything else.
_FIXED, _INPUT, _LINEAR, _OTHER = 'fixed', 'input', 'linear', 'other'
_LINEAR_IN_FIRST = frozenset(
    {
        'reshape',
        'broadcast_in_dim',
        'squeeze',
        'expand_dims',
        'transpose',
        'convert_element_type',
        'copy',
        'slice',
        'rev',
        'neg',
        'reduce_sum',
        'reduce_window_sum',
        'cumsum',
    }
)
_SUMS = frozenset(
    {
        'add',
        'add_any',
        'sub',
        'concatenate',
        'pad',
    }
)
_PRODUCTS = frozenset(
    {
        'mul',
        'dot_general',
        'conv_general_dilated',
    }
)


def _roles(jaxpr: jex.Jaxpr, arguments: Sequence[str]) -> list[str]:
    """The role of each output of a program, given those of its inputs."""
    known: dict[Any, str] = dict.fromkeys(jaxpr.constvars, _FIXED)
    known.update(zip(jaxpr.invars, arguments))

    def read(atom: Any) -> str:
        return _FIXED if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = inner_jaxpr(equation)
        # Not custom derivatives, which need not be those of the function.
        if inner is not None and equation.primitive in (primitives.jit_p, primitives.remat_p):
            outputs = _roles(inner[0], inputs)
        elif _rounds(equation) and _LINEAR in inputs:
            outputs = [_OTHER]
        else:
            outputs = [_role(equation.primitive.name, inputs)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _rounds(equation: Any) -> bool:
    """Whether an operation converts to integers."""
    if equation.primitive.name != 'convert_element_type':
        return False
    return not jnp.issubdtype(equation.params['new_dtype'], jnp.inexact)


def _role(name: str, inputs: Sequence[str]) -> str:
    if _OTHER in inputs:
        return _OTHER
    if _LINEAR not in inputs:
        return _INPUT if _INPUT in inputs else _FIXED
    if name in _SUMS or (name == 'select_n' and inputs[0] == _FIXED):
        return _LINEAR
    others = list(inputs)
    others.remove(_LINEAR)
    fixed_others = all(role == _FIXED for role in others)
    if name in _PRODUCTS and fixed_others:
        return _LINEAR
    if name in _LINEAR_IN_FIRST or (name == 'div' and inputs[0] == _LINEAR):
        return _LINEAR if fixed_others else _OTHER
    return _OTHER

"""Which layers to look at, and what they are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neurosens import forward as forward_lib
from neurosens.forward import Forward, Variables
from neurosens.neurons import tail, units
from neurosens.neurons.kernels import by_layer


class NeuronLayer(NamedTuple):
    """A layer seen as neurons.

    Attributes:
      name: its name.
      shape: shape of the activation of one example.
      unit: what counts as a neuron.
      neurons: number of neurons N.
      kernel_layer: the last layer with a kernel that runs at or before it, if its output channels
        are as many as this layer's: the filters whose norms and weights go with the neurons.
      facts: what the program says of it.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    neurons: int
    kernel_layer: str | None
    facts: tail.LayerFacts


def _one(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def describe(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'] | jax.ShapeDtypeStruct,
    layer: str,
    *,
    unit: str = 'channel',
) -> NeuronLayer:
    """Describes a layer, without running the model.

    Args:
      forward: the model.
      variables: its variables, or their shapes.
      x: a batch of inputs `[B, ...]`, or its shape.
      layer: name of the layer.
      unit: `'channel'` or `'unit'`.

    Returns:
      Shape, number of neurons, filters, sign and whether the rest of the network is affine.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: the unit is unknown.
    """
    facts = tail.layer_facts(forward, variables, _one(x), layer)
    kernels = by_layer(variables)
    module, is_input = layer.removesuffix(':in'), layer.endswith(':in')
    kernel_layer = None
    for name in forward_lib.layers(forward, variables, x):
        # What enters a module was made before anything inside it ran.
        if is_input and (name == module or name.startswith(f'{module}/')):
            break
        kernel_layer = name if name in kernels else kernel_layer
        if name == module:
            break
    channels = facts.shape[-1] if facts.shape else 1
    if kernel_layer is not None and kernels[kernel_layer].shape[-1] != channels:
        kernel_layer = None
    neurons = units.count(facts.shape, unit)
    return NeuronLayer(layer, facts.shape, unit, neurons, kernel_layer, facts)


def default_layers(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'] | jax.ShapeDtypeStruct,
) -> tuple[str, ...]:
    """The two layers of the papers: the first convolution and the input of the last layer.

    The first convolution is taken behind its normalisation and nonlinearity, where a neuron can
    really be removed: at the first layer after it that is never negative and has its shape, if one
    comes before the next kernel.

    Args:
      forward: the model.
      variables: its variables, or their shapes.
      x: a batch of inputs `[B, ...]`, or its shape.

    Returns:
      Their names; a single one where they are the same.

    Raises:
      ValueError: no layer has a kernel.
    """
    shapes = forward_lib.layers(forward, variables, x)
    kernels = by_layer(variables)
    with_kernel = [name for name in shapes if name in kernels]
    if not with_kernel:
        raise ValueError(
            'No layer of this model has a kernel, so there are no default layers; name the layers '
            'to measure.'
        )
    last = with_kernel[-1]
    convolutions = [name for name in with_kernel if jnp.ndim(kernels[name]) > 2]
    first = (convolutions or with_kernel)[0]
    if first == last:
        return (f'{last}:in',)
    order = list(shapes)
    chosen = first
    for name in order[order.index(first) + 1 :]:
        if name in kernels:
            break
        same_shape = shapes[name].shape == shapes[first].shape
        alike = same_shape and jnp.issubdtype(shapes[name].dtype, jnp.floating)
        if alike and tail.layer_facts(forward, variables, _one(x), name).nonnegative:
            chosen = name
            break
    return chosen, f'{last}:in'

"""The kernels of a model's convolution and dense layers, by the names of the layers.

A layer is named by its module path, as in `neurosens.forward`; its kernel is the leaf of that name.
Kernels are `[..., C]` with the output channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from neurosens import _validate
from neurosens.forward import Variables

_LEAF = 'kernel'


def by_layer(variables: Variables) -> dict[str, Float[Array, '... channels']]:
    """The kernels of all convolution and dense layers.

    Args:
      variables: a Linen variable dict (its collection `'params'`) or an NNX state.

    Returns:
      For each layer name the leaf `kernel` of that module, of 2 or more axes with the output
      channels last. The name is empty for a model that is a single layer.
    """
    found: dict[str, Array] = {}

    def note(layer: str, kernel: Array) -> Array:
        found[layer] = kernel
        return kernel

    replaced(note, variables)
    return found


def norms(variables: Variables, layer: str, order: float = 2) -> Float[Array, ' channels']:
    """Norm of the weights that lead to each output channel of a layer.

    Args:
      variables: a Linen variable dict or an NNX state.
      layer: name of a convolution or dense layer.
      order: order of the vector norm, above 0: 1, 2, `float('inf')`, ...

    Returns:
      One norm per output channel `[C]`, in the order of the channels, in float32 or wider. The bias
      does not enter.

    Raises:
      ValueError: the layer has no kernel, or `order` is not above 0.
    """
    if not order > 0:
        raise ValueError(f'order is {order!r}; it must be greater than 0.')
    kernel = chosen(variables, layer)[layer]
    rows = kernel.reshape(-1, kernel.shape[-1])
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return jnp.linalg.norm(rows, ord=order, axis=0)


def chosen(variables: Variables, layer: str | None) -> dict[str, Array]:
    """The kernel of one layer, or those of all.

    Args:
      variables: a Linen variable dict or an NNX state.
      layer: its name, None for all of them.

    Returns:
      As of `by_layer`.

    Raises:
      ValueError: there is no such layer, or none at all.
    """
    found = by_layer(variables)
    if layer is None:
        if not found:
            raise ValueError(
                'The variables hold no kernel of 2 or more axes to filter; give a Linen variable '
                'dict or an NNX state with a convolution or dense layer.'
            )
        return found
    if layer not in found:
        raise ValueError(_validate.unknown('layer with a kernel', layer, list(found)))
    return {layer: found[layer]}


def replaced(function: Callable[[str, Array], Array], variables: Variables) -> Variables:
    """Replaces each kernel.

    Args:
      function: from the name of a layer and its kernel to what takes its place.
      variables: a Linen variable dict or an NNX state.

    Returns:
      The variables in the structure given, with every other leaf as it is.
    """
    # Linen keeps parameters in a collection; an NNX state begins with the modules themselves.
    linen = isinstance(variables, Mapping) and not isinstance(variables, nnx.State)
    prefix = 'params/' if linen and 'params' in variables else ''

    def visit(path: tuple, leaf: Array) -> Array:
        layer = _layer(path, prefix)
        return leaf if layer is None or leaf.ndim < 2 else function(layer, leaf)

    return jax.tree_util.tree_map_with_path(visit, variables)


def _layer(path: tuple, prefix: str) -> str | None:
    """The module path of a kernel, or None if the leaf at this path is not one."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        # The leaf is boxed: an NNX variable, or a Linen array that carries its partitioning.
        path = path[:-1]
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    layer, _, leaf = name.removeprefix(prefix).rpartition('/')
    return layer if name.startswith(prefix) and leaf == _LEAF else None

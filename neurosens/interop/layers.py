"""The layers of a Linen module that hold arrays, and their arrays in PyTorch's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from neurosens.interop.errors import WeightsError
from neurosens.models import BatchNorm

CONVOLUTION, DENSE, NORMALIZATION = 'convolution', 'linear layer', 'normalisation'
# The batches that PyTorch's running statistics are of; nothing is computed from it.
COUNT = 'num_batches_tracked'
KINDS = (CONVOLUTION, DENSE, NORMALIZATION)
_MODULES: dict[type[nn.Module], str] = {
    nn.Conv: CONVOLUTION,
    nn.Dense: DENSE,
    nn.BatchNorm: NORMALIZATION,
    BatchNorm: NORMALIZATION,
}
_LEAVES = {
    ('params', 'kernel'): 'weight',
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}


class Layer(NamedTuple):
    """One layer with arrays.

    Attributes:
      path: its '/'-joined module path.
      kind: what it is, `CONVOLUTION`, `DENSE` or `NORMALIZATION`.
      channels: for a dense layer whose input is a flattened feature map, the channels of that
        map; 0 for all others.
      shapes: by `(collection, *path of the leaf)` the shape of each array, in PyTorch's order.
    """

    path: str
    kind: str
    channels: int
    shapes: dict[tuple[str, ...], tuple[int, ...]]


def trace(module: nn.Module, image_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """Lists the layers of a module with arrays, in the order in which they run.

    A dense layer is taken for one behind a flatten where it is the first after a module that
    returns a feature map `[B, H, W, C]` or `[B, L, C]`.

    Args:
      module: `module.init(key, x)` makes its variables.
      image_shape: height, width and channels.

    Returns:
      The layers; nothing is computed.

    Raises:
      WeightsError: an array belongs to a layer other than `nn.Conv`, `nn.Dense` and
        `nn.BatchNorm`.
      ValueError: as of the module, such as for images that are too small.
    """
    found: dict[str, tuple[str, int]] = {}
    channels = [image_shape[-1]]

    def visit(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != '__call__' or not context.module.path:
            return call(*args, **kwargs)
        kind = _MODULES.get(type(context.module))
        if kind:
            flattened = kind == DENSE and args[0].ndim == 2
            path = '/'.join(context.module.path)
            found.setdefault(path, (kind, channels[0] if flattened else 0))
        output = call(*args, **kwargs)
        if isinstance(output, jax.Array):
            channels[0] = output.shape[-1] if output.ndim > 2 else 0
        return output

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(visit):
        variables = jax.eval_shape(module.init, jax.random.key(0), image)
    shapes: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {path: {} for path in found}
    for leaf, value in flax.traverse_util.flatten_dict(variables).items():
        path = '/'.join(leaf[1:-1])
        if path not in shapes or (leaf[0], leaf[-1]) not in _LEAVES:
            raise WeightsError(
                f'{type(module).__name__} holds the array {"/".join(leaf)!r}, but only nn.Conv, '
                'nn.Dense and nn.BatchNorm can be converted; convert the others by hand.'
            )
        shapes[path][leaf] = value.shape
    order = list(_LEAVES.values())

    def in_order(leaves: dict[tuple[str, ...], tuple[int, ...]]) -> dict:
        return dict(sorted(leaves.items(), key=lambda item: order.index(torch_leaf(item[0]))))

    return tuple(
        Layer(path, kind, channels, in_order(shapes[path]))
        for path, (kind, channels) in found.items()
    )


def kind_of_weight(array: np.ndarray) -> str:
    """The kind of layer that has such a weight in PyTorch."""
    return {1: NORMALIZATION, 2: DENSE}.get(array.ndim, CONVOLUTION)


def torch_leaf(leaf: tuple[str, ...]) -> str:
    """PyTorch's name of an array inside its layer."""
    return _LEAVES[leaf[0], leaf[-1]]


def torch_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's arrays in PyTorch, by PyTorch's name inside the layer."""
    shapes = {
        torch_leaf(leaf): (*shape[:-3:-1], *shape[:-2]) if len(shape) > 2 else shape[::-1]
        for leaf, shape in layer.shapes.items()
    }
    return {**shapes, COUNT: ()} if layer.kind == NORMALIZATION else shapes


def from_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """An array of PyTorch in Flax's order, in memory of its own.

    Args:
      array: a kernel `[out, in, h, w]` (of any number of dimensions of space) or `[out, in]`, or a
        vector.
      channels: `Layer.channels`. PyTorch flattens feature maps channels first, Flax last.

    Returns:
      The kernel `[h, w, in, out]` or `[in, out]`, or the vector, in float32.
    """
    if array.ndim > 2:
        array = np.moveaxis(array, (1, 0), (-2, -1))
    elif array.ndim == 2 and channels:
        out = len(array)
        array = array.reshape(out, channels, -1).transpose(2, 1, 0).reshape(-1, out)
    elif array.ndim == 2:
        array = array.T
    return np.array(array, np.float32, order='C')


def to_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """An array of Flax in PyTorch's order, in memory of its own: the inverse of `from_torch`."""
    if array.ndim > 2:
        array = np.moveaxis(array, (-1, -2), (0, 1))
    elif array.ndim == 2 and channels:
        out = array.shape[1]
        array = array.reshape(-1, channels, out).transpose(2, 1, 0).reshape(out, -1)
    elif array.ndim == 2:
        array = array.T
    return np.array(array, order='C')

"""The layers of a Linen module that hold arrays, and their arrays in PyTorch's order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from neurosens import _validate
from neurosens.interop import flattening
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
      channels: for a layer that takes a flattened feature map, the channels of that map, or 1
        where its channels come first, as in PyTorch; 0 for all others.
      shapes: by `(collection, *path of the leaf)` the shape of each array, in PyTorch's order.
    """

    path: str
    kind: str
    channels: int
    shapes: dict[tuple[str, ...], tuple[int, ...]]


def trace(
    module: nn.Module, image_shape: tuple[int, ...], call: Mapping[str, Any]
) -> tuple[Layer, ...]:
    """Lists the layers of a module with arrays, in the order in which they run.

    Which of them take a flattened feature map, and how it was flattened, is read from the program
    that the module is: pools, concatenations and reshapes need not be modules.

    Args:
      module: `module.init(key, x, **call)` makes its variables.
      image_shape: height, width and channels.
      call: arguments of the call by name.

    Returns:
      The layers; nothing is computed.

    Raises:
      WeightsError: an array belongs to a layer other than `nn.Conv`, `nn.Dense` and
        `nn.BatchNorm`; or the order in which a layer takes its inputs cannot be told; or the call
        takes other arguments.
      ValueError: as of the module, such as for images that are too small.
    """
    _check_call(module, call)
    found: dict[str, str] = {}

    def visit(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        kind = _MODULES.get(type(context.module))
        if not kind or context.method_name != '__call__' or not context.module.path:
            return call(*args, **kwargs)
        path = '/'.join(context.module.path)
        found.setdefault(path, kind)
        if args:
            return call(flattening.marked(args[0], path), *args[1:], **kwargs)
        name = 'x' if 'x' in kwargs else 'inputs'
        return call(**{**kwargs, name: flattening.marked(kwargs[name], path)})

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(visit):
        program, variables = jax.make_jaxpr(
            lambda x: module.init(jax.random.key(0), x, **call), return_shape=True
        )(image)
    orders = flattening.orders(program.jaxpr)
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

    for path, kind in found.items():
        _check_order(module, path, kind, orders.get(path, 0))
    return tuple(
        Layer(path, kind, max(orders.get(path, 0), 0), in_order(shapes[path]))
        for path, kind in found.items()
    )


def _check_call(module: nn.Module, call: Mapping[str, Any]) -> None:
    """Refuses arguments that a module's call does not take, and too few of them."""
    if not isinstance(call, Mapping):
        raise WeightsError(
            f'call is {call!r}, but it must be a dict of arguments of the call by name.'
        )
    others = [*inspect.signature(module.__call__).parameters.values()][1:]
    named = [one for one in others if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    names = [one.name for one in named]
    any_name = any(one.kind is one.VAR_KEYWORD for one in others)
    for name in () if any_name else call:
        if name not in names:
            raise WeightsError(
                _validate.unknown(f'argument of {type(module).__name__} in call', name, names)
            )
    missing = [one.name for one in named if one.default is one.empty and one.name not in call]
    if missing:
        raise WeightsError(
            f'{type(module).__name__} takes {" and ".join(missing)} besides images; give '
            f'call={{{", ".join(f"{name!r}: ..." for name in missing)}}}.'
        )


def _check_order(module: nn.Module, path: str, kind: str, order: int) -> None:
    """Refuses layers of which nothing says in which order PyTorch would give them their inputs."""
    if order == flattening.UNKNOWN:
        raise WeightsError(
            f'{type(module).__name__} joins, cuts or exchanges features of a flattened map before '
            f'{path!r}, so in which order PyTorch has them cannot be told; join or cut maps before '
            f'they are flattened, or convert {path!r} by hand.'
        )
    if order == flattening.UNFLATTENED and kind in (CONVOLUTION, NORMALIZATION):
        raise WeightsError(
            f'{type(module).__name__} makes a map out of features before {path!r}, which PyTorch '
            'does channels first; do so too: x.reshape(B, C, H, W).transpose(0, 2, 3, 1).'
        )
    if order == flattening.MIXED and kind in (CONVOLUTION, NORMALIZATION):
        raise WeightsError(
            f'{type(module).__name__} makes channels out of positions before {path!r} in another '
            "order than PyTorch's PixelUnshuffle; make them in its order, channels before "
            'positions: x.reshape(B, H // r, r, W // r, r, C).transpose(0, 1, 3, 5, 2, 4); or '
            f'convert {path!r} by hand.'
        )


def kind_of_weight(array: np.ndarray) -> str:
    """The kind of layer that has such a weight in PyTorch."""
    return {1: NORMALIZATION, 2: DENSE}.get(array.ndim, CONVOLUTION)


def weights(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The weight of each layer of a state dict; the mean of a normalisation that has none."""
    found = {}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition('.')
        if leaf == 'weight' or (leaf == 'running_mean' and f'{layer}.weight' not in arrays):
            found[layer] = array
    return found


def flattened_channels(layer: Layer, leaf: tuple[str, ...]) -> int:
    """The channels whose order an array of a layer follows: biases have that of the outputs."""
    of_outputs = layer.kind != NORMALIZATION and leaf[-1] == 'bias'
    return 0 if of_outputs else layer.channels


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
      channels: of the flattened map that its last axis is of, or 0. PyTorch flattens feature maps
        channels first, Flax last.

    Returns:
      The kernel `[h, w, in, out]` or `[in, out]`, or the vector, in float32.
    """
    if array.ndim > 2:
        array = np.moveaxis(array, (1, 0), (-2, -1))
    elif channels:
        *out, inputs = array.shape
        array = array.reshape(*out, channels, -1).swapaxes(-1, -2).reshape(*out, inputs).T
    else:
        array = array.T
    return np.array(array, np.float32, order='C')


def to_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """An array of Flax in PyTorch's order, in memory of its own: the inverse of `from_torch`."""
    if array.ndim > 2:
        array = np.moveaxis(array, (-1, -2), (0, 1))
    elif channels:
        *out, inputs = array.T.shape
        array = array.T.reshape(*out, -1, channels).swapaxes(-1, -2).reshape(*out, inputs)
    else:
        array = array.T
    return np.array(array, order='C')


def inputs(layer: Layer) -> int:
    """Channels or features that a layer with a kernel takes."""
    return next(shape[-2] for leaf, shape in layer.shapes.items() if leaf[-1] == 'kernel')

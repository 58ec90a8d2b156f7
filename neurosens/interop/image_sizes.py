"""The size of the images that a network with given weights takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from neurosens.interop import layers
from neurosens.interop.errors import SIZE, WeightsError

# Sides of images that are tried where none is given: only layers behind a flatten depend on it.
_SIDES = (32, 28, 224, 64, 8, 16, 96, 128, 256, 299)


def fitting_layers(
    module: nn.Module,
    image_shape: tuple[int, ...] | None,
    arrays: Iterable[np.ndarray],
    weights: Callable[[tuple[layers.Layer, ...]], Mapping[str, np.ndarray]],
    call: Mapping[str, Any],
) -> tuple[tuple[layers.Layer, ...], bool]:
    """Finds images for which the layers of a module fit their weights.

    The images decide the channels of the first convolution and the inputs behind a flatten.

    Args:
      module: the module.
      image_shape: height, width and channels of the images; by default several sizes are tried.
      arrays: the weights, of which the channels of the images are guessed.
      weights: from the layers of the module to the weights of those that have some, by path.
      call: arguments of the module's call by name.

    Returns:
      `(found, fits)`: the layers, and whether they fit. Where no images fit, the layers are those
      for the first ones that the module takes.

    Raises:
      WeightsError: the module or the weights leave no images to try, or the module reshapes none
        of those that are tried.
      ValueError: the module takes none of them, such as images too small for its pools.
      TypeError: the module cannot reshape the given images.
    """
    shapes = [image_shape] if image_shape is not None else _image_shapes(arrays)
    first: tuple[layers.Layer, ...] | None = None
    refused: Exception | None = None
    other_channels: set[int] = set()
    for shape in shapes:
        if shape[-1] in other_channels:
            continue
        try:
            found = layers.trace(module, shape, call)
        except WeightsError:
            raise
        except (ValueError, TypeError) as error:
            # Such as images that are too small for the pools, or not of the size of a reshape,
            # for which JAX has a TypeError.
            refused = error
            continue
        first = first or found
        given = weights(found)
        wrong = {
            layer.path
            for layer in found
            if layer.kind != layers.NORMALIZATION
            and layer.path in given
            and given[layer.path].shape[1:2] != (layers.inputs(layer),)
        }
        convolutions = [layer.path for layer in found if layer.kind == layers.CONVOLUTION]
        if wrong.intersection(convolutions[:1]):
            other_channels.add(shape[-1])
        elif not wrong.intersection(layer.path for layer in found if layer.channels):
            return found, True
    if first is None:
        assert refused is not None
        if isinstance(refused, TypeError) and image_shape is None:
            reason, *_ = str(refused).splitlines() or ['']
            raise WeightsError(
                f'{type(module).__name__} takes none of the images that were tried '
                f'(TypeError: {reason.rstrip(".")}); give {SIZE}.'
            ) from refused
        raise refused
    return first, False


def _image_shapes(arrays: Iterable[np.ndarray]) -> list[tuple[int, int, int]]:
    """Shapes of images that a network with these weights may take, in PyTorch's order."""
    kernels = [array.shape for array in arrays if array.ndim in (2, 4)]
    channels = [shape[1] for shape in kernels if len(shape) == 4]
    if channels:
        # Which convolution comes first is not known here: images have the fewest channels, but
        # where channels are convolved one by one.
        either = dict.fromkeys((min(channels), channels[0]))
        return [(side, side, count) for count in either for side in _SIDES]
    inputs = kernels[0][1] if kernels else 0
    for count in (1, 3):
        side = math.isqrt(inputs // count)
        if side and inputs == side**2 * count:
            return [(side, side, count)]
    raise WeightsError(
        f'The first layer takes {inputs} inputs, which are no square image of 1 or 3 channels; '
        f'give {SIZE}.'
    )

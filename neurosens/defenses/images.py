"""Checks of images and labels that a defence is calibrated on."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from neurosens import _validate
from neurosens.forward import Forward, Variables


def check(
    x: Float[ArrayLike, 'examples ...'], y: Int[ArrayLike, ' examples']
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as arrays, if they can be used.

    Args:
      x: images with pixels in [0, 1] `[M, ...]`.
      y: their classes `[M]`.

    Returns:
      Both on the host, labels as int32.

    Raises:
      ValueError: there are no images, they are not floating-point, not finite or outside [0, 1], or
        labels are not integers, one for each image.
    """
    x, y = np.asarray(x), np.asarray(y)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f'Images are of type {x.dtype}; they must be floating-point with pixels in [0, 1] '
            '(divide bytes by 255).'
        )
    if x.ndim < 2 or not len(x):
        raise ValueError(f'Images have shape {x.shape}; a batch of at least one image is needed.')
    check_pixels(x)
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f'Labels have shape {y.shape} and type {y.dtype}; {len(x)} integers are needed, one '
            'for each image.'
        )
    return x, y.astype(np.int32)


def check_pixels(x: Float[ArrayLike, '...']) -> None:
    """Raises a ValueError where a pixel is outside [0, 1] or no number."""
    if not np.size(x):
        return
    of = jnp if isinstance(x, jax.Array) else np
    low, high = float(of.min(x)), float(of.max(x))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError('Images hold NaN or infinite pixels; leave those images out.')
    if low < 0 or high > 1:
        raise ValueError(
            f'Pixels lie between {low:g} and {high:g}; they must be in [0, 1], with normalisation '
            'inside the model.'
        )


def count_classes(
    forward: Forward, variables: Variables, x: np.ndarray | jax.ShapeDtypeStruct
) -> int:
    """Number of classes of a model, which is not run.

    Args:
      forward: the model.
      variables: its variables.
      x: images that it should take `[M, ...]`, or their shape and type.

    Returns:
      The number of its logits.

    Raises:
      ValueError: the model does not take images of this shape and type.
    """
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    try:
        logits = jax.eval_shape(lambda v, x: forward(v, x)[0], variables, one)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'Images have shape {x.shape[1:]} and type {x.dtype}, which the model does not take: '
            f'{reason}'
        ) from error
    return logits.shape[-1]


def check_labels(y: Int[np.ndarray, ' examples'], classes: int) -> None:
    """Raises a ValueError where a label is not one of the model's classes."""
    _validate.check_labels(int(y.min()), int(y.max()), classes)

"""Random augmentation of float images on the device, inside jit."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neurosens import _validate

# Candidate crops drawn at once; the first that fits the image is taken.
_CROP_CANDIDATES = 10
# For images of 32 pixels this is the usual 4.
_PADDING_FRACTION = 8

_NAMES = ('none', 'pad_crop', 'pad_crop_flip', 'random_resized_crop_flip')


def augmentation_names() -> tuple[str, ...]:
    """Returns the names that `augment` knows."""
    return _NAMES


def pad_crop(image: jax.Array, key: jax.Array, *, padding: int = 4) -> jax.Array:
    """Shifts an image by up to `padding` pixels and fills with zeros.

    Args:
        image: float [H, W, C].
        key: Typed random key.
        padding: Zeros added to each side before the random crop, in pixels.

    Returns:
        [H, W, C], a random window of the padded image.
    """
    return pad_crop_flip(image, key, padding=padding, flip=False)


def pad_crop_flip(
    image: jax.Array, key: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Shifts an image by up to `padding` pixels and mirrors it half of the time.

    Args:
        image: float [H, W, C].
        key: Typed random key.
        padding: Zeros added to each side before the random crop, in pixels.
        flip: Whether to mirror left and right with probability 1/2.

    Returns:
        [H, W, C], a random window of the padded image, mirrored or not.

    Raises:
        ValueError: The padding is negative.
    """
    if padding < 0:
        raise ValueError(f'padding {padding} must not be negative')
    crop_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    rows = top + jnp.arange(image.shape[0])
    columns = left + jnp.arange(image.shape[1])
    if flip:
        columns = jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns)
    # Under vmap, on CPU, two takes are faster than one dynamic slice and a mirrored copy.
    window = jnp.take(padded, rows, axis=0, mode='clip')
    return jnp.take(window, columns, axis=1, mode='clip')


def random_resized_crop_flip(
    image: jax.Array,
    key: jax.Array,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """Scales a random part of an image to a square and mirrors it half of the time.

    The part's area and aspect ratio are drawn up to ten times until it fits the image, else it
    is the largest centre part with an allowed aspect ratio.

    Args:
        image: float [H, W, C].
        key: Typed random key.
        size: Side of the result, in pixels.
        scale: Range of the part's area, as a fraction of the image's.
        ratio: Range of the part's width over height, drawn uniformly in its logarithm.

    Returns:
        [size, size, C], interpolated bilinearly with antialiasing.

    Raises:
        ValueError: The size is not positive, or a range is empty or not positive.
    """
    if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            f'size {size}, scale {scale} and ratio {ratio} describe no crop: size must be '
            'positive, and both ranges positive and ascending with scale at most 1'
        )
    crop_key, flip_key = jax.random.split(key)
    top, left, height, width = _crop_box(crop_key, image.shape[0], image.shape[1], scale, ratio)
    zoom = jnp.stack([size / height, size / width])
    resized = jax.image.scale_and_translate(
        image,
        (size, size, image.shape[-1]),
        (0, 1),
        zoom,
        -jnp.stack([top, left]) * zoom,
        method='linear',
        antialias=True,
        precision=jax.lax.Precision.HIGHEST,
    )
    # Interpolation weights are rounded, which can leave [0, 1] by a rounding error.
    return _flip(jnp.clip(resized, image.min(), image.max()), flip_key).astype(image.dtype)


def centre_crop(image: jax.Array, *, size: int) -> jax.Array:
    """Returns the centre of an image.

    Args:
        image: [H, W, C] with H and W at least `size`.
        size: Side of the crop, in pixels.

    Returns:
        [size, size, C].

    Raises:
        ValueError: The image is smaller than the crop.
    """
    height, width, _ = image.shape
    if not 0 < size <= min(height, width):
        raise ValueError(f'crop size {size} does not fit an image of {height}x{width} pixels')
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def augment(
    name: str,
    images: jax.Array,
    key: jax.Array,
    index: jax.Array,
    *,
    size: int | None = None,
    padding: int | None = None,
) -> jax.Array:
    """Augments a batch; each example's randomness depends on the key and its index only.

    The result is therefore the same on any number of devices and processes, and a batch
    sharded along its first axis is augmented without communication.

    Args:
        name: 'none', 'pad_crop', 'pad_crop_flip' or 'random_resized_crop_flip'.
        images: float [B, H, W, C].
        key: Typed random key of the training step.
        index: Integers [B] that tell the examples of the global batch apart, such as
            `Batch.index`.
        size: Side of the result, in pixels; None for the images' height. 'none' takes the
            centre, and the padded crops cannot change the size.
        padding: Padding of 'pad_crop' and 'pad_crop_flip', in pixels; None for an eighth of the
            height.

    Returns:
        float [B, size, size, C] for a given size or a random resized crop, else the shape of
        `images`.

    Raises:
        ValueError: The name is unknown, or the size is not possible.
    """
    height, width = images.shape[1:3]
    if padding is None:
        padding = height // _PADDING_FRACTION
    one: Callable[[jax.Array, jax.Array], jax.Array]
    match name:
        case 'none':
            if size is None:
                return images
            return jax.vmap(functools.partial(centre_crop, size=size))(images)
        case 'pad_crop' | 'pad_crop_flip':
            if size is not None and (size, size) != (height, width):
                raise ValueError(
                    f'{name} cannot turn {height}x{width} images into size {size}: '
                    'use random_resized_crop_flip'
                )
            one = functools.partial(pad_crop_flip, padding=padding, flip=name == 'pad_crop_flip')
        case 'random_resized_crop_flip':
            one = functools.partial(random_resized_crop_flip, size=size or height)
        case _:
            raise ValueError(_validate.unknown('augmentation', name, _NAMES))
    return jax.vmap(lambda image, i: one(image, jax.random.fold_in(key, i)))(images, index)


def _flip(image: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _crop_box(
    key: jax.Array,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns top, left, height and width of a random part, in whole pixels as floats."""
    area_key, ratio_key, position_key = jax.random.split(key, 3)
    count = (_CROP_CANDIDATES,)
    areas = height * width * jax.random.uniform(area_key, count, minval=scale[0], maxval=scale[1])
    log_ratio = jnp.log(jnp.array(ratio))
    ratios = jnp.exp(jax.random.uniform(ratio_key, count, minval=log_ratio[0], maxval=log_ratio[1]))
    heights = jnp.round(jnp.sqrt(areas / ratios))
    widths = jnp.round(jnp.sqrt(areas * ratios))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = jnp.argmax(fits)
    whole_height = min(height, max(1, round(width / ratio[0])))
    whole_width = min(width, max(1, round(height * ratio[1])))
    crop_height = jnp.where(fits[first], heights[first], whole_height)
    crop_width = jnp.where(fits[first], widths[first], whole_width)
    free = jnp.stack([height - crop_height, width - crop_width])
    corner = jnp.floor(jax.random.uniform(position_key, (2,)) * (free + 1))
    corner = jnp.where(fits[first], corner, jnp.floor(free / 2))
    return corner[0], corner[1], crop_height, crop_width

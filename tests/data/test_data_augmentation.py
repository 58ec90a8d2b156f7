"""Augmentation: what it does to pixels, and that devices do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neurosens import data

RANDOM_NAMES = ('pad_crop', 'pad_crop_flip', 'random_resized_crop_flip')


def images(count=16, height=8, width=8, channels=3):
    pixels = np.random.default_rng(5).random((count, height, width, channels), np.float32)
    return jnp.asarray(pixels)


def windows(image, padding):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width, _ = image.shape
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            yield (top, left), padded[top : top + height, left : left + width]


def find_window(result, image, padding):
    for place, window in windows(image, padding):
        if np.array_equal(result, window):
            return place, False
        if np.array_equal(result, window[:, ::-1]):
            return place, True
    raise AssertionError('the result is no window of the padded image')


@pytest.mark.parametrize('name', ['pad_crop', 'pad_crop_flip'])
def test_padded_crops_are_windows_of_the_padded_image(name):
    original = images(count=200, height=8, width=6)
    result = data.augment(name, original, jax.random.key(0), jnp.arange(200), padding=2)
    found = [
        find_window(one, image, 2) for one, image in zip(np.asarray(result), np.asarray(original))
    ]
    assert {place for place, _ in found} == {(i, j) for i in range(5) for j in range(5)}
    flips = sum(flipped for _, flipped in found)
    assert 70 < flips < 130 if name == 'pad_crop_flip' else flips == 0


def test_padding_is_an_eighth_of_the_height_unless_given():
    key, index = jax.random.key(0), jnp.arange(16)
    original = images(height=16, width=16)
    apply = jax.jit(functools.partial(data.augment, 'pad_crop'), static_argnames='padding')
    np.testing.assert_array_equal(
        apply(original, key, index), apply(original, key, index, padding=2)
    )


def test_whole_image_crop_at_its_own_size_is_the_image_or_its_mirror():
    crop = functools.partial(
        data.random_resized_crop_flip, size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    original = images()
    keys = jax.random.split(jax.random.key(1), len(original))
    mirrored = 0
    results = np.asarray(jax.jit(jax.vmap(crop))(original, keys))
    for result, image in zip(results, np.asarray(original)):
        flipped = np.abs(result - image[:, ::-1]).max() < 1e-5
        assert flipped or np.abs(result - image).max() < 1e-5
        mirrored += flipped
    assert 0 < mirrored < len(original)


def test_random_resized_crops_zoom_into_parts_within_the_allowed_ranges():
    height, width = 40, 60
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
    ramp = jnp.stack([rows, columns], -1).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(2), 300)
    crop = functools.partial(data.random_resized_crop_flip, size=16, scale=(0.2, 0.9))
    result = np.asarray(jax.jit(jax.vmap(crop, (None, 0)))(ramp, keys))
    # Neighbouring output pixels are crop side / 16 input pixels apart, away from the border.
    crop_height = np.median(np.diff(result[..., 0], axis=1), axis=(1, 2)) * 16
    crop_width = np.abs(np.median(np.diff(result[..., 1], axis=2), axis=(1, 2))) * 16
    area = crop_height * crop_width / (height * width)
    assert 0.17 < area.min() < 0.3 and 0.65 < area.max() < 0.93
    ratio = crop_width / crop_height
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.4
    assert result.min() >= 0 and result[..., 0].max() <= 39 and result[..., 1].max() <= 59


def test_a_part_that_never_fits_becomes_the_centre():
    ramp = jnp.broadcast_to(jnp.arange(64.0)[None, :, None], (4, 64, 1))
    crop = functools.partial(
        data.random_resized_crop_flip, size=8, scale=(0.9, 1.0), ratio=(1.0, 1.0)
    )
    result = jax.jit(crop)(ramp, jax.random.key(0))
    np.testing.assert_allclose(result.mean(), 31.5, atol=0.5)
    assert result.min() > 28 and result.max() < 35


def test_no_augmentation_returns_the_images_or_their_centre():
    original = images(height=9, width=8)
    arguments = (jax.random.key(0), jnp.arange(16))
    assert data.augment('none', original, *arguments) is original
    np.testing.assert_array_equal(
        data.augment('none', original, *arguments, size=4), original[:, 2:6, 2:6]
    )


@pytest.mark.parametrize('name', RANDOM_NAMES)
def test_randomness_follows_the_key_and_the_index_of_the_example(name):
    original = jnp.broadcast_to(images(count=1), (16, 8, 8, 3))
    apply = jax.jit(functools.partial(data.augment, name))
    first = apply(original, jax.random.key(0), jnp.arange(16))
    order = jnp.flip(jnp.arange(16))
    np.testing.assert_array_equal(apply(original, jax.random.key(0), order), first[::-1])
    assert np.any(apply(original, jax.random.key(1), jnp.arange(16)) != first)
    assert len(np.unique(np.asarray(first).reshape(16, -1), axis=0)) > 4


@pytest.mark.parametrize('name', RANDOM_NAMES)
def test_sharded_batches_give_the_same_pixels_without_gathering(name):
    mesh = Mesh(np.array(jax.devices()), ('data',))
    assert mesh.size == 8
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    original, index, key = images(), jnp.arange(16), jax.random.key(0)
    apply = jax.jit(functools.partial(data.augment, name))
    sharded = (jax.device_put(original, sharding), key, jax.device_put(index, sharding))
    program = apply.lower(*sharded).compile().as_text()
    for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
        assert collective not in program
    result = apply(*sharded)
    assert result.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(result, apply(original, key, index), atol=1e-6)


def test_unknown_augmentation_names_the_closest():
    with pytest.raises(ValueError, match=r"'pad_crop_flp'.*pad_crop_flip"):
        data.augment('pad_crop_flp', images(), jax.random.key(0), jnp.arange(16))


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda image, key: data.pad_crop_flip(image, key, padding=-1), 'padding -1'),
        (lambda image, key: data.random_resized_crop_flip(image, key, size=0), 'size 0'),
        (lambda image, key: data.centre_crop(image, size=9), 'crop size 9'),
        (
            lambda image, key: data.augment('pad_crop', image[None], key, jnp.arange(1), size=4),
            'use random_resized_crop_flip',
        ),
    ],
)
def test_impossible_crops_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(images()[0], jax.random.key(0))

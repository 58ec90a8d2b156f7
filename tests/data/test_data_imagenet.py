"""ImageNet-size images, on a small directory of the same format."""

import io
import itertools
import pickle
import types

import jax
import numpy as np
import pytest
from PIL import Image

from neurosens import data
from neurosens.data import imagenet
from neurosens.data.batching import epoch_order

TRAIN, TEST = 23, 7


def picture(number):
    """A smooth image whose size, colours and mode depend on its number."""
    width, height = 260 + 17 * (number % 5), 270 + 11 * (number % 7)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows % 256, columns % 256, np.full_like(rows, 8 * number % 256)], -1)
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.convert('L') if number % 6 == 5 else image


def encoded(number):
    file = io.BytesIO()
    picture(number).save(file, format='JPEG', quality=90)
    return file.getvalue()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    import tensorflow_datasets as tfds

    def examples(count, shift):
        for number in range(count):
            yield (
                f'{number}.JPEG',
                {
                    'image': io.BytesIO(encoded(number + shift)),
                    'label': (number * 41) % 1000,
                    'file_name': f'{number}.JPEG',
                },
            )

    official = tfds.builder_cls('imagenet2012')
    members = {
        'name': 'imagenet2012',
        '__module__': official.__module__,
        '_split_generators': lambda self, _: {
            'train': examples(TRAIN, 0),
            'validation': examples(TEST, 100),
        },
    }
    builder = types.new_class(
        'Imagenet2012',
        (official,),
        {'skip_registration': True},
        lambda namespace: namespace.update(members),
    )
    root = tmp_path_factory.mktemp('tfds')
    builder(data_dir=root).download_and_prepare(file_format='array_record')
    return root


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_training_batches_follow_the_common_order_and_format(directory):
    source = data.open('imagenet2012', 'train', directory, threads=2)
    assert source.num_examples == TRAIN and source.info.image_shape == (224, 224, 3)
    assert source.info.class_names[0] == 'n01440764'
    batches = take(source.train_batches(batch_size=4, seed=9), 7)
    for batch in batches:
        assert isinstance(batch, data.Batch)
        assert batch.image.shape == (4, 256, 256, 3) and batch.image.dtype == np.uint8
        assert batch.label.dtype == batch.index.dtype == np.int32
        assert batch.mask.dtype == bool and batch.mask.all()
    seen = np.concatenate([batch.index for batch in batches])
    expected = [epoch_order(TRAIN, 9, 0)[:20], epoch_order(TRAIN, 9, 1)[:8]]
    np.testing.assert_array_equal(seen, np.concatenate(expected))


def test_processes_and_restarts_do_not_change_training_batches(directory):
    source = data.open('imagenet2012', 'train', directory, threads=2)
    whole = take(source.train_batches(batch_size=4, seed=1), 7)
    assert_same(whole[4:], take(source.train_batches(batch_size=4, seed=1, start_step=4), 3))
    parts = [
        take(
            source.train_batches(
                batch_size=4, seed=1, start_step=4, process_index=process, process_count=2
            ),
            3,
        )
        for process in range(2)
    ]
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *pair) for pair in zip(*parts)]
    assert_same(whole[4:], joined)


def test_evaluation_sees_every_test_image_once(directory):
    source = data.open('imagenet2012', 'test', directory, threads=2)
    parts = [
        list(source.eval_batches(batch_size=4, process_index=process, process_count=2))
        for process in range(2)
    ]
    batches = [batch for step in zip(*parts) for batch in step]
    assert [batch.image.shape for batch in batches] == [(2, 224, 224, 3)] * 4
    assert np.concatenate([batch.index for batch in batches]).tolist() == [*range(TEST), TEST - 1]
    assert np.concatenate([batch.mask for batch in batches]).tolist() == [True] * TEST + [False]
    limited = list(source.eval_batches(batch_size=4, limit=3))
    assert len(limited) == 1 and limited[0].mask.tolist() == [True] * 3 + [False]


def test_held_out_images_are_not_training_images(directory):
    splits = [
        data.open('imagenet2012', split, directory, 5, threads=2)
        for split in ('train', 'validation')
    ]
    labels = [
        {int(y) for batch in split.eval_batches(batch_size=8) for y in batch.label}
        for split in splits
    ]
    assert [len(one) for one in labels] == [TRAIN - 5, 5]
    assert not labels[0] & labels[1]


@pytest.mark.parametrize('reduced', [False, True])
def test_decoding_takes_the_centre_at_shorter_side_256(reduced):
    rows, columns = np.mgrid[0:512, 0:1024]
    pixels = np.stack([rows / 2, columns / 4, rows * 0], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format='JPEG', quality=95)
    image = imagenet.decode_image(file.getvalue(), resized_side=256, crop=224, reduced=reduced)
    assert image.shape == (224, 224, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image[:, 100, 0], np.arange(16, 240), atol=3)
    np.testing.assert_allclose(image[100, :, 1], 64 + np.arange(16, 240) / 2, atol=3)


def test_grey_and_cmyk_images_become_colour():
    for mode in ('L', 'CMYK'):
        file = io.BytesIO()
        picture(0).convert(mode).save(file, format='JPEG')
        image = imagenet.decode_image(file.getvalue(), resized_side=64, crop=32, reduced=True)
        assert image.shape == (32, 32, 3)


def test_the_rows_can_travel_to_worker_processes(directory):
    source = data.open('imagenet2012', 'test', directory, threads=2)
    copy = pickle.loads(pickle.dumps(source))
    assert_same(next(source.eval_batches(batch_size=2)), next(copy.eval_batches(batch_size=2)))


def test_an_unreadable_image_is_reported_in_one_sentence(directory):
    source = data.open('imagenet2012', 'test', directory, threads=2)
    broken = imagenet.StreamedDataset(
        [source.records[0][:200]] * 4, np.arange(4), source.info, source.directory, threads=2
    )
    with pytest.raises(data.DatasetDamagedError, match='remove that directory and prepare'):
        next(broken.eval_batches(batch_size=2))


def test_thread_and_worker_counts_are_checked(directory):
    with pytest.raises(ValueError, match='0 threads with 0 workers'):
        data.open('imagenet2012', 'test', directory, threads=0)


def test_a_streamed_data_set_is_not_loaded_into_memory():
    with pytest.raises(ValueError, match=r'use neurosens\.data\.open'):
        data.load('imagenet2012', 'train')

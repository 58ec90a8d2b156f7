"""The table of data sets, loading into memory, and what is said where that fails."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from neurosens import data


def test_every_data_set_is_described_consistently():
    assert data.names()[0] == 'digits'
    for name in data.names():
        info = data.info(name)
        assert info.name == name
        assert len(info.class_names) == len(set(info.class_names)) == info.num_classes
        assert len(info.mean) == len(info.std) == info.image_shape[2]
        assert all(0 < mean < 1 for mean in info.mean) and all(0 < std < 1 for std in info.std)
    assert [name for name in data.names() if not data.info(name).in_memory] == ['imagenet2012']


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(ValueError, match=r"Unknown data set 'cifr10'.*cifar10"):
        data.info('cifr10')
    with pytest.raises(ValueError, match=r"Unknown split 'tset'.*test"):
        data.load('digits', 'tset')


@pytest.mark.parametrize('split', ['train', 'test'])
def test_digits_have_fixed_stratified_splits(split):
    dataset = data.load('digits', split)
    size = {'train': 1437, 'test': 360}[split]
    assert dataset.images.shape == (size, 8, 8, 1) and dataset.images.dtype == np.uint8
    assert dataset.labels.shape == (size,) and dataset.labels.dtype == np.int32
    assert dataset.images.max() == 255 and 128 in dataset.images
    if split == 'test':
        assert np.bincount(dataset.labels).tolist() == [36] * 10
        # A change here would silently change every published number.
        assert dataset.labels[:10].tolist() == [1, 5, 2, 4, 5, 8, 3, 9, 5, 4]
    with pytest.raises(ValueError, match='read-only'):
        dataset.images[0] = 0
    with pytest.raises(ValueError, match='read-only'):
        dataset.labels[0] = 0


def test_digits_statistics_are_those_of_the_training_split():
    info = data.info('digits')
    pixels = data.load('digits', 'train').images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), info.mean, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), info.std, atol=5e-5)


def test_validation_is_held_out_of_the_official_training_split():
    whole = data.load('digits', 'train')
    train = data.load('digits', 'train', validation_size=200)
    validation = data.load('digits', 'validation', validation_size=200)
    assert (train.num_examples, validation.num_examples) == (1237, 200)
    together = np.concatenate([train.images, validation.images]).reshape(1437, -1)
    order = np.lexsort(together.T), np.lexsort(whole.images.reshape(1437, -1).T)
    np.testing.assert_array_equal(together[order[0]], whole.images.reshape(1437, -1)[order[1]])
    np.testing.assert_array_equal(
        validation.images, data.load('digits', 'validation', validation_size=200).images
    )
    assert np.bincount(validation.labels).min() > 5


@pytest.mark.parametrize(
    ('split', 'size', 'words'),
    [('validation', 0, 'pass how many'), ('train', 1437, 'size 1437'), ('train', -1, 'size -1')],
)
def test_impossible_validation_sizes_are_refused(split, size, words):
    with pytest.raises(ValueError, match=words):
        data.load('digits', split, validation_size=size)


@pytest.mark.parametrize('name', ['mnist', 'imagenet2012'])
def test_a_data_set_that_is_not_prepared_names_the_command(name, tmp_path):
    expected = (
        f'{name} is not prepared in {tmp_path}: '
        f'run `python -m neurosens.data prepare {name} --data_dir={tmp_path}`'
    )
    with pytest.raises(data.DatasetNotPreparedError) as caught:
        data.open(name, 'test', tmp_path)
    assert str(caught.value) == expected
    assert isinstance(caught.value, FileNotFoundError)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'elsewhere'))
    with pytest.raises(data.DatasetNotPreparedError, match='elsewhere'):
        data.load('mnist', 'test')


def test_loading_digits_needs_neither_tfds_nor_grain():
    program = (
        'import sys; from neurosens import data; data.load("digits", "train"); '
        'print(sorted({"tensorflow", "tensorflow_datasets", "grain"} & set(sys.modules)))'
    )
    assert run_python(program) == '[]'


def run_python(program, **environment):
    result = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip().splitlines()[-1]


# Real data, where present.


@pytest.fixture(scope='module')
def tfds_dir(data_root):
    if not (data_root / 'tfds').is_dir():
        pytest.skip('no tfds/ in NEUROSENS_DATA')
    return data_root / 'tfds'


def test_real_mnist_test_images(tfds_dir):
    dataset = data.load('mnist', 'test', data_dir=tfds_dir)
    assert dataset.images.shape == (10_000, 28, 28, 1)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.labels).tolist() == counts
    assert dataset.labels[:5].tolist() == [2, 0, 4, 8, 7]
    with pytest.raises(ValueError, match='read-only'):
        dataset.images[0] = 0


def test_real_cifar10(tfds_dir):
    test = data.load('cifar10', 'test', data_dir=tfds_dir)
    assert test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    train = data.load('cifar10', 'train', data_dir=tfds_dir, validation_size=5000)
    assert train.images.shape == (45_000, 32, 32, 3)
    mean = train.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, train.info.mean, atol=2e-3)


def test_reading_tfds_never_imports_tensorflow(tfds_dir):
    program = (
        'import os, sys; from neurosens import data; '
        'data.load("mnist", "test", data_dir=os.environ["DIRECTORY"]); '
        'print("tensorflow" in sys.modules)'
    )
    assert run_python(program, DIRECTORY=str(tfds_dir)) == 'False'


def truncate(directory):
    file = directory / 'mnist-test.array_record-00000-of-00001'
    os.truncate(file, file.stat().st_size // 2)


def overwrite(directory):
    with (directory / 'mnist-test.array_record-00000-of-00001').open('r+b') as file:
        file.seek(100_000)
        file.write(b'\xff' * 70_000)


def rewrite(name, old, new):
    def damage(directory):
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return damage


@pytest.mark.parametrize(
    'damage',
    [
        truncate,
        overwrite,
        lambda directory: (directory / 'mnist-test.array_record-00000-of-00001').unlink(),
        lambda directory: (directory / 'features.json').unlink(),
        rewrite('dataset_info.json', '{', ''),
        rewrite('dataset_info.json', '"10000"', '"10001"'),
        rewrite('dataset_info.json', 'array_record', 'tfrecord'),
    ],
)
def test_damaged_files_give_one_sentence_with_a_remedy(tfds_dir, tmp_path, damage):
    (source,) = (tfds_dir / 'mnist').iterdir()
    directory = tmp_path / 'mnist' / source.name
    directory.mkdir(parents=True)
    for file in source.iterdir():
        if 'train' not in file.name:
            shutil.copyfile(file, directory / file.name)
    damage(directory)
    with pytest.raises(data.DatasetDamagedError) as caught:
        data.load('mnist', 'test', data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f'mnist in {directory} ')
    assert '\n' not in message and 'prepare it again' in message

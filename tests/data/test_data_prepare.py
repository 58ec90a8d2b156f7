"""Preparation from small archives, and the command line."""

import gzip
import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest

from neurosens import data
from neurosens.data import __main__ as command_line
from neurosens.data.archives import Archive
from neurosens.data.prepare import PrepareError, prepare

COUNTS = {'train': 30, 'test': 11}


@pytest.fixture(scope='module')
def random_examples():
    def examples(name, split):
        info = data.info(name)
        generator = np.random.default_rng(COUNTS[split])
        images = generator.integers(0, 256, (COUNTS[split], *info.image_shape), np.uint8)
        labels = generator.integers(0, info.num_classes, COUNTS[split], np.uint8)
        return images, labels

    return examples


def publish(directory, filename, content):
    directory.mkdir(exist_ok=True)
    (directory / filename).write_bytes(content)
    url = (directory / filename).as_uri()
    return Archive(url, filename, hashlib.sha256(content).hexdigest())


def idx(array):
    sizes = b''.join(side.to_bytes(4, 'big') for side in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def publish_mnist(directory, name, examples):
    published = []
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        images, labels = examples(name, split)
        published += [
            publish(directory, f'{prefix}-images-idx3-ubyte.gz', idx(images[..., 0])),
            publish(directory, f'{prefix}-labels-idx1-ubyte.gz', idx(labels)),
        ]
    return published


def publish_cifar(directory, name, examples):
    coarse = name == 'cifar100'

    def records(split):
        images, labels = examples(name, split)
        columns = [labels % 20] * coarse + [labels, images.transpose(0, 3, 1, 2)]
        return np.concatenate([column.reshape(len(labels), -1) for column in columns], axis=1)

    train, test = records('train'), records('test')
    class_names = '\n'.join(data.info(name).class_names).encode() + b'\n'
    if coarse:
        coarse_names = '\n'.join(f'group_{group}' for group in range(20)).encode()
        members = {
            'train.bin': train.tobytes(),
            'test.bin': test.tobytes(),
            'fine_label_names.txt': class_names,
            'coarse_label_names.txt': coarse_names,
        }
    else:
        members = {'batches.meta.txt': class_names, 'test_batch.bin': test.tobytes()}
        for number in range(5):
            part = train[number * len(train) // 5 : (number + 1) * len(train) // 5]
            members[f'data_batch_{number + 1}.bin'] = part.tobytes()
    folder = 'cifar-100-binary' if coarse else 'cifar-10-batches-bin'
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w:gz') as archive:
        for member, value in members.items():
            entry = tarfile.TarInfo(f'{folder}/{member}')
            entry.size = len(value)
            archive.addfile(entry, io.BytesIO(value))
    filename = 'cifar-100-binary.tar.gz' if coarse else 'cifar-10-binary.tar.gz'
    return [publish(directory, filename, content.getvalue())]


def publish_any(directory, name, examples):
    return (publish_mnist if 'mnist' in name else publish_cifar)(directory, name, examples)


def multiset(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels))


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'cifar10', 'cifar100'])
def test_prepared_data_is_an_ordinary_tfds_directory(name, tmp_path, random_examples):
    import tensorflow_datasets as tfds

    published = publish_any(tmp_path / 'server', name, random_examples)
    prepared = prepare(name, tmp_path / 'data', published=published)
    assert prepared.created and prepared.directory.parent == tmp_path / 'data' / name
    assert not list((tmp_path / 'data').rglob('*incomplete*'))
    for split in COUNTS:
        dataset = data.load(name, split, data_dir=tmp_path / 'data', validation_size=0)
        expected = random_examples(name, split)
        assert multiset(dataset.images, dataset.labels) == multiset(*expected)
        official = tfds.builder(name, data_dir=tmp_path / 'data').as_data_source(split=split)
        np.testing.assert_array_equal(official[3]['image'], dataset.images[3])
        assert official[3]['label'] == dataset.labels[3]
        assert ('id' in official[3]) == name.startswith('cifar')
        if name == 'cifar100':
            assert official[3]['coarse_label'] == official[3]['label'] % 20
    builder = tfds.builder_from_directory(prepared.directory)
    if name != 'mnist':
        assert tuple(builder.info.features['label'].names) == data.info(name).class_names
    assert prepare(name, tmp_path / 'data') == type(prepared)(prepared.directory, created=False)
    assert 'tensorflow' not in sys.modules


def test_archives_already_there_are_not_downloaded(tmp_path, random_examples):
    downloads = tmp_path / 'downloads' / 'mnist'
    downloads.parent.mkdir()
    published = publish_any(downloads, 'mnist', random_examples)
    offline = [Archive('http://localhost:1/', one.filename, one.sha256) for one in published]
    assert prepare('mnist', tmp_path, published=offline).created


def test_unreachable_archives_leave_nothing_behind(tmp_path):
    root = tmp_path / 'data'
    with pytest.raises(PrepareError, match='could not download http'):
        prepare('mnist', root, published=[Archive('http://localhost:1/x.gz', 'x.gz', '0' * 64)])
    assert not root.exists()


def test_archives_that_are_not_the_published_ones_leave_nothing_behind(tmp_path):
    published = publish(tmp_path / 'server', 'cifar-10-binary.tar.gz', b'not it')
    wrong = Archive(published.url, published.filename, '0' * 64)
    with pytest.raises(PrepareError, match='is not the published file'):
        prepare('cifar10', tmp_path / 'data', published=[wrong])
    assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize('name', ['mnist', 'cifar10'])
def test_damaged_archives_are_named_and_nothing_is_prepared(name, tmp_path, random_examples):
    published = [
        publish(tmp_path / 'damaged', one.filename, b'\x1f\x8b damaged')
        for one in publish_any(tmp_path / 'server', name, random_examples)
    ]
    with pytest.raises(PrepareError, match=r'\.gz is damaged'):
        prepare(name, tmp_path / 'data', published=published)
    assert not (tmp_path / 'data' / name).exists()


def test_an_incomplete_version_is_not_taken_for_a_prepared_one(tmp_path, random_examples):
    published = publish_any(tmp_path / 'server', 'mnist', random_examples)
    (tmp_path / 'data' / 'mnist' / '3.0.1').mkdir(parents=True)
    with pytest.raises(PrepareError, match='holds an incomplete version'):
        prepare('mnist', tmp_path / 'data', published=published)


def test_imagenet_says_where_its_archives_belong(tmp_path):
    with pytest.raises(PrepareError) as caught:
        prepare('imagenet2012', tmp_path)
    message = str(caught.value)
    assert 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar' in message
    assert str(tmp_path / 'downloads' / 'manual') in message
    assert not list(tmp_path.iterdir())


def test_imagenet_asks_for_tensorflow_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    manual = tmp_path / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    for file in ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'):
        (manual / file).touch()
    with pytest.raises(PrepareError, match='pip install tensorflow'):
        prepare('imagenet2012', tmp_path)


def test_command_line_reports_failures_in_one_sentence_with_exit_code_2(tmp_path, capsys):
    assert command_line.main(['prepare', 'cifr10', '--data_dir', str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "Unknown data set 'cifr10'; valid names are digits, mnist, fashion_mnist, cifar10, "
        'cifar100, imagenet2012.\n'
    )
    assert command_line.main(['prepare', 'imagenet2012', '--data_dir', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises(SystemExit) as caught:
        command_line.main(['prepare'])
    assert caught.value.code == 2


def test_command_line_lists_what_is_prepared(tmp_path, capsys, random_examples):
    published = publish_any(tmp_path / 'server', 'mnist', random_examples)
    prepare('mnist', tmp_path, published=published)
    capsys.readouterr()
    assert command_line.main(['list', '--data_dir', str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert tuple(lines) == data.names()
    assert lines['digits'].endswith('embedded')
    assert lines['mnist'].endswith(str(tmp_path / 'mnist' / '3.0.1'))
    assert lines['cifar10'].endswith('not prepared')
    assert command_line.main(['prepare', 'mnist', '--data_dir', str(tmp_path)]) == 0
    assert 'already prepared' in capsys.readouterr().out
    assert command_line.main(['prepare', 'digits']) == 0
    assert 'embedded' in capsys.readouterr().out

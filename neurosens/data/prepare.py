"""Downloads data sets and writes them as ordinary TFDS directories of ArrayRecord files."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from neurosens.data import archives, catalogue, tfds_source
from neurosens.data.archives import Archive, ArchiveError, ParsedDataset, ParsedSplit

_IMAGENET_ARCHIVES = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
_PARSERS: Mapping[str, Callable[[Mapping[str, pathlib.Path]], ParsedDataset]] = (
    types.MappingProxyType(
        {
            'mnist': archives.parse_mnist,
            'fashion_mnist': archives.parse_mnist,
            'cifar10': archives.parse_cifar10,
            'cifar100': archives.parse_cifar100,
        }
    )
)


class PrepareError(RuntimeError):
    """A data set cannot be prepared; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` found or wrote.

    Attributes:
        directory: The directory of the prepared version; None for an embedded data set.
        created: Whether this call wrote it.
    """

    directory: pathlib.Path | None
    created: bool


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    published: Sequence[Archive] | None = None,
) -> Prepared:
    """Downloads a data set and writes it for `neurosens.data.load`.

    The result is the directory that TFDS itself writes, examples in the same order, but is made
    without TensorFlow (`imagenet2012` excepted). Archives stay in `data_dir`/downloads/`name`;
    those already there are not downloaded again.

    Args:
        name: One of `neurosens.data.names()`.
        data_dir: Where to write; None for TFDS_DATA_DIR or else ~/tensorflow_datasets.
        published: The archives to fetch; None for those that TFDS registers.

    Returns:
        Where the data set is and whether it was written by this call.

    Raises:
        ValueError: The name is unknown.
        PrepareError: An archive cannot be fetched or read, TensorFlow is needed, or the
            directory cannot be written. Nothing incomplete is left behind.
    """
    catalogue.info(name)
    if name == 'digits':
        return Prepared(None, created=False)
    root = tfds_source.resolve_data_dir(data_dir)
    if (directory := tfds_source.find_prepared(name, root)) is not None:
        return Prepared(directory, created=False)
    try:
        if name == 'imagenet2012':
            _prepare_imagenet(root)
        else:
            _prepare_from_archives(name, root, published)
    except ArchiveError as error:
        raise PrepareError(str(error)) from error
    except OSError as error:
        raise PrepareError(
            f'could not write {name} to {root} ({error}): make room or choose another data_dir'
        ) from error
    directory = tfds_source.find_prepared(name, root)
    if directory is None:
        # TFDS takes any existing version directory for a finished one.
        raise PrepareError(
            f'{root / name} holds an incomplete version: remove it and run the command again'
        )
    return Prepared(directory, created=True)


def _prepare_from_archives(
    name: str, root: pathlib.Path, published: Sequence[Archive] | None
) -> None:
    import tensorflow_datasets as tfds

    official = tfds.builder_cls(name)
    if published is None:
        published = [
            Archive(url, url_info.filename, url_info.checksum)
            for url, url_info in official.url_infos.items()
        ]
    with _directory(root / 'downloads' / name) as downloads:
        paths = {archive.filename: archives.fetch(archive, downloads) for archive in published}
        builder = _builder(official, root, _PARSERS[name](paths))
        builder.download_and_prepare(file_format='array_record')


@contextlib.contextmanager
def _directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a directory, and on an error takes back those levels that stayed empty."""
    missing = [level for level in (path, *path.parents) if not level.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            for level in missing:
                level.rmdir()
        raise


def _builder(official: Any, root: pathlib.Path, dataset: ParsedDataset) -> Any:
    """Returns the official builder with the steps that need TensorFlow replaced."""

    def split_generators(self: Any, download_manager: object) -> dict[str, Iterator[Any]]:
        del download_manager
        for feature, names in dataset.class_names.items():
            self.info.features[feature].names = names
        with_id = 'id' in self.info.features
        return {
            split: _examples(parsed, f'{split}_' if with_id else None)
            for split, parsed in dataset.splits.items()
        }

    def namespace(members: dict[str, Any]) -> None:
        members.update(
            name=official.name,
            __module__=official.__module__,
            _split_generators=split_generators,
        )

    builder_class: Any = types.new_class(
        official.__name__, (official,), {'skip_registration': True}, namespace
    )
    return builder_class(data_dir=root)


def _examples(split: ParsedSplit, id_prefix: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each example under its number, from which TFDS derives the stored order."""
    from PIL import Image

    for number, pixels in enumerate(split.images):
        encoded = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(encoded, format='PNG')
        encoded.seek(0)
        example: dict[str, Any] = {'image': encoded}
        example.update((feature, int(values[number])) for feature, values in split.labels.items())
        if id_prefix is not None:
            example['id'] = f'{id_prefix}{number:05d}'
        yield number, example


def _prepare_imagenet(root: pathlib.Path) -> None:
    manual = root / 'downloads' / 'manual'
    missing = [file for file in _IMAGENET_ARCHIVES if not (manual / file).is_file()]
    if missing:
        raise PrepareError(
            f'imagenet2012 cannot be downloaded automatically: register at https://image-net.org, '
            f'put {" and ".join(missing)} into {manual}, and run the command again'
        )
    if importlib.util.find_spec('tensorflow') is None:
        raise PrepareError(
            'building imagenet2012 is the one step that needs TensorFlow: run '
            '`pip install tensorflow`, in a separate environment if need be, and then the '
            'command again'
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder('imagenet2012', data_dir=root)
    builder.download_and_prepare(
        download_dir=root / 'downloads',
        download_config=tfds.download.DownloadConfig(manual_dir=manual),
        file_format='array_record',
    )

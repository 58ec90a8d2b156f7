"""What wrappers add to a state dict: prefixes, duplicates, and the numbers of the normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from neurosens.interop import layers
from neurosens.interop.errors import WeightsError

# The adversary of MadryLab's robustness library holds the network a second time.
_ADVERSARY = 'attacker.'
_NORMALIZATION = {
    'mean': re.compile(r'(?:^|\.)(?:new_mean|mean|mu)$'),
    'std': re.compile(r'(?:^|\.)(?:new_std|std|sigma)$'),
}
# How many models the averages of `torch.optim.swa_utils` are of.
_AVERAGED = 'n_averaged'
# DenseNets of the first versions of torchvision.
_OLD_DENSE_LAYER = re.compile(r'(denselayer\d+\.(?:norm|conv))\.([12])\.')


class Cleaned(NamedTuple):
    """A state dict without what wrappers added to it.

    Attributes:
      arrays: weights and statistics by their name in the bare network, in the file's order.
      originals: for each of them every name that it has in the file.
      mean: mean of each channel that the file normalises images by, or None.
      std: standard deviation of each channel, or None.
    """

    arrays: dict[str, np.ndarray]
    originals: dict[str, tuple[str, ...]]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def clean(state: Mapping[str, np.ndarray]) -> Cleaned:
    """Takes prefixes of wrappers, duplicates and the normalisation out of a state dict.

    A prefix is any module that holds all others, such as `module` of `DataParallel` or `model` of
    a network behind its normalisation. The adversary's copy of the network in files of the
    robustness library goes, and so do counts of batches and of averaged models, which nothing is
    computed from.

    Args:
      state: arrays by name.

    Returns:
      The bare state dict.

    Raises:
      WeightsError: two entries stand for one array and differ.
    """
    names = {
        name: name
        for name in state
        if not name.endswith(layers.COUNT) and name.split('.')[-1] != _AVERAGED
    }
    numbers: dict[str, tuple[float, ...]] = {}
    for kind, pattern in _NORMALIZATION.items():
        for original in [name for name in names if pattern.search(name)]:
            del names[original]
            found = tuple(float(value) for value in state[original].ravel())
            if numbers.setdefault(kind, found) != found:
                raise WeightsError(
                    f'The file normalises by two values of {kind}, {numbers[kind]} and {found} '
                    f'({original!r}); leave out the one that is not meant.'
                )
    names = _without_prefixes(names)
    arrays: dict[str, np.ndarray] = {}
    originals: dict[str, tuple[str, ...]] = {}
    for original, name in names.items():
        name = _OLD_DENSE_LAYER.sub(r'\1\2.', name)
        if name in arrays and not np.array_equal(arrays[name], state[original], equal_nan=True):
            raise WeightsError(
                f'{originals[name][0]!r} and {original!r} stand for one array but differ; leave '
                'out the one that is not meant.'
            )
        arrays.setdefault(name, state[original])
        originals[name] = (*originals.get(name, ()), original)
    return Cleaned(arrays, originals, numbers.get('mean'), numbers.get('std'))


def _without_prefixes(names: dict[str, str]) -> dict[str, str]:
    while True:
        prefix = _common_prefix(names.values())
        shorter = {
            original: name.removeprefix(prefix).removeprefix(_ADVERSARY)
            for original, name in names.items()
        }
        if shorter == names:
            return names
        names = shorter


def _common_prefix(names: Iterable[str]) -> str:
    """The first module's name and a dot, where it holds all layers and is none itself."""
    parts = [name.split('.') for name in names]
    firsts = {name[0] for name in parts}
    if len(firsts) == 1 and all(len(name) > 2 for name in parts):
        return f'{firsts.pop()}.'
    return ''

"""Which layer of a state dict is which layer of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import numpy as np

from neurosens import _validate
from neurosens.interop import layers, naming
from neurosens.interop.errors import WeightsError

IN_ORDER = 'save it with PyTorch, or give from_torch the state dict in order'


def torch_names(
    module: nn.Module,
    found: Sequence[layers.Layer],
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str] | None,
    unordered: str = '',
) -> dict[str, str]:
    """Finds the layers of a module in a state dict.

    Args:
      module: the module.
      found: its layers.
      arrays: the state dict without prefixes of wrappers.
      originals: the names that each array had with them.
      given: names of layers by path that the user knows, with or without prefixes.
      unordered: what the arrays were read from where that keeps no order, in words.

    Returns:
      For the path of each layer PyTorch's name of it, ours where it has none.

    Raises:
      WeightsError: a given name or path is unknown, or the order would decide and is not known.
    """
    check_paths(given, found)
    known = _bare_names(given or {}, arrays, originals)
    paths = [layer.path for layer in found]
    theirs = {name.rpartition('.')[0] for name in arrays}
    candidates = [
        {path: known.get(path) or name(module, path) for path in paths}
        for name in naming.namings(module)
    ]
    # The first of the best.
    best = max(candidates, key=lambda pairs: len(theirs & set(pairs.values())))
    if not naming.is_chain(module) or theirs == set(best.values()):
        return best
    if unordered:
        remedy = f'{IN_ORDER}, or give names={{path: layer}}.'
        naming.check_order(arrays, unordered, remedy, but=known.values())
    return _in_order(found, arrays, known)


def head(
    given: Mapping[str, str] | None,
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
) -> np.ndarray | None:
    """The weight of the last layer, where names (as of `torch_names`) say which one that is."""
    _check_strings(given)
    if not given or 'head' not in given:
        return None
    layer = _bare_names({'head': given['head']}, arrays, originals)['head']
    weight = arrays.get(f'{layer}.weight')
    if weight is None or weight.ndim != 2:
        raise WeightsError(
            f"names['head'] is {given['head']!r}, which is no linear layer; name the one that "
            'gives the logits.'
        )
    return weight


def _bare_names(
    given: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Names of layers without the prefixes of wrappers, which users may give with or without."""
    bare = {name.rpartition('.')[0]: name.rpartition('.')[0] for name in arrays}
    bare |= {
        original.rpartition('.')[0]: name.rpartition('.')[0]
        for name in arrays
        for original in originals[name]
    }
    for layer in given.values():
        if layer not in bare:
            raise WeightsError(_validate.unknown('layer of the state dict in names', layer, bare))
    return {path: bare[layer] for path, layer in given.items()}


def _in_order(
    found: Sequence[layers.Layer], arrays: Mapping[str, np.ndarray], given: Mapping[str, str]
) -> dict[str, str]:
    """Pairs the layers of each kind in their order; what is left over keeps our name."""
    theirs: dict[str, list[str]] = {kind: [] for kind in layers.KINDS}
    for layer, array in layers.weights(arrays).items():
        if layer not in given.values():
            theirs[layers.kind_of_weight(array)].append(layer)
    waiting = {kind: iter(names) for kind, names in theirs.items()}
    return {
        layer.path: given.get(layer.path) or next(waiting[layer.kind], naming.own(None, layer.path))
        for layer in found
    }


def weights(chosen: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by the path of our layer, of the layers that the state dict has."""
    named = {path: arrays.get(f'{layer}.weight') for path, layer in chosen.items()}
    return {path: array for path, array in named.items() if array is not None}


def check_paths(names: Mapping[str, str] | None, found: Sequence[layers.Layer]) -> None:
    """Refuses names for layers that the module does not have."""
    _check_strings(names)
    paths = [layer.path for layer in found]
    for path in names or ():
        if path not in paths:
            raise WeightsError(_validate.unknown('layer in names', path, paths))


def _check_strings(names: Mapping[str, str] | None) -> None:
    if not isinstance(names, Mapping | None):
        raise WeightsError(
            f'names is {names!r}, but it must be a dict of layers of the file by those of the '
            'module: {path: layer}.'
        )
    for path, layer in (names or {}).items():
        if not (isinstance(path, str) and isinstance(layer, str)):
            raise WeightsError(
                f'names has {path!r}: {layer!r}, but both must be strings: the path of a layer of '
                'the module and the name of one of the file.'
            )

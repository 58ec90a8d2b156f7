"""State dicts out of files, without ever running what a file says.

PyTorch's files are pickles, and a pickle can call any function of the process that reads it. Here
they are read by `torch.load(..., weights_only=True)` alone, which builds tensors and plain
containers and refuses everything else, and only by releases in which it does so.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from neurosens.interop.errors import WeightsError

# The only format here that keeps no order of what it holds.
SAFETENSORS_SUFFIX = '.safetensors'
TORCH_SUFFIXES = ('.pt', '.pth', '.th', '.ckpt', '.bin', '.tar')
_DEPTH = 3
# Before, a file can run code in spite of `weights_only=True` (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)

StateDict = dict[str, np.ndarray]


def read_state_dict(path: str | os.PathLike[str], key: str | None = None) -> StateDict:
    """Reads a state dict from a file of PyTorch or safetensors.

    Training scripts save more than weights: the state dict is searched in nested dicts and lists,
    such as under `state_dict`, `model`, `net` or `model_state_dict`.

    Args:
      path: a file ending in `.pt`, `.pth`, `.th`, `.ckpt`, `.bin` or `.tar`, which needs PyTorch
        installed, or in `.safetensors`, which does not.
      key: where in the file the state dict lies, such as `'ema'` or `'models/teacher'`; needed
        only where the file holds several.

    Returns:
      Arrays by PyTorch name, in the file's order; half-precision numbers as float32. Files of
      safetensors keep no order, so their names are sorted, numbers by their value.

    Raises:
      WeightsError: the file has another suffix, holds anything but tensors and plain containers,
        is damaged, or holds no or several state dicts; or PyTorch is needed, and is not installed
        or older than 2.10.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no file of weights {str(path)!r}; name a file ending in '
            f'{", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}.'
        )
    suffix = path.suffix.lower()
    if suffix == SAFETENSORS_SUFFIX:
        content = _read_safetensors(path)
    elif suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise WeightsError(
            f'{str(path)!r} ends in {path.suffix!r}; rename it to what it is, one of '
            f'{", ".join(TORCH_SUFFIXES)} for PyTorch and {SAFETENSORS_SUFFIX} for safetensors.'
        )
    return plain_arrays(_choose(dict(_state_dicts(content, ())), key, path))


def keeps_order(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds its arrays in the order of the layers, as PyTorch's do."""
    return pathlib.Path(path).suffix.lower() != SAFETENSORS_SUFFIX


def plain_arrays(state: Mapping[str, Any]) -> StateDict:
    """A state dict of tensors or arrays as arrays of NumPy's own types.

    Args:
      state: tensors or arrays by name, as of `network.state_dict()`.

    Returns:
      Arrays by name, which may share memory with the tensors; half precision becomes float32.

    Raises:
      WeightsError: an entry is not an array.
    """
    return {str(name): _plain_array(name, value) for name, value in state.items()}


def _plain_array(name: str, value: Any) -> np.ndarray:
    if _is_tensor(value):
        try:
            value = value.detach().cpu()
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()
            value = value.numpy()
        except (RuntimeError, TypeError) as error:
            # Such as quantised, sparse and conjugate ones.
            raise WeightsError(
                f'{name!r} is a tensor that is no plain array ({_one_line(error)}); convert it to '
                'an ordinary one of float32 first.'
            ) from error
    if not hasattr(value, 'shape') or not hasattr(value, 'dtype'):
        raise WeightsError(
            f'{name!r} is a {type(value).__name__}, not an array; pass a state dict, such as '
            'network.state_dict().'
        )
    array = np.asarray(value)
    # The kind of bfloat16 and its like is 'V': NumPy itself does not know them.
    if array.dtype == np.float16 or array.dtype.kind == 'V':
        array = array.astype(np.float32)
    return array


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor of PyTorch, which need not be imported to know."""
    return type(value).__module__.split('.')[0] == 'torch' and hasattr(value, 'is_floating_point')


# ------------------------------------------------------------------------------------- files


def _read_safetensors(path: pathlib.Path) -> StateDict:
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            # The format keeps no order; layers are counted in most of their names.
            return {name: file.get_tensor(name) for name in sorted(file.keys(), key=_natural)}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise WeightsError(
            f'{str(path)!r} cannot be read as safetensors ({_one_line(error)}); write it again, '
            'its tensors in float32.'
        ) from error


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers inside of names by their value."""
    parts = re.findall(r'\d+|\D+', name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _read_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f'Reading {str(path)!r} needs PyTorch, which is not installed: pip install torch, or '
            'convert the file to .safetensors where it is.'
        ) from None
    release = re.match(r'(\d+)\.(\d+)', torch.__version__)
    if release is None or tuple(map(int, release.groups())) < _SAFE_TORCH:
        raise WeightsError(
            f'Reading {str(path)!r} with PyTorch {torch.__version__} could run any code that the '
            "file holds; install 2.10 or newer: pip install 'torch>=2.10', or convert the file to "
            '.safetensors where it comes from.'
        )
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r'GLOBAL ([\w.]+)', str(error)):
            what = f'the Python object {match.group(1)}'
        else:
            what = 'more than tensors and plain containers'
        raise WeightsError(
            f'{str(path)!r} holds {what}, and reading it could run any code, so it is refused; '
            'where you trust it, load it with PyTorch and save its state_dict() alone.'
        ) from error
    # There is hardly an exception that unpickling cut and foreign files does not raise.
    except Exception as error:
        raise WeightsError(
            f'{str(path)!r} cannot be read as weights of PyTorch ({_one_line(error)}); save the '
            'state_dict() of the network again with torch.save.'
        ) from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        f'{type(error).__name__}: {lines[0].rstrip(".")[:120]}' if lines else type(error).__name__
    )


# ----------------------------------------------------------------------------------- nesting


def _state_dicts(content: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every state dict inside nested containers, each with its place, outermost first."""
    if isinstance(content, Mapping):
        arrays = {name: value for name, value in content.items() if _is_array(value)}
        # Its other entries are no arrays; without any weights it is no state dict.
        if all(isinstance(name, str) for name in content) and any(
            value.ndim > 1 for value in arrays.values()
        ):
            yield '/'.join(place), arrays
            if len(arrays) == len(content):
                return
    if len(place) == _DEPTH:
        return
    inner: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(content, Mapping):
        inner = iter(content.items())
    elif isinstance(content, (list, tuple)):
        inner = iter(enumerate(content))
    for name, value in inner:
        # The state of an optimizer has arrays of the parameters' shapes too.
        if 'optim' not in str(name):
            yield from _state_dicts(value, (*place, str(name)))


def _is_array(value: Any) -> bool:
    return _is_tensor(value) or isinstance(value, np.ndarray)


def _choose(
    found: dict[str, Mapping[str, Any]], key: str | None, path: pathlib.Path
) -> Mapping[str, Any]:
    places = ', '.join(repr(place) for place in found)
    if not found:
        raise WeightsError(
            f'{str(path)!r} holds no state dict; save the state_dict() of the network.'
        )
    if key is not None:
        if key not in found:
            raise WeightsError(
                f'{str(path)!r} has no state dict at {key!r}; it has them at {places}.'
            )
        return found[key]
    if len(found) > 1:
        raise WeightsError(
            f'{str(path)!r} holds {len(found)} state dicts; choose one by its key, one of {places}.'
        )
    return next(iter(found.values()))

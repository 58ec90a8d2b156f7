"""State dicts of PyTorch as variables of Flax modules, and back."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from neurosens import _validate, models
from neurosens.forward import Variables
from neurosens.interop import (
    cleaning,
    image_sizes,
    layers,
    mismatches,
    naming,
    pairing,
    reading,
    sequential,
)
from neurosens.interop.errors import WeightsError
from neurosens.models import registry

SEQUENTIAL = 'sequential'


def load_torch(
    path: str | os.PathLike[str],
    model: str | nn.Module,
    *,
    key: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: DTypeLike = jnp.float32,
    image_shape: tuple[int, int, int] | None = None,
    names: Mapping[str, str] | None = None,
    call: Mapping[str, Any] = {},
    **options: Any,
) -> tuple[nn.Module, Variables]:
    """Loads a network that was trained in PyTorch.

        module, variables = load_torch('resnet20.th', 'cifar_resnet20', mean=MEAN, std=STD)
        forward = neurosens.LinenForward(module, {'train': False})

    Args:
      path: a file, see `read_state_dict`.
      model: as of `from_torch`, like all others but `key`.
      key: where in the file the state dict lies, where it holds several.
      num_classes: number of logits; by default that of the file.
      mean: mean of each channel of the images, with `std` or not at all.
      std: standard deviation of each channel.
      dtype: floating-point type of the computation.
      image_shape: height, width and channels of the images.
      names: layers of the file for layers of the module.
      call: arguments of the module's call besides images.
      **options: options of the model.

    Returns:
      `(module, variables)`.

    Raises:
      WeightsError: the file cannot be read, or does not fit; or it is one of safetensors, which
        keep no order, layers go by their order, and their names do not tell it.
      FileNotFoundError: there is no such file.
      ValueError: an option of the model is unknown or wrong.
    """
    return _convert(
        reading.read_state_dict(path, key),
        model,
        repr(str(path)),
        ordered=reading.keeps_order(path),
        num_classes=num_classes,
        mean=mean,
        std=std,
        dtype=dtype,
        image_shape=image_shape,
        names=names,
        call=call,
        options=options,
    )


def from_torch(
    state: Mapping[str, Any],
    model: str | nn.Module,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: DTypeLike = jnp.float32,
    image_shape: tuple[int, int, int] | None = None,
    names: Mapping[str, str] | None = None,
    call: Mapping[str, Any] = {},
    **options: Any,
) -> tuple[nn.Module, Variables]:
    """Converts a state dict of PyTorch.

    Kernels are transposed, inputs behind a flatten brought from PyTorch's order (channels first)
    to ours, running statistics put into `batch_stats`; prefixes of wrappers are taken off. Every
    array of the file has to find its place, and every array of the module its values.

    Args:
      state: tensors or arrays by name, as of `network.state_dict()`.
      model: a name of `neurosens.models.names()`; 'sequential' for a plain stack of convolutions
        and linear layers, which is built from the state dict (see `infer` for its options); or a
        Linen module of `nn.Conv`, `nn.Dense` and `nn.BatchNorm`, which then normalises by itself.
        Layers of the named residual and dense networks and VGGs are found by the names that PyTorch
        projects use; all others go by their order among layers of their kind.
      num_classes: number of logits; by default that of the state dict.
      mean: mean of each channel, which is subtracted inside the model; by default that in the state
        dict, where it has one, else 0, with a warning where images have three channels.
      std: standard deviation of each channel, likewise, else 1; where one of both is known, the
        other has to be.
      dtype: floating-point type of the computation; variables are float32.
      image_shape: height, width and channels of the images; by default a square that fits.
      names: for layers of the module, by path, the layer in the state dict, with or without the
        prefixes of wrappers, where it is not found by itself.
      call: arguments of the module's call besides images, such as `{'train': False}`, as of
        `LinenForward`.
      **options: options of the model, as of `neurosens.models.options`. A `resnet18` or `resnet50`
        whose layers are named as in torchvision, but whose first convolution is 3 x 3, needs
        `stem='cifar'`, which says that no max pool follows it.

    Returns:
      `(module, variables)`: images in [0, 1] `[B, H, W, C]` are classified by
      `module.apply(variables, x)`.

    Raises:
      WeightsError: names or shapes do not fit, each of them named; values are not finite; the
        state dict normalises by other numbers than `mean` and `std`, or only one of them is known;
        or the order in which a layer of the module takes the features of a flattened map, or
        whether a max pool follows the first convolution, cannot be told.
      ValueError: an option of the model is unknown or wrong.
    """
    return _convert(
        reading.plain_arrays(state),
        model,
        'The state dict',
        ordered=True,
        num_classes=num_classes,
        mean=mean,
        std=std,
        dtype=dtype,
        image_shape=image_shape,
        names=names,
        call=call,
        options=options,
    )


def to_torch(
    module: nn.Module,
    variables: Variables,
    *,
    like: Mapping[str, Any] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    names: Mapping[str, str] | None = None,
    call: Mapping[str, Any] = {},
    tensors: bool = False,
) -> dict[str, Any]:
    """Converts variables to a state dict of PyTorch: the inverse of `from_torch`, bit for bit.

    Args:
      module: the module, as of `from_torch`.
      variables: its variables.
      like: a state dict whose names are used and whose other entries are kept (prefixes, numbers
        of the normalisation, counts of batches), such as `network.state_dict()`; by default the
        usual names, where the family has some, else our own.
      image_shape: as of `from_torch`.
      names: as of `from_torch`.
      call: as of `from_torch`.
      tensors: tensors of PyTorch in place of arrays of NumPy.

    Returns:
      Arrays by PyTorch's name, ready for `network.load_state_dict`.

    Raises:
      WeightsError: the variables are not those of the module, or do not fit `like`.
    """
    flat = {
        leaf: np.asarray(array)
        for leaf, array in flax.traverse_util.flatten_dict(dict(variables)).items()
    }
    weights = {'/'.join(leaf[1:-1]): array for leaf, array in flat.items() if leaf[-1] == 'kernel'}
    kernels = {path: layers.to_torch(array, 0) for path, array in weights.items()}
    found, fits = image_sizes.fitting_layers(
        module, image_shape, kernels.values(), lambda _: kernels, call
    )
    mismatches.check_variables(module, found, flat, fits or image_shape is not None)
    if like is None:
        usual = naming.namings(module)[0]
        pairing.check_paths(names, found)
        chosen = {layer.path: usual(module, layer.path) for layer in found} | dict(names or {})
        state = dict(_torch_arrays(found, chosen, flat))
    else:
        state = {name: np.array(array) for name, array in reading.plain_arrays(like).items()}
        cleaned = cleaning.clean(state)
        arrays = naming.without_unused(module, cleaned.arrays)
        chosen = pairing.torch_names(module, found, arrays, cleaned.originals, names)
        problems = mismatches.find(found, chosen, arrays, cleaned.originals)
        mismatches.refuse(problems, 'The state dict', module, sized=True)
        for name, array in _torch_arrays(found, chosen, flat):
            # Of counts of batches the one in `like` stays.
            for original in cleaned.originals.get(name, ()):
                state[original] = array
    if tensors:
        import torch

        return {name: torch.from_numpy(array) for name, array in state.items()}
    return state


def torch_shapes(
    module: nn.Module,
    image_shape: tuple[int, int, int] = (224, 224, 3),
    *,
    call: Mapping[str, Any] = {},
) -> dict[str, tuple[int, ...]]:
    """Lists what a state dict of PyTorch for a module holds, without computing anything.

    Args:
      module: as of `from_torch`.
      image_shape: height, width and channels of the images.
      call: as of `from_torch`.

    Returns:
      Shapes by PyTorch's usual name, as `to_torch` gives them.
    """
    usual = naming.namings(module)[0]
    return {
        f'{usual(module, layer.path)}.{name}': shape
        for layer in layers.trace(module, image_shape, call)
        for name, shape in layers.torch_shapes(layer).items()
    }


def _convert(
    state: reading.StateDict,
    model: str | nn.Module,
    source: str,
    *,
    ordered: bool,
    num_classes: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: DTypeLike,
    image_shape: tuple[int, int, int] | None,
    names: Mapping[str, str] | None,
    call: Mapping[str, Any],
    options: dict[str, Any],
) -> tuple[nn.Module, Variables]:
    cleaned = cleaning.clean(state)
    if not cleaned.arrays:
        raise WeightsError(f'{source} is empty; save the state_dict() of the network.')
    if model == SEQUENTIAL and not ordered:
        remedy = f'{pairing.IN_ORDER}, or give a module and names={{path: layer}}.'
        naming.check_order(cleaned.arrays, source, remedy, stacked=True)
    if isinstance(model, nn.Module):
        given = {'num_classes': num_classes, 'mean': mean, 'std': std, **options}
        for name, value in given.items():
            if value is not None:
                raise WeightsError(
                    f'{name} is {value!r}, but the model is a module; give it to '
                    f'{type(model).__name__} itself.'
                )
        module = model
        if isinstance(module, models.Classifier):
            _normalization(cleaned, module.mean, module.std)
        elif cleaned.mean is not None or cleaned.std is not None:
            numbers = ' and '.join(
                f'{name} ({", ".join(f"{value:.6g}" for value in values)})'
                for name, values in (('mean', cleaned.mean), ('std', cleaned.std))
                if values is not None
            )
            warnings.warn(
                f'{source} normalises images by {numbers}, which is left out: '
                f'{type(module).__name__} has to do so itself.',
                stacklevel=3,
            )
    else:
        normalized = not (mean is None and cleaned.mean is None)
        mean, std = _normalization(cleaned, mean, std)
        settings = {'mean': mean, 'std': std, 'dtype': dtype, **options}
        head = pairing.head(names, cleaned.arrays, cleaned.originals)
        module = _create(model, cleaned.arrays, head, num_classes, settings)
    arrays = naming.without_unused(module, cleaned.arrays)
    pair = functools.partial(
        pairing.torch_names,
        module,
        arrays=arrays,
        originals=cleaned.originals,
        given=names,
        unordered='' if ordered else source,
    )
    found, fits = image_sizes.fitting_layers(
        module,
        image_shape,
        arrays.values(),
        lambda found: pairing.weights(pair(found), arrays),
        call,
    )
    chosen = pair(found)
    problems = mismatches.find(found, chosen, arrays, cleaned.originals)
    mismatches.refuse(problems, source, module, sized=fits or image_shape is not None)
    if not isinstance(model, nn.Module):
        if 'stem' not in options:
            naming.check_stem(module, arrays, source)
        if not normalized and _channels(found, image_shape) == 3:
            warnings.warn(
                f'{source} holds no mean and std, and none are given: images are not normalised; '
                'give those that the network was trained with, or mean=(0.0,) and std=(1.0,) where '
                'there are none.',
                stacklevel=3,
            )
    if image_shape is None and isinstance(module, models.LeNet5):
        mismatches.check_lenet5(found, source)
    flat = {
        leaf: jnp.array(
            layers.from_torch(
                arrays[f'{chosen[layer.path]}.{layers.torch_leaf(leaf)}'],
                layers.flattened_channels(layer, leaf),
            )
        )
        for layer in found
        for leaf in layer.shapes
    }
    return module, flax.traverse_util.unflatten_dict(flat)


def _create(
    model: str,
    arrays: Mapping[str, np.ndarray],
    head: np.ndarray | None,
    num_classes: int | None,
    options: dict[str, Any],
) -> nn.Module:
    """The module of a name, with as many logits as the state dict has, or its head if known."""
    if model == SEQUENTIAL:
        valid = (*inspect.signature(sequential.infer).parameters,)[1:]
        for option in options:
            if option not in valid:
                raise WeightsError(_validate.unknown('sequential option', option, valid))
        module = sequential.infer(arrays, **options)
        if num_classes not in (None, module.num_classes):
            raise WeightsError(
                f'num_classes is {num_classes}, but the last layer of the file has '
                f'{module.num_classes} outputs; leave it out or use another data set.'
            )
        return module
    if model not in models.names():
        raise WeightsError(_validate.unknown('model', model, (*models.names(), SEQUENTIAL)))
    linear = arrays.values() if head is None else [head]
    rows = [len(array) for array in linear if array.ndim == 2]
    if num_classes is None and not rows:
        raise WeightsError(
            f'The file has no linear layer, whose outputs a {model} would have as logits; name the '
            'model it is of.'
        )
    options = naming.implied_options(model, arrays) | options
    return models.create(model, num_classes=num_classes or rows[-1], **options)


def _normalization(
    cleaned: cleaning.Cleaned, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation: those given, those of the file, or 0 and 1."""
    chosen: dict[str, tuple[float, ...]] = {}
    for name, value, saved in (('mean', mean, cleaned.mean), ('std', std, cleaned.std)):
        # An array or a tuple of zeros of the caller's counts as given.
        given = None if value is None else registry.floats(name, value)
        if given is not None and saved is not None and not _agree(given, saved):
            raise WeightsError(
                f'{name} is {given}, but the network in the file normalises by {saved}; '
                f'leave {name} out.'
            )
        known = given if given is not None else saved
        if known is not None:
            chosen[name] = known
    for name, other, without in (('mean', 'std', 1.0), ('std', 'mean', 0.0)):
        if name in chosen and other not in chosen:
            raise WeightsError(
                f'{name} is {chosen[name]}, but {other} is neither given nor in the file; give '
                f'{other} too, ({without},) where the network normalises without.'
            )
    chosen = chosen or {'mean': (0.0,), 'std': (1.0,)}
    # A value given for all channels goes with values for each.
    size = max(map(len, chosen.values()))
    mean, std = (value * size if len(value) == 1 else value for value in chosen.values())
    return mean, std


def _channels(
    found: Sequence[layers.Layer], image_shape: tuple[int, int, int] | None
) -> int | None:
    """Channels of the images, where a first convolution or the user tells."""
    if image_shape is not None:
        return image_shape[-1]
    first = found[0]
    return layers.inputs(first) if first.kind == layers.CONVOLUTION else None


def _agree(given: Sequence[float], saved: Sequence[float]) -> bool:
    """Whether both are the same numbers, one of which may stand for all channels."""
    if len(given) != len(saved) and 1 not in (len(given), len(saved)):
        return False
    return np.allclose(given, saved, atol=1e-6)


def _torch_arrays(
    found: Sequence[layers.Layer],
    chosen: Mapping[str, str],
    flat: Mapping[tuple[str, ...], np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of PyTorch, layer by layer."""
    for layer in found:
        name = chosen[layer.path]
        for leaf in layer.shapes:
            array = layers.to_torch(flat[leaf], layers.flattened_channels(layer, leaf))
            yield f'{name}.{layers.torch_leaf(leaf)}', array
        if layer.kind == layers.NORMALIZATION:
            yield f'{name}.{layers.COUNT}', np.array(0, np.int64)

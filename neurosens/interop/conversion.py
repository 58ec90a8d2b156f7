"""State dicts of PyTorch as variables of Flax modules, and back."""

from __future__ import annotations

import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from neurosens import _validate, models
from neurosens.forward import Variables
from neurosens.interop import cleaning, layers, naming, reading, sequential
from neurosens.interop.errors import WeightsError
from neurosens.models import registry

SEQUENTIAL = 'sequential'
_IN_ORDER = 'save it with PyTorch, or give from_torch the state dict in order'
_SIZE = 'image_shape=(height, width, channels)'
# Sides of images that are tried where none is given: only layers behind a flatten depend on it.
_SIDES = (32, 28, 224, 64, 8, 16, 96, 128, 256, 299)


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
      mean: mean of each channel of the images.
      std: standard deviation of each channel.
      dtype: floating-point type of the computation.
      image_shape: height, width and channels of the images.
      names: layers of the file for layers of the module.
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
        dict, where it has one, else 0.
      std: standard deviation of each channel, likewise; else 1.
      dtype: floating-point type of the computation; variables are float32.
      image_shape: height, width and channels of the images; by default a square that fits.
      names: for layers of the module, by path, the layer in the state dict, with or without the
        prefixes of wrappers, where it is not found by itself.
      **options: options of the model, as of `neurosens.models.options`.

    Returns:
      `(module, variables)`: images in [0, 1] `[B, H, W, C]` are classified by
      `module.apply(variables, x)`.

    Raises:
      WeightsError: names or shapes do not fit, each of them named; values are not finite; the
        state dict normalises by other numbers than `mean` and `std`; or the order in which a layer
        of the module takes the features of a flattened map cannot be told.
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
        options=options,
    )


def to_torch(
    module: nn.Module,
    variables: Variables,
    *,
    like: Mapping[str, Any] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    names: Mapping[str, str] | None = None,
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
    found, fits = _fitting(module, image_shape, kernels.values(), lambda _: kernels)
    _check_variables(module, found, flat, fits or image_shape is not None)
    if like is None:
        usual = naming.namings(module)[0]
        _check_paths(names, found)
        chosen = {layer.path: usual(module, layer.path) for layer in found} | dict(names or {})
        state = dict(_torch_arrays(found, chosen, flat))
    else:
        state = {name: np.array(array) for name, array in reading.plain_arrays(like).items()}
        cleaned = cleaning.clean(state)
        arrays = naming.without_unused(module, cleaned.arrays)
        chosen = _names(module, found, arrays, cleaned.originals, names)
        problems = _problems(found, chosen, arrays, cleaned.originals)
        _check(problems, 'The state dict', module, sized=True)
        for name, array in _torch_arrays(found, chosen, flat):
            # Of counts of batches the one in `like` stays.
            for original in cleaned.originals.get(name, ()):
                state[original] = array
    if tensors:
        import torch

        return {name: torch.from_numpy(array) for name, array in state.items()}
    return state


def torch_shapes(
    module: nn.Module, image_shape: tuple[int, int, int] = (224, 224, 3)
) -> dict[str, tuple[int, ...]]:
    """Lists what a state dict of PyTorch for a module holds, without computing anything.

    Args:
      module: as of `from_torch`.
      image_shape: height, width and channels of the images.

    Returns:
      Shapes by PyTorch's usual name, as `to_torch` gives them.
    """
    usual = naming.namings(module)[0]
    return {
        f'{usual(module, layer.path)}.{name}': shape
        for layer in layers.trace(module, image_shape)
        for name, shape in layers.torch_shapes(layer).items()
    }


# ------------------------------------------------------------------------------------ modules


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
    options: dict[str, Any],
) -> tuple[nn.Module, Variables]:
    cleaned = cleaning.clean(state)
    if not cleaned.arrays:
        raise WeightsError(f'{source} is empty; save the state_dict() of the network.')
    if model == SEQUENTIAL and not ordered:
        remedy = f'{_IN_ORDER}, or give a module and names={{path: layer}}.'
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
        mean, std = _normalization(cleaned, mean, std)
        settings = {'mean': mean, 'std': std, 'dtype': dtype, **options}
        module = _create(model, cleaned.arrays, num_classes, settings)
    arrays = naming.without_unused(module, cleaned.arrays)
    pair = functools.partial(
        _names,
        module,
        arrays=arrays,
        originals=cleaned.originals,
        given=names,
        unordered='' if ordered else source,
    )
    found, fits = _fitting(
        module, image_shape, arrays.values(), lambda found: _weights(pair(found), arrays)
    )
    chosen = pair(found)
    problems = _problems(found, chosen, arrays, cleaned.originals)
    _check(problems, source, module, sized=fits or image_shape is not None)
    if image_shape is None and isinstance(module, models.LeNet5):
        _check_lenet5(found, source)
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
    num_classes: int | None,
    options: dict[str, Any],
) -> nn.Module:
    """The module of a name, with as many logits as the state dict has."""
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
    rows = [len(array) for array in arrays.values() if array.ndim == 2]
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
    chosen = []
    for name, value, saved, default in (
        ('mean', mean, cleaned.mean, (0.0,)),
        ('std', std, cleaned.std, (1.0,)),
    ):
        # An array or a tuple of zeros of the caller's counts as given.
        given = None if value is None else registry.floats(name, value)
        if given is not None and saved is not None and not _agree(given, saved):
            raise WeightsError(
                f'{name} is {given}, but the network in the file normalises by {saved}; '
                f'leave {name} out.'
            )
        chosen.append(given if given is not None else saved if saved is not None else default)
    # A value given for all channels goes with values for each.
    size = max(map(len, chosen))
    mean, std = (value * size if len(value) == 1 else value for value in chosen)
    return mean, std


def _agree(given: Sequence[float], saved: Sequence[float]) -> bool:
    """Whether both are the same numbers, one of which may stand for all channels."""
    if len(given) != len(saved) and 1 not in (len(given), len(saved)):
        return False
    return np.allclose(given, saved, atol=1e-6)


# ------------------------------------------------------------------------------------- layers


def _fitting(
    module: nn.Module,
    image_shape: tuple[int, ...] | None,
    arrays: Iterable[np.ndarray],
    weights: Callable[[tuple[layers.Layer, ...]], Mapping[str, np.ndarray]],
) -> tuple[tuple[layers.Layer, ...], bool]:
    """The layers of a module, for images whose layers fit their weights, and whether they do.

    The images decide the channels of the first convolution and the inputs behind a flatten. Where
    none fit, the layers are those for the first ones that the module takes.
    """
    shapes = [image_shape] if image_shape is not None else _image_shapes(arrays)
    first, refused = None, None
    other_channels: set[int] = set()
    for shape in shapes:
        if shape[-1] in other_channels:
            continue
        try:
            found = layers.trace(module, shape)
        except WeightsError:
            raise
        except ValueError as error:
            # Such as images that are too small for the pools.
            refused = error
            continue
        first = first or found
        given = weights(found)
        wrong = {
            layer.path
            for layer in found
            if layer.kind != layers.NORMALIZATION
            and layer.path in given
            and given[layer.path].shape[1:2] != (_inputs(layer),)
        }
        convolutions = [layer.path for layer in found if layer.kind == layers.CONVOLUTION]
        if wrong.intersection(convolutions[:1]):
            other_channels.add(shape[-1])
        elif not wrong.intersection(layer.path for layer in found if layer.channels):
            return found, True
    if first is None:
        assert refused is not None
        raise refused
    return first, False


def _image_shapes(arrays: Iterable[np.ndarray]) -> list[tuple[int, int, int]]:
    """Shapes of images that a network with these weights may take, in PyTorch's order."""
    kernels = [array.shape for array in arrays if array.ndim in (2, 4)]
    channels = [shape[1] for shape in kernels if len(shape) == 4]
    if channels:
        # Which convolution comes first is not known here: images have the fewest channels, but
        # where channels are convolved one by one.
        either = dict.fromkeys((min(channels), channels[0]))
        return [(side, side, count) for count in either for side in _SIDES]
    inputs = kernels[0][1] if kernels else 0
    for count in (1, 3):
        side = math.isqrt(inputs // count)
        if side and inputs == side**2 * count:
            return [(side, side, count)]
    raise WeightsError(
        f'The first layer takes {inputs} inputs, which are no square image of 1 or 3 channels; '
        f'give {_SIZE}.'
    )


def _inputs(layer: layers.Layer) -> int:
    return next(shape[-2] for leaf, shape in layer.shapes.items() if leaf[-1] == 'kernel')


def _weights(chosen: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by the path of our layer."""
    named = {path: arrays.get(f'{layer}.weight') for path, layer in chosen.items()}
    return {path: array for path, array in named.items() if array is not None}


def _names(
    module: nn.Module,
    found: Sequence[layers.Layer],
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str] | None,
    unordered: str = '',
) -> dict[str, str]:
    """For the path of each layer PyTorch's name of it.

    `unordered` names what the arrays were read from where that keeps no order.
    """
    _check_paths(given, found)
    known = _bare_names(given or {}, arrays, originals)
    paths = [layer.path for layer in found]
    theirs = {name.rpartition('.')[0] for name in arrays}
    candidates = [
        {path: known.get(path) or name(module, path) for path in paths}
        for name in naming.namings(module)
    ]
    # The first of the best.
    best = max(candidates, key=lambda names: len(theirs & set(names.values())))
    if not naming.is_chain(module) or theirs == set(best.values()):
        return best
    if unordered:
        remedy = f'{_IN_ORDER}, or give names={{path: layer}}.'
        naming.check_order(arrays, unordered, remedy, but=known.values())
    return _in_order(found, arrays, known)


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


# ------------------------------------------------------------------------------------- checks


def _problems(
    found: Sequence[layers.Layer],
    chosen: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
) -> list[str]:
    """Phrases for everything that does not fit, each array by its name."""
    wanted = {
        f'{chosen[layer.path]}.{name}': shape
        for layer in found
        for name, shape in layers.torch_shapes(layer).items()
        if name != layers.COUNT
    }
    problems = []
    if missing := [name for name in wanted if name not in arrays]:
        problems.append(f'missing {_listed(missing)}')
    if unexpected := [originals[name][0] for name in arrays if name not in wanted]:
        problems.append(f'unexpected {_listed(unexpected)}')
    both = [(originals[name][0], arrays[name], wanted[name]) for name in arrays if name in wanted]
    if shapes := [
        f'{name!r} has shape {array.shape} in place of {shape}'
        for name, array, shape in both
        if array.shape != shape
    ]:
        problems.append(', '.join(shapes))
    if kinds := [f'{name!r} ({a.dtype})' for name, a, _ in both if a.dtype.kind != 'f']:
        problems.append(f'not of floating-point type {", ".join(kinds)}')
    with np.errstate(over='ignore'):
        values = [
            name
            for name, array, _ in both
            if array.dtype.kind == 'f' and not np.isfinite(array.astype(np.float32)).all()
        ]
    if values:
        problems.append(f'not finite {_listed(values)}')
    return problems


def _listed(names: Iterable[str]) -> str:
    return ', '.join(map(repr, names))


def _check(problems: Sequence[str], source: str, module: nn.Module, *, sized: bool) -> None:
    """Refuses what does not fit; `sized` says whether the size of the images is known."""
    if not problems:
        return
    if isinstance(module, models.Classifier):
        remedy = 'the model and the options that it was trained with'
    else:
        remedy = 'names={path: layer} where the order of the layers differs'
    size = '' if sized else f'{_SIZE}, or '
    raise WeightsError(
        f'{source} does not fit {type(module).__name__}: {"; ".join(problems)}; '
        f'give {size}{remedy}.'
    )


def _check_paths(names: Mapping[str, str] | None, found: Sequence[layers.Layer]) -> None:
    """Refuses names for layers that the module does not have."""
    if not isinstance(names, Mapping | None):
        raise WeightsError(
            f'names is {names!r}, but it must be a dict of layers of the file by those of the '
            'module: {path: layer}.'
        )
    paths = [layer.path for layer in found]
    for path in names or ():
        if path not in paths:
            raise WeightsError(_validate.unknown('layer in names', path, paths))


def _check_lenet5(found: Sequence[layers.Layer], source: str) -> None:
    """Refuses to guess that images of 28 x 28 pixels have three channels.

    Without the padding of our LeNet-5, as in PyTorch's tutorial, it takes as many features of
    images of 32 x 32.
    """
    inputs = {layer.path: _inputs(layer) for layer in found}
    if inputs['conv1'] > 1 and inputs['dense3'] == 400:
        channels = inputs['conv1']
        raise WeightsError(
            f'{source} fits LeNet5 for images of 28 x 28 pixels, and without padding for those of '
            f'32 x 32; give image_shape=(28, 28, {channels}) if its first convolution pads, or '
            "else the model 'sequential' with strides=1, padding=0 and pool='max'."
        )


def _check_variables(
    module: nn.Module,
    found: Sequence[layers.Layer],
    flat: Mapping[tuple[str, ...], np.ndarray],
    sized: bool,
) -> None:
    """Refuses variables that are not those of the module."""
    wanted = {leaf: shape for layer in found for leaf, shape in layer.shapes.items()}
    wrong = sorted(
        {leaf for leaf, shape in wanted.items() if leaf not in flat or flat[leaf].shape != shape}
        | (flat.keys() - wanted.keys())
    )
    if wrong:
        raise WeightsError(
            f'The variables are not those of this {type(module).__name__}: '
            f'{_listed("/".join(leaf) for leaf in wrong)} differ in name or shape; pass the module '
            f'that they are of{"" if sized else f", and {_SIZE}"}.'
        )


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

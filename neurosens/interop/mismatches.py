"""What of a state dict or of variables does not fit a module, each array by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import numpy as np

from neurosens import models
from neurosens.interop import layers, naming
from neurosens.interop.errors import SIZE, WeightsError


def find(
    found: Sequence[layers.Layer],
    chosen: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
    originals: Mapping[str, tuple[str, ...]],
) -> list[str]:
    """Compares a state dict with the layers of a module.

    Args:
      found: the layers.
      chosen: PyTorch's name of each, by path.
      arrays: the state dict without prefixes of wrappers.
      originals: the names that each array had with them.

    Returns:
      Phrases for everything that does not fit, each array by its name; none where all fits.
    """
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


def refuse(problems: Sequence[str], source: str, module: nn.Module, *, sized: bool) -> None:
    """Refuses what does not fit.

    Args:
      problems: what was found.
      source: where the arrays come from, in words.
      module: the module.
      sized: whether the size of the images is known.

    Raises:
      WeightsError: there are problems.
    """
    if not problems:
        return
    remedies = [] if sized else [SIZE]
    if isinstance(module, models.Classifier):
        remedies.append('the model and the options that it was trained with')
    if naming.is_chain(module):
        remedies.append('names={path: layer} where the order of the layers differs')
    raise WeightsError(
        f'{source} does not fit {type(module).__name__}: {"; ".join(problems)}; '
        f'give {", or ".join(remedies)}.'
    )


def check_lenet5(found: Sequence[layers.Layer], source: str) -> None:
    """Refuses to guess that images of 28 x 28 pixels have three channels.

    Without the padding of our LeNet-5, as in PyTorch's tutorial, it takes as many features of
    images of 32 x 32.
    """
    inputs = {layer.path: layers.inputs(layer) for layer in found}
    if inputs['conv1'] > 1 and inputs['dense3'] == 400:
        channels = inputs['conv1']
        raise WeightsError(
            f'{source} fits LeNet5 for images of 28 x 28 pixels, and without padding for those of '
            f'32 x 32; give image_shape=(28, 28, {channels}) if its first convolution pads, or '
            "else the model 'sequential' with strides=1, padding=0 and pool='max'."
        )


def check_variables(
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
            f'that they are of{"" if sized else f", and {SIZE}"}.'
        )


def _listed(names: Iterable[str]) -> str:
    return ', '.join(map(repr, names))

"""Trained models out of work directories and files of weights."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neurosens import config as config_lib
from neurosens import data, interop, models, parallel
from neurosens.forward import LinenForward, Variables
from neurosens.training import checkpoints

# What a model is made of and loaded with beside its options, by the setting that decides it.
_SETTINGS = {
    'name': 'model',
    'model': 'model',
    'path': 'weights',
    'key': 'weights_key',
    'num_classes': 'dataset',
    'image_shape': 'dataset',
    'mean': 'mean',
    'std': 'std',
    'dtype': 'dtype',
}


class TrainedModel(NamedTuple):
    """A model as training left it.

    Attributes:
      forward: the model in evaluation mode.
      variables: its variables, replicated over the mesh; the averaged parameters where training
        kept an average.
      config: the config it was trained with.
      step: the training step it was saved at; 0 for a file of weights, which does not say.
    """

    forward: LinenForward
    variables: Variables
    config: config_lib.Config
    step: int


def make_model(config: config_lib.Config) -> nn.Module:
    """The model of a config, with the input normalisation of it or of its data set inside.

    Args:
      config: the settings.

    Returns:
      An uninitialised Linen module.

    Raises:
      ValueError: the data set, the model or one of its options is unknown, or another setting
        decides the option.
    """
    info = data.info(config.dataset)
    return models.create(
        config.model,
        num_classes=info.num_classes,
        mean=config.mean or info.mean,
        std=config.std or info.std,
        dtype=jnp.dtype(config.dtype),
        **_model_options(config),
    )


def _model_options(config: config_lib.Config) -> dict[str, Any]:
    for option in config.model_options:
        if option in _SETTINGS:
            raise config_lib.ConfigError(
                f'model_options has {option!r}, which is no option of a model; set '
                f'{_SETTINGS[option]} instead.'
            )
    return dict(config.model_options)


def load(
    workdir: str | pathlib.Path, which: str = 'best', mesh: Mesh | None = None
) -> TrainedModel:
    """Loads a trained model from a work directory of `train.py`.

    Args:
      workdir: the work directory.
      which: `'best'` (highest validation accuracy, or accuracy under PGD where the monitor chooses
        by it; without validation the latest), `'latest'` or a step number.
      mesh: devices to put the variables on; all by default.

    Returns:
      The model, ready to call: `model.forward(model.variables, x)`.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    step, config = checkpoints.read_config(workdir, which)
    mesh = parallel.data_mesh() if mesh is None else mesh
    module = make_model(config)
    image = jax.ShapeDtypeStruct((1, *data.info(config.dataset).image_shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    sharding = parallel.replicated(mesh)
    abstract = {
        'variables': jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )
    }
    averaged = config.optimizer.ema_decay > 0
    if averaged:
        abstract['average'] = abstract['variables']['params']
    items = checkpoints.read_items(workdir, step, abstract)
    variables = items['variables']
    if averaged:
        variables = {**variables, 'params': items['average']}
    return TrainedModel(LinenForward(module, {'train': False}), variables, config, step)


def load_weights(config: config_lib.Config, mesh: Mesh | None = None) -> TrainedModel:
    """Loads a network that was trained elsewhere, from the file that a config names.

    Args:
      config: `weights` and `weights_key` say where they are; `model`, `model_options`, `dataset`,
        `mean`, `std` and `dtype` of what. `'names'` in `model_options` are the layers of the file
        for those of the model, as of `interop.load_torch`.
      mesh: devices to put the variables on; all by default.

    Returns:
      The model, ready to call: `model.forward(model.variables, x)`.

    Raises:
      WeightsError: the file cannot be read, or does not fit.
      FileNotFoundError: there is no such file.
      ValueError: the data set or an option of the model is unknown or wrong, or another setting
        decides the option.
    """
    info = data.info(config.dataset)
    options = _model_options(config)
    module, variables = interop.load_torch(
        config.weights,
        config.model,
        key=config.weights_key or None,
        num_classes=info.num_classes,
        mean=config.mean or None,
        std=config.std or None,
        dtype=jnp.dtype(config.dtype),
        image_shape=info.image_shape,
        names=options.pop('names', None),
        **options,
    )
    mesh = parallel.data_mesh() if mesh is None else mesh
    variables = parallel.replicate(mesh, variables)
    return TrainedModel(LinenForward(module, {'train': False}), variables, config, 0)

"""Weights of another model that training starts from, as they are or with rescaled filters."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neurosens import config as config_lib
from neurosens import data, defenses, interop, models, parallel
from neurosens.forward import LinenForward, Variables
from neurosens.interop import naming
from neurosens.training import checkpoints, freezing
from neurosens.training.loading import load, make_model
from neurosens.training.objectives import run_training_mode

# Images on which a rescaling has to show in training, and how much of what it does in evaluation.
_IMAGES, _LEAST_EFFECT = 16, 0.1


def check(config: config_lib.Config, module: nn.Module, mesh: Mesh) -> None:
    """Refuses weights that do not fit, and rescalings that cannot be used.

    Args:
      config: the settings, with `initial_weights`.
      module: the model to be trained.
      mesh: devices to run on.

    Raises:
      ConfigError: the weights are of another kind of model, `weights_key` is set for a work
        directory, or training would undo the rescaling.
      CheckpointError: the work directory cannot be read.
      WeightsError: the file of weights cannot be read or does not fit.
      DefenseError: the rescaling cannot be read, or is of other weights.
      ValueError: the rescaled layer has no kernel.
    """
    if pathlib.Path(config.initial_weights).is_file():
        _from_file(config, module)
    else:
        if config.weights_key:
            raise config_lib.ConfigError(
                f'weights_key is {config.weights_key!r}, which chooses inside of a file of '
                f'weights, but initial_weights is {config.initial_weights!r}, which is none; leave '
                'weights_key out, or name a file.'
            )
        _, saved = checkpoints.read_config(config.initial_weights, 'best')
        if _shapes(module, config) != _shapes(make_model(saved), saved):
            raise config_lib.ConfigError(
                f'initial_weights is {config.initial_weights!r}, a {saved.model} with '
                f'{saved.model_options} for {saved.dataset}; it must hold the arrays of the model '
                f'to be trained, {config.model} with {config.model_options} for {config.dataset}.'
            )
    if config.initial_rescaling:
        _check_effect(config, module, mesh)


def variables(config: config_lib.Config, module: nn.Module, mesh: Mesh) -> Variables:
    """The variables that `initial_weights` names, rescaled as `initial_rescaling` says.

    Args:
      config: as of `check`, like the next two.
      module: the model to be trained.
      mesh: devices to put them on, on each of them whole.

    Returns:
      The variables.

    Raises:
      CheckpointError: the work directory cannot be read.
      WeightsError: the file of weights cannot be read or does not fit.
      DefenseError: the rescaling cannot be read, or is of other weights.
      ValueError: the rescaled layer has no kernel.
    """
    found = _plain(config, module, mesh)
    if not config.initial_rescaling:
        return found
    return defenses.rescaling.fold(_rescaling(config, mesh, found), found)


def _plain(config: config_lib.Config, module: nn.Module, mesh: Mesh) -> Variables:
    if pathlib.Path(config.initial_weights).is_file():
        return parallel.replicate(mesh, _from_file(config, module))
    return load(config.initial_weights, mesh=mesh).variables


def _from_file(config: config_lib.Config, module: nn.Module) -> Variables:
    shape = data.info(config.dataset).image_shape
    key = config.weights_key or None
    _, found = interop.load_torch(config.initial_weights, module, key=key, image_shape=shape)
    if isinstance(module, models.ResNet) and 'stem' not in config.model_options:
        # The module has one, but nobody has said so.
        names = interop.read_state_dict(config.initial_weights, key)
        naming.check_stem(module, names, repr(config.initial_weights))
    return found


def _shapes(module: nn.Module, config: config_lib.Config) -> Variables:
    image = jnp.zeros((1, *data.info(config.dataset).image_shape))
    return jax.eval_shape(module.init, jax.random.key(0), image)


def _rescaling(
    config: config_lib.Config, mesh: Mesh, found: Variables
) -> defenses.rescaling.Parameters:
    kept = config.initial_rescaling
    parameters = defenses.load(kept, mesh, variables=found)
    if (name := defenses.name_of(parameters)) != 'rescaling':
        raise defenses.DefenseError(
            f"The defense in {kept} is {name!r}, but initial_rescaling needs 'rescaling', whose "
            'factors can go into weights; name one of that kind.'
        )
    return parameters


def _check_effect(config: config_lib.Config, module: nn.Module, mesh: Mesh) -> None:
    """Refuses a rescaling that the statistics of batches undo.

    A normalisation by them divides by what the filters before it were multiplied with, so that the
    model in training would be the one without rescaling, and its running statistics soon too.
    """
    before = _plain(config, module, mesh)
    parameters = _rescaling(config, mesh, before)
    after = defenses.rescaling.fold(parameters, before)
    if not before.get('batch_stats'):
        return
    key = jax.random.key(0)
    x = jax.random.uniform(key, (_IMAGES, *data.info(config.dataset).image_shape))

    @jax.jit
    def logits(variables: Variables) -> tuple[jax.Array, jax.Array]:
        with freezing.kept_statistics(config.optimizer.freeze_statistics):
            training, _ = run_training_mode(module, variables, x, key)
        return training, LinenForward(module, {'train': False})(variables, x)[0]

    training, evaluation = (
        float(jnp.abs(one - other).max()) for one, other in zip(logits(before), logits(after))
    )
    if training < _LEAST_EFFECT * evaluation:
        raise config_lib.ConfigError(
            f'initial_rescaling rescales {parameters.settings.layer!r}, which the normalisation '
            'behind it would undo, as it normalises by batches in training; name it in '
            "optimizer.freeze_statistics, such as ('norm1',)."
        )

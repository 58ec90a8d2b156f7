"""What training is watched by: robust accuracy and neurons on the same few validation images."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from neurosens import attacks, data, evaluation, parallel
from neurosens import config as config_lib
from neurosens.evaluation import accuracy
from neurosens.forward import Forward, LinenForward, Variables

PGD_ACCURACY = 'monitor/pgd_accuracy'


def check(module: nn.Module, info: data.DatasetInfo, settings: config_lib.Monitor) -> None:
    """Finds out before training whether a layer can be watched.

    Args:
      module: the model.
      info: the data set.
      settings: names the layer.

    Raises:
      LayerError: the layer cannot be tapped.
    """
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    forward = LinenForward(module, {'train': False})
    evaluation.neuron_layers(forward, variables, info, _neurons(settings))


def _neurons(settings: config_lib.Monitor, batch_size: int = 1) -> config_lib.Neurons:
    return config_lib.Neurons(
        measures=('statistics', 'sensitivity'),
        layers=(settings.layer,),
        limit=settings.images,
        batch_size=batch_size,
    )


def measure(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Monitor,
    key: PRNGKeyArray,
    batch_size: int,
) -> dict[str, float]:
    """Measures a model on the first images of a data set, always the same.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: what to measure.
      key: randomness of the attack; the same key attacks from the same places.
      batch_size: images per batch over all devices.

    Returns:
      `monitor/clean_accuracy` and `monitor/pgd_accuracy`, shares of the images; where a layer is
      named `monitor/sensitivity`, the mean over the `top` most sensitive neurons of the median of
      |Delta| / std over the images, left out where no neuron flips half of them, and
      `monitor/dead_share`, the share of neurons that are 0 on all of the images.
    """
    images = settings.images
    # A batch of the size of training would mostly be filling.
    batch_size = min(batch_size, parallel.round_up(images, mesh))
    run = functools.partial(
        attacks.pgd,
        forward,
        variables,
        key=parallel.replicate(mesh, key),
        threat=attacks.Threat(settings.norm, settings.eps),
        steps=settings.steps,
    )
    attacked = accuracy.attack(
        lambda x, y, index: run(x, y, index=index),
        forward,
        variables,
        source,
        mesh,
        batch_size=batch_size,
        limit=images,
    )
    clean = accuracy.predict(forward, variables, source, mesh, batch_size=batch_size, limit=images)
    found = {
        'monitor/clean_accuracy': clean.accuracy,
        PGD_ACCURACY: float(1 - attacked.success.mean()),
    }
    if settings.layer:
        wanted = _neurons(settings, batch_size)
        report = evaluation.measure_neurons(
            forward, variables, source, mesh, wanted, key, split='validation', eps=0.0
        )
        found.update(_of_layer(report.layers[0], settings.top))
    return found


def _of_layer(layer: evaluation.LayerReport, top: int) -> dict[str, float]:
    assert layer.statistics is not None
    found = {'monitor/dead_share': float((layer.statistics.zero_share() == 1).mean())}
    distance = np.median(layer.scaled_distance(), axis=0)
    nearest = np.sort(distance[np.isfinite(distance)])[:top]
    if len(nearest):
        found['monitor/sensitivity'] = float(nearest.mean())
    return found

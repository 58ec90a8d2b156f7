"""What training is watched by: robust accuracy and neurons on the same few validation images."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from neurosens import attacks, data, evaluation, parallel
from neurosens import config as config_lib
from neurosens.convolution import with_fast_input_gradients
from neurosens.evaluation import accuracy
from neurosens.forward import Forward, LayerError, LinenForward, Variables
from neurosens.regularizers import passes, regularizer

PGD_ACCURACY = 'monitor/pgd_accuracy'
# No layer has these names.
_JACOBIAN, _DISTANCE = '||J||^2', 'gap / ||J||'


def check(module: nn.Module, info: data.DatasetInfo, settings: config_lib.Monitor) -> None:
    """Finds out before training whether the layers can be watched.

    Args:
      module: the model.
      info: the data set.
      settings: names the layer, if there is one, and says whether derivatives are wanted.

    Raises:
      LayerError: the layer cannot be tapped, or, with probes, a nonlinearity cannot.
      ValueError: no module has the name of a nonlinearity.
    """
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    forward = LinenForward(module, {'train': False})
    if settings.layer:
        evaluation.neuron_layers(forward, variables, info, _neurons(settings))
    if settings.probes:

        def hidden(variables: Variables, x: Array) -> dict[str, Array]:
            return regularizer.hidden(forward, variables, x[0], None)

        try:
            jax.eval_shape(hidden, variables, image)
        except (LayerError, ValueError) as error:
            raise type(error)(f'{error} Or leave out monitor.probes.') from None


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
      key: randomness of the attack and of the directions; the same key gives the same ones.
      batch_size: images per batch over all devices.

    Returns:
      `monitor/clean_accuracy` and `monitor/pgd_accuracy`, shares of the images; where a layer is
      named `monitor/sensitivity`, the mean over the `top` most sensitive neurons of the median of
      |Delta| / std over the images, left out where no neuron flips half of them, and
      `monitor/dead_share`, the share of neurons that are 0 on all of the images. With `probes`
      estimates of `monitor/jacobian_norm`, the root of the mean of ||J||_F^2 over the images, and
      of `monitor/activation_sensitivity/<layer>`, the mean of squared derivatives over images and
      neurons, for every nonlinearity, with their mean `monitor/activation_sensitivity`; and
      `monitor/boundary_distance`, the median over the images of the gap between the two largest
      logits over the l2 norm of its gradient, which a common factor of the logits does not change
      as it does ||J||; left out where the gradient of half of the images is 0.
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
    if settings.probes:
        key = parallel.replicate(mesh, key)
        each = accuracy.stream(
            source,
            mesh,
            batch_size,
            lambda batch: {
                **_squares(forward, variables, batch, key, settings.probes),
                _DISTANCE: _boundary_distance(forward, variables, batch),
            },
            limit=images,
        )
        found.update(_derivatives(each))
    return found


@functools.partial(jax.jit, static_argnames='probes')
def _squares(
    forward: Forward, variables: Variables, batch: data.Batch, key: PRNGKeyArray, probes: int
) -> dict[str, Array]:
    """Of each image, squared derivatives along directions of its own.

    Returns:
      Under `_JACOBIAN` the sum over logits, by nonlinearity the mean over its neurons, `[B]`.
    """
    x = data.to_float(batch.image)

    def read(logits: Array, tapped: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        return regularizer.single(logits), regularizer.hidden_of(tapped, None, 'post')

    _, push = passes.linearize(forward, variables, x, read, regularizer.hidden_taps(None, 'post'))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
    shape = (probes, *x.shape[1:])
    directions = jax.vmap(lambda own: jax.random.rademacher(own, shape, x.dtype), out_axes=1)(keys)
    logits, tangents = passes.each(push, directions)
    found = {_JACOBIAN: (logits**2).sum(-1).mean(0)}
    for name, tangent in tangents.items():
        found[name] = (tangent**2).reshape(probes, len(x), -1).mean((0, 2))
    return found


@jax.jit
def _boundary_distance(forward: Forward, variables: Variables, batch: data.Batch) -> Array:
    """To first order how far each image is from the class with the second largest logit `[B]`."""

    def gap(x: Array) -> tuple[Array, Array]:
        largest, _ = jax.lax.top_k(regularizer.single(forward(variables, x)[0]), 2)
        gaps = largest[:, 0] - largest[:, 1]
        return gaps.sum(), gaps

    x = data.to_float(batch.image)
    slope, gaps = jax.grad(with_fast_input_gradients(gap), has_aux=True)(x)
    return gaps / jnp.linalg.norm(regularizer.single(slope).reshape(len(x), -1), axis=1)


def _derivatives(each: Mapping[str, np.ndarray]) -> dict[str, float]:
    squares = {name: float(values.mean()) for name, values in each.items() if name != _DISTANCE}
    layers = {name: value for name, value in squares.items() if name != _JACOBIAN}
    found = {
        'monitor/jacobian_norm': squares[_JACOBIAN] ** 0.5,
        'monitor/activation_sensitivity': sum(layers.values()) / len(layers),
        **{f'monitor/activation_sensitivity/{name}': value for name, value in layers.items()},
    }
    # 0 / 0 where nothing tells the classes apart.
    distance = float(np.median(np.nan_to_num(each[_DISTANCE], nan=0.0, posinf=np.inf)))
    if np.isfinite(distance):
        found['monitor/boundary_distance'] = distance
    return found


def _of_layer(layer: evaluation.LayerReport, top: int) -> dict[str, float]:
    assert layer.statistics is not None
    found = {'monitor/dead_share': float((layer.statistics.zero_share() == 1).mean())}
    distance = np.median(layer.scaled_distance(), axis=0)
    nearest = np.sort(distance[np.isfinite(distance)])[:top]
    if len(nearest):
        found['monitor/sensitivity'] = float(nearest.mean())
    return found

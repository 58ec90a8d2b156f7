"""Measures single neurons over a data set, with every measure of `neurosens.neurons`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from neurosens import config as config_lib
from neurosens import data, neurons
from neurosens.attacks.representation import activation_and_logits
from neurosens.defenses import images
from neurosens.evaluation import accuracy
from neurosens.evaluation.layer_measures import (
    LAYER_MEASURES,
    Task,
    fgsm_images,
    filtering_curves,
    has_filters,
    predict_batch,
    probe_estimates,
    targeting_reports,
)
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport
from neurosens.forward import Forward, Variables
from neurosens.neurons import filtering


def chosen_layers(
    forward: Forward,
    variables: Variables,
    info: data.DatasetInfo,
    settings: config_lib.Neurons,
) -> tuple[neurons.NeuronLayer, ...]:
    """The layers to measure, without running the model: what is wrong with them shows here.

    Args:
      forward: the model.
      variables: its variables, or their shapes.
      info: the data set.
      settings: layers and measures.

    Returns:
      The layers named in the settings, or the default ones.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: the method of sensitivity, the mode of ablation or the straight layer of attacks
        does not fit.
    """
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    names = settings.layers or neurons.default_layers(forward, variables, image)
    layers = tuple(
        neurons.describe(forward, variables, image, name, unit=settings.unit) for name in names
    )
    for layer in layers:
        if 'sensitivity' in settings.measures and settings.method == 'closed_form':
            neurons.check_closed_form(layer.facts, layer.name)
        if 'ablation' in _with_prerequisites(settings.measures):
            _check_ablation(layer, settings.ablation)
        if 'attack' in settings.measures and settings.straight_layer:
            jax.eval_shape(
                functools.partial(
                    _straight_activation, forward, layer.name, settings.straight_layer
                ),
                variables,
                image,
            )
    return layers


def _check_ablation(layer: neurons.NeuronLayer, mode: str) -> None:
    if mode == 'weights' and not has_filters(layer):
        raise ValueError(
            f"neurons.ablation is 'weights', but the neurons of layer {layer.name!r} are not the "
            "filters of a kernel; use 'activation', or name other layers."
        )


def _straight_activation(
    forward: Forward, layer: str, straight_layer: str, variables: Variables, x: Array
) -> Array:
    run = activation_and_logits(forward, variables, layer, straight_layer)
    return run(x[0], jax.random.key(0))[0]


def measure(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Neurons,
    key: PRNGKeyArray,
    *,
    split: str,
    eps: float,
    population: Sequence[data.Source] = (),
    progress: Callable[[str], accuracy.Progress] = lambda name: iter,
) -> NeuronReport:
    """Measures the neurons of a model on a data set.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: layers and measures.
      key: randomness of the probes, folded with each image's position in the data set.
      split: name of the split, for the report.
      eps: linf radius of the FGSM attack behind targeting and attacked ablation, in pixel units.
      population: data sets over all of whose images statistics are taken; by default over the
        images that are measured.
      progress: from a label to a wrapper of an iterator of batches.

    Returns:
      The report; results do not depend on batches and devices.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a measure does not fit a layer, or a label is no class of the model.
    """
    layers = chosen_layers(forward, variables, source.info, settings)
    run = functools.partial(
        accuracy.stream,
        source,
        mesh,
        settings.batch_size,
        limit=settings.limit or None,
    )
    label = functools.partial(predict_batch, forward, variables)
    predicted = run(label, progress=progress('predictions'))
    image = jax.ShapeDtypeStruct((1, *source.info.image_shape), jnp.float32)
    images.check_labels(predicted['labels'], images.count_classes(forward, variables, image))
    attack = jax.tree_util.Partial(fgsm_images, jnp.float32(eps))
    spread = [
        functools.partial(accuracy.stream, one, mesh, settings.batch_size) for one in population
    ]
    probed: dict[str, dict[str, np.ndarray]] = {}
    if 'input_gradients' in settings.measures and settings.probes:
        wrap = progress('input_gradients')
        probed = probe_estimates(forward, variables, layers, settings, run, wrap, key)
    reports = []
    for layer in layers:
        measured: dict[str, Any] = {'layer': layer, **probed.get(layer.name, {})}
        for measure_name in _with_prerequisites(settings.measures):
            if measure_name == 'input_gradients' and settings.probes:
                continue
            wrap = progress(f'{layer.name} {measure_name}')
            task = Task(
                forward, variables, layer, settings, run, wrap, attack, key, mesh, measured, spread
            )
            measured.update(LAYER_MEASURES[measure_name](task))
        if 'targeting' in settings.measures:
            measured['targeting'] = targeting_reports(
                measured, predicted['labels'], source.info.num_classes, variables, layer
            )
        measured = {name: value for name, value in measured.items() if not name.startswith('_')}
        measured |= {'ranking': settings.ranking, 'agreement_top': settings.agreement_top}
        reports.append(LayerReport(**measured))
    curves = {}
    if 'network_filtering' in settings.measures:
        curves = filtering_curves(
            forward,
            variables,
            run,
            progress('network_filtering'),
            attack,
            layer=None,
            alphas=filtering.global_thresholds(settings.thresholds),
        )
    return NeuronReport(
        source.info,
        split,
        predicted['labels'],
        predicted['predictions'],
        f'FGSM, linf eps {eps:g}',
        tuple(reports),
        curves,
    )


def _with_prerequisites(measures: Iterable[str]) -> list[str]:
    """The measures asked for and those that their summaries need, in a fixed order."""
    wanted = set(measures)
    if 'attack' in wanted:
        wanted.add('sensitivity')
    if 'sensitivity' in wanted:
        wanted.add('statistics')
    if 'targeting' in wanted:
        wanted.add('ablation')
    return [name for name in LAYER_MEASURES if name in wanted]


def fetch_images(
    source: data.Source, wanted: Iterable[int], limit: int | None, batch_size: int = 256
) -> dict[int, np.ndarray]:
    """Reads single images of a data set by their positions.

    Args:
      source: the data.
      wanted: positions.
      limit: as in the evaluation that named them.
      batch_size: images read at once.

    Returns:
      uint8 images `[H, W, C]` by position.
    """
    missing, found = set(wanted), {}
    for batch in source.eval_batches(batch_size=batch_size, limit=limit):
        for row, position in enumerate(batch.index):
            if batch.mask[row] and int(position) in missing:
                found[int(position)] = batch.image[row]
                missing.discard(int(position))
        if not missing:
            break
    return found

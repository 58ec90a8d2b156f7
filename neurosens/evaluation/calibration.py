"""Defences calibrated as a config says, on benign images of the training split."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from neurosens import config as config_lib
from neurosens import data, defenses, neurons
from neurosens.defenses import inverse_perturbation, pruning, rescaling
from neurosens.evaluation import accuracy, neuron_measures
from neurosens.evaluation.neuron_report import LayerReport
from neurosens.forward import Forward, Variables


def check_defense(
    forward: Forward, variables: Variables, info: data.DatasetInfo, settings: config_lib.Defense
) -> None:
    """Finds what is wrong with a defence's settings, without running the model.

    Args:
      forward: the model.
      variables: its variables.
      info: the data set.
      settings: the defence and its options.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: an option is wrong, does not fit another, or asks for more neurons than a layer
        has.
    """
    chosen = defenses.make_settings(settings.name, settings.options)
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    if not isinstance(chosen, inverse_perturbation.Settings):
        layer = neurons.describe(forward, variables, image, chosen.layer, unit=chosen.unit)
        if isinstance(chosen, pruning.Settings) and chosen.count > layer.neurons:
            raise ValueError(
                f'count is {chosen.count}, but layer {chosen.layer!r} has {layer.neurons} neurons; '
                'prune fewer.'
            )
        if isinstance(chosen, rescaling.Settings) and chosen.renormalize:
            norms = neurons.kernels.norms(variables, chosen.layer)
            if len(norms) != layer.neurons:
                raise ValueError(
                    f'renormalize needs the norm of the weights of each neuron, but layer '
                    f'{chosen.layer!r} has {len(norms)} filters and {layer.neurons} neurons of '
                    f"unit {chosen.unit!r}; set unit to 'channel', or leave renormalize out."
                )
        return
    run = functools.partial(inverse_perturbation.directions, forward, settings=chosen)
    found = jax.eval_shape(run, variables, image)
    classes = found.logits.shape[-1]
    if chosen.top > classes:
        raise ValueError(f'top is {chosen.top}, but the model has {classes} classes.')


# What gives a measure of pruning, and its name among scores, where these are others.
_MEASURES = {
    'scaled_sensitivity': 'sensitivity',
    'ablation_attacked': 'ablation',
    'targeting_relative': 'targeting',
    'targeting_log': 'targeting',
}
_IMPORTANCE = {'input_gradients': 'input_gradient'}


def pruning_scores(layer: LayerReport, measure: str) -> Float[np.ndarray, ' neurons']:
    """What pruning ranks neurons by.

    Args:
      layer: a report with that measure.
      measure: of `config.PRUNED_BY`; `'scaled_sensitivity'` is the one of Suri & Evans.

    Returns:
      A score for each neuron, larger where it goes first with the order `'most'` `[N]`; by
      `'scaled_sensitivity'` minus infinity for one that flips no image or never varies, such as a
      dead one, and NaN where all logits are.

    Raises:
      ValueError: the images show nothing of that measure.
    """
    if measure == 'scaled_sensitivity':
        assert layer.delta is not None
        score = layer.mean_scaled_delta()
        # What no change of a neuron does is as far away as can be, and so the first of the least.
        unreachable = np.isnan(score) & ~np.isnan(layer.delta).all(0)
        # The smallest is the most sensitive.
        return np.where(unreachable, -np.inf, -np.abs(score))
    scores, name = layer.importance(), _IMPORTANCE.get(measure, measure)
    if name not in scores:
        reason = 'the logits of every image are NaN'
        if measure.startswith('targeting'):
            reason = 'FGSM moves no image, as where all are misclassified or no gradient leads away'
        raise ValueError(
            f'defense.measure is {measure!r}, but {reason}; take other images, or another measure.'
        )
    return scores[name]


def calibration_facts(settings: config_lib.Defense, eps: float) -> dict[str, Any]:
    """What decides a calibration beside the settings of the defence itself, for its record.

    Args:
      settings: as of `calibrate_defense`.
      eps: as there.

    Returns:
      The number of `images`, the `measure` or `response`, and the radius `eps` where it attacks; by
      random order none of them.
    """
    if settings.name == 'inverse_perturbation':
        return {'images': settings.images}
    chosen = defenses.make_settings(settings.name, settings.options)
    if isinstance(chosen, pruning.Settings) and chosen.order == 'random':
        return {}
    option = 'measure' if isinstance(chosen, pruning.Settings) else 'response'
    value = getattr(settings, option)
    radius = {'eps': eps} if _attacks(value) else {}
    return {'images': settings.images, option: value, **radius}


def _attacks(value: str) -> bool:
    """Whether a measure or response is one of attacked images."""
    return value.endswith('_attacked') or value.startswith('targeting')


def calibrate_defense(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Defense,
    key: PRNGKeyArray,
    *,
    eps: float = 0.1,
    batch_size: int = 128,
) -> Any:
    """Parameters of the defence that a config names.

    Inverse perturbation takes its directions, rescaling the nodal-dropout response and pruning the
    measure of the settings from the first `settings.images` images. Measures are taken as they are
    by default, whatever `neurons` of an evaluation says; pruning in random order needs none.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: benign images, such as the training split.
      mesh: devices to run on.
      settings: the defence, its options, and the images it is calibrated on.
      key: randomness of measures that are estimated.
      eps: linf radius of the attack of measures and responses that need one.
      batch_size: images at once over all devices.

    Returns:
      What `neurosens.defenses.save` keeps and the `apply` of the defence takes.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: an option is wrong, images do not suffice, a label is no class of the model, or a
        measure or response needs another radius.
    """
    chosen = defenses.make_settings(settings.name, settings.options)
    limit = settings.images or None
    if isinstance(chosen, inverse_perturbation.Settings):

        def images_of(batch: data.Batch) -> dict[str, Any]:
            return {'image': batch.image, 'label': batch.label}

        held = accuracy.stream(source, mesh, batch_size, images_of, limit=limit)
        x = held['image'].astype(np.float32) / np.float32(255)
        return inverse_perturbation.calibrate(
            forward, variables, x, held['label'], settings=chosen, batch_size=batch_size, mesh=mesh
        )
    if isinstance(chosen, pruning.Settings) and chosen.order == 'random':
        image = jax.ShapeDtypeStruct((1, *source.info.image_shape), jnp.float32)
        described = neurons.describe(forward, variables, image, chosen.layer, unit=chosen.unit)
        return pruning.calibrate(np.zeros(described.neurons), settings=chosen)
    measure, option, value = settings.measure, 'measure', settings.measure
    if isinstance(chosen, rescaling.Settings):
        measure, option, value = 'ablation', 'response', settings.response
    attacked = _attacks(value)
    if attacked and not eps > 0:
        raise ValueError(
            f'defense.{option} is {value!r}, which attacks images, but the radius is {eps}; give '
            'neurons.eps.'
        )
    report = neuron_measures.measure(
        forward,
        variables,
        source,
        mesh,
        config_lib.Neurons(
            measures=(_MEASURES.get(measure, measure),),
            layers=(chosen.layer,),
            unit=chosen.unit,
            limit=settings.images,
            batch_size=batch_size,
        ),
        key,
        split='train',
        eps=eps if attacked else 0.0,
    )
    (layer,) = report.layers
    if isinstance(chosen, pruning.Settings):
        return pruning.calibrate(pruning_scores(layer, measure), settings=chosen)
    norms = neurons.kernels.norms(variables, chosen.layer) if chosen.renormalize else None
    found = layer.attacked if attacked else layer.clean
    responses = getattr(found, value.removesuffix('_attacked'))
    return rescaling.calibrate(responses, settings=chosen, norms=norms)

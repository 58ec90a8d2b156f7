"""Compress and amplify: fragile neurons scaled up, robust ones down, without retraining.

After the mitigation of Pravin et al. 2021, "Adversarial Robustness in Deep Learning: Attacks on
Fragile Neurons" (https://arxiv.org/abs/2201.12347): compress the features within robust neurons
and amplify the fragile ones proportionally. The formula is our reading of that sentence.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, ArrayLike, Float

from neurosens import _validate
from neurosens.forward import Forward, Variables, with_edits
from neurosens.neurons import kernels, units
from neurosens.neurons.ablation import RULES, fragility


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a layer is rescaled; hashable.

    Attributes:
      layer: name of the layer. One that has a kernel (such as `conv1`) is scaled with kernel and
        bias alike; behind a nonlinearity (`act1`) the activation is.
      unit: `'channel'` or `'unit'`.
      strength: beta in [0, 1], of fragile and robust neurons alike.
      rule: which neurons are fragile, `'mean'`, `'median'`, `'zero'` or a threshold of responses,
        as in `ablation.fragility`.
      renormalize: scale all alike afterwards so that the sum of squares over `norms` stays.
    """

    layer: str = 'act1'
    unit: str = 'channel'
    strength: float = 0.5
    rule: str | float = 'mean'
    renormalize: bool = False

    def __post_init__(self) -> None:
        units.check_unit(self.unit)
        _validate.check_layer(self.layer)
        _validate.check_flag('renormalize', self.renormalize)
        if not isinstance(self.rule, str):
            _validate.check_range('rule', self.rule)
        elif self.rule not in RULES:
            raise ValueError(_validate.unknown('rule', self.rule, (*RULES, 'a number')))
        _validate.check_range('strength', self.strength, low=0, high=1)


DEFAULT = Settings()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=('scale',), meta_fields=('settings',)
)
@dataclasses.dataclass(frozen=True)
class Parameters:
    """What calibration found.

    Attributes:
      scale: factor of each neuron `[N]`.
      settings: of the calibration.
    """

    scale: Float[Array, ' neurons']
    settings: Settings


def calibrate(
    responses: Float[ArrayLike, ' neurons'],
    *,
    settings: Settings = DEFAULT,
    norms: Float[ArrayLike, ' neurons'] | None = None,
) -> Parameters:
    """Factors from nodal-dropout responses.

    s_k = |d_k - mean d| / max_j |d_j - mean d|; a fragile neuron is scaled by 1 + beta s_k, a
    robust one by 1 - beta s_k. Where all responses are equal nothing is scaled.

    Args:
      responses: d_k of each neuron, such as `ablation.response(...).accuracy` `[N]`.
      settings: strength and rule.
      norms: norm ||w_k|| of each neuron's weights `[N]`, of `neurons.kernels.norms`, needed to
        renormalise.

    Returns:
      The factors.

    Raises:
      ValueError: responses are empty or not finite, or norms are missing or do not fit.
    """
    d = np.asarray(responses, np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(
            f'Responses have shape {d.shape} and must be finite, one for each neuron; measure them '
            'with neurons.ablation.'
        )
    distance = np.abs(d - d.mean())
    # What is left of equal responses by the rounding of their mean is no difference.
    slack = 8 * np.finfo(np.float64).eps * np.abs(d).max(initial=0)
    share = distance / distance.max() if distance.max() > slack else np.zeros_like(distance)
    fragile = fragility(d, settings.rule).fragile
    scale = np.where(fragile, 1 + settings.strength * share, 1 - settings.strength * share)
    if settings.renormalize:
        if norms is None or np.shape(norms) != d.shape:
            raise ValueError(
                f'renormalize needs the norm of the weights of each of {len(d)} neurons; pass '
                'norms, or leave it out.'
            )
        squares = np.asarray(norms, np.float64) ** 2
        total = (scale**2 * squares).sum()
        scale = scale * np.sqrt(squares.sum() / total) if total > 0 else scale
    return Parameters(jnp.asarray(scale, jnp.float32), settings)


def apply(parameters: Parameters, forward: Forward) -> Forward:
    """The model with the layer's neurons scaled.

    A normalisation behind the layer must use its running statistics, as forwards do: statistics of
    the batch would undo the scaling.

    Args:
      parameters: of `calibrate`.
      forward: the model.

    Returns:
      A forward with the same variables and layers; a call raises a ValueError where the layer has
      not as many neurons as factors.
    """
    settings = parameters.settings
    scale = _scale_channels if settings.unit == 'channel' else _scale_units
    edit = jax.tree_util.Partial(scale, parameters.scale)
    return with_edits(forward, {settings.layer: edit})


def _scale_channels(scale: Array, activation: Array) -> Array:
    return activation * units.across(scale, activation.shape).astype(activation.dtype)


def _scale_units(scale: Array, activation: Array) -> Array:
    return activation * units.across(scale, activation.shape, 'unit').astype(activation.dtype)


def fold(parameters: Parameters, variables: Variables) -> Variables:
    """Variables with the factors inside kernel and bias, to fine-tune or save as a plain model.

    Args:
      parameters: of a layer that has a kernel, with its channels as neurons.
      variables: Linen variables of the model.

    Returns:
      New variables; the plain model with them is the rescaled one.

    Raises:
      ValueError: the layer has no kernel, or its units are scaled apart.
    """
    settings = parameters.settings
    found = kernels.by_layer(variables)
    if settings.layer not in found:
        raise ValueError(
            _validate.unknown('layer with a kernel', settings.layer, tuple(found))
            + ' Other layers are scaled by apply().'
        )
    if settings.unit != 'channel':
        raise ValueError("A kernel scales whole channels; calibrate with unit='channel'.")
    path = tuple(settings.layer.split('/'))
    parameters_tree = flatten_dict(variables['params'])
    for name in ('kernel', 'bias'):
        if (leaf := parameters_tree.get((*path, name))) is not None:
            parameters_tree[(*path, name)] = leaf * parameters.scale.astype(leaf.dtype)
    return {**variables, 'params': unflatten_dict(parameters_tree)}


def skeleton(settings: Settings) -> Parameters:
    """Parameters without arrays, of the same structure as those of a calibration."""
    return Parameters(jnp.zeros(0), settings)

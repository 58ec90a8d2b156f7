"""Nodal dropout: what a classifier loses when one neuron is removed.

After Pravin et al. 2021, "Adversarial Robustness in Deep Learning: Attacks on Fragile Neurons"
(https://arxiv.org/abs/2201.12347), who remove the filters of the first convolution one at a time.
The response d_k = A(M; X) - A(M_-k; X) with accuracy A, its versions for loss and margin, and the
label "fragile where d_k is above the mean" are our reading of their text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from neurosens import _validate
from neurosens.forward import Forward, Variables, with_edits
from neurosens.neurons import chunks, tail, units
from neurosens.neurons.kernels import by_layer

MODES = ('activation', 'weights')
RULES = ('mean', 'median', 'zero')


class Ablation(NamedTuple):
    """How one example, or a batch, fares without each neuron.

    Attributes:
      correct: whether it is classified correctly without neuron k, bool `[B, N]`.
      loss: cross-entropy without neuron k `[B, N]`.
      margin: logit of the label minus the largest other, without neuron k `[B, N]`.
      intact_correct: the same with all neurons, bool `[B]`.
      intact_loss: `[B]`.
      intact_margin: `[B]`.
    """

    correct: Bool[Array, 'batch neurons']
    loss: Float[Array, 'batch neurons']
    margin: Float[Array, 'batch neurons']
    intact_correct: Bool[Array, ' batch']
    intact_loss: Float[Array, ' batch']
    intact_margin: Float[Array, ' batch']


def ablation_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    *,
    layer: str,
    unit: str = 'channel',
    mode: str = 'activation',
    replacement: Float[Array, ' neurons'] | float | None = None,
    chunk: int | None = None,
) -> Ablation:
    """One example without each neuron of a layer in turn.

    The function that `ablation` maps over a batch; it has its arguments and errors, with `x` one
    input and `y` its label, and returns arrays `[N]` and scalars.
    """
    units.check_unit(unit)
    chunks.check_chunk(chunk)
    if mode not in MODES:
        raise ValueError(_validate.unknown('mode', mode, MODES))
    if mode == 'weights':
        _check_weights(variables, layer, unit)
        if replacement is not None:
            raise ValueError("mode='weights' leaves 0; use mode='activation' with a replacement.")
    cut = tail.cut(forward, variables, x, layer)
    shape, dtype = cut.activation.shape, cut.activation.dtype
    neurons = units.count(shape, unit)
    given = 0.0 if replacement is None else replacement
    constant = jnp.broadcast_to(jnp.asarray(given, dtype), (neurons,))
    apart = units.are_channels(shape, unit)
    if apart:
        channel_logits = cut.channel_logits()
    else:
        filling = units.spread(constant, shape, unit)

    def judge(values: Array) -> tuple[Array, Array, Array]:
        others = jnp.where(jnp.arange(len(values)) == y, -jnp.inf, values)
        loss = optax.softmax_cross_entropy_with_integer_labels(values, y)
        return values.argmax() == y, loss, values[y] - others.max()

    def without(index: Array) -> tuple[Array, Array, Array]:
        if apart:
            value = jnp.broadcast_to(constant.at[index].get(mode='clip'), shape[:-1])
            return judge(channel_logits(index, value))
        removed = units.direction(index, shape, unit, dtype) > 0
        return judge(cut.logits(jnp.where(removed, filling, cut.activation)))

    results = chunks.map_chunks(without, neurons, chunk or chunks.DEFAULT)
    return Ablation._make((*results, *judge(cut.logits(cut.activation))))


def _check_weights(variables: Variables, layer: str, unit: str) -> None:
    kernels = by_layer(variables)
    if layer not in kernels:
        raise ValueError(
            _validate.unknown('layer with a kernel', layer, tuple(kernels))
            + " Use mode='activation' for other layers."
        )
    if unit != 'channel':
        raise ValueError("mode='weights' removes whole filters; use unit='channel'.")


@functools.partial(jax.jit, static_argnames=('layer', 'unit', 'mode', 'chunk'))
def ablation(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    *,
    layer: str,
    unit: str = 'channel',
    mode: str = 'activation',
    replacement: Float[Array, ' neurons'] | float | None = None,
    chunk: int | None = None,
) -> Ablation:
    """Removes each neuron of a layer in turn and classifies the batch without it, jit-compiled.

    The network in front of the layer runs once, what follows it N + 1 times, `chunk` at once.

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`, clean or attacked; attacks are made beforehand, on the intact network.
      y: labels `[B]`.
      layer: name of the layer: behind its normalisation and nonlinearity (such as `act1`) a neuron
        is really removed.
      unit: `'channel'` or `'unit'`.
      mode: `'activation'` masks the layer's value. `'weights'` is the habit of the authors'
        programs, a filter whose kernel and bias are 0: the layer then has to be the one with the
        kernel (such as `conv1`), and a normalisation behind it leaves a constant.
      replacement: what a removed neuron gives instead of 0, one value or `[N]`, such as its mean;
        only with `'activation'`.
      chunk: neurons at once for each example, 16 by default; bounds memory, never changes results
        beyond rounding.

    Returns:
      Per example and neuron whether the label is still predicted, loss and margin; and the same of
      the intact network.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: a choice is unknown, `chunk` is below 1, or with `'weights'` the layer has no
        kernel or there is a replacement.
    """
    example = functools.partial(
        ablation_example,
        forward,
        variables,
        layer=layer,
        unit=unit,
        mode=mode,
        replacement=replacement,
        chunk=chunk,
    )
    return jax.vmap(example)(jnp.asarray(x), jnp.asarray(y))


def without_neurons(
    forward: Forward, layer: str, removed: Bool[Array, ' neurons'], unit: str = 'channel'
) -> Forward:
    """A forward in which some neurons of a layer are always 0.

    Args:
      forward: the model.
      layer: name of the layer.
      removed: which neurons are removed, bool `[N]`; an array of the returned forward, so that
        another choice needs no new trace.
      unit: `'channel'` or `'unit'`.

    Returns:
      A forward with the same variables and layers; a call raises a ValueError where the layer has
      not N neurons.
    """
    units.check_unit(unit)
    # Always the same function object: another one would be another program.
    mask = _mask_channels if unit == 'channel' else _mask_units
    return with_edits(forward, {layer: jax.tree_util.Partial(mask, jnp.asarray(removed))})


def _mask_channels(removed: Array, activation: Array) -> Array:
    removed = units.across(removed, activation.shape)
    return jnp.where(removed, jnp.zeros((), activation.dtype), activation)


def _mask_units(removed: Array, activation: Array) -> Array:
    removed = units.across(removed, activation.shape, 'unit')
    return jnp.where(removed, jnp.zeros((), activation.dtype), activation)


# --------------------------------------------------------------------------------- on the host


class Response(NamedTuple):
    """Nodal-dropout responses of a layer over a data set.

    Attributes:
      accuracy: d_k, accuracy intact minus accuracy without neuron k `[N]`.
      loss: mean loss without neuron k minus intact `[N]`.
      margin: mean margin intact minus without neuron k `[N]`.
      intact_accuracy: accuracy of the intact network.
    """

    accuracy: Float[np.ndarray, ' neurons']
    loss: Float[np.ndarray, ' neurons']
    margin: Float[np.ndarray, ' neurons']
    intact_accuracy: float


def response(result: Ablation) -> Response:
    """Averages an ablation over its examples, in float64 on the host.

    Positive responses mean that the network is worse without the neuron.

    Args:
      result: an ablation of M examples, at least 1.

    Returns:
      The responses of accuracy, loss and margin.
    """
    correct, loss, margin, *intact = (np.asarray(leaf, np.float64) for leaf in result)
    intact_correct, intact_loss, intact_margin = (leaf[:, None] for leaf in intact)
    # Differences first: a neuron that changes nothing gets 0, up to the rounding of its products.
    return Response(
        (intact_correct - correct).mean(0),
        (loss - intact_loss).mean(0),
        (intact_margin - margin).mean(0),
        float(intact_correct.mean()),
    )


class Fragility(NamedTuple):
    """Which neurons are fragile, and by which rule.

    Attributes:
      fragile: bool `[N]`; the others are robust.
      threshold: response above which a neuron is fragile.
      rule: the rule in words, for reports.
    """

    fragile: Bool[np.ndarray, ' neurons']
    threshold: float
    rule: str


def fragility(responses: Float[np.ndarray, ' neurons'], rule: str | float = 'mean') -> Fragility:
    """Labels neurons fragile or robust by their nodal-dropout response.

    Args:
      responses: such as `Response.accuracy` on clean or attacked images `[N]`.
      rule: `'mean'` (fragile above the mean response, the default), `'median'`, `'zero'`, or a
        threshold.

    Returns:
      The labels with the rule that made them.

    Raises:
      ValueError: the rule is unknown.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(_validate.unknown('rule', rule, (*RULES, 'a number')))
        threshold = 0.0
        if rule != 'zero':
            threshold = float(np.mean(responses) if rule == 'mean' else np.median(responses))
        words = 'd_k > 0' if rule == 'zero' else f'd_k > {rule} of d = {threshold:.6g}'
    else:
        threshold = rule
        words = f'd_k > {threshold:.6g}'
    responses = np.asarray(responses, np.float64)
    # Equal responses are not above their mean because that is rounded.
    slack = 8 * np.finfo(np.float64).eps * np.abs(responses).max(initial=0.0)
    return Fragility(responses > threshold + slack, threshold, words)

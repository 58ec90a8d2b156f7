"""How strongly each neuron responds to the input: gradient norms, exact and by random probes.

Exact norms cost one vector-Jacobian product per neuron. A single Jacobian-vector product J u along
a random direction u with E[u u^T] = I gives (J u)_i^2, an unbiased estimate of ||grad_x a_i||_2^2,
for every neuron of every layer at once; n directions also give its standard error. Such squared
gradient norms are what Fidel et al. 2020 (https://arxiv.org/abs/2009.11349) regularize; the
estimator is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import EVERY_OUTPUT, Forward, Variables
from neurosens.neurons import channels, chunks, tail, units
from neurosens.neurons.program import specialize

PROBES = ('normal', 'rademacher')
# Pulled back at once for each example: measured on ResNet-20, larger chunks leave the cache.
DEFAULT_CHUNK = 8


class GradientNorms(NamedTuple):
    """Norms of the input gradient of each neuron, per pixel unit.

    Attributes:
      l1: sum of absolute values `[B, N]`; the dual of linf perturbations.
      l2: Euclidean norm `[B, N]`.
      linf: largest absolute value `[B, N]`; the dual of l1 perturbations.
    """

    l1: Float[Array, 'batch neurons']
    l2: Float[Array, 'batch neurons']
    linf: Float[Array, 'batch neurons']


def input_gradient_norms_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    chunk: int | None = None,
) -> GradientNorms:
    """Input gradient norms of a layer's neurons for one example.

    The function that `input_gradient_norms` maps over a batch; it has its arguments and errors,
    with `x` one input, and returns arrays `[N]`.
    """
    units.check_unit(unit)
    chunks.check_chunk(chunk)
    size = chunk or DEFAULT_CHUNK

    def neuron_values(x: Array) -> Array:
        return tail.tap(forward, variables, x, layer)

    shape = jax.eval_shape(neuron_values, x)
    neurons = units.count(shape.shape, unit)
    looped = not chunks.fits(neurons, size)
    pulled = with_fast_input_gradients(neuron_values) if looped else neuron_values
    _, pull = jax.vjp(pulled, x)
    if len(shape.shape) == 1:
        # The cotangent of a neuron is zero but for one entry: a dense layer gives it one row of its
        # kernel, not a product with all of it, whose cost for all neurons would grow as N^2.
        nothing = jnp.zeros(shape.shape, shape.dtype)
        backward = specialize(lambda cotangent: pull(cotangent)[0], nothing, inline=True)
        pull_entry = channels.of_channel(backward, nothing)

    def norms(index: Array) -> GradientNorms:
        if len(shape.shape) == 1:
            gradient = pull_entry(index, jnp.ones((), shape.dtype))
        else:
            (gradient,) = pull(units.direction(index, shape.shape, unit, shape.dtype))
        gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)).ravel()
        magnitude = jnp.abs(gradient)
        return GradientNorms(magnitude.sum(), jnp.sqrt((gradient**2).sum()), magnitude.max())

    return chunks.map_chunks(norms, neurons, size)


@functools.partial(jax.jit, static_argnames=('layer', 'unit', 'chunk'))
def input_gradient_norms(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    *,
    layer: str = 'head:in',
    unit: str = 'channel',
    chunk: int | None = None,
) -> GradientNorms:
    """Exact norms of the input gradient of every neuron of a layer, jit-compiled.

    One vector-Jacobian product per neuron through the network up to the layer.

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`.
      layer: name of the layer.
      unit: `'channel'` (the gradient of the sum over positions) or `'unit'`.
      chunk: neurons at once for each example, 8 by default; bounds memory, never changes results
        beyond rounding.

    Returns:
      l1, l2 and linf norms, `[B, N]` each, in units of the activation per pixel unit.

    Raises:
      LayerError: the layer cannot be tapped.
      ValueError: the unit is unknown or `chunk` is below 1.
    """
    example = functools.partial(
        input_gradient_norms_example, forward, variables, layer=layer, unit=unit, chunk=chunk
    )
    return jax.vmap(example)(jnp.asarray(x))


class Estimate(NamedTuple):
    """An estimate from random probes.

    Attributes:
      value: mean over the probes: an unbiased estimate of ||grad_x a_i||_2^2, `[B, N]`.
      standard_error: standard deviation of that mean, estimated from the spread of the probes
        `[B, N]`; NaN with a single probe.
    """

    value: Float[Array, 'batch neurons']
    standard_error: Float[Array, 'batch neurons']


def probe_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    key: PRNGKeyArray,
    *,
    probes: int = 8,
    layers: Collection[str] = (EVERY_OUTPUT,),
    unit: str = 'channel',
    distribution: str = 'rademacher',
) -> dict[str, Estimate]:
    """Estimates for every neuron of several layers for one example.

    The function that `probe_gradients` maps over a batch; it has its arguments and errors, with `x`
    one input, and returns arrays `[N]`.
    """
    units.check_unit(unit)
    _validate.check_whole('probes', probes)
    if distribution not in PROBES:
        raise ValueError(_validate.unknown('distribution', distribution, PROBES))
    taps = tuple(layers)

    def activations(x: Array) -> dict[str, Array]:
        tapped = forward(variables, x[None], taps=taps)[1]
        # A pattern stands for the layers that have neurons; a name has to be one of them.
        for name in taps:
            if name in tapped:
                tail.check_neurons(name, tapped[name])
        return {name: value[0] for name, value in tapped.items() if tail.has_neurons(value)}

    _, push = jax.linearize(activations, x)

    def squares(index: Array) -> dict[str, Array]:
        draw = jax.random.normal if distribution == 'normal' else jax.random.rademacher
        direction = draw(jax.random.fold_in(key, index), x.shape).astype(x.dtype)

        def square(tangent: Array) -> Array:
            wide = tangent.astype(jnp.promote_types(tangent.dtype, jnp.float32))
            return units.pool(wide, unit) ** 2

        return jax.tree.map(square, push(direction))

    def accumulate(index: Array, sums: tuple[dict, dict]) -> tuple[dict, dict]:
        """Welford's update of the mean and of the sum of squared deviations."""
        mean, deviations = sums
        drawn = squares(index)
        new = jax.tree.map(lambda m, d: m + (d - m) / (index + 1), mean, drawn)
        deviations = jax.tree.map(
            lambda s, d, m, n: s + (d - m) * (d - n), deviations, drawn, mean, new
        )
        return new, deviations

    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(squares, jnp.int32(0))
    )
    mean, deviations = jax.lax.fori_loop(0, probes, accumulate, (zero, zero))

    def standard_error(total: Array) -> Array:
        if probes == 1:
            return jnp.full_like(total, jnp.nan)
        return jnp.sqrt(total / (probes * (probes - 1)))

    return {name: Estimate(mean[name], standard_error(deviations[name])) for name in mean}


@functools.partial(jax.jit, static_argnames=('probes', 'layers', 'unit', 'distribution'))
def _probe_batch(
    forward: Forward,
    variables: Variables,
    x: Array,
    key: PRNGKeyArray,
    index: Array,
    **options: Any,
) -> dict[str, Estimate]:
    def example(x: Array, key: PRNGKeyArray) -> dict[str, Estimate]:
        return probe_example(forward, variables, x, key, **options)

    # Keys follow the example, not its place in a batch or on a device.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    return jax.vmap(example)(x, keys)


def probe_gradients(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    key: PRNGKeyArray,
    *,
    probes: int = 8,
    layers: Collection[str] = (EVERY_OUTPUT,),
    unit: str = 'channel',
    distribution: str = 'rademacher',
    index: Int[Array, ' batch'] | None = None,
) -> dict[str, Estimate]:
    """Estimates the squared input gradient norm of every neuron of every layer, jit-compiled.

    One forward pass, and one Jacobian-vector product per probe for all layers together.

    Args:
      forward: the model.
      variables: its variables.
      x: inputs `[B, ...]`.
      key: randomness of the directions.
      probes: directions per example, at least 1.
      layers: names of layers; `'*'`, the default, stands for every layer there is.
      unit: `'channel'` (the gradient of the sum over positions) or `'unit'`.
      distribution: `'rademacher'` (entries -1 and 1) or `'normal'`; the former never has the larger
        variance.
      index: identity of each example `[B]`, such as its position in the data set: the same example
        gets the same directions in any batch. By default its place in this batch.

    Returns:
      For each layer the estimates of ||grad_x a_i||_2^2 and their standard errors, `[B, N]` each.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: a choice is unknown or `probes` is below 1.
    """
    x = jnp.asarray(x)
    if isinstance(layers, str):
        raise TypeError(f'layers must be a collection of layer names, not the string {layers!r}.')
    if index is None:
        index = jnp.arange(x.shape[0])
    return _probe_batch(
        forward,
        variables,
        x,
        key,
        index,
        probes=probes,
        layers=tuple(layers),
        unit=unit,
        distribution=distribution,
    )

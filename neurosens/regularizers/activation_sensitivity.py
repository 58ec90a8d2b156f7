"""Activation sensitivity: small derivatives of hidden neurons with respect to the input.

After Fidel, Bitton, Katzir & Shabtai 2020 (https://arxiv.org/abs/2009.11349), of which no program
is public: the estimators, weights and layers are ours. With a_l the N_l entries of hidden layer l
of L,

    R(x) = (1/L) sum_l (1/N_l) ||d a_l / d x||_F^2.

Multiplying a ReLU layer by a factor and dividing the next one by it changes R and nothing else: a
smaller R alone does not mean a more robust classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.neurons import chunks
from neurosens.regularizers import passes
from neurosens.regularizers.regularizer import (
    POSITIONS,
    Regularizer,
    hidden_of,
    hidden_taps,
    keys_of,
    mean_over_layers,
    mean_square,
    selected,
    single,
    zeros_of,
)

ESTIMATORS = ('tangent', 'cotangent', 'neuron_sampling', 'finite_difference', 'exact')
DISTRIBUTIONS = ('rademacher', 'normal', 'uniform')

_Activations = Callable[[Array], dict[str, Array]]
# Estimates by layer, and which activations were 0.
_Estimates = tuple[dict[str, Array], dict[str, Array]]


def _direction(key: PRNGKeyArray, like: Array, distribution: str) -> Array:
    """Independent entries of mean 0 and variance 1."""
    draws: dict[str, Callable[..., Array]] = {
        'rademacher': jax.random.rademacher,
        'normal': jax.random.normal,
        # s^2 / 3 is the variance between -s and s.
        'uniform': functools.partial(jax.random.uniform, minval=-(3**0.5), maxval=3**0.5),
    }
    return draws[distribution](key, like.shape).astype(like.dtype)


def _draws(key: PRNGKeyArray, x: Array, samples: int) -> PRNGKeyArray:
    """Keys `[samples, B]`."""
    return jax.vmap(lambda own: jax.random.split(own, samples), out_axes=1)(keys_of(key, x))


def _tangents(
    forward: Forward,
    variables: Variables,
    x: Array,
    key: PRNGKeyArray,
    *,
    samples: int,
    layers: Sequence[str] | None,
    position: str,
    distribution: str,
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Array]]:
    """Derivatives of a batch along random directions, for every neuron of every layer at once.

    Returns:
      Derivatives of the logits `[samples, B, K]` and of activations `[samples, B, ...]`, and which
      activations were 0.
    """

    def read(logits: Array, tapped: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        return single(logits), hidden_of(tapped, layers, position)

    taps = hidden_taps(layers, position)
    values, push = passes.linearize(forward, variables, x, read, taps)
    draw = functools.partial(_direction, distribution=distribution)
    directions = jax.vmap(jax.vmap(draw), (0, None))(_draws(key, x, samples), x)
    return passes.each(push, directions), zeros_of(values[1])


def _vjp(
    forward: Forward, variables: Variables, x: Array, layers: Sequence[str] | None, position: str
) -> tuple[dict[str, Array], Callable[[Any], Array]]:
    """Activations of a batch by layer, and from their cotangents to gradients `[B, ...]`."""

    def read(logits: Array, tapped: Mapping[str, Array]) -> dict[str, Array]:
        del logits
        return hidden_of(tapped, layers, position)

    return passes.vjp(forward, variables, x, read, hidden_taps(layers, position))


def _cotangent(
    forward: Forward,
    variables: Variables,
    x: Array,
    key: PRNGKeyArray,
    *,
    samples: int,
    layers: Sequence[str] | None,
    position: str,
) -> _Estimates:
    """Signs over all neurons of all layers, in one pass back; terms between layers cancel."""
    values, pull = _vjp(forward, variables, x, layers, position)

    def signs(key: PRNGKeyArray, values: dict[str, Array]) -> dict[str, Array]:
        keys = jax.random.split(key, len(values))
        return {
            name: _direction(own, value, 'rademacher') / jnp.sqrt(float(len(values) * value.size))
            for own, (name, value) in zip(keys, values.items())
        }

    drawn = jax.vmap(jax.vmap(signs), (0, None))(_draws(key, x, samples), values)
    squares = single(passes.each(pull, drawn)) ** 2
    return {'': squares.sum() / (samples * x.shape[0])}, zeros_of(values)


def _neuron_sampling(
    forward: Forward,
    variables: Variables,
    x: Array,
    key: PRNGKeyArray,
    *,
    samples: int,
    layers: Sequence[str] | None,
    position: str,
) -> _Estimates:
    """Squared gradient norms of a few random neurons of each layer, others for each image."""
    values, pull = _vjp(forward, variables, x, layers, position)
    zeros, found = jax.tree.map(jnp.zeros_like, values), {}
    keys = jax.vmap(functools.partial(jax.random.split, num=len(values)))(keys_of(key, x))
    for place, (name, value) in enumerate(values.items()):
        count = value[0].size
        draw = functools.partial(jax.random.randint, shape=(samples,), minval=0, maxval=count)
        chosen = jax.vmap(draw)(keys[:, place])

        def norms(neurons: Array, name: str = name, value: Array = value) -> Array:
            one = jax.nn.one_hot(neurons, value[0].size, dtype=value.dtype).reshape(value.shape)
            squares = single(pull({**zeros, name: one})) ** 2
            return squares.reshape(len(value), -1).sum(1)

        found[name] = passes.each(norms, chosen.T).mean(0)
    return found, zeros_of(values)


def _finite_difference(
    function: _Activations,
    x: Array,
    key: PRNGKeyArray,
    samples: int,
    sigma: float,
    distribution: str,
) -> _Estimates:
    """The change under small random ones; biased by O(sigma^2), at kinks by O(sigma)."""
    before = function(x)

    def change(key: PRNGKeyArray) -> dict[str, Array]:
        after = function(x + sigma * _direction(key, x, distribution))
        return {name: mean_square(after[name] - before[name]) / sigma**2 for name in before}

    changes = jax.vmap(change)(jax.random.split(key, samples))
    return jax.tree.map(lambda change: change.mean(), changes), zeros_of(before)


def _exact(function: _Activations, x: Array) -> _Estimates:
    """One direction per entry of the input."""
    values, push = jax.linearize(function, x)

    def along(place: Array) -> dict[str, Array]:
        direction = jnp.zeros(x.size, x.dtype).at[place].set(1.0).reshape(x.shape)
        return jax.tree.map(mean_square, push(direction))

    parts = chunks.map_chunks(along, x.size, chunks.DEFAULT)
    return jax.tree.map(lambda part: part.sum(0), parts), zeros_of(values)


def activation_sensitivity(
    *,
    estimator: str = 'tangent',
    layers: Sequence[str] | None = None,
    position: str = 'post',
    samples: int = 1,
    distribution: str = 'rademacher',
    sigma: float = 1e-2,
) -> Regularizer:
    """The mean of R(x) over images.

    Args:
      estimator: all are unbiased for the same R but the last but one.
        `'tangent'`: a Jacobian-vector product along a random direction, for all neurons of all
        layers at once; `'cotangent'`: a vector-Jacobian product of random signs over all of them;
        `'neuron_sampling'`: exact gradients of `samples` random neurons of each layer;
        `'finite_difference'`: activations at a random point nearby, with a bias of the order of
        sigma^2 where layers are smooth over that distance, and of sigma, downwards, of those whose
        entries cross the kink of a ReLU, and refused where layers are computed in half precision,
        in whose rounding the changes are lost; `'exact'`: one direction per entry of the input, for
        tests and probes. The first three can share the pass of a training objective.
      layers: names of layers; None for every nonlinearity that is a module, by its name (`act1`,
        `relu_1`, ...). One that cannot be taken, as it runs more than once, is refused.
      position: `'post'`, what the layers return, or `'pre'`, what enters them. Behind a ReLU
        neurons that are off have no gradient: the penalty rewards dead ones, and logs their share.
        In front of it they have one; which are dead is not seen there, and no share is logged.
      samples: draws per image, of which the mean counts; for `'neuron_sampling'` neurons. For
        `'exact'` it stays 1.
      distribution: of `'tangent'` and `'finite_difference'`, `'rademacher'`, `'normal'` or
        `'uniform'`; for the others it stays `'rademacher'`.
      sigma: standard deviation of each pixel's change by `'finite_difference'`, in pixel units; a
        uniform one goes up to sqrt(3) sigma. For the others it stays 0.01.

    Returns:
      The regularizer; it logs the part of each layer under its name (`'cotangent'` cannot tell them
      apart) and, of `'post'`, `dead`, the share of entries that are 0 for every image of the batch.

    Raises:
      ValueError: a choice is unknown, a number out of range, or given to an estimator that does not
        use it; when called, finite differences are of half precision, or there is no nonlinearity.
      LayerError: when called, a layer cannot be tapped.
    """
    for name, value, known in (
        ('estimator', estimator, ESTIMATORS),
        ('position', position, POSITIONS),
        ('distribution', distribution, DISTRIBUTIONS),
    ):
        if value not in known:
            raise ValueError(_validate.unknown(name, value, known))
    _validate.check_layers(layers)
    _validate.check_whole('samples', samples)
    _validate.check_range('sigma', sigma, low=0, low_open=True)
    _check_used(estimator, samples, distribution, sigma)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del y

        def example(x: Array, key: PRNGKeyArray) -> _Estimates:
            def function(x: Array) -> dict[str, Array]:
                tapped = forward(variables, x[None], taps=hidden_taps(layers, position))[1]
                values = selected(tapped, layers, position)
                if estimator == 'finite_difference':
                    _check_precision(values)
                return {name: single(value[0]) for name, value in values.items()}

            if estimator == 'exact':
                return _exact(function, x)
            return _finite_difference(function, x, key, samples, sigma, distribution)

        common: Any = {'samples': samples, 'layers': layers, 'position': position}
        if estimator == 'tangent':
            common['distribution'] = distribution
            (_, tangents), zero = _tangents(forward, variables, x, key, **common)
            parts = {name: mean_square(tangent) for name, tangent in tangents.items()}
        elif estimator == 'cotangent':
            parts, zero = _cotangent(forward, variables, x, key, **common)
        elif estimator == 'neuron_sampling':
            parts, zero = _neuron_sampling(forward, variables, x, key, **common)
        else:
            parts, zero = jax.vmap(example)(x, keys_of(key, x))
        means = {name: part.mean() for name, part in parts.items()}
        metrics = {name: value for name, value in means.items() if name}
        return mean_over_layers(means), {**metrics, **_dead(zero, position)}

    return regularizer


def _check_used(estimator: str, samples: int, distribution: str, sigma: float) -> None:
    """Refuses what an estimator has no use for; a default cannot be told from nothing given."""
    for name, value, default, users in (
        ('samples', samples, 1, ESTIMATORS[:-1]),
        ('distribution', distribution, DISTRIBUTIONS[0], ('tangent', 'finite_difference')),
        ('sigma', sigma, 1e-2, ('finite_difference',)),
    ):
        if estimator not in users and value != default:
            raise ValueError(
                f'{name} is {value!r}, which estimator {estimator!r} has no use for; leave it out, '
                f'or take estimator {" or ".join(users)}.'
            )


def _check_precision(values: Mapping[str, Array]) -> None:
    """Refuses activations whose rounding is of the size of the changes to be measured."""
    for name, value in values.items():
        if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
            raise ValueError(
                f'Layer {name!r} is computed in {value.dtype.name}, in whose rounding estimator '
                "'finite_difference' loses the changes it measures; compute in float32, or take "
                "another estimator, such as 'tangent'."
            )


def _dead(zero: Mapping[str, Array], position: str) -> dict[str, Float[Array, '']]:
    """Under `dead` the share of entries that are 0 for every image of a batch `[B, ...]`.

    Nothing for `'pre'`: what enters a layer does not say which of its neurons are off.
    """
    if position == 'pre':
        return {}
    return {'dead': jnp.concatenate([flags.all(0).ravel() for flags in zero.values()]).mean()}


def sensitivity_and_jacobian(
    *,
    sensitivity: float = 0.1,
    jacobian: float = 0.05,
    layers: Sequence[str] | None = None,
    position: str = 'post',
    distribution: str = 'rademacher',
) -> Regularizer:
    """Activation sensitivity and the Jacobian of the logits from one Jacobian-vector product.

    The objective of Fidel et al. 2020: sensitivity R(x) + (jacobian / 2) ||J(x)||_F^2, its mean
    over images, both estimated along the same random direction.

    Args:
      sensitivity: weight of R.
      jacobian: weight of half the squared norm of the Jacobian.
      layers: as of `activation_sensitivity`.
      position: as of `activation_sensitivity`.
      distribution: of the direction, `'rademacher'`, `'normal'` or `'uniform'`.

    Returns:
      The regularizer; it logs `sensitivity` (R), `jacobian` (half the squared norm) and, of
      `'post'`, `dead`.

    Raises:
      ValueError: a choice is unknown or a weight negative.
    """
    for name, value, known in (
        ('position', position, POSITIONS),
        ('distribution', distribution, DISTRIBUTIONS),
    ):
        if value not in known:
            raise ValueError(_validate.unknown(name, value, known))
    _validate.check_layers(layers)
    _validate.check_range('sensitivity', sensitivity, low=0)
    _validate.check_range('jacobian', jacobian, low=0)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del y

        (logits, tangents), zero = _tangents(
            forward, variables, x, key,
            samples=1, layers=layers, position=position, distribution=distribution,
        )  # fmt: skip
        parts = {name: mean_square(tangent) for name, tangent in tangents.items()}
        found = {
            'sensitivity': mean_over_layers(parts),
            'jacobian': (logits**2).sum() / (2 * x.shape[0]),
        }
        penalty = sensitivity * found['sensitivity'] + jacobian * found['jacobian']
        return penalty, {**found, **_dead(zero, position)}

    return regularizer

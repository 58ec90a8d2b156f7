"""From an attack on one example to a jitted one on a batch, the same for every attack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import _validate
from neurosens.forward import Forward, Variables


class Bounded(Protocol):
    """A threat model of any kind: it knows the smallest and largest pixel value."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest pixel value."""


@functools.partial(jax.jit, static_argnames=('attack', 'options', 'split'))
def _run(
    attack: Callable[..., Any],
    forward: Forward,
    variables: Variables,
    x: Array,
    y: Array,
    key: PRNGKeyArray,
    index: Array,
    each: Mapping[str, Array],
    shared: Mapping[str, Any],
    options: tuple[tuple[str, Any], ...],
    split: NamedSharding | None,
) -> Any:
    def batch(
        forward: Forward,
        variables: Variables,
        x: Array,
        y: Array,
        keys: PRNGKeyArray,
        each: Any,
        shared: Any,
    ) -> Any:
        def example(x: Array, y: Array, key: PRNGKeyArray, each: Mapping[str, Array]) -> Any:
            return attack(forward, variables, x, y, key, **each, **shared, **dict(options))

        return jax.vmap(example)(x, y, keys, each)

    # Keys follow the example, not its place in a batch or on a device.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    if split is not None:
        whole, part = PartitionSpec(), split.spec
        batch = jax.shard_map(
            batch,
            mesh=split.mesh,
            in_specs=(whole, whole, part, part, part, part, whole),
            out_specs=part,
            check_vma=False,
        )
    return batch(forward, variables, x, y, keys, each, shared)


def _split(x: Array, model: Any) -> NamedSharding | None:
    """How the examples of a batch are split over devices that each hold all of the model.

    Every device then runs a program of its own: one that ends early waits for no other. None where
    that is not known, as inside a caller's jit, or where there is nothing to split.
    """
    if isinstance(x, jax.core.Tracer) or not isinstance(x.sharding, NamedSharding):
        return None
    examples, *pixels = *x.sharding.spec, None
    if examples is None or any(pixels) or len(x.sharding.device_set) == 1:
        return None
    for array in jax.tree.leaves(model):
        known = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        if known and not array.sharding.is_fully_replicated:
            return None
    return NamedSharding(x.sharding.mesh, PartitionSpec(examples))


def attack_batch(
    attack: Callable[..., Any],
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    y: Int[Array, ' batch'],
    key: PRNGKeyArray,
    *,
    threat: Bounded | None = None,
    unbounded: bool = False,
    index: Int[Array, ' batch'] | None = None,
    each: Mapping[str, Array | None] | None = None,
    shared: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Maps an attack on one example over a batch, jit-compiled.

    Args:
      attack: `attack(forward, variables, x, y, key, *, ...)` on one example.
      forward: the model to attack.
      variables: its variables.
      x: images `[B, ...]`, finite and inside the threat's bounds.
      y: labels `[B]`.
      key: randomness; folded with the identity of each example.
      threat: the perturbations allowed, if the attack takes a threat.
      unbounded: whether its radius may be infinite.
      index: identity of each example `[B]`, by default its place in the batch.
      each: keyword arguments with a value per example `[B, ...]`; those that are None are left out.
      shared: keyword arguments that all examples share: arrays and numbers, which are traced, so
        that other values need no new compilation.
      options: keyword arguments that are compiled in; hashable.

    Returns:
      What `attack` returns, stacked.

    Raises:
      ValueError: images, labels and `each` differ in number, there are none, images are not
        floating-point or labels no integers; or an image is not finite or outside the bounds, a
        label is not one of the model's classes, or the radius is infinite (as far as values are
        known: not inside a caller's jit).
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    check_batch(x, y)
    if index is not None and jnp.shape(index) != y.shape:
        raise ValueError(
            f'index has shape {jnp.shape(index)}; it must have a value for each of {len(x)} images.'
        )
    check_labels(forward, variables, x, y)
    if threat is not None:
        check_images(x, threat.bounds)
        if not unbounded:
            check_radius(threat)
        shared = {**(shared or {}), 'threat': threat}
    given = {name: jnp.asarray(value) for name, value in (each or {}).items() if value is not None}
    for name, value in given.items():
        if value.shape[:1] != y.shape:
            raise ValueError(
                f'{name} has shape {value.shape}; it must have a value for each of {len(x)} images.'
            )
    if index is None:
        index = jnp.arange(x.shape[0])
    chosen = tuple(sorted((options or {}).items()))
    return _run(
        attack,
        forward,
        variables,
        x,
        y,
        key,
        index,
        given,
        shared or {},
        chosen,
        _split(x, (forward, variables)),
    )


def check_batch(x: Array | np.ndarray, y: Array | np.ndarray) -> None:
    """Raises a ValueError unless these are floating-point images and as many integer labels.

    Args:
      x: images `[B, ...]`.
      y: labels `[B]`.
    """
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f'images have shape {x.shape} and labels {y.shape}; they must be [B, ...] and [B].'
        )
    if not len(x):
        raise ValueError(f'images have shape {x.shape}; an attack needs at least one.')
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'images are of type {x.dtype}; they must be floating-point (divide bytes by 255).'
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f'labels are of type {y.dtype}; they must be integers, one per image.')


def check_images(x: Float[Array | np.ndarray, 'batch ...'], bounds: tuple[float, float]) -> None:
    """Raises a ValueError unless images are finite and within bounds; traced ones pass.

    Args:
      x: images.
      bounds: smallest and largest pixel value.
    """
    if isinstance(x, jax.core.Tracer):
        return
    low, high = (float(value) for value in jax.device_get(_extremes(x)))
    # A comparison with NaN is false.
    slack = 1e-6 * (bounds[1] - bounds[0])
    if low >= bounds[0] - slack and high <= bounds[1] + slack:
        return
    if np.isnan(low) or np.isnan(high):
        raise ValueError('An image has pixels that are NaN; attacks need finite images.')
    raise ValueError(
        f'Pixels reach from {low:.6g} to {high:.6g}, but the bounds of the threat are '
        f'{bounds[0]:g} and {bounds[1]:g}; scale the images or set Threat(bounds=...).'
    )


def check_labels(
    forward: Forward,
    variables: Variables,
    x: Float[Array | np.ndarray, 'batch ...'],
    y: Int[Array | np.ndarray, ' batch'],
) -> None:
    """Raises a ValueError unless labels are classes of the model; those of traced images pass.

    Any other label would call every image misclassified. The model is not run, and traced once for
    each shape of images.

    Args:
      forward: the model.
      variables: its variables.
      x: images.
      y: labels.
    """
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer) or not len(y):
        return
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    try:
        classes = jax.eval_shape(_logits, forward, variables, one).shape[-1]
    except (flax.errors.FlaxError, TypeError, ValueError):
        # The attack says better what is wrong with images that the model does not take.
        return
    if isinstance(y, jax.Array) and not y.is_fully_addressable:
        # Some lie with other processes.
        low, high = jax.device_get(_extremes(y))
    else:
        low, high = np.asarray(y).min(), np.asarray(y).max()
    _validate.check_labels(int(low), int(high), classes)


def check_radius(threat: Bounded) -> None:
    """Raises a ValueError where the eps of a threat, if it has one, is not finite, if known."""
    eps = getattr(threat, 'eps', 0.0)
    if not isinstance(eps, jax.core.Tracer) and not np.isfinite(eps):
        raise ValueError(
            f'The eps of the threat is {float(eps)}; without a radius there are only the attacks '
            'that look for the smallest perturbation: fab, fmn, deepfool, carlini_wagner.'
        )


# Jitted, so that its shapes are remembered.
@jax.jit
def _logits(forward: Forward, variables: Variables, x: Array) -> Array:
    return forward(variables, x)[0]


@jax.jit
def _extremes(x: Array) -> tuple[Array, Array]:
    return x.min(), x.max()

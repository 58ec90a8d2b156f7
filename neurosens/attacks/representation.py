"""What attacks on a representation share: an activation of one image, and its ascent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens import _validate
from neurosens.attacks.adaptive import redraw
from neurosens.attacks.pgd import STARTS
from neurosens.attacks.threat import Threat, project, random_start, steepest_ascent
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Edit, Forward, Variables
from neurosens.neurons import units
from neurosens.neurons.tail import check_neurons

# Activation and logits of one image, for a key that only random models use.
Run: TypeAlias = Callable[[Array, PRNGKeyArray], tuple[Array, Array]]


def activation_and_logits(
    forward: Forward, variables: Variables, layer: str, straight_layer: str | None
) -> Run:
    """The model as a function of one image: activation of a layer and logits, at least float32."""

    def run(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        model = redraw(forward, key)
        edits = {} if straight_layer is None else _straight(model, variables, x, straight_layer)
        logits, tapped = model(variables, x[None], edits=edits, taps=(layer,))
        check_neurons(layer, tapped[layer])
        return _at_least_single(tapped[layer][0]), _at_least_single(logits[0])

    return run


def _straight(model: Forward, variables: Variables, x: Array, layer: str) -> Mapping[str, Edit]:
    """An edit that keeps what a layer returns and passes gradients straight to what enters it.

    An edit sees only one of the two, so what enters comes from a forward pass of its own. Up to the
    layer it is equal to the one that is edited, and XLA merges them.
    """
    entering = model(variables, x[None], taps=(layer, f'{layer}:in'))[1][f'{layer}:in']

    def edit(value: Array) -> Array:
        if value.shape != entering.shape:
            raise ValueError(
                f'straight_layer {layer!r} maps shape {entering.shape} to {value.shape}; name a '
                'layer that keeps the shape, such as an activation.'
            )
        # For a ReLU exact: the difference is 0 or minus the first term.
        return entering + jax.lax.stop_gradient(value - entering)

    return {layer: edit}


def _at_least_single(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def l2_norm(values: Array) -> Array:
    """The l2 norm of all entries, with gradient 0 at 0."""
    squares = (values**2).sum()
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def ascend(
    run: Run,
    value: Callable[[Array], Array],
    see: Callable[[Array, Array, Array, Array], Any],
    keep: Callable[[Any, Any], Any],
    clean: Any,
    x: Float[Array, '...'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int | Array,
    step_size: float | Array,
    restarts: int | Array,
    start: str,
) -> Any:
    """Projected steepest ascent of a function of an activation, from one image.

    Args:
      run: the model.
      value: from the activation to what is ascended.
      see: from an iterate, its value, activation and logits to what is known of it.
      keep: of a new and an old `see`, what counts.
      clean: `see` of the clean image.
      x: the clean image.
      key: randomness.
      threat: the perturbations allowed.
      steps: steps per restart.
      step_size: their length.
      restarts: how many runs.
      start: `'clean'` or `'random'`.

    Returns:
      What counts of all iterates.
    """

    def evaluate(image: Array, key: PRNGKeyArray) -> tuple[Array, tuple[Array, Array]]:
        activation, logits = run(image, key)
        return value(activation), (activation, logits)

    def restart(number: Array, best: Any) -> Any:
        own = jax.random.fold_in(key, number)
        first = random_start(threat, x, own) if start == 'random' else x

        def step(number: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
            image, best = state
            own_key = jax.random.fold_in(own, number)
            fast = with_fast_input_gradients(lambda image: evaluate(image, own_key))
            (height, seen), gradient = jax.value_and_grad(fast, has_aux=True)(image)
            moved = project(threat, x, image + step_size * steepest_ascent(threat, gradient))
            return moved, keep(see(image, height, *seen), best)

        last, best = jax.lax.fori_loop(0, steps, step, (first, best))
        height, seen = evaluate(last, jax.random.fold_in(own, steps))
        return keep(see(last, height, *seen), best)

    return jax.lax.fori_loop(0, restarts, restart, clean)


@functools.partial(jax.jit, static_argnames=('layer', 'unit'))
def _count(forward: Forward, variables: Variables, x: Array, layer: str, unit: str) -> Array:
    """Number of neurons; nothing of the network is run for it, and it is traced only once."""
    activation = forward(variables, x, taps=(layer,))[1][layer]
    return jnp.int32(units.count(activation.shape[1:], unit))


def check_steps(steps: int, restarts: int, start: str) -> None:
    """Raises a ValueError unless numbers are positive and the start is known."""
    _validate.check_whole('steps', steps)
    _validate.check_whole('restarts', restarts)
    if start not in STARTS:
        raise ValueError(f"start is {start!r}; it must be 'random' or 'clean'.")


def check_indices(
    forward: Forward, variables: Variables, x: Array, neurons: Array, layer: str, unit: str
) -> None:
    """Raises a ValueError unless neurons are integers that exist; traced ones pass the latter."""
    if not jnp.issubdtype(neurons.dtype, jnp.integer):
        raise ValueError(f'neurons are of type {neurons.dtype}; they must be integer indices.')
    found = _count(forward, variables, x, layer, unit), neurons.min(), neurons.max()
    if any(isinstance(value, jax.core.Tracer) for value in found):
        return
    count, low, high = (int(value) for value in found)
    if low < 0 or high >= count:
        raise ValueError(
            f'neurons reach from {low} to {high}, but layer {layer!r} has {count} of them with '
            f'unit={unit!r}; give indices from 0 to {count - 1}.'
        )

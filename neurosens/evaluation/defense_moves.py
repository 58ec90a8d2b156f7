"""Moves of the input as controls of inverse perturbation, and what attacks do to its neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from neurosens import data, parallel
from neurosens.defenses import inverse_perturbation, oracles
from neurosens.evaluation import accuracy, robustness
from neurosens.evaluation.defense_outcomes import GROUPS, DefenseOutcome, Moves, success_rate
from neurosens.forward import Forward, Variables
from neurosens.neurons import units
from neurosens.neurons.influence import FRONT, MIDDLE, TAIL, labels

# One step, or no gradient: of attacks that fool equally often these say least about a defence.
_PLAIN = ('fgsm', 'fgsm_rs', 'square', 'noise')


def strongest_static(outcomes: Sequence[DefenseOutcome]) -> list[DefenseOutcome]:
    """Of each radius the static attack that fools the undefended model most often.

    Ensembles are left out, whose images come of several attacks, and attacks for the smallest
    perturbation, whose images stop at the boundary, where any move recovers most. Of attacks that
    fool equally often the first that follows gradients for several steps is taken.

    Args:
      outcomes: attacks on a defence.

    Returns:
      One outcome for each radius that such an attack had.
    """
    strongest: dict[float, tuple[tuple[int, bool], DefenseOutcome]] = {}
    for outcome in outcomes:
        left_out = outcome.attack.startswith('autoattack') or outcome.attack in robustness.MINIMUM
        if outcome.fooled is not None and not left_out:
            strength = int(outcome.fooled.sum()), outcome.attack not in _PLAIN
            if outcome.eps not in strongest or strength > strongest[outcome.eps][0]:
                strongest[outcome.eps] = strength, outcome
    return [outcome for _, outcome in strongest.values()]


def measure_moves(
    run: Callable[..., Any],
    forward: Forward,
    variables: Variables,
    stream: Callable[..., dict[str, np.ndarray]],
    parameters: inverse_perturbation.Parameters,
    key: PRNGKeyArray,
    mesh: Mesh,
    outcome: DefenseOutcome,
) -> Moves:
    """What moves of each size recover, and what the attack does to front and tail.

    Args:
      run: the attack on the undefended model, from images, labels and their places in the data.
      forward: the undefended model.
      variables: its variables, replicated over the mesh.
      stream: runs a function of batches over the data.
      parameters: of inverse perturbation, replicated over the mesh.
      key: of random directions and noise.
      mesh: devices to run on.
      outcome: of that attack.

    Returns:
      Both, of the images that the attack fooled.
    """
    settings = parameters.settings
    sizes = [parallel.replicate(mesh, jnp.float32(rho)) for rho in settings.rho]
    key = parallel.replicate(mesh, key)

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        x_adv = run(x, batch.label, batch.index).x_adv
        found = {}
        for rho, size in zip(settings.rho, sizes):
            moved = oracles.moved(
                forward,
                variables,
                x,
                x_adv,
                batch.label,
                key,
                rho=size,
                parameters=parameters,
                index=batch.index,
            )
            for name, images in moved.items():
                right = accuracy.classify(forward, variables, images) == batch.label
                found[f'{rho}|{name}'] = right
        noisy = _noise_of_size(x, x_adv, key, batch.index)
        for made, images in (('attack', x_adv), ('noise', noisy)):
            for name, change in _shift(forward, variables, x, images, settings).items():
                found[f'{made}|{name}'] = change
        return found

    arrays = stream(step)
    fooled = outcome.fooled
    assert fooled is not None
    controls = {
        name: {rho: success_rate(fooled, arrays[f'{rho}|{name}']) for rho in settings.rho}
        for name in oracles.NAMES
    }
    shifts, noise = (
        {
            layer: {group: arrays[f'{made}|{layer}|{group}'][fooled] for group in GROUPS}
            for layer in settings.layers
        }
        for made in ('attack', 'noise')
    )
    return Moves(outcome.name, controls, shifts, noise)


@jax.jit
def _noise_of_size(x: Array, x_adv: Array, key: Array, index: Array) -> Array:
    """Images moved as far in l2 as the attack did, in random directions, and then clipped."""

    def example(x: Array, x_adv: Array, index: Array) -> Array:
        # Not the stream of the controls.
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 1), index), x.shape)
        size = jnp.linalg.norm(x_adv - x) / jnp.linalg.norm(noise)
        return jnp.clip(x + size * noise, 0, 1)

    return jax.vmap(example)(x, x_adv, index)


@functools.partial(jax.jit, static_argnames='settings')
def _shift(
    forward: Forward,
    variables: Variables,
    x: Array,
    x_adv: Array,
    settings: inverse_perturbation.Settings,
) -> dict[str, Array]:
    """Mean change of the neurons of each group, of each image's own partition."""

    def example(x: Array, x_adv: Array) -> dict[str, Array]:
        clean = inverse_perturbation.direction_example(forward, variables, x, settings=settings)
        attacked = forward(variables, x_adv[None], taps=settings.layers)[1]
        found = {}
        for layer in settings.layers:
            before = clean.activation[layer]
            change = units.pool(attacked[layer][0], settings.unit) - before
            scale = jnp.maximum(jnp.abs(before).mean(), jnp.finfo(jnp.float32).tiny)
            part = inverse_perturbation.partition(clean.influence[layer], settings)
            label = labels(part, len(before))
            for group, value in zip(GROUPS, (FRONT, MIDDLE, TAIL)):
                members = label == value
                total = jnp.where(members, change, 0).sum() / jnp.maximum(members.sum(), 1)
                found[f'{layer}|{group}'] = total / scale
        return found

    return jax.vmap(example)(x, x_adv)

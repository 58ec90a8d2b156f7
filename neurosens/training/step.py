"""One training step, jit-compiled for a mesh: augment, differentiate, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import data, parallel
from neurosens.forward import LinenForward, Variables
from neurosens.regularizers import Regularizer
from neurosens.training.objectives import Objective, Outcome


class TrainState(NamedTuple):
    """Everything that a training step changes; replicated over all devices.

    Attributes:
      step: steps done, int32.
      variables: the model's variables.
      optimizer: the optimizer's state.
      average: exponential moving average of `variables['params']`, or None where it is off.
    """

    step: Int[Array, '']
    variables: Variables
    optimizer: optax.OptState
    average: Any


class WeightedRegularizer(NamedTuple):
    """A regularizer with its place in the loss.

    Attributes:
      name: prefix of its metrics.
      regularizer: the penalty.
      weight: its factor in the loss, after the ramp.
      ramp: steps over which the factor rises linearly from 0.
    """

    name: str
    regularizer: Regularizer
    weight: float
    ramp: int


Metrics: TypeAlias = Mapping[str, Float[Array, '']]
TrainStep: TypeAlias = Callable[[TrainState, data.Batch, PRNGKeyArray], tuple[TrainState, Metrics]]


def init_state(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    key: PRNGKeyArray,
    *,
    average: bool = False,
) -> TrainState:
    """Initialises parameters and optimizer; deterministic in `key` and jit-compatible.

    Args:
      module: the model.
      optimizer: the gradient transformation.
      image_shape: shape `[H, W, C]` of one image.
      key: randomness of the initial parameters.
      average: keep a moving average of the parameters.

    Returns:
      The state before the first step.
    """
    variables = module.init(key, jnp.zeros((1, *image_shape)))
    params = variables['params']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer=optimizer.init(params),
        # A copy: the step donates both, and one buffer cannot be donated twice.
        average=jax.tree.map(jnp.copy, params) if average else None,
    )


def evaluated_variables(state: TrainState) -> Variables:
    """The variables to evaluate: the averaged parameters where there is an average."""
    if state.average is None:
        return state.variables
    return {**state.variables, 'params': state.average}


def make_train_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    regularizers: Sequence[WeightedRegularizer],
    mesh: Mesh,
    *,
    augmentation: str = 'none',
    image_size: int | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Compiles one training step.

    The batch is split over the mesh and the state replicated, so losses and BatchNorm statistics
    are those of the global batch. Randomness is folded from the key, the step and each image's
    position in the data set: it does not depend on the number of devices.

    Args:
      module: the model.
      optimizer: the gradient transformation.
      schedule: learning rate by number of updates, for the log only.
      objective: the loss.
      regularizers: penalties added to it, evaluated on running statistics.
      mesh: devices to run on.
      augmentation: name of an augmentation of `neurosens.data`.
      image_size: side of the images that the model sees; by default as they come.
      accumulate: batches per update; `optimizer` must already accumulate them.
      ema_decay: decay of the averaged parameters per update.

    Returns:
      A jitted function `(state, batch, key) -> (state, metrics)` that donates `state`. Metrics are
      float32 scalars: `loss`, `accuracy`, `gradient_norm`, `update_norm`, `learning_rate`, and
      per regularizer `<name>/penalty` and its own.
    """
    forward = LinenForward(module, {'train': False})

    def loss_function(
        params: optax.Params, rest: Variables, x: Array, y: Array, step: Array, key: PRNGKeyArray
    ) -> tuple[Array, tuple[Outcome, dict[str, Array]]]:
        variables = {**rest, 'params': params}
        keys = jax.random.split(key, 1 + len(regularizers))
        loss, outcome = objective(module, variables, x, y, keys[0])
        metrics = dict(outcome.metrics)
        for term, term_key in zip(regularizers, keys[1:]):
            penalty, own = term.regularizer(forward, variables, x, y, term_key)
            weight = term.weight * jnp.minimum(1.0, (step + 1) / max(term.ramp, 1))
            loss = loss + weight * penalty
            metrics[f'{term.name}/penalty'] = penalty
            metrics.update({f'{term.name}/{name}': value for name, value in own.items()})
        return loss, (outcome, metrics)

    def train_step(
        state: TrainState, batch: data.Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = data.augment(
            augmentation, data.to_float(batch.image), augment_key, batch.index, size=image_size
        )
        params = state.variables['params']
        rest = {name: value for name, value in state.variables.items() if name != 'params'}
        (loss, (outcome, metrics)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            params, rest, x, batch.label, state.step, loss_key
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        average = state.average
        if average is not None:
            updated = (state.step + 1) % accumulate == 0
            decay = jnp.where(updated, ema_decay, 1.0)
            average = optax.incremental_update(params, average, 1.0 - decay)
        new_state = TrainState(
            step=state.step + 1,
            variables={**rest, **outcome.updates, 'params': params},
            optimizer=optimizer_state,
            average=average,
        )
        metrics = {
            'loss': loss,
            'accuracy': (outcome.logits.argmax(-1) == batch.label).mean(),
            'gradient_norm': optax.tree.norm(gradients),
            'update_norm': optax.tree.norm(updates),
            'learning_rate': schedule(state.step // accumulate),
            **metrics,
        }
        return new_state, {name: jnp.float32(value) for name, value in metrics.items()}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=parallel.replicated(mesh),
    )

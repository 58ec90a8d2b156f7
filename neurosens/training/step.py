"""One training step, jit-compiled for a mesh: augment, differentiate, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neurosens import data, parallel
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import Forward, LinenForward, Variables
from neurosens.regularizers import Regularizer
from neurosens.training import freezing, inner
from neurosens.training.objectives import Objective, Outcome, Replayed
from neurosens.training.shared_pass import ObjectivePass, Requests


class TrainState(NamedTuple):
    """Everything that a training step changes; replicated over all devices but for the last.

    Attributes:
      step: steps done, int32.
      variables: the model's variables.
      optimizer: the optimizer's state.
      average: exponential moving average of `variables['params']`, or None where it is off.
      perturbation: of a `Replayed` objective the perturbation of each place of the batch, split as
        batches are; None for others.
    """

    step: Int[Array, '']
    variables: Variables
    optimizer: optax.OptState
    average: Any
    perturbation: Any = None


class WeightedRegularizer(NamedTuple):
    """A regularizer with its place in the loss.

    Attributes:
      name: prefix of its metrics.
      regularizer: the penalty.
      weight: its factor in the loss, after the ramp.
      ramp: steps over which the factor rises linearly from 0.
      start: steps before the ramp, in which the factor is 0.
      shared: whether it uses the objective's pass over the clean images, in training mode, in place
        of a pass of its own on running statistics. Of the regularizers of a step one at most can
        take derivatives of that pass.
      attacked: whether it sees the images that the objective's attack found, not the clean ones.
    """

    name: str
    regularizer: Regularizer
    weight: float
    ramp: int
    start: int = 0
    shared: bool = False
    attacked: bool = False

    def factor(self, step: Array | int) -> Array:
        """The factor in the loss of a step, counted from 0."""
        return self.weight * jnp.clip((step + 1 - self.start) / max(self.ramp, 1), 0.0, 1.0)


Metrics: TypeAlias = Mapping[str, Float[Array, '']]
TrainStep: TypeAlias = Callable[[TrainState, data.Batch, PRNGKeyArray], tuple[TrainState, Metrics]]
GradientShares: TypeAlias = Callable[[TrainState, data.Batch, PRNGKeyArray], Metrics]


def init_state(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    key: PRNGKeyArray,
    *,
    average: bool = False,
    perturbed: int = 0,
) -> TrainState:
    """Initialises parameters and optimizer; deterministic in `key` and jit-compatible.

    Args:
      module: the model.
      optimizer: the gradient transformation.
      image_shape: shape `[H, W, C]` of one image.
      key: randomness of the initial parameters.
      average: keep a moving average of the parameters.
      perturbed: images of a batch that carry a perturbation; 0 for none.

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
        perturbation=jnp.zeros((perturbed, *image_shape)) if perturbed else None,
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where the arrays of a state lie.

    Args:
      state: arrays or their shapes.
      mesh: devices.

    Returns:
      One sharding per array.
    """
    shardings = jax.tree.map(lambda _: parallel.replicated(mesh), state)
    if state.perturbation is not None:
        shardings = shardings._replace(perturbation=parallel.split(mesh))
    return shardings


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
    freeze_statistics: Sequence[str] = (),
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Compiles one training step.

    The batch is split over the mesh and the state replicated, so losses and BatchNorm statistics
    are those of the global batch. Randomness is folded from the key and the step; augmentation
    folds it with each image's position in the data set, regularizers and attacks with its place in
    the global batch. So it does not depend on the number of devices.

    Args:
      module: the model.
      optimizer: the gradient transformation.
      schedule: learning rate by number of updates, for the log only.
      objective: the loss.
      regularizers: penalties added to it, evaluated on running statistics unless they share the
        objective's pass.
      mesh: devices to run on.
      augmentation: name of an augmentation of `neurosens.data`.
      image_size: side of the images that the model sees; by default as they come.
      freeze_statistics: layers whose batch normalisations keep and use their running statistics,
        as of `freezing.kept_statistics`.
      accumulate: batches per update; `optimizer` must already accumulate them.
      ema_decay: decay of the averaged parameters per update.

    Returns:
      A jitted function `(state, batch, key) -> (state, metrics)` that donates `state`. Metrics are
      float32 scalars: `loss`, `accuracy`, `gradient_norm`, `update_norm`, `learning_rate`, those of
      the objective with `objective/<term>` of one that is a sum, and per regularizer
      `<name>/penalty` and its own.
    """
    losses = _make_losses(module, objective, regularizers, freeze_statistics)
    replayed = objective if isinstance(objective, Replayed) else None
    see = _make_images(augmentation, image_size, replayed)

    def loss_function(
        params: optax.Params, images: Array, *rest: Any
    ) -> tuple[Array, tuple[Outcome, dict[str, Array]]]:
        parts, outcome, metrics = losses(params, images, *rest)
        return sum(parts.values(), start=jnp.zeros(())), (outcome, metrics)

    def train_step(
        state: TrainState, batch: data.Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        x, images, loss_key = see(state, batch, key)
        params = state.variables['params']
        rest = {name: value for name, value in state.variables.items() if name != 'params'}
        run = jax.value_and_grad(loss_function, (0, 1) if replayed else 0, has_aux=True)
        (loss, (outcome, metrics)), found = run(
            params, images, x, rest, batch.label, state.step, loss_key
        )
        gradients = found[0] if replayed else found
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        average = state.average
        if average is not None:
            updated = (state.step + 1) % accumulate == 0
            decay = jnp.where(updated, ema_decay, 1.0)
            average = optax.incremental_update(params, average, 1.0 - decay)
        perturbation = state.perturbation
        if replayed is not None:
            perturbation = inner.moved(
                # The box is that of the images seen, not of what moves on to the next ones.
                dataclasses.replace(replayed.threat, bounds=(-1.0, 1.0)),
                jnp.zeros_like(x),
                state.perturbation,
                found[1],
                replayed.step_size,
            )
        new_state = TrainState(
            step=state.step + 1,
            variables={**rest, **outcome.updates, 'params': params},
            optimizer=optimizer_state,
            average=average,
            perturbation=perturbation,
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

    everywhere: Any = parallel.replicated(mesh)
    spread: Any = TrainState(everywhere, everywhere, everywhere, everywhere, parallel.split(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(spread, everywhere))


def make_gradient_shares(
    module: nn.Module,
    objective: Objective,
    regularizers: Sequence[WeightedRegularizer],
    mesh: Mesh,
    *,
    augmentation: str = 'none',
    image_size: int | None = None,
    freeze_statistics: Sequence[str] = (),
) -> GradientShares:
    """Compiles what says how much of a step's gradient each term of the loss makes.

    Args:
      module: the model.
      objective: the loss.
      regularizers: penalties added to it.
      mesh: devices to run on.
      augmentation: as of `make_train_step`, like the next two.
      image_size: side of the images that the model sees.
      freeze_statistics: layers whose batch normalisations keep their running statistics.

    Returns:
      A jitted function of what a training step takes, to be called before it: for `objective` (or,
      if that is a sum, each `objective/<term>`) and each regularizer `<name>/gradient_share`, the
      norm of the term's own gradient, weighted as in the loss, divided by the sum of all norms.
    """
    losses = _make_losses(module, objective, regularizers, freeze_statistics)
    replayed = objective if isinstance(objective, Replayed) else None
    see = _make_images(augmentation, image_size, replayed)

    def shares(state: TrainState, batch: data.Batch, key: PRNGKeyArray) -> Metrics:
        x, images, loss_key = see(state, batch, key)
        rest = {name: value for name, value in state.variables.items() if name != 'params'}

        def parts(params: optax.Params) -> dict[str, Array]:
            return losses(params, images, x, rest, batch.label, state.step, loss_key)[0]

        values, pull = jax.vjp(parts, state.variables['params'])
        norms = {}
        for name in values:
            one = {other: jnp.float32(other == name) for other in values}
            norms[name] = optax.tree.norm(pull(one)[0])
        total = sum(norms.values(), start=jnp.zeros(()))
        total = jnp.where(total > 0, total, 1.0)
        return {f'{name}/gradient_share': norm / total for name, norm in norms.items()}

    return jax.jit(shares, out_shardings=parallel.replicated(mesh))


# From parameters, the images the objective sees, clean ones, other variables, labels, step and key.
_Losses: TypeAlias = Callable[..., tuple[dict[str, Array], Outcome, dict[str, Array]]]


def _make_losses(
    module: nn.Module,
    objective: Objective,
    regularizers: Sequence[WeightedRegularizer],
    freeze_statistics: Sequence[str],
) -> _Losses:
    """The terms of the loss by name, in the order in which they are added."""
    forward = LinenForward(module, {'train': False})

    def losses(
        params: optax.Params,
        images: Array,
        x: Array,
        rest: Variables,
        y: Array,
        step: Array,
        key: PRNGKeyArray,
    ) -> tuple[dict[str, Array], Outcome, dict[str, Array]]:
        variables = {**rest, 'params': params}
        keys = jax.random.split(key, 1 + len(regularizers))
        terms = list(zip(regularizers, keys[1:]))
        wanted = {
            term.name: _wanted(term, forward, variables, x, y, own)
            for term, own in terms
            if term.shared
        }
        _check_derivatives(wanted)
        taps = sorted(set().union(*(one.taps for one in wanted.values())))
        # Objectives that no regularizer shares need not know of taps.
        asked = (taps,) if wanted else ()

        def run(x: Array) -> tuple[Array, Outcome]:
            # Without a shared pass the objective's images may be others.
            return objective(module, variables, x if wanted else images, y, keys[0], *asked)

        shared = ObjectivePass(forward, x, run)
        # The objective is differentiated where it is first asked for.
        order = sorted(terms, key=lambda pair: not _derivatives(wanted, pair[0]))
        found = {}
        for term, own in order:
            seen = _attacked_images(term, shared.objective()[1]) if term.attacked else x
            model = shared if term.shared else forward
            found[term.name] = term.regularizer(model, variables, seen, y, own)
        loss, outcome = shared.objective()
        parts, metrics = {'objective': loss}, dict(outcome.metrics)
        if outcome.terms:
            parts = {f'objective/{name}': term for name, term in outcome.terms.items()}
            metrics.update(parts)
        if regularizers:
            # Else it is the loss.
            metrics['objective'] = loss
        for term in regularizers:
            penalty, others = found[term.name]
            parts[term.name] = term.factor(step) * penalty
            metrics[f'{term.name}/penalty'] = penalty
            metrics.update({f'{term.name}/{name}': value for name, value in others.items()})
        return parts, outcome, metrics

    def with_kept_statistics(*arguments: Any) -> Any:
        with freezing.kept_statistics(freeze_statistics):
            return losses(*arguments)

    # Derivatives that a term takes itself, also in forward mode, are traced before it is rewritten.
    return with_fast_input_gradients(with_kept_statistics if freeze_statistics else losses)


def _wanted(
    term: WeightedRegularizer,
    forward: Forward,
    variables: Variables,
    x: Array,
    y: Array,
    key: PRNGKeyArray,
) -> Requests:
    """What a regularizer wants of the pass that it shares."""
    requests = Requests(forward, x)
    jax.eval_shape(lambda: term.regularizer(requests, variables, x, y, key))
    if not requests.passes:
        raise ValueError(
            f'The regularizer {term.name!r} runs the model on one image at a time, or on some of '
            "them, so it cannot share the objective's pass over the batch; leave out its 'shared'."
        )
    return requests


def _attacked_images(term: WeightedRegularizer, outcome: Outcome) -> Array:
    if outcome.attacked is None:
        raise ValueError(
            f'The regularizer {term.name!r} is to see attacked images, but the objective attacks '
            "none; take another objective, or leave out 'attacked'."
        )
    # Like the objective's own, they are taken as they are.
    return jax.lax.stop_gradient(outcome.attacked)


def _check_derivatives(wanted: Mapping[str, Requests]) -> None:
    names = [name for name, requests in wanted.items() if requests.derivatives]
    if len(names) > 1 or any(wanted[name].derivatives > 1 for name in names):
        raise ValueError(
            f"Only one derivative of the objective's pass can be shared, not those of "
            f"{' and '.join(names)}; leave out 'shared' of all but one."
        )


def _derivatives(wanted: Mapping[str, Requests], term: WeightedRegularizer) -> int:
    return wanted[term.name].derivatives if term.shared else 0


def _make_images(
    augmentation: str, image_size: int | None, replayed: Replayed | None
) -> Callable[[TrainState, data.Batch, PRNGKeyArray], tuple[Array, Array, PRNGKeyArray]]:
    """From state, batch and key: clean images, those the objective sees, and the loss's key."""

    def see(
        state: TrainState, batch: data.Batch, key: PRNGKeyArray
    ) -> tuple[Array, Array, PRNGKeyArray]:
        # A batch that is taken again looks the same again.
        replays = 1 if replayed is None else replayed.replays
        own = jax.random.fold_in(key, state.step // replays)
        augment_key, loss_key = jax.random.split(own)
        x = data.augment(
            augmentation, data.to_float(batch.image), augment_key, batch.index, size=image_size
        )
        if replayed is None:
            return x, x, loss_key
        images = jnp.clip(x + state.perturbation, 0.0, 1.0)
        return x, images, jax.random.fold_in(loss_key, state.step % replays)

    return see

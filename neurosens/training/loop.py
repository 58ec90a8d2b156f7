"""The training loop: from a config and a work directory to a trained, checkpointed model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from neurosens import _validate, data, interop, parallel
from neurosens import config as config_lib
from neurosens.evaluation import accuracy
from neurosens.forward import LinenForward
from neurosens.training import checkpoints, logs, monitor, objectives, optimizers
from neurosens.training.loading import load, make_model
from neurosens.training.step import (
    GradientShares,
    TrainState,
    TrainStep,
    WeightedRegularizer,
    evaluated_variables,
    init_state,
    make_gradient_shares,
    make_train_step,
    state_shardings,
)

# It runs once: XLA:CPU takes longer to optimise a deep network's random draws than to draw them.
_QUICK_COMPILATION = {'xla_backend_optimization_level': 0}


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, and what is kept."""


class Interrupted(TrainingStopped):
    """Training was asked to stop by a signal, and saved a checkpoint first."""

    def __init__(self, step: int, signal_number: int) -> None:
        """Names the step and the signal."""
        super().__init__(
            f'Stopped by {signal.Signals(signal_number).name} after step {step}; the checkpoint is '
            'saved and the same command goes on from it.'
        )
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config turned into the pieces that training needs; nothing is written yet.

    Attributes:
      config: the settings.
      mesh: devices to run on.
      module: the model.
      source: training data.
      validation: held-out training data, or None.
      optimizer: the gradient transformation.
      train_step: the compiled step.
      gradient_shares: the compiled function that says what makes a step's gradient, or None.
      replays: times in a row that each batch is taken by a `Replayed` objective; 0 for others.
      total_steps: steps of the whole training.
      evaluate_every: steps between validations.
    """

    config: config_lib.Config
    mesh: Mesh
    module: nn.Module
    source: data.Source
    validation: data.Source | None
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    gradient_shares: GradientShares | None
    replays: int
    total_steps: int
    evaluate_every: int

    @property
    def forward(self) -> LinenForward:
        """The model in evaluation mode."""
        return LinenForward(self.module, {'train': False})


class Result(NamedTuple):
    """What training ended with.

    Attributes:
      step: steps done.
      state: the final state.
      validation_accuracy: of the last validation, or None without one.
    """

    step: int
    state: TrainState
    validation_accuracy: float | None


def prepare(config: config_lib.Config, mesh: Mesh | None = None) -> Experiment:
    """Builds everything an experiment needs and finds every mistake in its config.

    Args:
      config: the settings.
      mesh: devices to run on; all by default.

    Returns:
      The experiment, ready for `train`.

    Raises:
      ValueError: a setting cannot be used.
      neurosens.data.DatasetNotPreparedError: the data set is not in `data_dir`.
      LayerError: a layer to be watched or shared is unknown.
      CheckpointError: the initial weights cannot be read.
    """
    config_lib.validate(config)
    if config.weights:
        raise config_lib.ConfigError(
            f'weights is {config.weights!r}, but only evaluate.py takes a file of weights; leave '
            'it out.'
        )
    mesh = parallel.data_mesh() if mesh is None else mesh
    if config.batch_size % mesh.size:
        raise config_lib.ConfigError(
            f'batch_size is {config.batch_size}; it must be a multiple of the {mesh.size} devices, '
            f'such as {parallel.round_up(config.batch_size, mesh)}.'
        )
    info = data.info(config.dataset)
    module = make_model(config)
    objective = objectives.create(
        'objective', config.objective, config.objective_options, objectives.OBJECTIVES
    )
    if config.augmentation not in data.augmentation_names():
        raise config_lib.ConfigError(
            _validate.unknown('augmentation', config.augmentation, data.augmentation_names())
        )
    data_dir = config.data_dir or None
    source = data.open(config.dataset, 'train', data_dir, config.validation_size)
    validation = (
        data.open(config.dataset, 'validation', data_dir, config.validation_size)
        if config.validation_size
        else None
    )
    per_epoch = data.steps_per_epoch(source.num_examples, config.batch_size)
    total_steps = config.steps or max(1, round(config.epochs * per_epoch))
    accumulate = config.optimizer.accumulate
    updates = max(1, total_steps // accumulate)
    optimizer, schedule = optimizers.make_optimizer(config.optimizer, config.schedule, updates)
    terms = [
        _weighted_regularizer(name, options, total_steps)
        for name, options in config.regularizers.items()
    ]
    seen: dict[str, Any] = {
        'augmentation': config.augmentation,
        'image_size': info.image_shape[0],
    }
    train_step = make_train_step(
        module,
        optimizer,
        schedule,
        objective,
        terms,
        mesh,
        accumulate=accumulate,
        ema_decay=config.optimizer.ema_decay,
        **seen,
    )
    if config.monitor.images and config.monitor.layer:
        monitor.check(module, info, config.monitor)
    shares = None
    if terms and config.gradient_shares:
        shares = make_gradient_shares(module, objective, terms, mesh, **seen)
    if config.initial_weights:
        _check_initial_weights(config, module)
    experiment = Experiment(
        config=config,
        mesh=mesh,
        module=module,
        source=source,
        validation=validation,
        optimizer=optimizer,
        train_step=train_step,
        gradient_shares=shares,
        replays=objective.replays if isinstance(objective, objectives.Replayed) else 0,
        total_steps=total_steps,
        evaluate_every=max(1, round(config.evaluate_every * per_epoch)),
    )
    if any(term.shared for term in terms):
        _trace(experiment)
    return experiment


def _check_initial_weights(config: config_lib.Config, module: nn.Module) -> None:
    """Refuses a work directory or file whose model has other arrays than the one to be trained."""
    if pathlib.Path(config.initial_weights).is_file():
        interop.load_torch(
            config.initial_weights, module, image_shape=data.info(config.dataset).image_shape
        )
        return
    _, saved = checkpoints.read_config(config.initial_weights, 'best')
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *data.info(name).image_shape)))
        for model, name in ((module, config.dataset), (make_model(saved), saved.dataset))
    ]
    if shapes[0] != shapes[1]:
        raise config_lib.ConfigError(
            f'initial_weights is {config.initial_weights!r}, a {saved.model} with '
            f'{saved.model_options} for {saved.dataset}; it must hold the arrays of the model to '
            f'be trained, {config.model} with {config.model_options} for {config.dataset}.'
        )


def _trace(experiment: Experiment) -> None:
    """Traces a step, which finds regularizers that cannot share the objective's pass."""
    size = experiment.config.batch_size
    shape = data.info(experiment.config.dataset).image_shape
    kinds = ((size, *shape), jnp.uint8), ((size,), jnp.int32), ((size,), bool), ((size,), jnp.int32)
    batch = data.Batch(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))
    jax.eval_shape(experiment.train_step, _state_shapes(experiment), batch, jax.random.key(0))


def _weighted_regularizer(
    name: str, options: Mapping[str, Any], total_steps: int
) -> WeightedRegularizer:
    options = dict(options)
    weight = options.pop('weight', 1.0)
    _validate.check_range(f'The weight of regularizer {name!r}', weight, low=0)
    shares = {key: options.pop(key, 0.0) for key in ('ramp', 'start')}
    for key, share in shares.items():
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise config_lib.ConfigError(
                f'The {key} of regularizer {name!r} is {share!r}; it is a share of training, a '
                'number from 0 to 1.'
            )
    shared = options.pop('shared', ())
    if not isinstance(shared, (tuple, list)) or not all(isinstance(one, str) for one in shared):
        raise config_lib.ConfigError(
            f"The 'shared' of regularizer {name!r} is {shared!r}; it is a tuple of layer names, "
            "such as ('head:in',)."
        )
    regularizer = objectives.create('regularizer', name, options, objectives.REGULARIZERS)
    ramp, start = (round(share * total_steps) for share in shares.values())
    return WeightedRegularizer(name, regularizer, float(weight), ramp, start, tuple(shared))


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, on every device; deterministic in the config's seed.

    Args:
      experiment: from `prepare`.

    Returns:
      The state, with the weights of `initial_weights` where the config names some.

    Raises:
      CheckpointError: they cannot be read.
      WeightsError: they are a file that cannot be read or does not fit.
    """
    state, config = _initializer(experiment)(_key(experiment, 0)), experiment.config
    if not config.initial_weights:
        return state
    if pathlib.Path(config.initial_weights).is_file():
        shape = data.info(config.dataset).image_shape
        _, variables = interop.load_torch(
            config.initial_weights, experiment.module, image_shape=shape
        )
        variables = parallel.replicate(experiment.mesh, variables)
    else:
        variables = load(config.initial_weights, mesh=experiment.mesh).variables
    average = None if state.average is None else jax.tree.map(jnp.copy, variables['params'])
    return state._replace(variables=variables, average=average)


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and placement of the state, to read a checkpoint into."""
    shapes = _state_shapes(experiment)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(shapes, experiment.mesh),
    )


def _state_shapes(experiment: Experiment) -> TrainState:
    return jax.eval_shape(_plain_initializer(experiment), _key(experiment, 0))


def _plain_initializer(experiment: Experiment) -> Callable[[jax.Array], TrainState]:
    config = experiment.config
    return functools.partial(
        init_state,
        experiment.module,
        experiment.optimizer,
        data.info(config.dataset).image_shape,
        average=config.optimizer.ema_decay > 0,
        perturbed=config.batch_size if experiment.replays else 0,
    )


def _initializer(experiment: Experiment) -> Callable[[jax.Array], TrainState]:
    return jax.jit(
        _plain_initializer(experiment),
        out_shardings=state_shardings(_state_shapes(experiment), experiment.mesh),
        compiler_options=_QUICK_COMPILATION if jax.default_backend() == 'cpu' else None,
    )


def _key(experiment: Experiment, purpose: int) -> jax.Array:
    """The key of one purpose: 0 initialises, 1 is folded with every step, 2 watches."""
    return jax.random.fold_in(jax.random.key(experiment.config.seed), purpose)


def saved_items(state: TrainState) -> dict[str, Any]:
    """The checkpointables of a state: evaluation needs only the first, or `average`."""
    items = {'variables': state.variables, 'optimizer': state.optimizer}
    further = {'average': state.average, 'perturbation': state.perturbation}
    return {**items, **{name: item for name, item in further.items() if item is not None}}


def _restored_state(restored: checkpoints.Restored, mesh: Mesh) -> TrainState:
    return TrainState(
        step=parallel.replicate(mesh, jnp.int32(restored.step)),
        variables=restored.items['variables'],
        optimizer=restored.items['optimizer'],
        average=restored.items.get('average'),
        perturbation=restored.items.get('perturbation'),
    )


def train(experiment: Experiment, workdir: str | pathlib.Path, *, progress: bool = True) -> Result:
    """Trains to the end, from the newest checkpoint of the work directory if there is one.

    Interrupted anywhere and started again, it ends with the same parameters and the same lines in
    `metrics.jsonl` (times aside) as without the interruption.

    Args:
      experiment: from `prepare`.
      workdir: checkpoints, metrics and TensorBoard files go here; shared by all processes.
      progress: show a progress bar on standard error.

    Returns:
      The final state and validation accuracy.

    Raises:
      TrainingStopped: a loss or gradient is not finite, or the monitor's guard found overfitting.
      Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
      neurosens.training.CheckpointError: the work directory belongs to another config.
    """
    config, mesh, workdir = experiment.config, experiment.mesh, pathlib.Path(workdir)
    checkpointer, restored = checkpoints.resume(
        workdir, config.keep_checkpoints, saved_items(abstract_state(experiment)), config
    )
    if restored is None:
        state, first = initial_state(experiment), 0
        window, validation_accuracy, best_pgd, best_step = logs.Window(), None, 0.0, 0
    else:
        state, first = _restored_state(restored, mesh), restored.step
        window = logs.Window(restored.loop['window'])
        validation_accuracy = restored.loop['validation_accuracy']
        best_pgd, best_step = restored.loop['best_pgd'], restored.loop['best_step']
    if parallel.is_primary():
        text = json.dumps(config_lib.to_dict(config), indent=2)
        (workdir / 'config.json').write_text(text + '\n', encoding='utf-8')
    key = parallel.replicate(mesh, _key(experiment, 1))
    batches = _batches(experiment, first)
    log = logs.Log(
        workdir,
        first_step=first,
        total_steps=experiment.total_steps,
        active=parallel.is_primary(),
        progress=progress,
    )
    clock = _Clock(config.batch_size)
    last_saved = first
    with checkpointer, log, _stop_requests() as stop_signal:
        if first:
            log.say(f'Going on from the checkpoint of step {first}.')

        def take(
            step: int, metrics: Mapping[str, jax.Array], parts: Mapping[str, jax.Array]
        ) -> None:
            """Fetches the metrics of one step: called when the next step is already running."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not logs.all_finite(values):
                raise TrainingStopped(_not_finite(step, values, last_saved))
            window.add(values)
            speed = clock.tick()
            shown = {'loss': f'{values["loss"]:.3f}', 'accuracy': f'{values["accuracy"]:.3f}'}
            log.advance({**shown, 'images/s': f'{speed:.0f}'})
            if logged(step):
                shares = {name: float(value) for name, value in jax.device_get(parts).items()}
                log.write(step, {**window.means(), **shares, 'images_per_second': speed})

        def logged(step: int) -> bool:
            return step % config.log_every == 0 or step == experiment.total_steps

        pending: tuple[int, Mapping[str, jax.Array], Mapping[str, jax.Array]] | None = None
        for step in range(first + 1, experiment.total_steps + 1):
            batch = parallel.shard(mesh, next(batches))
            parts: Mapping[str, jax.Array] = {}
            if experiment.gradient_shares is not None and logged(step):
                parts = experiment.gradient_shares(state, batch, key)
            state, metrics = experiment.train_step(state, batch, key)
            if pending is not None:
                take(*pending)
            pending = (step, metrics, parts)
            stop = _agreed_stop(stop_signal, step)
            last = step == experiment.total_steps
            validate = step % experiment.evaluate_every == 0 or last
            regular = config.checkpoint_every and step % config.checkpoint_every == 0
            if not (validate or regular or stop):
                continue
            # A state is saved only after its own step is known to be finite.
            take(*pending)
            pending = None
            score = None
            if validate and experiment.validation is not None:
                score = validation_accuracy = _score(experiment, state, log, step)
                if config.monitor.images:
                    robust = _watch(experiment, state, log, step)
                    if config.monitor.guard and robust < best_pgd - config.monitor.guard:
                        raise TrainingStopped(_overfit(step, robust, best_pgd, best_step))
                    if robust >= best_pgd:
                        best_pgd, best_step = robust, step
                    score = robust if config.monitor.choose else score
            loop = {
                'window': window.state(),
                'validation_accuracy': validation_accuracy,
                'best_pgd': best_pgd,
                'best_step': best_step,
            }
            checkpoints.save(checkpointer, step, saved_items(state), config, loop, score)
            last_saved = step
            clock.restart()
            if stop and not last:
                raise Interrupted(step, stop)
    return Result(experiment.total_steps, state, validation_accuracy)


def _batches(experiment: Experiment, first: int) -> Iterator[data.Batch]:
    """The batches of the steps after the first ones, each as often as it is replayed."""
    config, replays = experiment.config, max(experiment.replays, 1)
    batches = experiment.source.train_batches(
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first // replays,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    done = first % replays
    for batch in batches:
        yield from itertools.repeat(batch, replays - done)
        done = 0


def _watch(experiment: Experiment, state: TrainState, log: logs.Log, step: int) -> float:
    """Logs what the monitor measures and returns the accuracy under PGD."""
    assert experiment.validation is not None
    found = monitor.measure(
        experiment.forward,
        evaluated_variables(state),
        experiment.validation,
        experiment.mesh,
        experiment.config.monitor,
        _key(experiment, 2),
        experiment.config.batch_size,
    )
    log.write(step, found)
    log.say(
        '; '.join(f'{name.removeprefix("monitor/")} {value:.4g}' for name, value in found.items())
    )
    return found[monitor.PGD_ACCURACY]


def _overfit(step: int, robust: float, best: float, best_step: int) -> str:
    return (
        f'The accuracy under PGD fell from {best:.2%} at step {best_step} to {robust:.2%} at step '
        f'{step} (catastrophic overfitting, monitor.guard); train with objective pgd, a smaller '
        'eps or a lower optimizer.learning_rate in another --workdir, or evaluate the checkpoints '
        'from before the fall.'
    )


def _score(experiment: Experiment, state: TrainState, log: logs.Log, step: int) -> float:
    assert experiment.validation is not None
    predictions = accuracy.predict(
        experiment.forward,
        evaluated_variables(state),
        experiment.validation,
        experiment.mesh,
        batch_size=experiment.config.batch_size,
    )
    loss = float(predictions.loss.astype('float64').mean())
    log.write(step, {'validation_accuracy': predictions.accuracy, 'validation_loss': loss})
    log.say(f'step {step}: validation accuracy {predictions.accuracy:.2%}, loss {loss:.4f}')
    return predictions.accuracy


def _not_finite(step: int, values: Mapping[str, float], last_saved: int) -> str:
    kept = f'the checkpoint of step {last_saved} is kept' if last_saved else 'nothing was saved yet'
    shown = ', '.join(f'{name} {value:g}' for name, value in values.items())
    return (
        f'Training diverged at step {step} ({shown}); {kept}. Lower optimizer.learning_rate, '
        'lengthen schedule.warmup or set optimizer.clip_norm.'
    )


class _Clock:
    """Images per second since training (re)started, pauses for validation left out."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._seconds, self._steps = 0.0, 0
        self._last: float | None = None

    def tick(self) -> float:
        """Counts a step and returns the speed so far; the first step, which compiles, is left out.

        Returns:
          Images per second, or 0 before it is known.
        """
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += 1
        self._last = now
        return self._steps * self._batch_size / self._seconds if self._steps else 0.0

    def restart(self) -> None:
        """Leaves out the time until the next step."""
        self._last = None


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list instead of dying; the second one of a kind kills."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _agreed_stop(received: list[int], step: int) -> int:
    """The signal to stop for, or 0; all processes get the same answer at the same step."""
    if jax.process_count() == 1:
        return received[0] if received else 0
    # JAX's preemption service hears SIGTERM on any host and names a step that all will reach.
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0

"""The training loop: from a config and a work directory to a trained, checkpointed model."""

from __future__ import annotations

import dataclasses
import functools
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

from neurosens import _validate, data, parallel
from neurosens import config as config_lib
from neurosens.evaluation import accuracy
from neurosens.forward import LinenForward
from neurosens.training import checkpoints, logs, objectives, optimizers
from neurosens.training.loading import make_model
from neurosens.training.step import (
    TrainState,
    TrainStep,
    WeightedRegularizer,
    evaluated_variables,
    init_state,
    make_train_step,
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
    """
    config_lib.validate(config)
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
    train_step = make_train_step(
        module,
        optimizer,
        schedule,
        objective,
        terms,
        mesh,
        augmentation=config.augmentation,
        image_size=info.image_shape[0],
        accumulate=accumulate,
        ema_decay=config.optimizer.ema_decay,
    )
    return Experiment(
        config=config,
        mesh=mesh,
        module=module,
        source=source,
        validation=validation,
        optimizer=optimizer,
        train_step=train_step,
        total_steps=total_steps,
        evaluate_every=max(1, round(config.evaluate_every * per_epoch)),
    )


def _weighted_regularizer(
    name: str, options: Mapping[str, Any], total_steps: int
) -> WeightedRegularizer:
    options = dict(options)
    weight, ramp = options.pop('weight', 1.0), options.pop('ramp', 0.0)
    regularizer = objectives.create('regularizer', name, options, objectives.REGULARIZERS)
    return WeightedRegularizer(name, regularizer, float(weight), round(ramp * total_steps))


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, on every device; deterministic in the config's seed."""
    return _initializer(experiment)(_key(experiment, 0))


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and placement of the state, to read a checkpoint into."""
    shapes = jax.eval_shape(_initializer(experiment), _key(experiment, 0))
    sharding = parallel.replicated(experiment.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def _initializer(experiment: Experiment) -> Callable[[jax.Array], TrainState]:
    config = experiment.config
    return jax.jit(
        functools.partial(
            init_state,
            experiment.module,
            experiment.optimizer,
            data.info(config.dataset).image_shape,
            average=config.optimizer.ema_decay > 0,
        ),
        out_shardings=parallel.replicated(experiment.mesh),
        compiler_options=_QUICK_COMPILATION if jax.default_backend() == 'cpu' else None,
    )


def _key(experiment: Experiment, purpose: int) -> jax.Array:
    """The key of one purpose: 0 initialises parameters, 1 is folded with every step."""
    return jax.random.fold_in(jax.random.key(experiment.config.seed), purpose)


def saved_items(state: TrainState) -> dict[str, Any]:
    """The checkpointables of a state: evaluation needs only the first, or `average`."""
    items = {'variables': state.variables, 'optimizer': state.optimizer}
    return items if state.average is None else {**items, 'average': state.average}


def _restored_state(restored: checkpoints.Restored, mesh: Mesh) -> TrainState:
    return TrainState(
        step=parallel.replicate(mesh, jnp.int32(restored.step)),
        variables=restored.items['variables'],
        optimizer=restored.items['optimizer'],
        average=restored.items.get('average'),
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
      TrainingStopped: a loss or gradient is not finite.
      Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
      neurosens.training.CheckpointError: the work directory belongs to another config.
    """
    config, mesh, workdir = experiment.config, experiment.mesh, pathlib.Path(workdir)
    checkpointer, restored = checkpoints.resume(
        workdir, config.keep_checkpoints, saved_items(abstract_state(experiment)), config
    )
    if restored is None:
        state, first = initial_state(experiment), 0
        window, validation_accuracy = logs.Window(), None
    else:
        state, first = _restored_state(restored, mesh), restored.step
        window = logs.Window(restored.loop['window'])
        validation_accuracy = restored.loop['validation_accuracy']
    if parallel.is_primary():
        text = json.dumps(config_lib.to_dict(config), indent=2)
        (workdir / 'config.json').write_text(text + '\n', encoding='utf-8')
    key = parallel.replicate(mesh, _key(experiment, 1))
    batches = experiment.source.train_batches(
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
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

        def take(step: int, metrics: Mapping[str, jax.Array]) -> None:
            """Fetches the metrics of one step: called when the next step is already running."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not logs.all_finite(values):
                raise TrainingStopped(_not_finite(step, values, last_saved))
            window.add(values)
            speed = clock.tick()
            shown = {'loss': f'{values["loss"]:.3f}', 'accuracy': f'{values["accuracy"]:.3f}'}
            log.advance({**shown, 'images/s': f'{speed:.0f}'})
            if step % config.log_every == 0 or step == experiment.total_steps:
                log.write(step, {**window.means(), 'images_per_second': speed})

        pending: tuple[int, Mapping[str, jax.Array]] | None = None
        for step in range(first + 1, experiment.total_steps + 1):
            state, metrics = experiment.train_step(state, parallel.shard(mesh, next(batches)), key)
            if pending is not None:
                take(*pending)
            pending = (step, metrics)
            stop = _agreed_stop(stop_signal, step)
            last = step == experiment.total_steps
            validate = step % experiment.evaluate_every == 0 or last
            regular = config.checkpoint_every and step % config.checkpoint_every == 0
            if not (validate or regular or stop):
                continue
            # A state is saved only after its own step is known to be finite.
            take(*pending)
            pending = None
            scored = validate and experiment.validation is not None
            if scored:
                validation_accuracy = _score(experiment, state, log, step)
            checkpoints.save(
                checkpointer,
                step,
                saved_items(state),
                config,
                {'window': window.state(), 'validation_accuracy': validation_accuracy},
                validation_accuracy if scored else None,
            )
            last_saved = step
            clock.restart()
            if stop and not last:
                raise Interrupted(step, stop)
    return Result(experiment.total_steps, state, validation_accuracy)


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

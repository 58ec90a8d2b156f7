"""The training loop: from a config and a work directory to a trained, checkpointed model."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from neurosens import config as config_lib
from neurosens import data, parallel
from neurosens.evaluation import accuracy
from neurosens.training import checkpoints, logs, monitor
from neurosens.training.experiment import Experiment, abstract_state, initial_state
from neurosens.training.step import (
    TrainState,
    evaluated_variables,
)


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
        # Older checkpoints are of trainings that nothing watched.
        best_pgd, best_step = restored.loop.get('best_pgd', 0.0), restored.loop.get('best_step', 0)
    if parallel.is_primary():
        text = json.dumps(config_lib.to_dict(config), indent=2)
        (workdir / 'config.json').write_text(text + '\n', encoding='utf-8')
    key = parallel.replicate(mesh, experiment.key(1))
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
            score: float | None = None
            robust: float | None = None
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
            checkpoints.save(checkpointer, step, saved_items(state), config, loop, score, robust)
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
        experiment.key(2),
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
        'eps or a lower optimizer.learning_rate in another --workdir, or evaluate what was reached '
        f'before the fall with --checkpoint={best_step}.'
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
    """Collects SIGTERM and SIGINT in a list instead of dying; the second one of a kind kills.

    With several processes it is JAX that listens to SIGTERM, and tells the others: a handler of
    ours would take its place. SIGINT is passed on to it.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    shared = jax.process_count() > 1

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, previous[number])
        if shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received.append(number)

    heard = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in heard}
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

"""Checkpoints that survive anything: atomic, verified on reading, with their config inside.

A checkpoint holds separate Orbax checkpointables (`variables`, `optimizer`, ...), so evaluation
reads the model alone, and a JSON record: the config, the training loop's host state, and a
fingerprint of every checkpointable and of itself. Storage formats do not notice a flipped bit; the
fingerprints do.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orbax.checkpoint import v1 as ocp

from neurosens import config as config_lib
from neurosens import fingerprints, parallel

_METRIC, _ROBUST = 'accuracy', 'pgd_accuracy'


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: training steps done.
      items: the checkpointables by name.
      loop: the training loop's host state, as it was saved.
    """

    step: int
    items: dict[str, Any]
    loop: dict[str, Any]


def open_directory(
    workdir: str | pathlib.Path, keep: int, keep_robust: bool = False
) -> ocp.training.Checkpointer:
    """Opens (or creates) the checkpoints of a work directory for training.

    Args:
      workdir: the work directory; checkpoints lie in `checkpoints/` inside it.
      keep: how many of the latest to keep, besides the best one.
      keep_robust: keep the one of highest accuracy under PGD too.

    Returns:
      An Orbax checkpointer; close it (or use it as a context manager) at the end.
    """
    policies = ocp.training.preservation_policies
    best = [
        policies.BestN(
            # Older checkpoints have one accuracy only.
            get_metric_fn=lambda metrics, name=name: metrics.get(name, -1.0),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        for name in ((_METRIC, _ROBUST) if keep_robust else (_METRIC,))
    ]
    return ocp.training.Checkpointer(
        _directory(workdir),
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *best]),
        cleanup_tmp_directories=True,
    )


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    items: Mapping[str, Any],
    config: config_lib.Config,
    loop: Mapping[str, Any],
    accuracy: float | None = None,
    robust: float | None = None,
) -> None:
    """Writes one checkpoint and returns when it is complete on disk.

    It appears under its final name only when whole, so a process killed meanwhile loses nothing
    older. Writing is synchronous because the training step donates its buffers.

    Args:
      checkpointer: from `open_directory`.
      step: training steps done.
      items: pytrees of arrays by name, replicated over all devices or split along their first axis.
      config: the config that is being trained.
      loop: JSON values that the training loop needs to go on.
      accuracy: validation accuracy in [0, 1], where there is one, or with `monitor.choose` that
        under PGD; decides which is best.
      robust: accuracy under PGD in [0, 1], where there is one besides.
    """
    digests = {name: fingerprints.of_tree(tree) for name, tree in items.items()}
    scores = {_METRIC: accuracy, _ROBUST: robust}
    metrics = {name: score for name, score in scores.items() if score is not None}
    checkpointer.save_checkpointables(
        step,
        dict(items),
        force=True,
        metrics=metrics or None,
        custom_metadata=fingerprints.signed(
            {
                'config': config_lib.to_dict(config),
                'loop': dict(loop),
                'fingerprints': digests,
            }
        ),
    )


def resume(
    workdir: str | pathlib.Path,
    keep: int,
    abstract_items: Mapping[str, Any],
    config: config_lib.Config,
) -> tuple[ocp.training.Checkpointer, Restored | None]:
    """Opens a work directory and reads its newest undamaged checkpoint, to go on training.

    Damaged checkpoints are reported by a warning and moved to `damaged_checkpoints/` in the work
    directory, so that training can write their steps again and nothing is lost.

    Args:
      workdir: the work directory; it may be new.
      keep: as in `open_directory`.
      abstract_items: for each checkpointable its shapes, dtypes and shardings.
      config: the config that is to be trained; where its monitor has a guard, the checkpoint of
        highest accuracy under PGD is kept too.

    Returns:
      `(checkpointer, what the checkpoint held or None where there is none)`.

    Raises:
      CheckpointError: the checkpoint was made with another config, or all are damaged.
    """
    unreadable = _unreadable_accuracies(_directory(workdir))
    if unreadable and len(unreadable) == len(list(_directory(workdir).glob('[0-9]*'))):
        raise _all_damaged(workdir, unreadable)
    for step in unreadable:
        warnings.warn(
            f'Checkpoint {step} in {_directory(workdir)} is damaged (its accuracy cannot be read); '
            'going on without it.',
            stacklevel=2,
        )
    _set_aside(_directory(workdir), unreadable)
    keep_robust = config.monitor.guard > 0
    checkpointer = open_directory(workdir, keep, keep_robust)
    damaged = []
    for step in reversed([checkpoint.step for checkpoint in checkpointer.checkpoints]):
        try:
            record = _record(checkpointer, step)
            _refuse_other_config(record['config'], config, checkpointer.directory)
            items = _load(checkpointer, step, record, abstract_items)
        except _Damaged as error:
            warnings.warn(
                f'Checkpoint {step} in {checkpointer.directory} is damaged ({error}); going back '
                'to the one before it.',
                stacklevel=2,
            )
            damaged.append(step)
            continue
        if damaged:
            checkpointer.close()
            _set_aside(_directory(workdir), damaged)
            # Orbax remembers which steps it saw; the directory has to be opened afresh.
            checkpointer = open_directory(workdir, keep, keep_robust)
        return checkpointer, Restored(step, items, record['loop'])
    if damaged:
        checkpointer.close()
        raise _all_damaged(workdir, reversed(damaged))
    return checkpointer, None


def _set_aside(directory: pathlib.Path, steps: list[int]) -> None:
    # All processes must have looked before the first one moves anything.
    parallel.barrier('checkpoints inspected')
    if parallel.is_primary():
        for step in steps:
            target = directory.parent / 'damaged_checkpoints' / str(step)
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + '_again')
            (directory / str(step)).rename(target)
    parallel.barrier('damaged checkpoints set aside')


def read_config(workdir: str | pathlib.Path, which: str) -> tuple[int, config_lib.Config]:
    """Finds a checkpoint of a work directory and reads its config.

    Args:
      workdir: the work directory.
      which: `'best'` (highest validation accuracy, or with `monitor.choose` highest accuracy under
        PGD; without either the latest), `'latest'` or a step number.

    Returns:
      `(step, config)`.

    Raises:
      CheckpointError: there is no such checkpoint, or its record is damaged.
    """
    with _open_to_read(workdir) as checkpointer:
        available = {checkpoint.step: checkpoint for checkpoint in checkpointer.checkpoints}
        scored = [c for c in available.values() if c.metrics is not None]
        if which == 'best' and scored:
            step = max(scored, key=lambda c: (c.metrics[_METRIC], c.step)).step
        elif which in ('best', 'latest'):
            step = max(available)
        elif which.isdecimal() and int(which) in available:
            step = int(which)
        else:
            steps = ', '.join(map(str, available))
            raise CheckpointError(
                f'There is no checkpoint {which!r} in {workdir}; choose best, latest or one of the '
                f'steps {steps}.'
            )
        try:
            return step, config_lib.from_dict(_record(checkpointer, step)['config'])
        except _Damaged as error:
            raise _unreadable(step, workdir, error) from error


def read_items(
    workdir: str | pathlib.Path, step: int, abstract_items: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads some checkpointables of one checkpoint, for evaluation.

    Args:
      workdir: the work directory.
      step: a step from `read_config`.
      abstract_items: for each checkpointable its shapes, dtypes and shardings.

    Returns:
      The checkpointables by name.

    Raises:
      CheckpointError: the checkpoint is damaged.
    """
    with _open_to_read(workdir) as checkpointer:
        try:
            return _load(checkpointer, step, _record(checkpointer, step), abstract_items)
        except _Damaged as error:
            raise _unreadable(step, workdir, error) from error


def _directory(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / 'checkpoints'


def _open_to_read(workdir: str | pathlib.Path) -> ocp.training.Checkpointer:
    directory = _directory(workdir)
    if not directory.is_dir() or not any(child.name.isdigit() for child in directory.iterdir()):
        raise CheckpointError(
            f'There is no checkpoint in {workdir}; train one with python train.py '
            f'--workdir={workdir}, or name the --workdir of a finished training.'
        )
    for step in _unreadable_accuracies(directory):
        raise CheckpointError(
            f'Checkpoint {step} in {workdir} is damaged (its accuracy cannot be read); move '
            f'{directory / str(step)} away to use the others.'
        )
    return ocp.training.Checkpointer(directory)


def _unreadable_accuracies(directory: pathlib.Path) -> list[int]:
    """Steps whose accuracy is damaged: Orbax reads all of them on opening, and raises."""
    steps = []
    for file in directory.glob('*/metrics/metrics'):
        try:
            json.loads(file.read_text(encoding='utf-8'))[_METRIC]
        except (OSError, ValueError, KeyError, TypeError):
            steps.append(file.parent.parent.name)
    return sorted(int(step) for step in steps if step.isdecimal())


def _all_damaged(workdir: str | pathlib.Path, steps: Iterable[int]) -> CheckpointError:
    return CheckpointError(
        f'Every checkpoint in {workdir} is damaged (steps {", ".join(map(str, steps))}); choose '
        'another --workdir to start afresh.'
    )


def _unreadable(step: int, workdir: str | pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'Checkpoint {step} in {workdir} is damaged ({error}); choose another with --checkpoint.'
    )


class _Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


def _record(checkpointer: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    record = checkpointer.checkpointables_metadata(step).custom_metadata or {}
    if 'fingerprint' not in record:
        raise _Damaged('its record is missing')
    if not fingerprints.is_intact(record):
        raise _Damaged('its record is not what was written')
    return record


def _load(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    record: Mapping[str, Any],
    abstract_items: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        items = checkpointer.load_checkpointables(step, dict(abstract_items))
    # What Orbax and TensorStore raise for missing, cut and unreadable files.
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise _Damaged(f'{type(error).__name__} on reading') from error
    for name, tree in items.items():
        if fingerprints.of_tree(tree) != record['fingerprints'].get(name):
            raise _Damaged(f'the contents of {name!r} are not what was written')
    return items


def _refuse_other_config(saved: dict[str, Any], config: config_lib.Config, directory: Any) -> None:
    differing = config_lib.differences(saved, config)
    if differing:
        changes = ', '.join(
            f'{key} ({theirs!r} there, {ours!r} now)' for key, (theirs, ours) in differing.items()
        )
        raise CheckpointError(
            f'The checkpoint in {directory} was trained with another config: {changes}; use the '
            'same settings to go on, or another --workdir to start afresh.'
        )

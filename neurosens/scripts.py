"""What `train.py` and `evaluate.py` share: flags, start of JAX, and errors as one sentence."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from neurosens import data, defenses, onednn, parallel, training
from neurosens.forward import LayerError

# What computes, or holds, the numbers of a report.
_PACKAGES = ('neurosens', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scipy')


def define_common_flags(own_flags: flags.FlagValues) -> None:
    """Adds the flags that every script has."""
    flags.DEFINE_boolean(
        'distributed',
        None,
        'This is one process of several (pod, SLURM, Open MPI): join them. --nodistributed says '
        'that it is alone.',
        flag_values=own_flags,
    )
    flags.DEFINE_boolean('progress', True, 'Show progress bars.', flag_values=own_flags)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks what the script does."""
    return any(argument in ('-h', '-help', '--help', '--helpfull') for argument in arguments)


def print_help(description: str | None, own_flags: flags.FlagValues) -> None:
    """Prints a script's description and its flags."""
    print((description or '').strip())
    print(
        '\nSettings: --config=FILE and --config.key=value; the keys stand in '
        'neurosens/config/settings.py.'
    )
    print(own_flags.get_help())


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the script with one sentence, and no traceback, for mistakes a user can mend.

    Exit status 2 for a mistake in the command or its data, 1 where training stopped by itself, and
    128 plus the number of the signal that asked it to stop.
    """
    try:
        yield
    except training.Interrupted as error:
        _end(str(error), 128 + error.signal_number)
    except training.TrainingStopped as error:
        _end(str(error), 1)
    except (
        ValueError,
        LayerError,
        OSError,
        training.CheckpointError,
        defenses.DefenseError,
    ) as error:
        if os.environ.get('NEUROSENS_TRACEBACK'):
            raise
        _end(_sentence(error), 2)


def _sentence(error: Exception) -> str:
    """What an error says; of the system's own, which have a number, in words with a remedy."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f'{error.filename!r}: ' if error.filename is not None else ''
    return (
        f'{where}{error.strerror}; see that the place is there, can be read and written, and has '
        'room.'
    )


def _end(sentence: str, status: int) -> None:
    print(f'error: {sentence}' if status in (1, 2) else sentence, file=sys.stderr)
    raise SystemExit(status)


def sets(arguments: Sequence[str], key: str) -> bool:
    """Whether the command line sets a config key."""
    return any(re.match(rf'--?config\.{key}(=|$)', argument) for argument in arguments)


def check_changes(
    arguments: Sequence[str],
    allowed: Sequence[str],
    reason: str = 'is fixed by the trained model',
) -> None:
    """Refuses overrides of settings that the checkpoint fixes.

    Args:
      arguments: command-line arguments.
      allowed: keys, or groups of keys, that may be changed.
      reason: why no others.

    Raises:
      ValueError: another key is overridden, or another config file is named.
    """
    for argument in arguments:
        match = re.match(r'--?(?:no)?config(?:\.([^=]+))?(?:=|$)', argument)
        if match and (match.group(1) or '').split('.')[0] not in allowed:
            raise ValueError(
                f'{argument.split("=")[0]} {reason}; only {", ".join(allowed)} can be changed here.'
            )


def start_jax(
    values: Mapping[str, Any], cpu_devices: int = 0, batch_size: int | None = None
) -> None:
    """Joins the other processes, if any; splits a CPU into one device per core, with oneDNN.

    Args:
      values: values of the script's flags.
      cpu_devices: XLA devices of a CPU; 0 means one per core.
      batch_size: images per batch where it has to split evenly over the devices.

    Raises:
      ValueError: the process looks like one of several and nothing says whether it is, or no
        cluster was found.
    """
    if parallel.only_cpu_installed():
        parallel.keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger('orbax').setLevel(logging.ERROR)
    # Orbax leaves tasks behind when it meets a damaged checkpoint; the warning about it is ours.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    warnings.showwarning = _show_warning
    distributed = values['distributed']
    reason = parallel.looks_distributed()
    if distributed is None and reason is not None:
        raise ValueError(
            f'This looks like one process of several ({reason}); pass --distributed to join them, '
            'or --nodistributed to run alone.'
        )
    parallel.use_cpu_devices(cpu_devices or parallel.cpu_device_count(batch_size))
    if distributed:
        parallel.initialize_distributed()
    if jax.default_backend() == 'cpu':
        onednn.use_onednn()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one line, without the source line it came from."""
    del filename, lineno, line
    print(f'warning: {message}', file=file or sys.stderr)


def describe(experiment: training.Experiment, workdir: Path) -> str:
    """A few lines on what is about to be trained, on what, and where it goes."""
    config = experiment.config
    shape = data.info(config.dataset).image_shape
    variables = jax.eval_shape(
        experiment.module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), 'float32')
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    devices = experiment.mesh.devices.ravel()
    hosts = f' on {jax.process_count()} hosts' if jax.process_count() > 1 else ''
    return (
        f'{config.model} ({parameters:,} parameters) on {config.dataset} '
        f'({experiment.source.num_examples:,} images), {experiment.total_steps:,} steps of '
        f'{config.batch_size}\n'
        f'{len(devices)} x {devices[0].device_kind}{hosts}; work directory {workdir}'
    )


def provenance(script: str, arguments: Sequence[str]) -> dict[str, str]:
    """What it takes to run a script again with the same results.

    Args:
      script: its file name.
      arguments: command-line arguments without the program's name.

    Returns:
      By names: `command`, `date`, the versions of Python and of the packages that compute, the
      `system`, and the `devices` and `processes` that JAX uses.
    """
    versions = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        'command': ' '.join(map(_quoted, ['python', script, *arguments])),
        'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
        'python': platform.python_version(),
        **versions,
        'system': f'{platform.system()} {platform.machine()}',
        'devices': ', '.join(f'{count} x {kind}' for kind, count in kinds.items()),
        'processes': str(jax.process_count()),
    }


def _quoted(argument: str) -> str:
    """An argument as a shell takes it; tuples of names in double quotes, to be legible."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)

"""Trains a classifier: `python train.py --config=FILE --workdir=DIR --config.key=value`.

Without arguments it trains on scikit-learn's digits, offline, in about a minute. Started again with
the same command, it goes on from its last checkpoint. On a pod, start the same command with
`--distributed` on every host.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from neurosens import command_line, parallel, scripts, training

CONFIGS = pathlib.Path(__file__).parent / 'configs'


def main(arguments: Sequence[str]) -> int:
    """Runs the script.

    Args:
      arguments: command-line arguments without the program's name.

    Returns:
      The exit status: 0, 1 if training stopped, 2 for a mistake in the command, or 128 plus the
      number of the signal that asked training to stop.
    """
    own_flags = flags.FlagValues()
    flags.DEFINE_string(
        'workdir', '', 'Directory of checkpoints and logs; runs/NAME by default.',
        flag_values=own_flags,
    )  # fmt: skip
    scripts.define_common_flags(own_flags)
    if scripts.asks_for_help(arguments):
        scripts.print_help(__doc__, own_flags)
        return 0

    with scripts.user_errors():
        command = command_line.parse(arguments, own_flags, CONFIGS / 'digits.py')
        config = command.config
        scripts.start_jax(command.flags, config.cpu_devices, config.batch_size)
        experiment = training.prepare(config)

    workdir = pathlib.Path(command.flags['workdir'] or f'runs/{command.name}')
    if parallel.is_primary():
        print(scripts.describe(experiment, workdir))
    with scripts.user_errors():
        result = training.train(experiment, workdir, progress=command.flags['progress'])

    if parallel.is_primary():
        if result.validation_accuracy is not None:
            print(f'Validation accuracy {result.validation_accuracy:.2%}.')
        print(f'Done. Next: python evaluate.py --workdir={workdir}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

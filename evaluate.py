"""Evaluates a trained model: `python evaluate.py --workdir=DIR --config.evaluation.key=value`.

Reports accuracy on clean images and under attack, on screen and in DIR/report. The settings are
those of the training, where the command line does not change them.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

from neurosens import command_line, data, evaluation, parallel, scripts, training
from neurosens import config as config_lib


def main(arguments: Sequence[str]) -> int:
    """Runs the script.

    Args:
      arguments: command-line arguments without the program's name.

    Returns:
      The exit status: 0, or 2 for a mistake in the command, its data or the work directory.
    """
    if scripts.asks_for_help(arguments):
        scripts.print_help(__doc__, _flags())
        return 0

    with scripts.user_errors():
        scripts.check_changes(arguments, allowed=('data_dir', 'cpu_devices', 'evaluation'))
        changes, values = command_line.override(config_lib.Config(), arguments, _flags())
        scripts.start_jax(values, changes.cpu_devices)
        workdir = pathlib.Path(values['workdir'])
        model = training.load(workdir, values['checkpoint'])
        config, _ = command_line.override(model.config, arguments, _flags())
        settings = config.evaluation
        source = data.open(
            config.dataset, settings.split, config.data_dir or None, config.validation_size
        )

    mesh = parallel.data_mesh()
    label = f'{config.model} on {config.dataset} {settings.split}, step {model.step} of {workdir}'
    if parallel.is_primary():
        print(label)
    report = evaluation.evaluate(
        model.forward,
        model.variables,
        source,
        mesh,
        settings,
        evaluation.fixed_key(config.seed),
        progress=lambda name: functools.partial(
            tqdm,
            desc=name,
            unit='batch',
            leave=False,
            disable=not (values['progress'] and parallel.is_primary()),
        ),
    )
    if parallel.is_primary():
        print(evaluation.table(report))
        facts = {'workdir': str(workdir), 'step': model.step, 'config': config_lib.to_dict(config)}
        evaluation.write(report, workdir / 'report', facts)
        print(f'\nWritten: results.json, results.csv and plots in {workdir / "report"}')
    return 0


def _flags() -> flags.FlagValues:
    own_flags = flags.FlagValues()
    flags.DEFINE_string(
        'workdir', 'runs/digits', 'Work directory of a training.', flag_values=own_flags
    )
    flags.DEFINE_string(
        'checkpoint', 'best', "'best', 'latest' or a step number.", flag_values=own_flags
    )
    scripts.define_common_flags(own_flags)
    return own_flags


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

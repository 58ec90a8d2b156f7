"""Evaluates a trained model: `python evaluate.py --workdir=DIR --config.evaluation.key=value`.

Reports accuracy on clean images and under attack, signs that the attacks were misled, and what
single neurons do, on screen and in DIR/report. The settings are those of the training, where the
command line does not change them.
With `--compare=DIR` the neurons of a second model are shown beside those of the first; with
`--transfer_from=DIR` images that fool a second model attack the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from absl import flags
from tqdm import tqdm

from neurosens import (
    attacks,
    command_line,
    data,
    defenses,
    evaluation,
    parallel,
    scripts,
    training,
)
from neurosens import config as config_lib

# Settings that may be changed for a trained model, and those that say what a file of weights is.
CHANGES = ('data_dir', 'cpu_devices', 'evaluation', 'neurons', 'defense')
OF_WEIGHTS = (
    'weights',
    'weights_key',
    'model',
    'model_options',
    'dataset',
    'mean',
    'std',
    'dtype',
    'seed',
    'validation_size',
)


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
        from_weights = scripts.sets(arguments, 'weights')
        if from_weights:
            scripts.check_changes(arguments, (*CHANGES, *OF_WEIGHTS), 'has no effect on weights')
        else:
            scripts.check_changes(arguments, CHANGES)
        changes, values = command_line.override(config_lib.Config(), arguments, _flags())
        workdir = _workdir(values, changes, from_weights)
        scripts.start_jax(values, changes.cpu_devices)
        if from_weights:
            model = training.load_weights(changes)
            origin = f'weights {changes.weights}'
        else:
            model = training.load(workdir, values['checkpoint'])
            origin = f'step {model.step} of {workdir}'
        config, _ = command_line.override(model.config, arguments, _flags())
        settings = config.evaluation
        source = data.open(
            config.dataset, settings.split, config.data_dir or None, config.validation_size
        )
        other = _load_other('--compare', values['compare'], model)
        if other is not None and not config.neurons.measures:
            raise ValueError(
                '--compare compares neurons, but --config.neurons.measures is empty; name measures.'
            )
        surrogate = _load_other('--transfer_from', values['transfer_from'], model)
        benign = None
        if config.defense.name:
            evaluation.check_defense(model.forward, model.variables, source.info, config.defense)
            benign = data.open(
                config.dataset, 'train', config.data_dir or None, config.validation_size
            )
        # What is wrong with a layer should not show only after long attacks.
        for each in filter(None, (model, other)):
            if config.neurons.measures:
                evaluation.neuron_layers(each.forward, each.variables, source.info, config.neurons)

    mesh = parallel.data_mesh()
    key = evaluation.fixed_key(config.seed)
    if parallel.is_primary():
        print(f'{config.model} on {config.dataset} {settings.split}, {origin}')
    bars = functools.partial(_bar, values['progress'])
    notes = workdir / 'report' / 'unfinished'
    with _ensemble_bar(values['progress']) as ensemble_progress:
        report = evaluation.evaluate(
            model.forward,
            model.variables,
            source,
            mesh,
            settings,
            key,
            progress=bars,
            ensemble_progress=ensemble_progress,
            directory=notes,
            surrogate=None if surrogate is None else (surrogate.forward, surrogate.variables),
        )
    if parallel.is_primary():
        print(evaluation.table(report))

    defended = None
    if benign is not None:
        with scripts.user_errors():
            parameters = evaluation.calibrate_defense(
                model.forward, model.variables, benign, mesh, config.defense, key
            )
        defenses.save(workdir / 'defense', parameters)
        with _ensemble_bar(values['progress']) as ensemble_progress:
            defended = evaluation.evaluate_defense(
                model.forward,
                model.variables,
                source,
                mesh,
                settings,
                config.defense,
                key,
                parameters=parallel.replicate(mesh, parameters),
                progress=bars,
                ensemble_progress=ensemble_progress,
            )
        if parallel.is_primary():
            print(f'\n{evaluation.defense_table(defended)}')

    found = compared = None
    if config.neurons.measures:
        measure = functools.partial(
            evaluation.measure_neurons,
            source=source,
            mesh=mesh,
            key=parallel.replicate(mesh, key),
            split=settings.split,
            eps=config.neurons.eps or max(settings.eps, default=0.0),
        )
        found = measure(model.forward, model.variables, settings=config.neurons, progress=bars)
        if other is not None:
            compared = measure(
                other.forward,
                other.variables,
                settings=_comparison(config.neurons),
                progress=lambda name: bars(f'compared {name}'),
            )

    if parallel.is_primary():
        facts = {'workdir': str(workdir), 'step': model.step, 'config': config_lib.to_dict(config)}
        if from_weights:
            del facts['step']
        if surrogate is not None:
            facts['transfer_from'] = values['transfer_from']
        directory = workdir / 'report'
        sections = []
        if found is not None:
            print(f'\n{evaluation.neuron_table(found)}')
            facts.update(evaluation.neuron_facts(found))
            compare = None
            if compared is not None:
                facts.update(evaluation.neuron_facts(compared, 'compared'))
                facts['compared/workdir'] = values['compare']
                compare = (values['compare'], compared)
            written = evaluation.write_neurons(
                found,
                directory,
                images=_top_images(found, source, config.neurons),
                top=config.neurons.top,
                compare=compare,
                name=str(workdir),
            )
            sections.append(evaluation.neuron_section(found, written, compare=compare))
        if defended is not None:
            facts.update(evaluation.defense_facts(defended))
            written = evaluation.write_defense(defended, directory)
            sections.append(evaluation.defense_section(defended, written))
        evaluation.write(
            report,
            directory,
            facts,
            training.logs.read(workdir),
            sections=sections,
            provenance=scripts.provenance('evaluate.py', arguments),
        )
        # What long attacks had noted, to go on after an interruption, is now in the report.
        shutil.rmtree(notes, ignore_errors=True)
        print(f'\nWritten: index.html, results.json, CSV files, plots and neurons/ in {directory}')
    return 0


def _workdir(values: dict, config: config_lib.Config, from_weights: bool) -> pathlib.Path:
    """Where the report goes, and whence the model comes unless it is a file of weights."""
    if not from_weights:
        return pathlib.Path(values['workdir'] or 'runs/digits')
    if not config.weights:
        raise ValueError('--config.weights is empty; name a file, or leave it out.')
    workdir = pathlib.Path(values['workdir'] or f'runs/{pathlib.Path(config.weights).stem}')
    if (workdir / 'checkpoints').exists():
        raise ValueError(
            f'--workdir={workdir} holds a training, whose report that of the weights would '
            'replace; name another directory.'
        )
    if values['checkpoint'] != 'best':
        raise ValueError(
            f'--checkpoint={values["checkpoint"]} chooses among those of a training, but '
            '--config.weights names a file; leave one out.'
        )
    return workdir


def _bar(shown: bool, name: str) -> evaluation.Progress:
    """A progress bar over batches, on the first process."""
    return functools.partial(
        tqdm, desc=name, unit='batch', leave=False, disable=not (shown and parallel.is_primary())
    )


@contextlib.contextmanager
def _ensemble_bar(shown: bool) -> Iterator[attacks.Progress]:
    """A progress bar of AutoAttack: the run, its batches, and the robust accuracy so far."""
    bar = tqdm(leave=False, unit='batch', disable=not (shown and parallel.is_primary()))

    def step(run: str, left: int, accuracy: float) -> None:
        bar.set_description(f'autoattack {run}, {left} to go, robust {accuracy:.2%}')
        bar.update()

    with bar:
        yield step


def _load_other(
    flag: str, workdir: str, model: training.TrainedModel
) -> training.TrainedModel | None:
    """The model that a flag names, which has to be one of the same data set."""
    if not workdir:
        return None
    other = training.load(workdir)
    if other.config.dataset != model.config.dataset:
        raise ValueError(
            f'{flag}: {workdir} was trained on {other.config.dataset}, not on '
            f'{model.config.dataset}; name a model of the same data set.'
        )
    return other


def _comparison(settings: config_lib.Neurons) -> config_lib.Neurons:
    """What is measured of the model compared with: what the shared plots show."""
    shared: tuple[str, ...] = ()
    if {'sensitivity', 'attack'} & set(settings.measures):
        shared = ('sensitivity',)
    elif 'statistics' in settings.measures:
        shared = ('statistics',)
    return dataclasses.replace(settings, measures=shared)


def _top_images(
    report: evaluation.NeuronReport, source: data.Source, settings: config_lib.Neurons
) -> dict:
    """The images that the report shows beside its most sensitive neurons."""
    wanted = {
        position
        for layer in report.layers
        for position in evaluation.images_wanted(layer, settings.top)
    }
    return evaluation.fetch_images(source, wanted, settings.limit or None)


def _flags() -> flags.FlagValues:
    own_flags = flags.FlagValues()
    flags.DEFINE_string(
        'workdir',
        '',
        'Work directory of a training, runs/digits by default; with --config.weights=FILE where '
        'the report goes, runs/NAME of the file by default.',
        flag_values=own_flags,
    )
    flags.DEFINE_string(
        'checkpoint', 'best', "'best', 'latest' or a step number.", flag_values=own_flags
    )
    flags.DEFINE_string(
        'compare',
        '',
        'Work directory of a second model, such as a robust one, whose neurons are plotted beside '
        'those of the first.',
        flag_values=own_flags,
    )
    flags.DEFINE_string(
        'transfer_from',
        '',
        'Work directory of a second model: adds an attack with images that PGD finds against it.',
        flag_values=own_flags,
    )
    scripts.define_common_flags(own_flags)
    return own_flags


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

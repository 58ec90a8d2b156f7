"""Evaluates a trained model: `python evaluate.py --workdir=DIR --config.evaluation.key=value`.

Reports accuracy on clean images and under attack, signs that the attacks were misled, and what
single neurons do, on screen and in DIR/report. The settings are those of the training, where the
command line does not change them. With `--config.defense.name=NAME` a defence is calibrated and
attacked; with `--config.weights=FILE` a network of PyTorch takes the place of the training.
With `--compare=DIR` the neurons of a second model are shown beside those of the first; with
`--transfer_from=DIR` images that fool a second model attack the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from neurosens import (
    attacks,
    command_line,
    data,
    defenses,
    evaluation,
    models,
    neurons,
    parallel,
    scripts,
    training,
)
from neurosens import config as config_lib
from neurosens.forward import Forward, Variables

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
        job = _open(arguments)
    mesh = parallel.data_mesh()
    key = evaluation.fixed_key(job.config.seed)
    if parallel.is_primary():
        print(f'{job.config.model} on {job.config.dataset} {job.split}, {job.origin}')
        if job.config.weights:
            # Not those of a data set: the settings have some, or the file, or nobody.
            numbers = (
                f'{name} ({", ".join(f"{value:.6g}" for value in values)})'
                for name, values in _normalization(job).items()
            )
            print(f'images normalised by {" and ".join(numbers)}')
    # First what may find the images wanting, which should not show only after long attacks.
    parameters: Any = None
    calibration: dict[str, Any] = {}
    if job.config.defense.name:
        parameters, calibration = _calibrate(job, mesh, key)
    report = _attack(job, mesh, key)
    defended = None
    if parameters is not None:
        defended = _defend(job, mesh, key, parameters, calibration)
    found, compared = _measure(job, mesh, key)
    ended = None
    if parallel.is_primary():
        try:
            with scripts.user_errors(), _whole_report(job) as fresh:
                sections, facts = _write_sections(job, fresh, found, compared, defended)
                evaluation.write(
                    report,
                    fresh,
                    facts,
                    training.logs.read(job.workdir),
                    sections=sections,
                    provenance=scripts.provenance('evaluate.py', arguments),
                )
        except SystemExit as error:
            ended = error
    # Only the first process knows, and all of them keep the defence.
    status = max(parallel.gather(np.array([0 if ended is None else int(ended.code or 1)])))
    if status:
        raise ended or SystemExit(int(status))
    if parameters is not None:
        with scripts.user_errors():
            _keep(job, parameters, calibration)
    if parallel.is_primary():
        # What long attacks had noted, to go on after an interruption, is now in the report.
        shutil.rmtree(job.notes, ignore_errors=True)
        print(
            f'\nWritten: index.html, results.json, CSV files, plots and neurons/ in {job.directory}'
        )
    return 0


class Job(NamedTuple):
    """What a command asks for, found to be possible.

    Attributes:
      config: the settings.
      values: values of the flags.
      workdir: work directory of the training, or where the report of a file of weights goes.
      model: what is evaluated.
      origin: where it comes from, in words.
      source: the images.
      other: the model whose neurons are shown beside, or None.
      surrogate: the model that transferred images are made on, or None.
      benign: images that a defence is calibrated on, or None without a defence or with kept
        parameters.
      population: data sets that statistics of neurons are taken over, empty for that of `source`.
    """

    config: config_lib.Config
    values: Mapping[str, Any]
    workdir: pathlib.Path
    model: training.TrainedModel
    origin: str
    source: data.Source
    other: training.TrainedModel | None
    surrogate: training.TrainedModel | None
    benign: data.Source | None
    population: tuple[data.Source, ...]

    @property
    def split(self) -> str:
        """The split that is evaluated."""
        return self.config.evaluation.split

    @property
    def directory(self) -> pathlib.Path:
        """Where the report goes."""
        return self.workdir / 'report'

    @property
    def notes(self) -> pathlib.Path:
        """Where long attacks note what they have done."""
        return self.directory / 'unfinished'

    @property
    def transferred(self) -> tuple[Forward, Variables] | None:
        """The model that transferred images are made on, and its variables."""
        return self.surrogate and (self.surrogate.forward, self.surrogate.variables)

    def bars(self, name: str) -> evaluation.Progress:
        """A progress bar over batches, on the first process."""
        shown = self.values['progress'] and parallel.is_primary()
        return functools.partial(tqdm, desc=name, unit='batch', leave=False, disable=not shown)


def _normalization(job: Job) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel that the model normalises images by."""
    module = job.model.forward.module
    assert isinstance(module, models.Classifier)
    return {'mean': list(module.mean), 'std': list(module.std)}


def _open(arguments: Sequence[str]) -> Job:
    """Reads the command, starts JAX and opens models and data; all mistakes show here."""
    from_weights = scripts.sets(arguments, 'weights')
    if from_weights:
        scripts.check_changes(arguments, (*CHANGES, *OF_WEIGHTS), 'has no effect on weights')
    else:
        scripts.check_changes(arguments, CHANGES)
    # Without weights the settings are those of a training, which are not read yet.
    changes, values = command_line.override(
        config_lib.Config(), arguments, _flags(), checked=from_weights
    )
    workdir = _workdir(values, changes, from_weights)
    scripts.start_jax(values, changes.cpu_devices)
    if from_weights:
        model = training.load_weights(changes)
        origin = f'weights {changes.weights}'
    else:
        model = training.load(workdir, values['checkpoint'])
        origin = f'step {model.step} of {workdir}'
    config, _ = command_line.override(_trained(model.config, arguments), arguments, _flags())

    def images(split: str) -> data.Source:
        return data.open(config.dataset, split, config.data_dir or None, config.validation_size)

    source = images(config.evaluation.split)
    other = _load_other('--compare', values['compare'], model)
    if other is not None and not config.neurons.measures:
        raise ValueError(
            '--compare compares neurons, but --config.neurons.measures is empty; name measures.'
        )
    if other is not None and not _comparison(config.neurons).measures:
        raise ValueError(
            f'--compare draws sensitivity and statistics, but --config.neurons.measures are '
            f'{config.neurons.measures}; add one of them.'
        )
    surrogate = _load_other('--transfer_from', values['transfer_from'], model)
    if surrogate is not None and config.evaluation.norm == 'spatial':
        raise ValueError(
            '--transfer_from makes images by PGD, which has no norm spatial; leave it out, or '
            'choose another --config.evaluation.norm.'
        )
    # What is wrong with a layer should not show only after long attacks.
    benign = None
    if config.defense.name and not config.defense.parameters:
        evaluation.check_defense(model.forward, model.variables, source.info, config.defense)
        benign = images('train')
    attacks = (*config.defense.attacks, *config.defense.surrogate_attacks)
    on_defense = attacks if config.defense.name else ()
    if 'latent' in (*config.evaluation.attacks, *on_defense):
        image = jax.ShapeDtypeStruct((1, *source.info.image_shape), jax.numpy.float32)
        neurons.describe(model.forward, model.variables, image, config.evaluation.layer)
    for each in filter(None, (model, other)):
        if config.neurons.measures:
            evaluation.neuron_layers(each.forward, each.variables, source.info, config.neurons)
    population = tuple(map(images, config.neurons.statistics_splits))
    return Job(config, values, workdir, model, origin, source, other, surrogate, benign, population)


def _trained(config: config_lib.Config, arguments: Sequence[str]) -> config_lib.Config:
    """The settings of the training, which calibrates nothing where kept parameters are named."""
    if not scripts.sets(arguments, 'defense.parameters'):
        return config
    usual = {name: getattr(config_lib.Defense(), name) for name in config_lib.CALIBRATION}
    return dataclasses.replace(config, defense=dataclasses.replace(config.defense, **usual))


def _attack(job: Job, mesh: Mesh, key: PRNGKeyArray) -> evaluation.RobustnessReport:
    """Accuracy on clean and attacked images."""
    with scripts.user_errors(), _ensemble_bar(job.values['progress']) as ensemble_progress:
        report = evaluation.evaluate(
            job.model.forward,
            job.model.variables,
            job.source,
            mesh,
            job.config.evaluation,
            key,
            progress=job.bars,
            ensemble_progress=ensemble_progress,
            directory=job.notes,
            surrogate=job.transferred,
        )
    if parallel.is_primary():
        print(evaluation.table(report))
    return report


def _calibrate(job: Job, mesh: Mesh, key: PRNGKeyArray) -> tuple[Any, dict[str, Any]]:
    """The defence of the settings, on all devices of all processes, and how it was calibrated."""
    settings, kept = job.config.defense, job.config.defense.parameters
    with scripts.user_errors():
        if kept:
            parameters = defenses.load(kept, mesh, variables=job.model.variables)
            found = defenses.name_of(parameters)
            if found != settings.name:
                raise defenses.DefenseError(
                    f'The defense in {kept} is {found!r}, but defense.name is {settings.name!r}; '
                    'name the same.'
                )
            return parameters, defenses.calibration_of(kept)
        assert job.benign is not None
        parameters = evaluation.calibrate_defense(
            job.model.forward,
            job.model.variables,
            job.benign,
            mesh,
            settings,
            key,
            eps=_attack_radius(job.config),
        )
        calibration = evaluation.calibration_facts(settings, _attack_radius(job.config))
    return parallel.replicate(mesh, parameters), calibration


def _defend(
    job: Job, mesh: Mesh, key: PRNGKeyArray, parameters: Any, calibration: Mapping[str, Any]
) -> evaluation.DefenseReport:
    """Attacks what a defence defends."""
    with scripts.user_errors(), _ensemble_bar(job.values['progress']) as ensemble_progress:
        defended = evaluation.evaluate_defense(
            job.model.forward,
            job.model.variables,
            job.source,
            mesh,
            job.config.evaluation,
            job.config.defense,
            key,
            parameters=parameters,
            progress=job.bars,
            ensemble_progress=ensemble_progress,
            directory=job.notes,
            surrogate=job.transferred,
            calibration=calibration,
        )
    if parallel.is_primary():
        print(f'\n{evaluation.defense_table(defended)}')
    return defended


def _keep(job: Job, parameters: Any, calibration: Mapping[str, Any]) -> None:
    """Keeps the parameters of a defence in the work directory, unless they are from there."""
    directory, kept = job.workdir / 'defense', job.config.defense.parameters
    if not kept or pathlib.Path(kept).resolve() != directory.resolve():
        variables = job.model.variables
        defenses.save(directory, parameters, variables=variables, calibration=calibration)


def _attack_radius(config: config_lib.Config) -> float:
    """The linf radius for measures of neurons under attack, their own or that of the attacks."""
    evaluated = config.evaluation
    known = max(evaluated.eps, default=0.0) if evaluated.norm == 'linf' else 0.1
    return config.neurons.eps or known


def _measure(
    job: Job, mesh: Mesh, key: PRNGKeyArray
) -> tuple[evaluation.NeuronReport | None, evaluation.NeuronReport | None]:
    """What single neurons do, and what those of the model compared with do."""
    settings = job.config.neurons
    if not settings.measures:
        return None, None
    measure = functools.partial(
        evaluation.measure_neurons,
        source=job.source,
        mesh=mesh,
        key=parallel.replicate(mesh, key),
        split=job.split,
        eps=_attack_radius(job.config),
        population=job.population,
    )
    with scripts.user_errors():
        found = measure(
            job.model.forward, job.model.variables, settings=settings, progress=job.bars
        )
        if parallel.is_primary():
            print(f'\n{evaluation.neuron_table(found)}')
        if job.other is None:
            return found, None
        compared = measure(
            job.other.forward,
            job.other.variables,
            settings=_comparison(settings),
            progress=lambda name: job.bars(f'compared {name}'),
        )
    return found, compared


@contextlib.contextmanager
def _whole_report(job: Job) -> Iterator[pathlib.Path]:
    """A directory whose files take the place of the report once all of them are written."""
    fresh = job.workdir / '.report.new'
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
        evaluation.put_in_place(fresh, job.directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_sections(
    job: Job,
    directory: pathlib.Path,
    found: evaluation.NeuronReport | None,
    compared: evaluation.NeuronReport | None,
    defended: evaluation.DefenseReport | None,
) -> tuple[list[evaluation.Section], dict[str, Any]]:
    """Files on neurons and defence, their sections of the page, and what is said of the whole."""
    facts: dict[str, Any] = {'workdir': str(job.workdir)}
    if not job.config.weights:
        facts['step'] = job.model.step
    facts['config'] = config_lib.to_dict(job.config)
    facts.update({f'normalisation/{name}': values for name, values in _normalization(job).items()})
    if job.config.defense.parameters:
        # Those of the calibration stand with the defence.
        for name in config_lib.CALIBRATION:
            del facts['config']['defense'][name]
    if job.surrogate is not None:
        facts['transfer_from'] = job.values['transfer_from']
    sections = []
    if found is not None:
        facts.update(evaluation.neuron_facts(found))
        compare = None
        if compared is not None:
            facts.update(evaluation.neuron_facts(compared, 'compared'))
            facts['compared/workdir'] = job.values['compare']
            compare = (job.values['compare'], compared)
        written = evaluation.write_neurons(
            found,
            directory,
            images=_top_images(found, job.source, job.config.neurons),
            top=job.config.neurons.top,
            compare=compare,
            name=str(job.workdir),
        )
        sections.append(evaluation.neuron_section(found, written, compare=compare))
    if defended is not None:
        facts.update(evaluation.defense_facts(defended))
        written = evaluation.write_defense(defended, directory)
        sections.append(evaluation.defense_section(defended, written))
    return sections, facts


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
    _check_stored_report(workdir, config.weights)
    if values['checkpoint'] != 'best':
        raise ValueError(
            f'--checkpoint={values["checkpoint"]} chooses among those of a training, but '
            '--config.weights names a file; leave one out.'
        )
    return workdir


def _check_stored_report(workdir: pathlib.Path, weights: str) -> None:
    """Refuses to replace the report of another file, such as one of the same name elsewhere."""
    try:
        report = json.loads((workdir / 'report' / 'results.json').read_text(encoding='utf-8'))
        stored = report['config']['weights']
    except (OSError, ValueError, KeyError, TypeError):
        # There is none, or none that says what it is of.
        return
    if stored and pathlib.Path(stored).resolve() != pathlib.Path(weights).resolve():
        raise ValueError(
            f'{workdir} holds the report of the weights {stored}, which that of {weights} would '
            'replace; name another directory by --workdir.'
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

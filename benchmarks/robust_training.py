"""What each way of training buys: clean and robust accuracy in three norms, and what it costs.

    python -m benchmarks.robust_training --data_dir DIR --output DIR [--dataset NAME] [--seeds N]
        [--methods NAME ...] [--attacks NAME ...] [--queries N]

Trains one network by every method and seed, attacks each in linf, l2 and l1 by AutoAttack, or those
of its attacks that are named, and keeps every result in the output folder, so that an interrupted
run goes on where it stopped. An image counts as robust if it withstands all attacks of a norm.
Signs of gradient masking are looked for in each model and norm, and stand beside the accuracies
with the warnings of AutoAttack.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import harness
from neurosens import attacks, config, data, parallel, training
from neurosens import evaluation as evaluation_lib
from neurosens.evaluation import accuracy

BATCH_SIZE = 250
# First images on which gradient masking is looked for.
_DIAGNOSED = 128
# Of the timing of steps.
_STEPS, _ROUNDS = 20, 7


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        objective: name of the objective.
        options: its options.
        regularizers: as in a config.
        weight_decay: of the kernels.
    """

    objective: str = 'standard'
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    regularizers: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0


class Setting(NamedTuple):
    """A data set, a network and the radii it is attacked with.

    Attributes:
        config: what all methods share.
        radii: eps of each norm.
        noise: standard deviation of the white noise that models meet too, in pixel units.
        methods: by name.
    """

    config: config.Config
    radii: dict[str, float]
    noise: float
    methods: dict[str, Method]


_RAMP = {'ramp': 0.15}


def _methods(eps: float, jacobian: float, steps: int) -> dict[str, Method]:
    contribution = {'weight_difference_weight': 10.0, 'contribution_weight': 100.0, 'top': 16}
    shared = {**contribution, 'shared': True, **_RAMP}
    both = {'sensitivity': 0.1, 'jacobian': jacobian, **_RAMP}
    attack = {'eps': eps, 'steps': steps}
    return {
        'standard': Method(),
        'weight decay 5e-4': Method(weight_decay=5e-4),
        'T1 + T2, published weights': Method(
            regularizers={'neuron_contribution': {'weight': 1.0, **shared}}
        ),
        'T1 + T2, a hundredth': Method(
            regularizers={'neuron_contribution': {'weight': 0.01, **shared}}
        ),
        'direct sensitivity': Method(
            regularizers={'direct_sensitivity': {'weight': 0.1, 'top': 16, **_RAMP}}
        ),
        'SNS': Method(regularizers={'activation_sensitivity': {'weight': 0.1, **_RAMP}}),
        'Jacobian': Method(regularizers={'jacobian': {'weight': jacobian, **_RAMP}}),
        'SNS + Jacobian': Method(regularizers={'sensitivity_and_jacobian': both}),
        f'PGD-{steps} training': Method('pgd', attack),
        'TRADES': Method('trades', {**attack, 'beta': 6.0}),
        f'PGD-{steps} training + Jacobian': Method(
            'pgd', attack, {'jacobian': {'weight': jacobian, **_RAMP}}
        ),
    }


SETTINGS = {
    'mnist': Setting(
        config.Config(
            dataset='mnist',
            model='mlp',
            model_options={'hidden': (200, 200)},
            epochs=5,
            batch_size=128,
            optimizer=config.Optimizer(name='sgd', learning_rate=0.1, clip_norm=5.0),
            schedule=config.Schedule(name='cosine', warmup=0.1),
            log_every=50,
            gradient_shares=False,
        ),
        {'linf': 0.1, 'l2': 1.0, 'l1': 5.0},
        0.3,
        _methods(0.1, 0.05, 7),
    ),
    'cifar10': Setting(
        config.Config(
            dataset='cifar10',
            augmentation='pad_crop_flip',
            model='cnn',
            model_options={'features': (16, 32), 'strides': 2, 'pool': 'none', 'hidden': (100,)},
            epochs=6,
            batch_size=128,
            optimizer=config.Optimizer(name='sgd', learning_rate=0.05, clip_norm=5.0),
            schedule=config.Schedule(name='cosine', warmup=0.1),
            log_every=50,
            gradient_shares=False,
        ),
        {'linf': 2 / 255, 'l2': 0.25, 'l1': 3.0},
        0.1,
        _methods(2 / 255, 0.01, 5),
    ),
}


def settings_of(setting: Setting, method: Method, seed: int, data_dir: str) -> config.Config:
    """Returns the config of one training."""
    return dataclasses.replace(
        setting.config,
        data_dir=data_dir,
        seed=seed,
        objective=method.objective,
        objective_options=method.options,
        regularizers=method.regularizers,
        optimizer=dataclasses.replace(setting.config.optimizer, weight_decay=method.weight_decay),
    )


def costs(setting: Setting, data_dir: str) -> harness.Measurement:
    """Times training steps of all methods in turns.

    Args:
        setting: data, network and methods.
        data_dir: directory of TFDS.

    Returns:
        Seconds of a few steps of each method.
    """
    units = {
        name: _steps(training.prepare(settings_of(setting, method, 0, data_dir)))
        for name, method in setting.methods.items()
    }
    return harness.alternate(units, rounds=_ROUNDS)


def _steps(experiment: training.Experiment) -> harness.Unit:
    state = training.experiment.initial_state(experiment)
    batches = experiment.source.train_batches(batch_size=experiment.config.batch_size, seed=0)
    batch = parallel.shard(experiment.mesh, next(batches))
    key = parallel.replicate(experiment.mesh, experiment.key(1))

    def unit() -> None:
        nonlocal state
        for _ in range(_STEPS):
            state, metrics = experiment.train_step(state, batch, key)
        jax.block_until_ready((state, metrics))

    return unit


def run(
    setting: Setting,
    method: Method,
    seed: int,
    folder: pathlib.Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Trains and attacks one model.

    Args:
        setting: data, network and radii.
        method: how to train.
        seed: of initialisation, data order and attacks.
        folder: for the training, removed afterwards.
        arguments: of the command line: data, and how many images are attacked by what.

    Returns:
        Clean accuracy on the whole test set; of the images that are attacked accuracy under white
        noise, clipped to [0, 1], and robust accuracy by norm; and by norm, under `warnings`, the
        checks for gradient masking that warn and the warnings of AutoAttack.
    """
    settings = settings_of(setting, method, seed, arguments.data_dir)
    experiment = training.prepare(settings)
    result = training.train(experiment, folder, progress=False)
    shutil.rmtree(folder)
    source = data.open(settings.dataset, 'test', arguments.data_dir)
    variables = result.state.variables
    predictions = accuracy.predict(
        experiment.forward, variables, source, experiment.mesh, batch_size=1000
    )
    images = arguments.images
    batch = next(iter(source.eval_batches(batch_size=images)))
    x, y = np.float32(batch.image) / 255, np.int32(batch.label)
    found: dict[str, Any] = {
        'clean': predictions.accuracy,
        'clean_of_attacked': float(predictions.correct[:images].mean()),
    }
    draws = np.random.default_rng(seed).normal(0, setting.noise, x.shape)
    noisy = np.float32(np.clip(x + draws, 0, 1))
    seen = accuracy.predict_images(
        experiment.forward, variables, noisy, y, experiment.mesh, BATCH_SIZE
    )
    found['noise'] = float((seen == y).mean())
    found['warnings'] = {}
    for norm, eps in setting.radii.items():
        outcome = attacks.autoattack(
            experiment.forward,
            variables,
            x,
            y,
            jax.random.key(seed),
            threat=attacks.Threat(norm, eps),
            attacks=arguments.attacks or None,
            queries=arguments.queries,
            batch_size=BATCH_SIZE,
            mesh=experiment.mesh,
        )
        found[norm] = float(1 - outcome.success.mean())
        few = slice(_DIAGNOSED)
        diagnosis = evaluation_lib.diagnose(
            experiment.forward,
            variables,
            x[few],
            y[few],
            jax.random.key(seed),
            threat=attacks.Threat(norm, eps),
            batch_size=BATCH_SIZE,
            mesh=experiment.mesh,
            reported=outcome.success[few],
        )
        warned = [check.name for check in diagnosis.checks if check.passed is False]
        found['warnings'][norm] = [*warned, *outcome.warnings]
    return found


def table(
    results: dict[str, list[dict[str, Any]]], setting: Setting, cost: harness.Measurement
) -> str:
    """Returns the Markdown table: means over seeds, and their standard deviation."""
    rows = []
    for name, runs in results.items():
        cells = []
        for key in ('clean', 'clean_of_attacked', 'noise', *setting.radii):
            values = [100 * one[key] for one in runs]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{spread}')
        counts = collections.Counter(
            f'{warning}, {norm}'
            for one in runs
            for norm, warnings in one['warnings'].items()
            for warning in warnings
        )
        of_seeds = (f'{warning}: {count} of {len(runs)}' for warning, count in counts.items())
        cells.append('; '.join(of_seeds).replace('_', ' ') or '-')
        rows.append((name, *cells, harness.ratio_text(cost.ratio(name, 'standard'))))
    attacked = (f'{norm} {eps:.4g}' for norm, eps in setting.radii.items())
    of_all = ('clean %', 'clean %, attacked images', f'noise {setting.noise:g}')
    header = ('Method', *of_all, *attacked, 'warnings, of seeds', 'step / standard')
    return harness.markdown_table(header, rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dataset', default='mnist', choices=SETTINGS)
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--output', required=True, help='folder of the results')
    parser.add_argument('--methods', nargs='+', default=(), help='names; all by default')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of each method')
    parser.add_argument('--images', type=int, default=1000, help='test images that are attacked')
    parser.add_argument('--attacks', nargs='+', default=(), help='of AutoAttack; all by default')
    parser.add_argument('--queries', type=int, default=5000, help='of Square')
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Trains, attacks and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    harness.start_jax(BATCH_SIZE)
    setting = SETTINGS[arguments.dataset]
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.methods or setting.methods:
        for seed in range(arguments.seeds):
            by = '+'.join(arguments.attacks) or 'autoattack'
            effort = f'{arguments.images}_{by}_{arguments.queries}'
            stem = f'{arguments.dataset}_{name.replace(" ", "_")}_{seed}'
            method = setting.methods[name]

            def make(stem: str = stem, method: Method = method, seed: int = seed) -> Any:
                start = time.perf_counter()
                found = run(setting, method, seed, folder / f'{stem}_training', arguments)
                print(f'{stem}: {found}, {time.perf_counter() - start:.0f} s', flush=True)
                return found

            decides = (setting.config, setting.radii, setting.noise, method, effort)
            results.setdefault(name, []).append(harness.kept(folder, stem, decides, make))
    cost = costs(setting, arguments.data_dir)
    harness.report(arguments, table(results, setting, cost), measurements={'training steps': cost})


if __name__ == '__main__':
    main()

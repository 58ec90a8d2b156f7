"""Images per second of training a CIFAR ResNet-20: neurosens against plain PyTorch on the same CPU.

    python -m benchmarks.training_step [--memory] [--rounds N] [--batch_size B] [--data_dir DIR]
        [--without CANDIDATE ...]

Both train the same network from the same weights on the same uint8 batches with the same SGD, once
with and once without random crops and flips. Before any timing, a guard checks that networks and
training steps agree. `--memory` compares keeping freed memory with giving it back, also where the
network is small and its first images large: that of configs/mnist.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks import harness
from neurosens import config, data, models, parallel
from neurosens.training import objectives, optimizers, step

PARAMETERS = 269_722
# Long enough for the learning rate never to reach 0 in a measurement.
UPDATES = 100_000
AUGMENTATIONS = {
    'With random crops and flips': 'pad_crop_flip',
    'Without augmentation': 'none',
}
OURS = {'cpu': 'neurosens, one XLA device per core', 'gpu': 'neurosens'}
# Beside the reference and the fastest PyTorch setting, those of `--memory` alone.
_MEMORY = {
    'neurosens, giving freed memory back',
    'PyTorch eager, channels last, keeping memory',
}
# Its network, with its images and how many times as many steps in a turn, for `--memory`.
_MNIST = 'The network of configs/mnist.py, with crops'
_MORE_STEPS = 8
_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    'cifar10': ('cifar_resnet20', {}),
    'mnist': ('cnn', {'features': (32, 64), 'hidden': (128,)}),
}
_DISTINCT_BATCHES = 8
_TORCH = 'benchmarks.torch_training:prepare'


def make_module(data_set: str = 'cifar10') -> nn.Module:
    """Returns the network for a data set."""
    info = data.info(data_set)
    name, options = _NETWORKS[data_set]
    return models.create(
        name, num_classes=info.num_classes, mean=info.mean, std=info.std, **options
    )


def initial_state(seed: int = 0, data_set: str = 'cifar10') -> tuple[step.TrainState, Any, Any]:
    """Returns the state before the first step, the optimizer and its schedule."""
    optimizer, schedule = optimizers.make_optimizer(
        config.Optimizer(), config.Schedule(warmup=0.0), UPDATES
    )
    shape, module = data.info(data_set).image_shape, make_module(data_set)
    state = jax.jit(lambda key: step.init_state(module, optimizer, shape, key))(
        jax.random.key(seed)
    )
    return state, optimizer, schedule


def load_batches(batch_size: int, data_dir: str, data_set: str = 'cifar10') -> list[data.Batch]:
    """Returns a few training batches: of the data set, or noise where `data_dir` is empty."""
    if data_dir:
        source = data.load(data_set, 'train', data_dir=data_dir)
        stream = source.train_batches(batch_size=batch_size, seed=0)
        return list(itertools.islice(stream, _DISTINCT_BATCHES))
    random = np.random.default_rng(0)
    shape = data.info(data_set).image_shape
    return [
        data.Batch(
            image=random.integers(0, 256, (batch_size, *shape), np.uint8),
            label=random.integers(0, 10, batch_size, np.int32),
            mask=np.ones(batch_size, bool),
            index=np.arange(batch_size, dtype=np.int32),
        )
        for _ in range(_DISTINCT_BATCHES)
    ]


def prepare(
    *,
    devices: int,
    keep_memory: bool,
    batch_size: int,
    steps: int,
    data_dir: str,
    mnist: bool = False,
) -> harness.Prepared:
    """Prepares our training step in a worker process.

    Args:
        devices: XLA devices the CPU is split into; 0 for as many as `train.py` uses.
        keep_memory: keep freed memory, as `train.py` does.
        batch_size: images per step.
        steps: training steps per unit of work.
        data_dir: directory of the prepared data, or empty.
        mnist: prepare the network of MNIST too.

    Returns:
        One unit per augmentation, and one for MNIST.
    """
    mesh = harness.start_jax(batch_size, devices=devices, keep_memory=keep_memory)
    batches = load_batches(batch_size, data_dir)
    units = {
        title: training_unit(mesh, augmentation, steps, batches)
        for title, augmentation in AUGMENTATIONS.items()
    }
    if mnist:
        batches = load_batches(batch_size, data_dir, 'mnist')
        units[_MNIST] = training_unit(mesh, 'pad_crop', steps * _MORE_STEPS, batches, 'mnist')
    return harness.Prepared(units, {'devices': mesh.size})


def count(*, batch_size: int, data_set: str = 'cifar10') -> harness.Prepared:
    """Counts the operations of a training step, as it is before any compiler has changed it.

    Args:
        batch_size: images per step.
        data_set: whose network is trained.

    Returns:
        No units; as details the `flops`.
    """
    mesh = harness.start_jax(devices=1)
    state, train_step, key = make_step(mesh, 'none', data_set)
    batch = parallel.shard(mesh, load_batches(batch_size, '', data_set)[0])
    return harness.Prepared({}, {'flops': harness.count_flops(train_step, state, batch, key)})


def make_step(
    mesh: jax.sharding.Mesh, augmentation: str, data_set: str = 'cifar10'
) -> tuple[step.TrainState, Any, Any]:
    """Returns a state, the compiled training step, and a key."""
    state, optimizer, schedule = initial_state(data_set=data_set)
    train_step = step.make_train_step(
        make_module(data_set),
        optimizer,
        schedule,
        objectives.standard(),
        (),
        mesh,
        augmentation=augmentation,
    )
    return parallel.replicate(mesh, state), train_step, parallel.replicate(mesh, jax.random.key(1))


def training_unit(
    mesh: jax.sharding.Mesh,
    augmentation: str,
    steps: int,
    batches: list[data.Batch],
    data_set: str = 'cifar10',
) -> harness.Unit:
    """Makes a unit of training steps, which go on from those before.

    Args:
        mesh: devices to train on.
        augmentation: of the config.
        steps: training steps per unit of work.
        batches: taken in turn.
        data_set: whose network is trained.

    Returns:
        The unit; it ends when state and metrics are there.
    """
    state, train_step, key = make_step(mesh, augmentation, data_set)
    stream = itertools.cycle(batches)

    def unit() -> None:
        nonlocal state
        for batch in itertools.islice(stream, steps):
            state, metrics = train_step(state, parallel.shard(mesh, batch), key)
        jax.block_until_ready((state, metrics))

    return unit


def worker_specs(arguments: argparse.Namespace) -> dict[str, harness.WorkerSpec]:
    """Returns how to start each candidate."""
    common = {
        'batch_size': arguments.batch_size,
        'steps': arguments.steps,
        'data_dir': arguments.data_dir,
    }
    ours = 'benchmarks.training_step:prepare'
    torch_options = {
        'PyTorch eager': (False, False, False),
        'PyTorch eager, channels last': (True, False, False),
        'PyTorch eager, channels last, keeping memory': (True, False, True),
        'PyTorch compiled': (False, True, False),
        'PyTorch compiled, channels last': (True, True, False),
    }
    our_options = {
        reference(): (0, True),
        'neurosens, one XLA device': (1, True),
        'neurosens, giving freed memory back': (0, False),
    }
    specs = {
        name: harness.WorkerSpec(
            ours,
            {'devices': devices, 'keep_memory': keep, 'mnist': arguments.memory, **common},
        )
        for name, (devices, keep) in our_options.items()
    }
    for name, (channels_last, compiled, keep) in torch_options.items():
        options = {'channels_last': channels_last, 'compiled': compiled, 'keep_memory': keep}
        specs[name] = harness.WorkerSpec(_TORCH, {**options, **common})
    chosen = _MEMORY if arguments.memory else specs.keys() - _MEMORY
    chosen = {*chosen, reference(), 'PyTorch eager, channels last'} - {*arguments.without}
    if harness.device() == 'gpu':
        chosen -= {'neurosens, one XLA device'}
    return {name: spec for name, spec in specs.items() if name in chosen}


def reference() -> str:
    """Returns the candidate that the others are compared with."""
    return OURS[harness.device()]


@contextlib.contextmanager
def running_workers(
    specs: dict[str, harness.WorkerSpec],
) -> Iterator[tuple[dict[str, harness.Worker], dict[str, str]]]:
    """Starts the workers; those of compiled PyTorch may fail.

    Args:
        specs: how to start each.

    Returns:
        The workers by name, and for each that failed why.
    """
    with contextlib.ExitStack() as stack:
        workers, failures = {}, {}
        for name, spec in specs.items():
            try:
                workers[name] = stack.enter_context(harness.worker(spec))
            except harness.WorkerError as error:
                if not spec.options.get('compiled'):
                    raise
                failures[name] = str(error).strip().splitlines()[-1]
        yield workers, failures


def table(measurement: harness.Measurement, *, images: int, floor: Sequence[float]) -> str:
    """Returns the Markdown table of one measurement, the fastest PyTorch setting in bold.

    Args:
        measurement: seconds per unit of work.
        images: images per unit of work.
        floor: seconds in each round that the operations of a unit take at the peak.
    """
    peers = [name for name in measurement.seconds if name.startswith('PyTorch')]
    fastest = harness.fastest(measurement, peers)
    rows = []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        # How many times as fast the reference is: the candidate's seconds over its own.
        ratio = harness.ratio_text(measurement.ratio(name, reference()))
        rows.append(
            (
                harness.bold(name, fastest),
                f'{images / summary.median:.0f}',
                f'{images / summary.upper_quartile:.0f}-{images / summary.lower_quartile:.0f}',
                f'{images / summary.minimum:.0f}',
                '1' if name == reference() else ratio,
                harness.percent(measurement.share(name, floor)),
            )
        )
    header = ('Candidate', 'images/s', 'quartiles', 'best round', 'speed of neurosens / its speed')
    return harness.markdown_table((*header, 'share of floor'), rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--memory', action='store_true', help='keep freed memory, or give it back')
    parser.add_argument('--batch_size', type=int, default=128, help='images per step')
    parser.add_argument('--steps', type=int, default=3, help='training steps per turn')
    parser.add_argument('--data_dir', default='', help='prepared data; noise without it')
    parser.add_argument(
        '--without', nargs='*', default=[], help='candidates to leave out, by their names'
    )
    parser.add_argument('--plot', default='', help='PNG file of the times')
    harness.add_arguments(parser, rounds=20)
    return parser.parse_args(arguments)


def step_flops(batch_size: int, data_set: str = 'cifar10') -> float:
    """Returns the operations of a training step, see `count`."""
    options = {'batch_size': batch_size, 'data_set': data_set}
    # JAX analyses the programs of a CPU, not those of every GPU.
    on_cpu = harness.environment('cpu')
    spec = harness.WorkerSpec('benchmarks.training_step:count', options, on_cpu)
    with harness.worker(spec) as counted:
        return counted.details['flops']


def main() -> None:
    """Checks, measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    # On noise: with real images the first steps at this rate amplify rounding beyond comparison.
    guard = harness.WorkerSpec('benchmarks.torch_training:check_agreement', {'data_dir': ''})
    with harness.worker(guard) as checked:
        agreement = dict(checked.details)
    data_sets = dict.fromkeys(AUGMENTATIONS, 'cifar10')
    if arguments.memory:
        data_sets[_MNIST] = 'mnist'
    flops = {name: step_flops(arguments.batch_size, name) for name in sorted({*data_sets.values()})}
    measurements, tables = {}, []
    with running_workers(worker_specs(arguments)) as (workers, failures):
        for title, data_set in data_sets.items():
            steps = arguments.steps * (_MORE_STEPS if title == _MNIST else 1)
            units = {
                name: worker.unit(title)
                for name, worker in workers.items()
                if title != _MNIST or name.startswith('neurosens')
            }
            measured, floors = harness.beside_floors(units, rounds=arguments.rounds)
            floor = floors.convolution_seconds(flops[data_set] * steps)
            measurements[title] = measured
            images = arguments.batch_size * steps
            each = f'{flops[data_set] / 1e9:.1f} GFLOP of a step on {arguments.batch_size} images'
            definition = f'{title}. Floor: the {each} at the peak rate of convolutions. {floors}'
            rows = table(measured, images=images, floor=floor)
            tables += [harness.wrapped(definition), rows]
    if arguments.plot:
        drawn = {title: measurements[title] for title in AUGMENTATIONS}
        harness.draw_times(drawn, arguments.plot, 'ms per step', 1e3 / arguments.steps)
    notes = [f'{name} did not run: {reason}' for name, reason in failures.items()]
    harness.report(
        arguments,
        harness.wrapped(
            f'{agreement["parameters"]} parameters in both; largest difference of logits '
            f'{agreement["logits"]:.1e}, of losses over {agreement["steps"]} steps '
            f'{agreement["losses"]:.1e}.'
        ),
        *tables,
        *notes,
        measurements=measurements,
        details={'agreement': agreement, 'failures': failures, 'flops': flops},
    )


if __name__ == '__main__':
    main()

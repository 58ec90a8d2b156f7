"""Images per second of training a CIFAR ResNet-20: neurosens against plain PyTorch on the same CPU.

    python -m benchmarks.training_step [--rounds N] [--batch_size B] [--data_dir DIR] [--json PATH]
        [--without CANDIDATE ...]

Both train the same network from the same weights on the same uint8 batches with the same SGD, once
with and once without random crops and flips. Before any timing, a guard checks that networks and
training steps agree.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks import harness
from neurosens import config, data, models, onednn, parallel
from neurosens.training import objectives, optimizers, step

PARAMETERS = 269_722
# Long enough for the learning rate never to reach 0 in a measurement.
UPDATES = 100_000
AUGMENTATIONS = {'with crops and flips': 'pad_crop_flip', 'without augmentation': 'none'}
OURS = 'neurosens, one XLA device per core'
_DISTINCT_BATCHES = 8
_TORCH = 'benchmarks.torch_training:prepare'


def make_module() -> nn.Module:
    """Returns the network."""
    info = data.info('cifar10')
    return models.create(
        'cifar_resnet20', num_classes=info.num_classes, mean=info.mean, std=info.std
    )


def initial_state(seed: int = 0) -> tuple[step.TrainState, Any, Any]:
    """Returns the state before the first step, the optimizer and its schedule."""
    optimizer, schedule = optimizers.make_optimizer(
        config.Optimizer(), config.Schedule(warmup=0.0), UPDATES
    )
    shape = data.info('cifar10').image_shape
    state = jax.jit(lambda key: step.init_state(make_module(), optimizer, shape, key))(
        jax.random.key(seed)
    )
    return state, optimizer, schedule


def load_batches(batch_size: int, data_dir: str) -> list[data.Batch]:
    """Returns a few training batches: of CIFAR-10, or of noise where `data_dir` is empty."""
    if data_dir:
        source = data.load('cifar10', 'train', data_dir=data_dir)
        stream = source.train_batches(batch_size=batch_size, seed=0)
        return list(itertools.islice(stream, _DISTINCT_BATCHES))
    random = np.random.default_rng(0)
    shape = data.info('cifar10').image_shape
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
    *, devices: int, keep_memory: bool, batch_size: int, steps: int, data_dir: str
) -> harness.Prepared:
    """Prepares our training step in a worker process.

    Args:
        devices: XLA devices the CPU is split into; 0 for as many as `train.py` uses.
        keep_memory: keep freed memory, as `train.py` does.
        batch_size: images per step.
        steps: training steps per unit of work.
        data_dir: directory of the prepared CIFAR-10, or empty.

    Returns:
        One unit per augmentation.
    """
    if keep_memory:
        parallel.keep_freed_memory()
    parallel.use_cpu_devices(devices or parallel.cpu_device_count(batch_size))
    onednn.use_onednn()
    mesh = parallel.data_mesh()
    batches = load_batches(batch_size, data_dir)
    units = {
        title: _training_unit(mesh, augmentation, steps, batches)
        for title, augmentation in AUGMENTATIONS.items()
    }
    return harness.Prepared(units, {'devices': mesh.size})


def _training_unit(
    mesh: jax.sharding.Mesh, augmentation: str, steps: int, batches: list[data.Batch]
) -> harness.Unit:
    state, optimizer, schedule = initial_state()
    state = parallel.replicate(mesh, state)
    train_step = step.make_train_step(
        make_module(),
        optimizer,
        schedule,
        objectives.standard(),
        (),
        mesh,
        augmentation=augmentation,
    )
    key = parallel.replicate(mesh, jax.random.key(1))
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
        OURS: (0, True),
        'neurosens, one XLA device': (1, True),
        'neurosens, giving freed memory back': (0, False),
    }
    specs = {
        name: harness.WorkerSpec(ours, {'devices': devices, 'keep_memory': keep, **common})
        for name, (devices, keep) in our_options.items()
    }
    for name, (channels_last, compiled, keep) in torch_options.items():
        options = {'channels_last': channels_last, 'compiled': compiled, 'keep_memory': keep}
        specs[name] = harness.WorkerSpec(_TORCH, {**options, **common})
    return {name: spec for name, spec in specs.items() if name not in arguments.without}


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


def table(
    measurement: harness.Measurement, *, images: int, fastest: str, reference: str = OURS
) -> str:
    """Returns the Markdown table of one measurement.

    Args:
        measurement: seconds per unit of work.
        images: images per unit of work.
        fastest: the fastest PyTorch setting, marked in bold.
        reference: the candidate that the others' throughput is compared to.
    """
    rows = []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        # How many times as fast the reference is: the candidate's seconds over its own.
        ratio = harness.ratio_text(measurement.ratio(name, reference))
        rows.append(
            (
                f'**{name}**' if name == fastest else name,
                f'{images / summary.median:.0f}',
                f'{images / summary.upper_quartile:.0f}-{images / summary.lower_quartile:.0f}',
                f'{images / summary.minimum:.0f}',
                '1' if name == reference else ratio,
            )
        )
    header = ('Candidate', 'images/s', 'quartiles', 'best round', 'speed of neurosens / its speed')
    return harness.markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=20, help='measured rounds')
    parser.add_argument('--batch_size', type=int, default=128, help='images per step')
    parser.add_argument('--steps', type=int, default=3, help='training steps per turn')
    parser.add_argument('--data_dir', default='', help='prepared CIFAR-10; noise without it')
    parser.add_argument(
        '--without', nargs='*', default=[], help='candidates to leave out, by their names'
    )
    parser.add_argument('--json', default='', help='file for the timings of every round')
    return parser.parse_args()


def main() -> None:
    """Checks, measures and prints."""
    arguments = parse_arguments()
    # On noise: with real images the first steps at this rate amplify rounding beyond comparison.
    guard = harness.WorkerSpec('benchmarks.torch_training:check_agreement', {'data_dir': ''})
    with harness.worker(guard) as checked:
        agreement = dict(checked.details)
    print(
        f'{agreement["parameters"]} parameters in both; largest difference of logits '
        f'{agreement["logits"]:.1e}, of losses over {agreement["steps"]} steps '
        f'{agreement["losses"]:.1e}'
    )
    measurements = {}
    with running_workers(worker_specs(arguments)) as (workers, failures):
        for title in AUGMENTATIONS:
            units = {name: worker.unit(title) for name, worker in workers.items()}
            measurements[title] = harness.alternate(units, rounds=arguments.rounds)
    description = harness.machine()
    print(f'\n{harness.machine_line(description)}')
    for title, measurement in measurements.items():
        peers = [name for name in measurement.seconds if name.startswith('PyTorch')]
        fastest = min(peers, key=lambda name: measurement.summary(name).median)
        images = arguments.batch_size * arguments.steps
        print(f'\nBatches of {arguments.batch_size}, {title}, {arguments.rounds} rounds:\n')
        print(table(measurement, images=images, fastest=fastest))
    for name, reason in failures.items():
        print(f'\n{name} did not run: {reason}')
    if arguments.json:
        harness.write_json(
            arguments.json,
            description=description,
            measurements=measurements,
            details={**vars(arguments), 'agreement': agreement, 'failures': failures},
        )


if __name__ == '__main__':
    main()

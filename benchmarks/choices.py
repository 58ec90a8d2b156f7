"""What single choices of this library buy: each beside the same work without it.

    python -m benchmarks.choices [--rounds N]

A training step of a ResNet-20 that gives its old state away, convolves by oneDNN, also for the
gradients of kernels, normalises by a factor and a shift with sums in one pass, keeps the results of
ReLUs, uses one XLA device per core and fetches metrics late; batches of several sizes; and one
compiled program for all batches of a data set, the last one filled up.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.interpreters import mlir

from benchmarks import harness, training_step
from neurosens import data, models, parallel
from neurosens.forward import LinenForward
from neurosens.models import channel_sums, common
from neurosens.onednn import kernel_gradient

BATCH_SIZE = 128
SIZES = (16, 32, 64, 128, 256)
_STEPS = 4
# Images that are no multiple of a batch.
_IMAGES = 1000
_TRAINING, _WHOLE = 'training step', 'all images of a test set'
# Workers: what they do otherwise, and their process-wide options.
_WORKERS: Mapping[str, dict[str, Any]] = {
    '': {},
    'convolutions and sums of XLA': {'by_onednn': False},
    'sums of batch normalisation of XLA': {'one_pass': False},
    'gradients of kernels as products of matrices': {'by_products': True},
    'batch normalisation of Flax': {'of_flax': 'normalisation'},
    'ReLU of Flax': {'of_flax': 'relu'},
    'one XLA device for all cores': {'devices': 1},
}
_SAME_PROCESS = ('without donation', 'loss fetched in every step')


def prepare(
    *,
    by_onednn: bool = True,
    by_products: bool = False,
    one_pass: bool = True,
    of_flax: str = '',
    devices: int = 0,
) -> harness.Prepared:
    """Prepares the training step, and what can be done otherwise in the same process.

    Args:
        by_onednn: whether oneDNN convolves, and sums are taken in one pass.
        by_products: whether gradients of kernels are products, as on processors without AVX-512.
        one_pass: whether sums are taken in one pass where oneDNN convolves.
        of_flax: what is Flax's in place of ours: `'normalisation'`, `'relu'` or nothing.
        devices: XLA devices; 0 for one per core.

    Returns:
        Units of a few steps each, and `donated`, the bytes that need no second place.
    """
    if by_products:
        kernel_gradient.has_avx512 = lambda: False  # type: ignore[assignment]
    if of_flax:
        {'normalisation': normalise_by_flax, 'relu': rectify_by_flax}[of_flax]()
    mesh = harness.start_jax(BATCH_SIZE, devices=devices, by_onednn=by_onednn)
    if not one_pass:
        sum_by_formula()
    batch = parallel.shard(mesh, training_step.load_batches(BATCH_SIZE, '')[0])
    state, step, key = training_step.make_step(mesh, 'none')
    memory = step.lower(state, batch, key).compile().memory_analysis()
    units = {_TRAINING: _stepping(state, step, batch, key, lambda metrics: None)}
    if by_onednn and one_pass and not (by_products or of_flax or devices):
        for name, function, look in (
            (_SAME_PROCESS[0], jax.jit(step.__wrapped__), lambda metrics: None),
            (_SAME_PROCESS[1], step, lambda metrics: float(metrics['loss'])),
        ):
            fresh, *_ = training_step.make_step(mesh, 'none')
            units[name] = _stepping(fresh, function, batch, key, look)
    return harness.Prepared(units, {'donated': memory.alias_size_in_bytes})


def normalise_by_flax() -> None:
    """Builds the networks of this process with Flax's batch normalisation from now on."""
    settings = {'momentum': 0.9, 'epsilon': 1e-5}
    common.BatchNorm = functools.partial(nn.BatchNorm, **settings)  # type: ignore[misc]


def sum_by_formula() -> None:
    """Takes the sums of batch normalisation as XLA does, from now on."""
    for primitive, formula in (
        (channel_sums.squares_p, channel_sums.squares_by_formula),
        (channel_sums.products_p, channel_sums.products_by_formula),
    ):
        lowering = mlir.lower_fun(formula, multiple_results=True)
        mlir.register_lowering(primitive, lowering, platform='cpu')


def rectify_by_flax() -> None:
    """Builds the networks of this process with Flax's ReLU from now on."""
    common.ACTIVATIONS = {**common.ACTIVATIONS, 'relu': nn.relu}


def _stepping(
    state: Any, step: Any, batch: data.Batch, key: jax.Array, look: Callable[[Any], Any]
) -> harness.Unit:
    def unit() -> None:
        nonlocal state
        for _ in range(_STEPS):
            state, metrics = step(state, batch, key)
            look(metrics)
        jax.block_until_ready((state, metrics))

    return unit


def prepare_sizes() -> harness.Prepared:
    """Prepares the training of equally many images in batches of each of `SIZES`."""
    mesh = harness.start_jax(max(SIZES))
    units = {}
    for size in SIZES:
        batch = parallel.shard(mesh, training_step.load_batches(size, '')[0])
        state, step, key = training_step.make_step(mesh, 'none')
        units[str(size)] = _sized(state, step, batch, key, max(SIZES) // size)
    return harness.Prepared(units, {})


def _sized(state: Any, step: Any, batch: data.Batch, key: jax.Array, steps: int) -> harness.Unit:
    def unit() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))

    return unit


def prepare_programs() -> harness.Prepared:
    """Prepares a forward pass over a test set, compiled anew each time: in one program or two."""
    mesh = harness.start_jax(BATCH_SIZE)
    info = data.info('cifar10')
    module = models.create('cifar_resnet20', num_classes=info.num_classes)
    forward = LinenForward(module, {'train': False})
    images = np.random.default_rng(0).random((_IMAGES, *info.image_shape), np.float32)
    variables = parallel.replicate(mesh, jax.jit(module.init)(jax.random.key(0), images[:1]))

    def logits(variables: Any, x: jax.Array) -> jax.Array:
        return forward(variables, x)[0]

    def unit(padded: bool) -> None:
        # A function of its own, so that nothing is compiled already.
        run = jax.jit(lambda variables, x: logits(variables, x))
        for start in range(0, _IMAGES, BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            if padded and len(batch) < BATCH_SIZE:
                batch = np.concatenate([batch, images[: BATCH_SIZE - len(batch)]])
            jax.block_until_ready(run(variables, parallel.shard(mesh, batch)))

    units = {_WHOLE: lambda: unit(True), 'a program for the last batch': lambda: unit(False)}
    flops = harness.count_flops(jax.jit(logits), variables, images)
    return harness.Prepared(units, {'flops': flops})


def table(
    choices: harness.Measurement,
    sizes: harness.Measurement,
    programs: harness.Measurement,
    floor: Sequence[float],
    floor_of_sizes: Sequence[float],
    floor_of_programs: Sequence[float] | None,
) -> str:
    """Returns the Markdown table.

    Args:
        choices: seconds of a few training steps, by what is done otherwise.
        sizes: seconds of equally many images, by batch size.
        programs: seconds of a test set, compilation with it.
        floor: seconds of these training steps at the peak of convolutions, in each round.
        floor_of_sizes: those of the images of all sizes.
        floor_of_programs: those of a forward pass of the test set; None where nobody counted.
    """
    rows = []
    for name in choices.seconds:
        rows.append(
            (
                _TRAINING if name == _TRAINING else f'{_TRAINING}, {name}',
                f'{harness.time_text(choices.summary(name), 1e3 / _STEPS, 0)} ms',
                '1' if name == _TRAINING else harness.ratio_text(choices.ratio(name, _TRAINING)),
                harness.percent(choices.share(name, floor)),
            )
        )
    usual = str(BATCH_SIZE)
    for size in sizes.seconds:
        rows.append(
            (
                f'{max(SIZES)} images in batches of {size}',
                f'{harness.time_text(sizes.summary(size), 1e3, 0)} ms',
                '1' if size == usual else harness.ratio_text(sizes.ratio(size, usual)),
                harness.percent(sizes.share(size, floor_of_sizes)),
            )
        )
    for name in programs.seconds:
        share = '-'
        if floor_of_programs is not None:
            share = harness.percent(programs.share(name, floor_of_programs))
        rows.append(
            (
                f'{_IMAGES:,} images and compilation, '
                + ('one program, the last batch filled up' if name == _WHOLE else name),
                f'{harness.time_text(programs.summary(name), 1, 2)} s',
                '1' if name == _WHOLE else harness.ratio_text(programs.ratio(name, _WHOLE)),
                share,
            )
        )
    return harness.markdown_table(
        ('Work', 'time', 'time / as the library does', 'share of floor'), rows
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds')
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Times everything in turns and prints the table."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    with contextlib.ExitStack() as stack:

        def start(factory: str, options: Mapping[str, Any]) -> harness.Worker:
            spec = harness.WorkerSpec(f'benchmarks.{factory}', dict(options))
            return stack.enter_context(harness.worker(spec))

        workers = {name: start('choices:prepare', options) for name, options in _WORKERS.items()}
        units = {name or _TRAINING: worker.unit(_TRAINING) for name, worker in workers.items()}
        units |= {name: workers[''].unit(name) for name in _SAME_PROCESS}
        choices, floors = harness.beside_floors(units, rounds=arguments.rounds)
        donated = workers[''].details['donated'] / 2**20
        of_sizes = start('choices:prepare_sizes', {})
        sizes, beside_sizes = harness.beside_floors(
            {str(size): of_sizes.unit(str(size)) for size in SIZES}, rounds=arguments.rounds
        )
        of_programs = start('choices:prepare_programs', {})
        programs, beside_programs = harness.beside_floors(
            {name: of_programs.unit(name) for name in (_WHOLE, 'a program for the last batch')},
            rounds=max(arguments.rounds // 2, 2),
        )
        flops_of_programs = of_programs.details['flops']
    flops = training_step.step_flops(BATCH_SIZE)
    floor = floors.convolution_seconds(_STEPS * flops)
    floor_of_sizes = beside_sizes.convolution_seconds(max(SIZES) // BATCH_SIZE * flops)
    floor_of_programs = None
    if flops_of_programs is not None:
        floor_of_programs = beside_programs.convolution_seconds(flops_of_programs)
    definition = (
        f'ResNet-20, batches of {BATCH_SIZE} where no other size is said. What a training step '
        f'gives away needs no second place: {donated:.1f} MiB, parameters and optimizer. Floor: '
        'the operations of the step, of those on 256 images, or of the forward pass of all images, '
        'without compilation, at the peak of convolutions in their own rounds. Times stand with '
        f'their quartiles. Of the step: {floors}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        table(choices, sizes, programs, floor, floor_of_sizes, floor_of_programs),
        measurements={'choices': choices, 'sizes': sizes, 'programs': programs},
    )


if __name__ == '__main__':
    main()

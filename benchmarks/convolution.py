"""Single convolutions on a CPU: what XLA chooses, oneDNN inside of XLA, and PyTorch.

    python -m benchmarks.convolution [--rounds N]

Forward passes and gradients with respect to images and to kernels, of the shapes of small image
classifiers, in batches of 128, with one XLA device per core.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from benchmarks import harness
from neurosens import onednn, parallel

BATCH_SIZE = 128
# What is timed, and its operations relative to those of a forward pass.
KINDS = {'forward': 1, 'gradient': 2, 'kernel gradient': 1}
# The candidates, each in a worker process.
SIDES = ('XLA', 'oneDNN', 'PyTorch')
# Of a unit, so many of which are a turn: the way to a worker and back would count in one call.
_UNIT_SECONDS = 0.03
_UNITS = 3


class Shape(NamedTuple):
    """A convolution: side and channels of its images, output channels, window and stride."""

    side: int
    inputs: int
    outputs: int
    window: int
    stride: int

    def __str__(self) -> str:
        strided = f', stride {self.stride}' if self.stride > 1 else ''
        side = f'{self.side} x {self.side} x {self.inputs} to {self.outputs}'
        return f'{side}, {self.window} x {self.window}{strided}'

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and kernel."""
        random = np.random.default_rng(0)
        images = random.standard_normal((BATCH_SIZE, self.side, self.side, self.inputs), 'f4')
        kernel = random.standard_normal((self.window, self.window, self.inputs, self.outputs), 'f4')
        return images, kernel

    def cotangents(self) -> np.ndarray:
        """Derivatives with respect to what the convolution returns."""
        side = -(-self.side // self.stride)
        random = np.random.default_rng(1)
        return random.standard_normal((BATCH_SIZE, side, side, self.outputs), 'f4')

    def flops(self) -> float:
        """Operations of a forward pass, without products with the zeros around images."""
        return BATCH_SIZE * harness.convolution_flops(*self)


SHAPES = (
    Shape(32, 3, 16, 3, 1),
    Shape(32, 16, 16, 3, 1),
    Shape(32, 16, 32, 3, 2),
    Shape(16, 32, 32, 3, 1),
    Shape(8, 64, 64, 3, 1),
    Shape(28, 1, 32, 3, 1),
    Shape(14, 32, 64, 3, 1),
    Shape(28, 1, 6, 5, 1),
    Shape(16, 32, 128, 1, 1),
)


def prepare(*, by_onednn: bool) -> harness.Prepared:
    """Prepares our convolutions in a worker process.

    Args:
        by_onednn: convolve with oneDNN.
    """
    mesh = harness.start_jax(BATCH_SIZE, by_onednn=False)
    if by_onednn and not onednn.use_onednn():
        raise ValueError('oneDNN is not used on this machine.')
    units: dict[str, harness.Unit] = {}
    for shape in SHAPES:
        images, kernel = shape.arrays()
        x, w = parallel.shard(mesh, images), parallel.replicate(mesh, kernel)
        run = functools.partial(_convolve, shape=shape)
        gradient = jax.grad(lambda x, w, run=run: (run(x, w) ** 2).sum())
        units[f'{shape} forward'] = _blocking(jax.jit(run), x, w)
        units[f'{shape} gradient'] = _blocking(jax.jit(gradient), x, w)
        cotangents = parallel.shard(mesh, shape.cotangents())
        units[f'{shape} kernel gradient'] = _blocking(
            jax.jit(lambda x, w, y, run=run: jax.vjp(lambda w: run(x, w), w)[1](y)),
            *(x, w, cotangents),
        )
    return lasting(units, devices=mesh.size)


def lasting(units: Mapping[str, harness.Unit], **details: Any) -> harness.Prepared:
    """Returns what a worker offers: units of several calls, and how many `calls` each has.

    Args:
        units: one call each.
        **details: further facts to report.
    """
    repeated = {name: harness.lasting(unit, _UNIT_SECONDS) for name, unit in units.items()}
    calls = {name: count for name, (_, count) in repeated.items()}
    several = {name: unit for name, (unit, _) in repeated.items()}
    return harness.Prepared(several, {**details, 'calls': calls})


def _convolve(x: jax.Array, w: jax.Array, shape: Shape) -> jax.Array:
    edge = (shape.window - 1) // 2
    return lax.conv_general_dilated(
        x, w, (shape.stride,) * 2, ((edge, edge),) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _blocking(function: Callable[..., Any], *arrays: jax.Array) -> harness.Unit:
    function(*arrays)
    return lambda: jax.block_until_ready(function(*arrays))


def table(measured: harness.Measurement, floors: harness.Floors) -> str:
    """Returns the Markdown table, the fastest side of each row in bold.

    Args:
        measured: seconds of one call, by `unit_name`.
        floors: peaks in the same rounds.
    """
    rows = []
    for shape, kind in _cases():
        names = {side: unit_name(side, shape, kind) for side in SIDES}
        fastest = harness.fastest(measured, list(names.values()))
        floor = floors.convolution_seconds(shape.flops() * KINDS[kind])
        times = {name: harness.time_text(measured.summary(name), 1e3, 2) for name in names.values()}
        rows.append(
            (
                f'{shape} {kind}',
                *(f'**{text}**' if name == fastest else text for name, text in times.items()),
                harness.ratio_text(measured.ratio(names['XLA'], names['oneDNN'])),
                harness.ratio_text(measured.ratio(names['PyTorch'], names['oneDNN'])),
                *(harness.percent(measured.share(name, floor)) for name in names.values()),
            )
        )
    header = ('Convolution', *(f'{side}, ms' for side in SIDES), 'XLA / oneDNN', 'PyTorch / oneDNN')
    return harness.markdown_table((*header, *(f'share of floor, {side}' for side in SIDES)), rows)


def unit_name(side: str, shape: Shape, kind: str) -> str:
    """Returns the name of a measured unit."""
    return f'{side}: {shape} {kind}'


def _cases() -> list[tuple[Shape, str]]:
    return [(shape, kind) for shape in SHAPES for kind in KINDS]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser, rounds=20, devices=('cpu',))
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device('cpu')
    ours, theirs = 'benchmarks.convolution:prepare', 'benchmarks.torch_convolution:prepare'
    specs = {
        'XLA': harness.WorkerSpec(ours, {'by_onednn': False}),
        'oneDNN': harness.WorkerSpec(ours, {'by_onednn': True}),
        'PyTorch': harness.WorkerSpec(theirs),
    }
    units, calls = {}, {}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(harness.worker(specs[side])) for side in SIDES}
        for shape, kind in _cases():
            for side, worker in workers.items():
                name = unit_name(side, shape, kind)
                units[name] = worker.unit(f'{shape} {kind}')
                calls[name] = worker.details['calls'][f'{shape} {kind}']
        several, floors = harness.beside_floors(units, rounds=arguments.rounds, repeats=_UNITS)
    measured = several.per_call(calls)
    definition = (
        f'Batches of {BATCH_SIZE}. In its turn each is called for {1e3 * _UNIT_SECONDS:.0f} ms or '
        f'longer, {_UNITS} times, of which the median counts; times are those of one call, with '
        'their quartiles over rounds. A gradient is a forward pass, a square and the gradient with '
        'respect to the images; that of the kernel is alone. Forward passes of 1 x 1 are the same '
        'program under XLA and oneDNN: their ratio shows the noise. Floor: the operations of the '
        'convolutions in it, without products with the zeros around images, at the peak rate of '
        f'convolutions. {floors}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        table(measured, floors),
        measurements={'convolution': measured},
        details={'calls': calls},
    )


if __name__ == '__main__':
    main()

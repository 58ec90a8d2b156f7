"""Single convolutions on a CPU: what XLA chooses, oneDNN inside of XLA, and PyTorch.

    python -m benchmarks.convolution [--rounds N]

Forward passes and gradients with respect to images and to kernels, of the shapes of small image
classifiers, in batches of 128, with one XLA device per core.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from benchmarks import harness
from neurosens import onednn, parallel

BATCH_SIZE = 128
# What is timed, and its operations relative to those of a forward pass.
KINDS = {'forward': 1, 'gradient': 2, 'kernel gradient': 1}


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
        """Operations of a forward pass."""
        pixels = (-(-self.side // self.stride)) ** 2
        return 2.0 * BATCH_SIZE * pixels * self.window**2 * self.inputs * self.outputs


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
    return harness.Prepared(units, {'devices': mesh.size})


def _convolve(x: jax.Array, w: jax.Array, shape: Shape) -> jax.Array:
    edge = (shape.window - 1) // 2
    return lax.conv_general_dilated(
        x, w, (shape.stride,) * 2, ((edge, edge),) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _blocking(function: Callable[..., Any], *arrays: jax.Array) -> harness.Unit:
    function(*arrays)
    return lambda: jax.block_until_ready(function(*arrays))


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
    cases = [(shape, kind) for shape in SHAPES for kind in KINDS]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(harness.worker(spec)) for name, spec in specs.items()}
        units = {
            f'{name}: {shape} {kind}': worker.unit(f'{shape} {kind}')
            for shape, kind in cases
            for name, worker in workers.items()
        }
        measured, floors = harness.beside_floors(units, rounds=arguments.rounds, repeats=3)
    rows = []
    for shape, kind in cases:
        names = {name: f'{name}: {shape} {kind}' for name in specs}
        fastest = harness.fastest(measured, list(names.values()))
        times = {unit: f'{1000 * measured.summary(unit).median:.2f}' for unit in names.values()}
        floor = floors.convolution_seconds(shape.flops() * KINDS[kind])
        rows.append(
            (
                f'{shape} {kind}',
                *(harness.bold(text, times[fastest]) for text in times.values()),
                harness.ratio_text(measured.ratio(names['XLA'], names['oneDNN'])),
                harness.ratio_text(measured.ratio(names['PyTorch'], names['oneDNN'])),
                *(harness.percent(measured.share(unit, floor)) for unit in names.values()),
            )
        )
    header = ('Convolution', *(f'{name}, ms' for name in specs), 'XLA / oneDNN', 'PyTorch / oneDNN')
    header = (*header, *(f'share of floor, {name}' for name in specs))
    definition = (
        f'Batches of {BATCH_SIZE}. A gradient is a forward pass, a square and the gradient with '
        'respect to the images; that of the kernel is alone. Floor: the operations of the '
        f'convolutions in it, at the peak rate of convolutions. {floors}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
        measurements={'convolution': measured},
    )


if __name__ == '__main__':
    main()

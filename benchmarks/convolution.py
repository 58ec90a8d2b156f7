"""Single convolutions on a CPU: what XLA chooses, oneDNN inside of XLA, and PyTorch.

    python -m benchmarks.convolution [--rounds N]

Forward passes and gradients with respect to the images, of the shapes of small image classifiers,
in batches of 128, with one XLA device per core.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import lax

from benchmarks import harness
from neurosens import onednn, parallel

BATCH_SIZE = 128


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


SHAPES = (
    Shape(32, 3, 16, 3, 1),
    Shape(32, 16, 16, 3, 1),
    Shape(32, 16, 32, 3, 2),
    Shape(16, 32, 32, 3, 1),
    Shape(8, 64, 64, 3, 1),
    Shape(28, 1, 32, 3, 1),
    Shape(14, 32, 64, 3, 1),
    Shape(28, 1, 6, 5, 1),
)


def prepare_ours(*, by_onednn: bool) -> harness.Prepared:
    """Prepares our convolutions in a worker process.

    Args:
        by_onednn: convolve with oneDNN.
    """
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(BATCH_SIZE))
    if by_onednn and not onednn.use_onednn():
        raise ValueError('oneDNN is not used on this machine.')
    mesh = parallel.data_mesh()
    units: dict[str, harness.Unit] = {}
    for shape in SHAPES:
        images, kernel = shape.arrays()
        x, w = parallel.shard(mesh, images), parallel.replicate(mesh, kernel)
        run = functools.partial(_convolve, shape=shape)
        gradient = jax.grad(lambda x, w, run=run: (run(x, w) ** 2).sum())
        units[f'{shape} forward'] = _blocking(jax.jit(run), x, w)
        units[f'{shape} gradient'] = _blocking(jax.jit(gradient), x, w)
    return harness.Prepared(units, {'devices': mesh.size})


def _convolve(x: jax.Array, w: jax.Array, shape: Shape) -> jax.Array:
    edge = (shape.window - 1) // 2
    return lax.conv_general_dilated(
        x, w, (shape.stride,) * 2, ((edge, edge),) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _blocking(function: Callable[..., Any], *arrays: jax.Array) -> harness.Unit:
    function(*arrays)
    return lambda: jax.block_until_ready(function(*arrays))


def prepare_torch() -> harness.Prepared:
    """Prepares PyTorch's convolutions, channels last, in a worker process."""
    parallel.keep_freed_memory()
    torch.set_num_threads(harness.cores())
    units: dict[str, harness.Unit] = {}
    for shape in SHAPES:
        images, kernel = shape.arrays()
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        w = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        w = w.contiguous(memory_format=torch.channels_last)
        edge = (shape.window - 1) // 2
        run = functools.partial(
            torch.nn.functional.conv2d, weight=w, stride=shape.stride, padding=edge
        )

        def forward(run: Callable[..., Any] = run, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                run(x)

        def gradient(run: Callable[..., Any] = run, x: torch.Tensor = x) -> None:
            leaf = x.detach().requires_grad_()
            torch.autograd.grad((run(leaf) ** 2).sum(), leaf)

        units[f'{shape} forward'], units[f'{shape} gradient'] = forward, gradient
    return harness.Prepared(units, {'threads': torch.get_num_threads()})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=20, help='measured rounds')
    arguments = parser.parse_args()
    factory = 'benchmarks.convolution:'
    specs = {
        'XLA': harness.WorkerSpec(f'{factory}prepare_ours', {'by_onednn': False}),
        'oneDNN': harness.WorkerSpec(f'{factory}prepare_ours', {'by_onednn': True}),
        'PyTorch': harness.WorkerSpec(f'{factory}prepare_torch', {}),
    }
    with (
        harness.worker(specs['XLA']) as plain,
        harness.worker(specs['oneDNN']) as ours,
        harness.worker(specs['PyTorch']) as theirs,
    ):
        workers = {'XLA': plain, 'oneDNN': ours, 'PyTorch': theirs}
        rows = []
        for shape in SHAPES:
            for kind in ('forward', 'gradient'):
                units = {name: worker.unit(f'{shape} {kind}') for name, worker in workers.items()}
                measured = harness.alternate(units, rounds=arguments.rounds, repeats=3)
                times = (f'{1000 * measured.summary(name).median:.2f}' for name in workers)
                rows.append(
                    (
                        f'{shape} {kind}',
                        *times,
                        harness.ratio_text(measured.ratio('XLA', 'oneDNN')),
                        harness.ratio_text(measured.ratio('PyTorch', 'oneDNN')),
                    )
                )
    header = ('Convolution', 'XLA, ms', 'oneDNN, ms', 'PyTorch, ms', 'XLA / oneDNN')
    print(f'Batches of {BATCH_SIZE}, {arguments.rounds} rounds:\n')
    print(harness.markdown_table((*header, 'PyTorch / oneDNN'), rows))
    print(f'\n{harness.machine_line(harness.machine())}')


if __name__ == '__main__':
    main()

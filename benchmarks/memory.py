"""Peak memory of PGD against its batch, and of Delta against its chunk of neurons.

    python -m benchmarks.memory [--device cpu|gpu]

Each row runs in a process of its own. Training steps with every regularizer are measured by
`benchmarks.regularizers memory`, nodal dropout by `benchmarks.neurons memory`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from benchmarks import harness, neuron_problems
from neurosens import attacks, neurons, parallel
from neurosens.forward import LinenForward

BATCHES = (16, 32, 64, 128, 256, 512)
CHUNKS = (1, 2, 4, 8, 16)
IMAGES = 64
# Behind it other blocks follow, so that Delta takes derivatives rather than the closed form.
LAYER = 'stage2_block3'
_STEPS = 20


def _resnet(mesh: jax.sharding.Mesh, images: int) -> tuple[LinenForward, Any, Any, Any]:
    """A network, its variables, images and labels on their devices."""
    forward = LinenForward(neuron_problems.resnet20(), {'train': False})
    variables = parallel.replicate(mesh, neuron_problems.resnet20_variables(0))
    x, y = parallel.shard(
        mesh, (neuron_problems.images(images, 0), neuron_problems.labels(images, 0))
    )
    return forward, variables, x, y


def prepare_pgd(*, batch_size: int) -> harness.Prepared:
    """Runs PGD on a ResNet-20 in a worker process and reports its memory.

    Args:
        batch_size: images.

    Returns:
        No units; the temporaries of the program, those of one input gradient of as many images, and
        the peak of the process, in MiB.
    """
    mesh = harness.start_jax(batch_size)
    forward, variables, x, y = _resnet(mesh, batch_size)
    key = parallel.replicate(mesh, jax.random.key(0))

    @jax.jit
    def pgd(variables: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        threat = attacks.Threat('linf', 8 / 255)
        return attacks.pgd(forward, variables, x, y, key, threat=threat, steps=_STEPS)

    @jax.jit
    @functools.partial(jax.grad, argnums=1)
    def gradient(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = forward(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

    floor = functools.partial(harness.temporary_memory, mesh, gradient, variables, x, y)
    return _measured(mesh, floor, pgd, variables, x, y, key)


def prepare_delta(*, chunk: int) -> harness.Prepared:
    """Runs Delta of the channels of a block of a ResNet-20 and reports its memory.

    Args:
        chunk: derivatives of logits at once for each image.

    Returns:
        As `prepare_pgd`, but with the temporaries of one forward pass.
    """
    mesh = harness.start_jax(IMAGES)
    forward, variables, x, _ = _resnet(mesh, IMAGES)

    @jax.jit
    def delta(variables: Any, x: jax.Array) -> Any:
        return neurons.sensitivity(forward, variables, x, layer=LAYER, chunk=chunk)

    @jax.jit
    def logits(variables: Any, x: jax.Array) -> jax.Array:
        return forward(variables, x)[0]

    floor = functools.partial(harness.temporary_memory, mesh, logits, variables, x)
    return _measured(mesh, floor, delta, variables, x)


def _measured(
    mesh: jax.sharding.Mesh,
    floor: Callable[[], float],
    function: Callable[..., Any],
    *arguments: Any,
) -> harness.Prepared:
    # The peak first: a process keeps what compiling other programs took.
    peak = harness.peak_memory(lambda: jax.block_until_ready(function(*arguments)))
    temporary = harness.temporary_memory(mesh, function, *arguments)
    return harness.Prepared({}, {'temporary': temporary, 'floor': floor(), 'peak': peak})


def _rows(factory: str, option: str, values: Sequence[int]) -> list[tuple[str, ...]]:
    rows = []
    for value in values:
        spec = harness.WorkerSpec(f'benchmarks.memory:{factory}', {option: value})
        with harness.worker(spec) as worker:
            found: Mapping[str, float] = worker.details
        temporary, floor = found['temporary'], found['floor']
        cells = (f'{temporary:.0f}', f'{floor:.0f}', harness.percent(floor / temporary))
        rows.append((f'{value}', *cells, f'{found["peak"]:.0f}'))
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, nargs='+', default=BATCHES, help='images of PGD')
    parser.add_argument('--chunks', type=int, nargs='+', default=CHUNKS, help='chunks of Delta')
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    columns = ('temporaries of the program', 'floor', 'share of floor', 'peak of the process')
    pgd = _rows('prepare_pgd', 'batch_size', arguments.batches)
    delta = _rows('prepare_delta', 'chunk', arguments.chunks)
    definition = (
        'MiB, each row in a process of its own, which keeps what it frees; the temporaries are '
        'those of all devices, the peak includes JAX itself. Floor: the temporaries of one input '
        'gradient of as many images, or of one forward pass.'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        f'PGD of {_STEPS} steps on a ResNet-20:',
        harness.markdown_table(('Images per batch', *columns), pgd),
        harness.wrapped(
            f'Delta of the 32 channels of `{LAYER}` of a ResNet-20, {IMAGES} images at once:'
        ),
        harness.markdown_table(('Chunk of derivatives', *columns), delta),
    )


if __name__ == '__main__':
    main()

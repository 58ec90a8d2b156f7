"""What batch normalisation costs at evaluation, and so what folding it into kernels could save.

    python -m benchmarks.batch_norm [--rounds N] [--batch_size B]

A forward pass and an input gradient of ResNet-20 with running statistics, with nothing left of each
normalisation but its bias, as after folding its factor into the kernel before it, and without any:
the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from benchmarks import harness
from neurosens import data, models, parallel
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import LinenForward
from neurosens.models import BatchNorm

MODEL, DATASET = 'cifar_resnet20', 'cifar10'
FORWARD, GRADIENT = 'forward pass', 'input gradient'


def _replaced(instead: Callable[[BatchNorm, jax.Array], jax.Array]) -> Any:
    """An interceptor that puts a function in the place of every batch normalisation."""

    def intercept(method: Any, arguments: Any, options: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == '__call__':
            return instead(context.module, arguments[0])
        return method(*arguments, **options)

    return intercept


def _bias(module: BatchNorm, x: jax.Array) -> jax.Array:
    return x + module.get_variable('params', 'bias')


KINDS: dict[str, Any] = {
    'running statistics': None,
    'a bias, as if folded': _replaced(_bias),
    'none': _replaced(lambda module, x: x),
}


def prepare(*, batch_size: int) -> harness.Prepared:
    """Prepares all passes in a worker process.

    Args:
        batch_size: images per batch.

    Returns:
        One unit per pass and kind.
    """
    mesh = harness.start_jax(batch_size)
    info = data.info(DATASET)
    module = models.create(MODEL, num_classes=info.num_classes, mean=info.mean, std=info.std)
    forward = LinenForward(module, {'train': False})
    random = np.random.default_rng(0)
    images = random.random((batch_size, *info.image_shape), np.float32)
    labels = random.integers(0, info.num_classes, batch_size, np.int32)
    x, y = parallel.shard(mesh, (images, labels))
    variables = parallel.replicate(mesh, jax.jit(module.init)(jax.random.key(0), images[:1]))

    def logits(variables: Any, x: jax.Array) -> jax.Array:
        return forward(variables, x)[0]

    def gradient(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            fit = optax.softmax_cross_entropy_with_integer_labels
            return fit(logits(variables, x), y).sum()

        return jax.grad(with_fast_input_gradients(loss))(x)

    units: dict[str, harness.Unit] = {}
    for kind, interceptor in KINDS.items():
        for name, function, arguments in (
            (FORWARD, logits, (variables, x)),
            (GRADIENT, gradient, (variables, x, y)),
        ):
            units[f'{name}, {kind}'] = _unit(function, interceptor, arguments)
    flops = harness.count_flops(jax.jit(logits), variables, x)
    return harness.Prepared(units, {'devices': mesh.size, 'units': list(units), 'flops': flops})


def _unit(
    function: Callable[..., jax.Array], interceptor: Any, arguments: tuple[Any, ...]
) -> harness.Unit:
    # A function of its own: of the same one JAX would take the trace of another kind.
    def run(*arguments: Any) -> jax.Array:
        if interceptor is None:
            return function(*arguments)
        with nn.intercept_methods(interceptor):
            return function(*arguments)

    compiled = jax.jit(run).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def table(measurement: harness.Measurement) -> str:
    """Returns the Markdown table."""
    rows = []
    for name in (FORWARD, GRADIENT):
        whole, floor = (f'{name}, {kind}' for kind in ('running statistics', 'none'))
        for kind in KINDS:
            own = f'{name}, {kind}'
            rows.append(
                (
                    name,
                    kind,
                    f'{measurement.summary(own).median * 1e3:.0f}',
                    '1' if own == whole else harness.ratio_text(measurement.ratio(own, whole)),
                    harness.percent(measurement.share(own, measurement.seconds[floor])),
                )
            )
    header = ('Pass', 'normalisation', 'ms per batch', 'time / running statistics')
    return harness.markdown_table((*header, 'share of floor'), rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=25, help='timed rounds')
    parser.add_argument('--batch_size', type=int, default=128, help='images per batch')
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Times all passes in turns and prints the table."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    spec = harness.WorkerSpec('benchmarks.batch_norm:prepare', {'batch_size': arguments.batch_size})
    with harness.worker(spec) as worker:
        units = {name: worker.unit(name) for name in worker.details['units']}
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
        pace = floors.pace(measurement, {f'{FORWARD}, none': worker.details['flops']})
    definition = (
        f'ResNet-20 on {arguments.batch_size} images. Floor: the same network without '
        f'normalisations. {pace}'
    )
    measurements = {MODEL: measurement}
    harness.report(
        arguments, harness.wrapped(definition), table(measurement), measurements=measurements
    )


if __name__ == '__main__':
    main()

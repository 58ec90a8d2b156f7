"""Cost of PGD with few steps against the gradient calls it is made of.

    python -m benchmarks.attack_loop [--rounds N] [--batch_size B] [--steps K]

The floor is K calls of a compiled input gradient of the whole batch, one after another, without any
loop. On a CPU a compiled loop over the same gradients can be much slower, unless its convolutions
are rewritten by `neurosens.convolution.with_fast_input_gradients`; the plain loop shows by how
much.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from neurosens import attacks, data, models, parallel
from neurosens.convolution import with_fast_input_gradients
from neurosens.forward import LinenForward

MODELS = {'cifar_resnet20': 'cifar10', 'lenet5_wide': 'mnist'}
FLOOR = 'input gradients, one call per step'
_EPS = 8 / 255

ExampleLoss: TypeAlias = Callable[[jax.Array], jax.Array]


def prepare(*, model: str, batch_size: int, steps: int, devices: int) -> harness.Prepared:
    """Prepares all candidates for one network in a worker process.

    Args:
        model: name of the network.
        batch_size: images per batch.
        steps: gradient steps.
        devices: XLA devices the CPU is split into; 0 for as many as `evaluate.py` uses.

    Returns:
        One unit per candidate.
    """
    mesh = harness.start_jax(batch_size, devices=devices)
    info = data.info(MODELS[model])
    module = models.create(model, num_classes=info.num_classes, mean=info.mean, std=info.std)
    forward = LinenForward(module, {'train': False})
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((batch_size, *info.image_shape), np.float32))
    labels = jnp.asarray(random.integers(0, info.num_classes, batch_size, np.int32))
    shape = jnp.zeros((1, *info.image_shape))
    variables = parallel.replicate(mesh, jax.jit(module.init)(jax.random.key(0), shape))
    x = parallel.shard(mesh, images)
    # Attacks leave an image that is misclassified as it is, but spend the same time on it.
    y = parallel.shard(mesh, labels)
    threat = attacks.Threat('linf', _EPS)
    key = parallel.replicate(mesh, jax.random.key(1))

    def loss(variables: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        logits = forward(variables, image[None])[0][0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def batch_loss(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(variables, images)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    gradient = jax.jit(jax.grad(batch_loss, argnums=1))
    logits = jax.jit(lambda variables, x: forward(variables, x)[0])

    def separate_calls() -> list[jax.Array]:
        return [gradient(variables, x, y) for _ in range(steps)]

    def separate_calls_and_forwards() -> list[jax.Array]:
        return [*separate_calls(), logits(variables, x), logits(variables, x)]

    rewrites: dict[str, Callable[[ExampleLoss], ExampleLoss]] = {
        'the loop, plain': lambda function: function,
        'the loop, rewritten convolutions': with_fast_input_gradients,
    }
    units: dict[str, harness.Unit] = {
        FLOOR: _blocking(separate_calls),
        'the same and two forward passes': _blocking(separate_calls_and_forwards),
        'neurosens.attacks.pgd': _blocking(
            lambda: attacks.pgd(forward, variables, x, y, key, threat=threat, steps=steps)
        ),
    }
    for name, rewrite in rewrites.items():
        loop = jax.jit(functools.partial(_loops, loss, rewrite, threat, steps))
        units[name] = _blocking(functools.partial(loop, variables, x, y))
    flops = harness.count_flops(gradient, variables, x, y, calls=steps)
    return harness.Prepared(units, {'devices': mesh.size, 'units': list(units), 'flops': flops})


def _loops(
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array],
    rewrite: Callable[[ExampleLoss], ExampleLoss],
    threat: attacks.Threat,
    steps: int,
    variables: Any,
    x: jax.Array,
    y: jax.Array,
) -> jax.Array:
    """Signed gradient steps inside one compiled loop, without PGD's bookkeeping."""

    def one(image: jax.Array, label: jax.Array) -> jax.Array:
        gradient = jax.grad(rewrite(lambda moved: loss(variables, moved, label)))

        def step(_: jax.Array, moved: jax.Array) -> jax.Array:
            direction = attacks.steepest_ascent(threat, gradient(moved))
            return attacks.project(threat, image, moved + threat.eps / steps * direction)

        return jax.lax.fori_loop(0, steps, step, image)

    return jax.vmap(one)(x, y)


def _blocking(function: Callable[[], Any]) -> harness.Unit:
    return lambda: jax.block_until_ready(function())


def table(measurement: harness.Measurement) -> str:
    """Returns the Markdown table of one network."""
    rows = []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        rows.append(
            (
                name,
                f'{summary.median * 1e3:.0f}',
                f'{summary.lower_quartile * 1e3:.0f}-{summary.upper_quartile * 1e3:.0f}',
                f'{summary.minimum * 1e3:.0f}',
                '1' if name == FLOOR else harness.ratio_text(measurement.ratio(name, FLOOR)),
                harness.percent(measurement.share(name, measurement.seconds[FLOOR])),
            )
        )
    header = ('Candidate', 'ms per batch', 'quartiles', 'best round', 'time / floor')
    header = (*header, 'share of floor')
    return harness.markdown_table(header, rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch_size', type=int, default=128, help='images per batch')
    parser.add_argument('--steps', type=int, default=5, help='gradient steps')
    parser.add_argument('--devices', type=int, default=0, help='XLA devices; 0 for one per core')
    harness.add_arguments(parser, rounds=10)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    measurements, tables = {}, []
    for model, dataset in MODELS.items():
        options = {
            'model': model,
            'batch_size': arguments.batch_size,
            'steps': arguments.steps,
            'devices': arguments.devices,
        }
        spec = harness.WorkerSpec('benchmarks.attack_loop:prepare', options)
        with harness.worker(spec) as worker:
            units = {name: worker.unit(name) for name in worker.details['units']}
            measurements[model], floors = harness.beside_floors(units, rounds=arguments.rounds)
            pace = floors.pace(measurements[model], {FLOOR: worker.details['flops']})
        shape = ' x '.join(map(str, data.info(dataset).image_shape))
        title = f'`{model}` on images of {shape}. {pace}'
        tables += [harness.wrapped(title), table(measurements[model])]
    definition = (
        f'Floor: {arguments.steps} calls of a compiled input gradient of the whole batch of '
        f'{arguments.batch_size}.'
    )
    harness.report(arguments, definition, *tables, measurements=measurements)


if __name__ == '__main__':
    main()

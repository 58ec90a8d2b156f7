"""Speed of the neuron measures, against floors and against PyTorch.

    python -m benchmarks.neurons SUBJECT [--rounds N]

Subjects: `delta`, `input_gradients`, `probes`, `logit_gradients`, `few_neurons`,
`ablation`, `memory`, `scaling`.
The inputs are those of `benchmarks.neuron_problems`, the peers those of `benchmarks.torch_neurons`.
Before timing, the results of both sides are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness, neuron_problems
from neurosens import models, neurons, parallel
from neurosens.forward import LinenForward, with_edits
from neurosens.neurons.statistics import activation_summary

DELTA = {'images': 10_000, 'neurons': 512, 'classes': 10, 'seed': 0}
GRADIENT_IMAGES = 64
LOGIT_LAYER = 'stage2_block3'
FEW_LAYER = 'stage1_block3'
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
DEPTHS = (20, 32, 44, 56)
CHUNKS = (1, 2, 4, 8, 16, 32, 65)
# Of scaling: the layer whose neurons are measured, and directions of random probes.
_MEASURED, _PROBES = 'act1', 4
_MULTIPLIES = 64
_AGREEING = 0.97


def _blocking(function: Callable[[], Any]) -> harness.Unit:
    return lambda: jax.block_until_ready(function())


def _prepared(units: Mapping[str, harness.Unit], **details: Any) -> harness.Prepared:
    return harness.Prepared(units, {**details, 'units': list(units)})


def _place(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    return parallel.replicate(mesh, jax.tree.map(jnp.asarray, variables))


def _save(output: str, **arrays: Any) -> None:
    if output:
        np.savez(output, **{name: np.asarray(value) for name, value in arrays.items()})


# -------------------------------------------------------------------------------------- delta


def prepare_delta(
    *, images: int, neurons: int, classes: int, seed: int, devices: int = 0, output: str = ''
) -> harness.Prepared:
    """Prepares Delta of every neuron on every image, and its floors, in a worker process.

    Args:
        images: number of images.
        neurons: width of the last layer's input.
        classes: number of logits.
        seed: seed of the problem.
        devices: XLA devices; 0 for one per core.
        output: `.npz` file for the results, or empty.

    Returns:
        The measure, a plain formulation of it, and units that only do its arithmetic or traffic.
    """
    mesh = harness.start_jax(devices=devices)
    problem = neuron_problems.delta_problem(images, neurons, classes, seed)
    features, logits = parallel.shard(mesh, (problem.features, problem.logits()))
    weights = _place(mesh, problem.weights)
    ours = jax.jit(jax.vmap(_closed_form, (0, None, 0)))
    alone = jax.jit(jax.vmap(lambda *inputs: _closed_form(*inputs).delta, (0, None, 0)))
    plain = jax.jit(jax.vmap(_plain_delta, (0, None, 0)))
    result = ours(features, weights, logits)
    _save(output, delta=result.delta, flips_to=result.flips_to)
    # Enough for each kind of device to be busy.
    length = 2**26 if harness.device() == 'gpu' else 2**20
    vectors = parallel.shard(mesh, np.ones(length * mesh.size, np.float32))
    arithmetic = jax.jit(_multiply_compare)
    traffic = jax.jit(lambda h: (-h, h.astype(jnp.int32)))
    units = {
        'neurosens': _blocking(lambda: ours(features, weights, logits)),
        'neurosens, Delta without its class': _blocking(lambda: alone(features, weights, logits)),
        'plain jitted definition': _blocking(lambda: plain(features, weights, logits)),
        'arithmetic': _blocking(lambda: arithmetic(vectors)),
        'traffic': _blocking(lambda: traffic(features)),
    }
    return _prepared(units, devices=mesh.size, multiply_compares=_MULTIPLIES * vectors.size)


def _closed_form(features: jax.Array, weights: jax.Array, logits: jax.Array) -> Any:
    return neurons.closed_form(features, weights, logits)


def _plain_delta(features: jax.Array, weights: jax.Array, logits: jax.Array) -> Any:
    """The definition in array operations, with a division for every class."""
    predicted = logits.argmax()
    slopes = weights - weights[predicted]
    delta = jnp.where(slopes == 0, jnp.inf, (logits[predicted] - logits)[:, None] / slopes)
    delta = jnp.where(features + delta >= 0, delta, jnp.inf)
    best = jnp.abs(delta).argmin(0)
    return jnp.take_along_axis(delta, best[None], 0)[0], best


def _multiply_compare(values: jax.Array) -> jax.Array:
    """Many independent multiplications, each with a maximum, on values that stay in registers."""
    largest = values
    for number in range(_MULTIPLIES):
        largest = jnp.maximum(largest, values * (1.0 + 0.001 * number))
    return largest


def delta(arguments: argparse.Namespace) -> None:
    """Measures Delta against PyTorch and reports."""
    slice_options = {**DELTA, 'slice': arguments.slice}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ours = _start(stack, 'neurons:prepare_delta', DELTA, folder, 'ours')
        peers = _start(stack, 'torch_neurons:prepare_delta', slice_options, folder, 'torch')
        agreement = _compare(folder, ('delta', 'flips_to'), rtol=1e-4)
        theirs = [f'PyTorch, {name}' for name in peers.details['units']]
        units = {name: ours.unit(name) for name in ours.details['units']}
        units |= {f'PyTorch, {name}': peers.unit(name) for name in peers.details['units']}
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
    # Everything in seconds for the whole problem.
    pairs = DELTA['images'] * DELTA['neurons']
    scale = dict.fromkeys(ours.details['units'], 1.0)
    scale |= {f'PyTorch, {name}': pairs / done for name, done in peers.details['pairs'].items()}
    scale['arithmetic'] = pairs * DELTA['classes'] / ours.details['multiply_compares']
    whole = harness.Measurement(
        {
            name: tuple(scale[name] * value for value in values)
            for name, values in measurement.seconds.items()
        }
    )
    floor = np.maximum(whole.seconds['arithmetic'], whole.seconds['traffic']).tolist()
    notes = {name: ' (scaled from a slice)' for name in theirs if scale[name] != 1}
    names = {
        'arithmetic': 'floor: one multiply and compare per class at the peak vector rate',
        'traffic': 'floor: inputs and outputs through memory once',
    }
    definition = (
        f'{DELTA["neurons"]} neurons on {DELTA["images"]:,} images with {DELTA["classes"]} '
        f'classes. {agreement} Floor: the slower of the two that the table names. {floors}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        _table(whole, theirs, floor, names=names, notes=notes),
        measurements={'delta': whole},
    )


def _table(
    measurement: harness.Measurement,
    peers: Sequence[str],
    floor: Sequence[float],
    *,
    names: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """A Markdown table of all candidates, the fastest peer in bold.

    Args:
        measurement: its timings.
        peers: which candidates are PyTorch's.
        floor: seconds in each round.
        names: longer names of candidates.
        notes: what is added to names.
    """
    fastest = harness.fastest(measurement, peers)
    rows = []
    for name in measurement.seconds:
        summary = measurement.summary(name)
        label = harness.bold((names or {}).get(name, name), fastest) + (notes or {}).get(name, '')
        rows.append(
            (
                label,
                _milliseconds(summary.median),
                f'{_milliseconds(summary.lower_quartile)}-{_milliseconds(summary.upper_quartile)}',
                '1' if name == 'neurosens' else _ratio(measurement.ratio(name, 'neurosens')),
                # A part of the work has no share of the floor of the whole.
                '-'
                if name.endswith('forward pass')
                else harness.percent(measurement.share(name, floor)),
            )
        )
    header = ('Candidate', 'ms', 'quartiles', 'time / neurosens', 'share of floor')
    return harness.markdown_table(header, rows)


def _milliseconds(seconds: float) -> str:
    return f'{seconds * 1e3:,.1f}' if seconds < 1 else f'{seconds * 1e3:,.0f}'


def _ratio(ratio: harness.Ratio) -> str:
    return harness.ratio_text(ratio, 2 if ratio.median < 100 else 0)


# ---------------------------------------------------------------------------- input gradients


def prepare_input_gradients(
    *, images: int, seed: int, devices: int = 0, output: str = ''
) -> harness.Prepared:
    """Prepares input gradient norms of the 64 penultimate neurons of a ResNet-20.

    Args:
        images: images in the batch.
        seed: seed of images and weights.
        devices: XLA devices; 0 for one per core.
        output: `.npz` file for the results, or empty.

    Returns:
        The measure, and the forward pass it is compared to.
    """
    mesh = harness.start_jax(devices=devices)
    forward, variables, x = _resnet(mesh, images, seed)
    run = functools.partial(neurons.input_gradient_norms, forward, variables, x)
    _save(output, l2=run().l2)
    plain = jax.jit(lambda v, x: forward(v, x)[0])
    units = {
        'neurosens': _blocking(run),
        'neurosens, forward pass': _blocking(lambda: plain(variables, x)),
    }
    flops = harness.count_flops(plain, variables, x)
    return _prepared(units, devices=mesh.size, flops={'neurosens, forward pass': flops})


def _resnet(mesh: jax.sharding.Mesh, images: int, seed: int) -> tuple[LinenForward, Any, Any]:
    forward = LinenForward(neuron_problems.resnet20(), {'train': False})
    variables = _place(mesh, neuron_problems.resnet20_variables(seed))
    return forward, variables, parallel.shard(mesh, neuron_problems.images(images, seed))


def input_gradients(arguments: argparse.Namespace) -> None:
    """Measures exact input gradients against captum and PyTorch and reports."""

    def floor(measurement: harness.Measurement) -> tuple[float, ...]:
        return measurement.scaled('neurosens, forward pass', 1 + 64)

    _against_torch(
        arguments,
        'input_gradients',
        {'images': GRADIENT_IMAGES, 'seed': 0},
        ('l2',),
        f'64 penultimate neurons of a ResNet-20, batch {GRADIENT_IMAGES}.',
        'a forward pass, and for every neuron a backward pass at the cost of a forward pass',
        floor,
    )


# ------------------------------------------------------------------------------------- probes


def prepare_probes(
    *, images: int, seed: int, probes: int, devices: int = 0, output: str = ''
) -> harness.Prepared:
    """Prepares random-probe estimates for every neuron of every layer of a ResNet-20.

    Args:
        images: images in the batch.
        seed: seed of images and weights.
        probes: probes per image.
        devices: XLA devices; 0 for one per core.
        output: not used: there is no peer to compare with.

    Returns:
        One and several probes, and the forward pass.
    """
    del output
    mesh = harness.start_jax(devices=devices)
    forward, variables, x = _resnet(mesh, images, seed)
    key = parallel.replicate(mesh, jax.random.key(seed))
    plain = jax.jit(lambda v, x: forward(v, x)[0])

    def run(count: int) -> harness.Unit:
        return _blocking(lambda: neurons.probe_gradients(forward, variables, x, key, probes=count))

    units = {
        'forward pass': _blocking(lambda: plain(variables, x)),
        '1 probe': run(1),
        f'{probes} probes': run(probes),
    }
    flops = harness.count_flops(plain, variables, x)
    return _prepared(units, devices=mesh.size, flops={'forward pass': flops})


def probes(arguments: argparse.Namespace) -> None:
    """Measures the probes against a forward pass and reports."""
    options = {'images': GRADIENT_IMAGES, 'seed': 0, 'probes': 8}
    with contextlib.ExitStack() as stack:
        ours = _start(stack, 'neurons:prepare_probes', options)
        units = {name: ours.unit(name) for name in ours.details['units']}
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
        pace = floors.pace(measurement, ours.details['flops'])
    rows = []
    for name in units:
        ratio = measurement.ratio(name, 'forward pass')
        count = 1 if name == 'forward pass' else int(name.split()[0])
        each = harness.Ratio(*(value / count for value in ratio))
        rows.append(
            (
                name,
                harness.time_text(measurement.summary(name), 1e3, 1),
                harness.ratio_text(each),
                harness.percent(measurement.share(name, measurement.scaled('forward pass', count))),
            )
        )
    header = ('All layers of ResNet-20', 'ms', 'forward passes per probe', 'share of floor')
    definition = (
        f'Batch {GRADIENT_IMAGES}, times with their quartiles. Floor: a forward pass per probe. '
        f'{pace}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
        measurements={'probes': measurement},
    )


# ---------------------------------------------------------------------------- logit gradients


def prepare_logit_gradients(
    *, images: int, seed: int, layer: str, devices: int = 0, output: str = ''
) -> harness.Prepared:
    """Prepares derivatives of all logits with respect to the channels of a layer of a ResNet-20.

    Args:
        images: images in the batch.
        seed: seed of images and weights.
        layer: name of the layer.
        devices: XLA devices; 0 for one per core.
        output: `.npz` file for the results, or empty.

    Returns:
        The measure in either direction, and as floor its forward pass and as many backward passes
        from the logits to the layer, one call each.
    """
    mesh = harness.start_jax(devices=devices)
    forward, variables, x = _resnet(mesh, images, seed)
    _save(output, gradients=neurons.logit_gradients(forward, variables, x, layer=layer))
    return _logit_units(mesh, forward, variables, x, layer)


def prepare_few_neurons(
    *, images: int, seed: int, layer: str, output: str = ''
) -> harness.Prepared:
    """Prepares the same of a ResNet-20 of a hundred classes, more than the layer has channels.

    Args:
        images: images in the batch.
        seed: seed of images and weights.
        layer: name of the layer.
        output: not used.
    """
    del output
    mesh = harness.start_jax()
    module = models.create('cifar_resnet20', num_classes=100)
    x = parallel.shard(mesh, neuron_problems.images(images, seed))
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, *x.shape[1:])))
    return _logit_units(mesh, LinenForward(module), _place(mesh, variables), x, layer)


def _logit_units(
    mesh: jax.sharding.Mesh, forward: LinenForward, variables: Any, x: jax.Array, layer: str
) -> harness.Prepared:
    run = functools.partial(neurons.logit_gradients, forward, variables, x, layer=layer)
    images, classes, channels = jax.eval_shape(run).shape
    passes = min(classes, channels)

    @jax.jit
    def pullback(variables: Any, x: jax.Array) -> Any:
        shape = jax.eval_shape(lambda v, x: forward(v, x, taps=(layer,))[1][layer], variables, x)

        def logits(change: jax.Array) -> jax.Array:
            moved = with_edits(forward, {layer: lambda h: h + change})
            return moved(variables, x)[0]

        return jax.vjp(logits, jnp.zeros(shape.shape))[1]

    pull = jax.block_until_ready(pullback(variables, x))
    backward = jax.jit(lambda pull, cotangent: pull(cotangent)[0].sum((1, 2)))
    cotangents = [
        parallel.shard(mesh, np.tile(np.eye(classes, dtype=np.float32)[c], (images, 1)))
        for c in range(passes)
    ]

    def floor() -> list[jax.Array]:
        pull = pullback(variables, x)
        return [backward(pull, cotangent) for cotangent in cotangents]

    def backward_passes() -> list[jax.Array]:
        return [backward(pull, cotangent) for cotangent in cotangents]

    alone = f'{passes} backward passes, one call each'
    other = 'forward' if classes <= channels else 'reverse'
    units = {
        'neurosens': _blocking(run),
        f'neurosens, {other} mode': _blocking(functools.partial(run, direction=other)),
        f'forward pass and {passes} backward passes, one call each': _blocking(floor),
        alone: _blocking(backward_passes),
    }
    flops = harness.count_flops(backward, pull, cotangents[0], calls=passes)
    details = {'classes': classes, 'neurons': channels, 'flops': {alone: flops}}
    return _prepared(units, devices=mesh.size, **details)


def logit_gradients(arguments: argparse.Namespace) -> None:
    """Measures derivatives of logits against backward passes and PyTorch, and reports."""
    alone = '10 backward passes, one call each'
    _against_torch(
        arguments,
        'logit_gradients',
        {'images': GRADIENT_IMAGES, 'seed': 0, 'layer': LOGIT_LAYER},
        ('gradients',),
        f'Channels of `{LOGIT_LAYER}` of a ResNet-20, batch {GRADIENT_IMAGES}.',
        alone,
        lambda measurement: measurement.seconds[alone],
    )


def few_neurons(arguments: argparse.Namespace) -> None:
    """Measures derivatives of many logits by few neurons against backward passes, and reports."""
    with contextlib.ExitStack() as stack:
        options = {'images': GRADIENT_IMAGES, 'seed': 0, 'layer': FEW_LAYER}
        worker = _start(stack, 'neurons:prepare_few_neurons', options)
        units = {name: worker.unit(name) for name in worker.details['units']}
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
        pace = floors.pace(measurement, worker.details['flops'])
        channels, classes = worker.details['neurons'], worker.details['classes']
    alone = f'{channels} backward passes, one call each'
    definition = (
        f'The {channels} channels of `{FEW_LAYER}` of a ResNet-20 of {classes} classes, batch '
        f'{GRADIENT_IMAGES}: a pass for each channel in forward mode, not for each class. Floor: '
        f'{alone}. {pace}'
    )
    harness.report(
        arguments,
        harness.wrapped(definition),
        _table(measurement, [], measurement.seconds[alone]),
        measurements={'few_neurons': measurement},
    )


# ----------------------------------------------------------------------------------- ablation


def prepare_ablation(
    *,
    images: int,
    batch_size: int,
    seed: int,
    chunk: int = 0,
    devices: int = 0,
    output: str = '',
) -> harness.Prepared:
    """Prepares nodal dropout of the 64 first filters of a small network.

    Args:
        images: number of images.
        batch_size: images per batch.
        seed: seed of images, labels and weights.
        chunk: neurons at once; 0 for the default.
        devices: XLA devices; 0 for one per core.
        output: `.npz` file for the results, or empty.

    Returns:
        The measure, and a Python loop over a compiled masked forward pass.
    """
    mesh = harness.start_jax(devices=devices)
    forward = LinenForward(neuron_problems.small_cnn())
    variables = _place(mesh, neuron_problems.small_cnn_variables(seed))
    shape = neuron_problems.SMALL_CNN_SHAPE
    x, y = neuron_problems.images(images, seed, shape), neuron_problems.labels(images, seed)
    batches = [
        parallel.shard(mesh, (x[start : start + batch_size], y[start : start + batch_size]))
        for start in range(0, images, batch_size)
    ]
    filters = 64

    def ours() -> np.ndarray:
        total = np.zeros(filters)
        for images, labels in batches:
            result = neurons.ablation(
                forward, variables, images, labels, layer='act1', chunk=chunk or None
            )
            total += np.asarray(result.intact_correct).sum() - np.asarray(result.correct).sum(0)
        return total / len(x)

    @jax.jit
    def correct(mask: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(variables, images, edits={'act1': lambda h: h * mask})[0]
        return logits.argmax(-1) == labels

    masks = list(_place(mesh, 1 - np.eye(filters + 1, filters, dtype=np.float32)))

    def loop() -> np.ndarray:
        total = np.zeros(filters)
        for batch in batches:
            counts = np.array([np.asarray(correct(mask, *batch)).sum() for mask in masks])
            total += counts[-1] - counts[:-1]
        return total / len(x)

    _save(output, responses=ours())
    units: dict[str, harness.Unit] = {'neurosens': ours, 'JAX, loop over filters': loop}
    return _prepared(units, devices=mesh.size)


def ablation(arguments: argparse.Namespace) -> None:
    """Measures nodal dropout against loops in JAX and PyTorch and reports."""
    _against_torch(
        arguments,
        'ablation',
        {'images': arguments.images, 'batch_size': 250, 'seed': 0},
        ('responses',),
        f'64 filters over {arguments.images:,} images.',
        'the operations of the network once, and of its dense layers for every filter, at the peak '
        'rate of matrix products',
        None,
        atol=0.002,
        flops=arguments.images * _least_ablation_flops(),
    )


def _least_ablation_flops() -> float:
    """Operations per image that no way of removing 64 filters in turn can do without."""
    first = harness.convolution_flops(28, 1, 64, 3)
    second = harness.convolution_flops(14, 64, 32, 3)
    dense = 2.0 * (7**2 * 32 * 64 + 64 * 10)
    return first + second + (1 + 64) * dense


# --------------------------------------------------------------------------- memory and scaling


def prepare_memory(*, chunk: int, images: int, output: str = '') -> harness.Prepared:
    """Runs an ablation once and reports the peak memory of its process.

    Args:
        chunk: neurons at once.
        images: images in the batch.
        output: not used.

    Returns:
        No units; what the compiler says that it needs and that a forward pass does, and by how
        much the process grows, in MiB.
    """
    del output
    mesh = harness.start_jax()
    forward = LinenForward(neuron_problems.small_cnn())
    variables = _place(mesh, neuron_problems.small_cnn_variables(0))
    shape = neuron_problems.SMALL_CNN_SHAPE
    x, y = parallel.shard(
        mesh, (neuron_problems.images(images, 0, shape), neuron_problems.labels(images, 0))
    )
    options = {'layer': 'act1', 'chunk': chunk}
    compiled = neurons.ablation.lower(forward, variables, x, y, **options).compile()  # type: ignore[attr-defined]
    temporary = compiled.memory_analysis().temp_size_in_bytes * mesh.size / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(compiled(forward, variables, x, y))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = (after - before) / 1024
    logits = jax.jit(lambda variables, x: forward(variables, x)[0])
    floor = harness.temporary_memory(mesh, logits, variables, x)
    return harness.Prepared({}, {'temporary': temporary, 'floor': floor, 'grown': grown})


def memory(arguments: argparse.Namespace) -> None:
    """Reports peak memory of an ablation against its chunk, and plots it."""
    found = {}
    for chunk in CHUNKS:
        spec = harness.WorkerSpec(
            'benchmarks.neurons:prepare_memory', {'chunk': chunk, 'images': 250}
        )
        with harness.worker(spec) as worker:
            found[chunk] = dict(worker.details)
    rows = [
        (
            f'{chunk}',
            f'{facts["temporary"]:.0f}',
            harness.percent(facts['floor'] / facts['temporary']),
            f'{facts["grown"]:.0f}',
        )
        for chunk, facts in found.items()
    ]
    header = ('Chunk', 'temporaries of the program, MiB', 'share of floor')
    header = (*header, 'growth of the process, MiB')
    floor = next(iter(found.values()))['floor']
    definition = (
        'Ablation of 64 filters, batches of 250, each chunk in a process of its own, '
        f'whose growth is that beyond what compiling took. Floor: the {floor:.0f} MiB of one '
        'forward pass.'
    )
    if arguments.plot:
        figure = Figure(figsize=(4.5, 3.2), layout='constrained')
        axes = figure.subplots()
        axes.plot(CHUNKS, [facts['temporary'] for facts in found.values()], marker='o')
        axes.set_xlabel('chunk: neurons at once')
        axes.set_ylabel('temporaries of the program (MiB)')
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        harness.save_figure(figure, arguments.plot)
    harness.report(
        arguments,
        harness.wrapped(definition),
        harness.markdown_table(header, rows),
    )


def prepare_scaling(*, output: str = '') -> harness.Prepared:
    """Prepares measures of growing width and depth.

    Args:
        output: not used.

    Returns:
        For each width of a hidden layer, and each depth of a CIFAR ResNet, one unit per measure; as
        details the `flops` of each, see `least_flops`.
    """
    del output
    mesh = harness.start_jax()
    key = parallel.replicate(mesh, jax.random.key(0))
    grey, colour = (
        parallel.shard(mesh, (neuron_problems.images(n, 0, shape), neuron_problems.labels(n, 0)))
        for n, shape in ((128, (28, 28, 1)), (16, (32, 32, 3)))
    )
    cases: list[tuple[str, str, dict[str, Any], Any, str, str]] = [
        (f'width {width}', 'mlp', {'hidden': (width, 256)}, grey, 'dense2', '') for width in WIDTHS
    ]
    # Gradients go from the neurons to the pixels: through all layers only from the last.
    cases += [
        (f'depth {depth}', f'cifar_resnet{depth}', {}, colour, 'stage1_block1/conv1', 'head:in')
        for depth in DEPTHS
    ]
    units: dict[str, harness.Unit] = {}
    flops: dict[str, float] = {}
    for name, model, options, (x, y), linear, pulled in cases:
        module = models.create(model, num_classes=10, **options)
        variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *x.shape[1:])))
        forward, variables = LinenForward(module), parallel.replicate(mesh, variables)
        measures = _measures(forward, variables, x, y, key, pulled or _MEASURED)
        units |= {f'{name} {measure}': _blocking(run) for measure, run in measures.items()}
        least = least_flops(forward, variables, x, linear=linear, pulled=pulled)
        flops |= {f'{name} {measure}': count for measure, count in least.items()}
    return _prepared(units, devices=mesh.size, flops=flops)


def _measures(
    forward: LinenForward, variables: Any, x: jax.Array, y: jax.Array, key: jax.Array, pulled: str
) -> dict[str, Callable[[], Any]]:
    call, layer = (forward, variables, x), _MEASURED
    plain = jax.jit(lambda v, x: forward(v, x)[0])
    everything, x_adv = jnp.ones_like(y, dtype=bool), jnp.clip(x + 0.1, 0, 1)
    return {
        'forward': lambda: plain(variables, x),
        'sensitivity': lambda: neurons.sensitivity(*call, layer=layer),
        'influence': lambda: neurons.influence(*call, layer=layer),
        'ablation': lambda: neurons.ablation(*call, y, layer=layer),
        'statistics': lambda: activation_summary(*call, everything, layer=layer),
        'shift': lambda: neurons.shift(*call, x_adv, layer=layer),
        'probes': lambda: neurons.probe_gradients(*call, key, probes=_PROBES),
        'gradients': lambda: neurons.input_gradient_norms(*call, layer=pulled),
    }


def least_flops(
    forward: LinenForward, variables: Any, x: jax.Array, *, linear: str, pulled: str
) -> dict[str, float]:
    """Counts the operations that measures of `act1` cannot do without, as their floor has them.

    Args:
        forward: the network.
        variables: its variables.
        x: images.
        linear: the first layer behind `act1` that multiplies: without a neuron its output differs
            by a part of it, and only what follows has to run again.
        pulled: the layer whose input gradients take a pass back for each neuron; empty where they
            are those of `act1` and rows of the kernel of a dense layer.

    Returns:
        By measure; nothing where JAX cannot count.
    """

    def value(layer: str) -> Any:
        return jax.jit(lambda v, x: forward(v, x, taps=(layer,))[1][layer])

    logits = jax.jit(lambda v, x: forward(v, x)[0])
    layers = (_MEASURED, linear, pulled or _MEASURED)
    counts = [harness.count_flops(run, variables, x) for run in (logits, *map(value, layers))]
    whole, front, entered, before = (count or 0.0 for count in counts)
    if not whole:
        return {}
    classes = jax.eval_shape(logits, variables, x).shape[-1]
    measured, last = (
        jax.eval_shape(value(layer), variables, x).shape[-1] for layer in (layers[0], layers[2])
    )
    behind = whole - front
    return {
        'forward': whole,
        'sensitivity': whole + min(classes, measured) * behind,
        'influence': whole + behind,
        'ablation': whole + measured * (whole - entered),
        'statistics': front,
        'shift': 2 * front,
        'probes': (1 + _PROBES) * whole,
        'gradients': (1 + last) * before if pulled else front,
    }


def scaling_figure(measurement: harness.Measurement, measures: Sequence[str]) -> Figure:
    """Cost of each measure against width and depth."""
    figure = Figure(figsize=(8, 3.8), layout='constrained')
    for axes, (kind, sizes) in zip(figure.subplots(1, 2), (('width', WIDTHS), ('depth', DEPTHS))):
        for measure in measures:
            times = [measurement.summary(f'{kind} {size} {measure}').median * 1e3 for size in sizes]
            axes.loglog(sizes, times, marker='o', label=measure)
        axes.set_xlabel('neurons of the layer' if kind == 'width' else 'layers of the ResNet')
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylabel('ms per batch')
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc='outside lower center', ncols=4, frameon=False)
    return figure


def scaling(arguments: argparse.Namespace) -> None:
    """Measures cost against width and depth, plots it and reports."""
    with contextlib.ExitStack() as stack:
        worker = _start(stack, 'neurons:prepare_scaling', {})
        units = {name: worker.unit(name) for name in worker.details['units']}
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
        flops = worker.details['flops']
    measures = tuple(
        name.rpartition(' ')[2] for name in units if name.startswith(f'width {WIDTHS[0]} ')
    )
    tables = []
    # The widths are of dense layers, the depths of convolutions.
    for kind, sizes, seconds in (
        ('width', WIDTHS, floors.matmul_seconds),
        ('depth', DEPTHS, floors.convolution_seconds),
    ):
        rows = []
        for measure in measures:
            cells = []
            for name in (f'{kind} {size} {measure}' for size in sizes):
                share = '-'
                if name in flops:
                    share = harness.percent(measurement.share(name, seconds(flops[name])))
                cells.append(f'{measurement.summary(name).median * 1e3:.1f} ({share})')
            # A ResNet of depth n has n - 2 layers behind the one that is measured.
            costly = sizes if kind == 'width' else [size - 2 for size in sizes]
            # One slope per round, in which drift of the machine cancels.
            rounds = np.log([measurement.seconds[f'{kind} {size} {measure}'] for size in sizes])
            exponents = np.polyfit(np.log(costly), rounds, 1)[0]
            low, middle, high = np.quantile(exponents, (0.1, 0.5, 0.9))
            exponent = harness.ratio_text(harness.Ratio(middle, low, high))
            last = np.diff(rounds[-2:], axis=0)[0] / np.log(costly[-1] / costly[-2])
            low, middle, high = np.quantile(last, (0.1, 0.5, 0.9))
            last_exponent = harness.ratio_text(harness.Ratio(middle, low, high))
            rows.append((measure, *cells, exponent, last_exponent))
        header = (f'ms at {kind} (share of floor)', *map(str, sizes), 'exponent')
        header = (*header, 'of the last step')
        tables.append(harness.markdown_table(header, rows))
    if arguments.plot:
        harness.save_figure(scaling_figure(measurement, measures), arguments.plot)
    definition = (
        '128 images for the widths, 16 for the depths. The exponent is the slope in logarithms, of '
        'all sizes and of the last two, for depth against the layers between the measured one and '
        'the logits, or, of gradients, which are those of the 64 last neurons, the pixels. Floor: '
        'operations, for the widths at the peak rate of matrix products, for the depths at that of '
        'convolutions: of the forward pass; for sensitivity also of a pass back to the layer for '
        f'each class, for influence of one, for probes of {_PROBES} forward passes more, for '
        'ablation of what stands behind the next convolution or product, for each neuron; for '
        'statistics of the layers up to the measured one alone, for shift twice; for gradients of '
        'those up to theirs, and of as many back from each neuron, but none for rows of the kernel '
        f'of a dense layer. {floors}'
    )
    harness.report(
        arguments, harness.wrapped(definition), *tables, measurements={'scaling': measurement}
    )


# -------------------------------------------------------------------------------------- common


def _start(
    stack: contextlib.ExitStack,
    factory: str,
    options: Mapping[str, Any],
    folder: str = '',
    name: str = '',
) -> harness.Worker:
    """Starts a worker that notes its units, and its results in a folder."""
    output = str(pathlib.Path(folder) / f'{name}.npz') if folder else ''
    spec = harness.WorkerSpec(f'benchmarks.{factory}', {**options, 'output': output})
    return stack.enter_context(harness.worker(spec))


def _compare(folder: str, names: tuple[str, ...], *, rtol: float = 1e-3, atol: float = 1e-6) -> str:
    """Says how far both sides agree; the slice of a peer is its first rows.

    Derivatives jump where a unit is within rounding of its kink, which a few of millions are: such
    an image may differ.

    Raises:
        ValueError: they computed different things.
    """
    sentences = []
    with (
        np.load(pathlib.Path(folder) / 'ours.npz') as ours,
        np.load(pathlib.Path(folder) / 'torch.npz') as theirs,
    ):
        for name in names:
            expected = theirs[name]
            close = np.isclose(ours[name][: len(expected)], expected, rtol=rtol, atol=atol)
            share = 100 * close.mean()
            sentences.append(f'{share:.4g} % of {close.size:,} values of `{name}` agree.')
            if close.mean() < _AGREEING:
                raise ValueError(f'Both sides compute different {name}: {sentences[-1]}')
    return ' '.join(sentences)


def _against_torch(
    arguments: argparse.Namespace,
    subject: str,
    options: Mapping[str, Any],
    names: tuple[str, ...],
    title: str,
    floor: str,
    floor_seconds: Callable[[harness.Measurement], Sequence[float]] | None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    flops: float = 0.0,
) -> None:
    """Times all units of both sides in turns and reports.

    Args:
        arguments: of the command line.
        subject: `prepare_` and this is the name of the factories.
        options: of the factories.
        names: arrays that are compared before.
        title: a sentence on what is measured.
        floor: what the floor is.
        floor_seconds: seconds of it in each round; None for those that `flops` take at the peak
            rate of matrix products.
        rtol: relative tolerance of the comparison.
        atol: absolute tolerance.
        flops: operations that cannot be avoided.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ours = _start(stack, f'neurons:prepare_{subject}', options, folder, 'ours')
        theirs = _start(stack, f'torch_neurons:prepare_{subject}', options, folder, 'torch')
        agreement = _compare(folder, names, rtol=rtol, atol=atol)
        peers = {f'PyTorch: {name}': theirs.unit(name) for name in theirs.details['units']}
        units = {name: ours.unit(name) for name in ours.details['units']} | peers
        measurement, floors = harness.beside_floors(units, rounds=arguments.rounds)
        if floor_seconds is None:
            seconds, peaks = floors.matmul_seconds(flops), str(floors)
        else:
            seconds = floor_seconds(measurement)
            peaks = floors.pace(measurement, ours.details['flops'])
    harness.report(
        arguments,
        harness.wrapped(f'{title} {agreement} Floor: {floor}. {peaks}'),
        _table(measurement, list(peers), seconds),
        measurements={subject: measurement},
    )


_SUBJECTS = {
    'delta': delta,
    'input_gradients': input_gradients,
    'probes': probes,
    'logit_gradients': logit_gradients,
    'few_neurons': few_neurons,
    'ablation': ablation,
    'memory': memory,
    'scaling': scaling,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_SUBJECTS)
    parser.add_argument('--slice', type=int, default=2, help='images of the slow peers of delta')
    parser.add_argument('--images', type=int, default=2000, help='images of ablation')
    parser.add_argument('--plot', default='', help='PNG file of memory or scaling')
    harness.add_arguments(parser, rounds=5)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse_arguments()
    harness.use_device(arguments.device)
    _SUBJECTS[arguments.subject](arguments)


if __name__ == '__main__':
    main()

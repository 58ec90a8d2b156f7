"""The PyTorch peers of the neuron measures, as factories for worker processes.

    python -m benchmarks.torch_neurons [--rounds N] [--images M] [--eager]

Each factory prepares several ways to write the same measure in PyTorch, from the literal to the
fastest found, checks that they agree, and where `output` names a file writes the results there once
as an .npz, for neurosens to be compared with. Inputs come from `benchmarks.neuron_problems`. Run as
a script, the module times the units of all factories at default sizes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import captum.attr
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import fusion

from benchmarks import harness, neuron_problems, torch_device
from benchmarks.torch_models import CIFARResNet20, load_variables
from neurosens import data, parallel

Key = TypeVar('Key', bound=Hashable)
Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
# Maps features, weights and logits to Delta.
DeltaFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Images and labels.
Batches: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]
# Results for the first so many neurons or classes.
Method: TypeAlias = Callable[[int], torch.Tensor]

LOOP, ROWS = 'loop over images and neurons', 'loop over images, vectorised over neurons'
BROADCAST, RATES = 'fully vectorised', 'fully vectorised, without divisions'
FULL, TAIL = 'a full forward pass per filter', 'a pass through the tail per filter'
_COMPILED = ', compiled'
_FOLDED = ', batch norm folded'
_PENULTIMATE = 64
_FIRST_FILTERS = 64
# Sizes of an intermediate [images, classes, neurons] among which the fastest is taken.
_CHUNK_ELEMENTS = (2**18, 2**20, 2**22, 2**24)
_VMAP_CHUNKS = (2, 4, 8, 16)
# Neurons on which the ways of computing are compared.
_CHECKED = 4
_SMALLEST_MARGIN = 1e-30
_TOLERANCE = 1e-4


def _start(keep_memory: bool) -> tuple[torch.device, dict[str, Any]]:
    """Settings of the process: its device, and what to report of them."""
    if keep_memory:
        parallel.keep_freed_memory()
    on = torch_device.start()
    return on, {'threads': torch.get_num_threads(), 'keep_memory': keep_memory}


def _fastest(units: Mapping[Key, harness.Unit], rounds: int = 3) -> tuple[Key, dict[str, float]]:
    """The unit with the fastest round, after one that is not counted, and the seconds of each."""
    turns: dict[Key, list[float]] = {name: [] for name in units}
    for _ in range(rounds + 1):
        for name, unit in units.items():
            start = time.perf_counter()
            torch_device.synchronized(unit)()
            turns[name].append(time.perf_counter() - start)
    seconds = {name: min(values[1:]) for name, values in turns.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best, {str(name): value for name, value in seconds.items()}


def _check_agreement(methods: Mapping[str, Method], count: int = _CHECKED) -> dict[str, float]:
    """Compares all methods with the first, and returns each one's largest relative difference.

    Rounding may switch single ReLUs, which changes a gradient by more than rounding: all but a
    tenth of the values have to agree.
    """
    expected = next(iter(methods.values()))(count)
    scale = expected.abs().mean()
    largest = {}
    for name, method in methods.items():
        difference = (method(count) - expected).abs() / scale
        largest[name] = difference.max().item()
        most = difference.quantile(0.9).item()
        assert most <= _TOLERANCE, f'{name} differs by {most}'
    return largest


def _try_to_compile(run: Callable[[], Any]) -> str:
    """Runs compiled code for the first time; returns why it failed, or an empty string."""
    try:
        run()
    except Exception as error:
        return str(error).strip().splitlines()[-1]
    return ''


def _save(output: str, **arrays: torch.Tensor) -> None:
    if output:
        np.savez(output, **{name: array.cpu().numpy() for name, array in arrays.items()})


# -------------------------------------------------------------- sensitivity of the last layer


def delta_of_neuron(
    feature: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Delta of one neuron of one image, operation by operation as the authors' program has it.

    Args:
        feature: h_i, a scalar.
        weights: W[:, i], one per class `[K]`.
        logits: z `[K]`.

    Returns:
        The valid change of smallest absolute value, a scalar; equal weights divide to +inf.
    """
    predicted = torch.argmax(logits)
    delta = logits[predicted] - logits
    delta /= weights - weights[predicted]
    delta[predicted] = torch.inf
    valid = delta[feature + delta >= 0]
    return valid[torch.argmin(torch.abs(valid))]


def delta_by_neuron(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Delta `[B, N]` in Python loops over images and neurons, as the authors' program finds it."""
    rows = []
    for feature, logit in zip(features, logits):
        row = [
            delta_of_neuron(feature[i], weights[:, i], logit).cpu().numpy()
            for i in range(weights.shape[1])
        ]
        rows.append(row)
    return torch.from_numpy(np.array(rows)).to(features.device)


def delta_by_image(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Delta `[B, N]` in a Python loop over images, all neurons at once."""
    rows = []
    for feature, logit in zip(features, logits):
        predicted = logit.argmax()
        delta = (logit[predicted] - logit)[:, None] / (weights - weights[predicted])
        delta[predicted] = torch.inf
        delta = torch.where(feature + delta >= 0, delta, torch.inf)
        nearest = delta.abs().argmin(0, keepdim=True)
        rows.append(delta.gather(0, nearest)[0])
    return torch.stack(rows)


def delta_and_class(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta and the class it flips to, -1 for none, `[B, N]` each, by the definition."""
    predicted = logits.argmax(1)
    margins = logits.gather(1, predicted[:, None]) - logits
    delta = margins[:, :, None] / (weights - weights[predicted][:, None])
    delta[torch.arange(len(delta), device=delta.device), predicted] = torch.inf
    delta = torch.where(features[:, None] + delta >= 0, delta, torch.inf)
    nearest = delta.abs().argmin(1, keepdim=True)
    delta = delta.gather(1, nearest)[:, 0]
    return delta, torch.where(delta.isinf(), -1, nearest[:, 0])


def delta_broadcast(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Delta `[B, N]` by the definition, written as one broadcast expression."""
    return delta_and_class(features, weights, logits)[0]


def _inverse_margins(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / (z_y - z_c), 0 for the predicted class y, `[B, K]`; and y `[B]`."""
    highest, predicted = logits.max(1, keepdim=True)
    inverse = (highest - logits).clamp_min(_SMALLEST_MARGIN).reciprocal()
    return inverse.scatter(1, predicted, 0.0), predicted[:, 0]


def _nearest(highest: torch.Tensor, lowest: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    rise, fall = highest.reciprocal(), lowest.abs().reciprocal()
    fall = torch.where(fall <= features, fall, torch.inf)
    return torch.where(rise <= fall, rise, -fall)


def delta_by_rates(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Delta `[B, N]` by the fastest broadcast expression found for eager mode.

    With the margins m_c = z_y - z_c, the smallest changes upwards and downwards are the inverses of
    the largest and smallest (W[c, i] - W[y, i]) / m_c, so that nothing of the size `[B, K, N]` is
    divided, selected or indexed.
    """
    inverse, predicted = _inverse_margins(logits)
    rates = (weights - weights[predicted][:, None]).mul_(inverse[:, :, None])
    return _nearest(rates.amax(1), rates.amin(1), features)


def delta_fused(
    features: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """The same in the form that `torch.compile` makes the fastest code of."""
    inverse, predicted = _inverse_margins(logits)
    rates = (weights - weights[predicted][:, None]) * inverse[:, :, None]
    lowest, highest = torch.aminmax(rates, dim=1)
    return _nearest(highest, lowest, features)


def prepare_delta(
    *,
    images: int = 10_000,
    neurons: int = 512,
    classes: int = 10,
    seed: int = 0,
    slice: int = 2,
    row_slice: int = 200,
    compiled: bool = True,
    keep_memory: bool = True,
    output: str = '',
) -> harness.Prepared:
    """Prepares Delta(i, x) of Suri & Evans from features, weights and logits.

    The logits are given, as a forward pass leaves them; units compute Delta but not the class that
    it flips to.

    Args:
        images: images of the problem, and per unit of the fully vectorised ways.
        neurons: width of the last layer's input.
        classes: number of logits.
        seed: seed of the problem, see `neuron_problems.delta_problem`.
        slice: images per unit of the loop over images and neurons.
        row_slice: images per unit of the loop over images alone.
        compiled: add compiled code, where a compiler is found.
        keep_memory: keep freed memory.
        output: `.npz` file for `delta` and `flips_to` `[images, neurons]`, or empty.

    Returns:
        One unit per way; as details the (image, neuron) `pairs` of each unit.
    """
    on, details = _start(keep_memory)
    problem = neuron_problems.delta_problem(images, neurons, classes, seed)
    weights, features, logits = (
        torch.from_numpy(array).to(on)
        for array in (problem.weights, problem.features, problem.logits())
    )

    def run(function: DeltaFunction, count: int, chunk: int) -> torch.Tensor:
        with torch.inference_mode():
            pieces = zip(features[:count].split(chunk), logits[:count].split(chunk))
            return torch.cat([function(feature, weights, logit) for feature, logit in pieces])

    def chunked(name: str, function: DeltaFunction, elements: Sequence[int]) -> harness.Unit:
        sizes = {min(max(size // (classes * neurons), 1), images) for size in elements}
        trials = {size: functools.partial(run, function, images, size) for size in sorted(sizes)}
        best, seconds = _fastest(trials)
        chunks[name] = {'images per chunk': best, 'seconds by images per chunk': seconds}
        return trials[best]

    chunks: dict[str, Any] = {}
    counts = {LOOP: min(slice, images), ROWS: min(row_slice, images)}
    units: dict[str, harness.Unit] = {
        LOOP: functools.partial(run, delta_by_neuron, counts[LOOP], counts[LOOP]),
        ROWS: functools.partial(run, delta_by_image, counts[ROWS], counts[ROWS]),
        BROADCAST: chunked(BROADCAST, delta_broadcast, _CHUNK_ELEMENTS),
        RATES: chunked(RATES, delta_by_rates, _CHUNK_ELEMENTS),
    }
    if compiled:
        code = torch.compile(delta_fused, dynamic=False)
        details['not compiled'] = _try_to_compile(lambda: run(code, 1, 1))
        if not details['not compiled']:
            # Fewer sizes: each is compiled, and so is its remainder.
            units[RATES + _COMPILED] = chunked(RATES + _COMPILED, code, _CHUNK_ELEMENTS[1:])
    expected = units[BROADCAST]()
    for name, unit in units.items():
        result = unit()
        counts[name] = len(result)
        torch.testing.assert_close(result, expected[: len(result)], rtol=1e-5, atol=0)
    if output:
        pieces = zip(features.split(100), logits.split(100))
        parts = [delta_and_class(feature, weights, logit) for feature, logit in pieces]
        _save(
            output,
            delta=torch.cat([d for d, _ in parts]),
            flips_to=torch.cat([c for _, c in parts]),
        )
    details |= {
        'pairs': {name: count * neurons for name, count in counts.items()},
        'chunks': chunks,
        'units': list(units),
    }
    return torch_device.prepared(units, details)


# ------------------------------------------------------------------------------- ResNet-20


def resnet20(seed: int, on: torch.device, *, channels_last: bool, frozen: bool) -> CIFARResNet20:
    """Returns the network of `neuron_problems.resnet20_variables` in evaluation mode.

    Args:
        seed: seed of the variables.
        on: where it belongs.
        channels_last: keep weights in channels-last memory.
        frozen: whether parameters need no gradients.
    """
    info = data.info('cifar10')
    network = CIFARResNet20(info.num_classes, info.mean, info.std)
    variables = neuron_problems.resnet20_variables(seed)
    load_variables(network, neuron_problems.resnet20(), variables)
    return network.eval().requires_grad_(not frozen).to(on, memory_format=_layout(channels_last))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _image_tensor(images: np.ndarray, on: torch.device, channels_last: bool) -> torch.Tensor:
    return (
        torch.from_numpy(images)
        .to(on)
        .permute(0, 3, 1, 2)
        .contiguous(memory_format=_layout(channels_last))
    )


def fold_batch_norm(network: CIFARResNet20) -> CIFARResNet20:
    """Returns a frozen copy whose convolutions contain the normalisations that follow them."""
    network = copy.deepcopy(network)
    for module in (network, *network.blocks.values()):
        for i in range(1, 3):
            if hasattr(module, f'norm{i}'):
                convolution, norm = getattr(module, f'conv{i}'), getattr(module, f'norm{i}')
                setattr(module, f'conv{i}', fusion.fuse_conv_bn_eval(convolution, norm))
                setattr(module, f'norm{i}', nn.Identity())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def cut(network: CIFARResNet20, block: str) -> tuple[Function, Function]:
    """Cuts the network behind a block.

    Args:
        network: the network.
        block: such as `'stage2_block3'`.

    Returns:
        The function from images to the block's output, and from there to the logits.
    """
    names = list(network.blocks)
    count = names.index(block) + 1

    def front(x: torch.Tensor) -> torch.Tensor:
        x = (x - network.mean) / network.std
        x = functional.relu(network.norm1(network.conv1(x)))
        for name in names[:count]:
            x = network.blocks[name](x)
        return x

    def back(x: torch.Tensor) -> torch.Tensor:
        for name in names[count:]:
            x = network.blocks[name](x)
        return network.head(x.mean((2, 3)))

    return front, back


def pooled_features(network: CIFARResNet20) -> Function:
    """Returns the function from images to the 64 features that enter the head."""
    front, _ = cut(network, list(network.blocks)[-1])
    return lambda x: front(x).mean((2, 3))


def pull_in_loop(function: Function, x: torch.Tensor, count: int, reduce: Function) -> torch.Tensor:
    """Gradients of the first outputs by one `torch.autograd.grad` call each.

    Args:
        function: maps `x` to outputs `[B, outputs]`.
        x: inputs `[B, ...]`.
        count: number of outputs whose gradients are taken.
        reduce: maps gradients `[B, ...]` to what is kept of them, `[B]` or `[B, values]`.

    Returns:
        `[B, count]` or `[B, count, values]`.
    """
    x = x.detach().requires_grad_()
    outputs = function(x)
    kept = []
    for i in range(count):
        (gradient,) = torch.autograd.grad(outputs[:, i].sum(), x, retain_graph=True)
        kept.append(reduce(gradient))
    return torch.stack(kept, 1)


def pull_in_vmap(
    function: Function, x: torch.Tensor, count: int, reduce: Function, *, chunk_size: int
) -> torch.Tensor:
    """The same by `torch.func.vmap` over the cotangents of one `torch.func.vjp`.

    Args:
        function: as for `pull_in_loop`, like `x`, `count`, `reduce` and the result.
        x: inputs.
        count: number of outputs.
        reduce: maps gradients to what is kept.
        chunk_size: cotangents at once.
    """
    outputs, pull = torch.func.vjp(function, x)
    width = outputs.shape[1]
    cotangents = torch.eye(width, device=x.device)[:count, None].expand(-1, len(x), -1)
    kept = torch.func.vmap(lambda cotangent: reduce(pull(cotangent)[0]), chunk_size=chunk_size)(
        cotangents
    )
    return kept.movedim(0, 1)


def _norms(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(gradient, dim=(1, 2, 3))


def _channel_sums(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum((2, 3))


def _with_chunk(
    method: Callable[..., torch.Tensor], chunk_size: int, limit: int
) -> tuple[Method, dict[str, Any]]:
    """A method with the given chunk size, or for 0 with the fastest, and what to report."""
    if chunk_size:
        return functools.partial(method, chunk_size=chunk_size), {'chunk_size': chunk_size}
    sizes = sorted({min(size, limit) for size in _VMAP_CHUNKS})
    trials = {size: functools.partial(method, sizes[-1], chunk_size=size) for size in sizes}
    best, seconds = _fastest(trials)
    return functools.partial(method, chunk_size=best), {
        'chunk_size': best,
        f'seconds of {sizes[-1]} by chunk size': seconds,
    }


def prepare_input_gradients(
    *,
    images: int = 64,
    seed: int = 0,
    chunk_size: int = 0,
    compiled: bool = True,
    keep_memory: bool = True,
    output: str = '',
) -> harness.Prepared:
    """Prepares the l2 norms of the input gradients of ResNet-20's 64 penultimate neurons.

    Networks are frozen and channels last but where a unit's name says otherwise.

    Args:
        images: images per unit.
        seed: seed of variables and images.
        chunk_size: neurons at once under `vmap`; 0 for the fastest of a few.
        compiled: add the compiled network, where a compiler is found.
        keep_memory: keep freed memory.
        output: `.npz` file for `l2` `[images, 64]`, or empty.

    Returns:
        One unit per way; as details the chunk sizes and the largest relative differences from the
        first way.
    """
    on, details = _start(keep_memory)
    batch = neuron_problems.images(images, seed)
    x = _image_tensor(batch, on, channels_last=True)
    network = resnet20(seed, on, channels_last=True, frozen=True)
    folded = pooled_features(fold_batch_norm(network))
    plain = pooled_features(resnet20(seed, on, channels_last=False, frozen=False))
    plain_x = _image_tensor(batch, on, channels_last=False)
    attribution = captum.attr.NeuronGradient(network, network.head)
    leaf = x.clone().requires_grad_()

    def with_captum(count: int) -> torch.Tensor:
        norms = []
        for i in range(count):
            gradient = attribution.attribute(leaf, i, attribute_to_neuron_input=True)
            norms.append(_norms(gradient))
        return torch.stack(norms, 1)

    def loop(function: Function, x: torch.Tensor) -> Method:
        return lambda count: pull_in_loop(function, x, count, _norms)

    def vmapped(name: str, function: Function) -> Method:
        def method(count: int, chunk_size: int) -> torch.Tensor:
            return pull_in_vmap(function, x, count, _norms, chunk_size=chunk_size)

        best, details[name] = _with_chunk(method, chunk_size, _PENULTIMATE)
        return best

    methods: dict[str, Method] = {
        'autograd.grad loop, contiguous, not frozen': loop(plain, plain_x),
        'autograd.grad loop': loop(pooled_features(network), x),
        'autograd.grad loop' + _FOLDED: loop(folded, x),
        'vmap of vjp': vmapped('vmap of vjp', pooled_features(network)),
        'vmap of vjp' + _FOLDED: vmapped('vmap of vjp' + _FOLDED, folded),
        'captum NeuronGradient': with_captum,
    }
    if compiled:
        code = loop(torch.compile(folded), x)
        details['not compiled'] = _try_to_compile(lambda: code(1))
        if not details['not compiled']:
            methods['autograd.grad loop' + _FOLDED + _COMPILED] = code
    details['differences'] = _check_agreement(methods)
    if output:
        _save(output, l2=methods['autograd.grad loop'](_PENULTIMATE))
    details |= {'gradients': images * _PENULTIMATE, 'units': list(methods)}
    units = {name: functools.partial(method, _PENULTIMATE) for name, method in methods.items()}
    return torch_device.prepared(units, details)


def prepare_logit_gradients(
    *,
    images: int = 64,
    seed: int = 0,
    layer: str = 'stage2_block3',
    chunk_size: int = 0,
    compiled: bool = True,
    keep_memory: bool = True,
    output: str = '',
) -> harness.Prepared:
    """Prepares the gradients of ResNet-20's logits with respect to the channels of a block.

    A unit runs the network up to the block without a graph, then the rest, and pulls every logit
    back to the block's output, where the gradient is summed over positions. Networks are frozen.

    Args:
        images: images per unit.
        seed: seed of variables and images.
        layer: a residual block, such as `'stage2_block3'` with 32 channels.
        chunk_size: classes at once under `vmap`; 0 for the fastest of a few.
        compiled: add the compiled network, where a compiler is found.
        keep_memory: keep freed memory.
        output: `.npz` file for `gradients` `[images, classes, channels]`, or empty.

    Returns:
        One unit per way; as details the chunk sizes and the largest relative differences from the
        first way.
    """
    on, details = _start(keep_memory)
    batch = neuron_problems.images(images, seed)
    network = resnet20(seed, on, channels_last=True, frozen=True)
    classes = network.head.out_features

    def parts(
        network: CIFARResNet20, *, channels_last: bool = True, compiled: bool = False
    ) -> tuple[Callable[[], torch.Tensor], Function]:
        front, back = cut(network, layer)
        if compiled:
            front, back = torch.compile(front), torch.compile(back)
        x = _image_tensor(batch, on, channels_last)

        def start() -> torch.Tensor:
            with torch.no_grad():
                return front(x)

        return start, back

    def loop(start: Callable[[], torch.Tensor], back: Function) -> Method:
        return lambda count: pull_in_loop(back, start(), count, _channel_sums)

    def vmapped(name: str, start: Callable[[], torch.Tensor], back: Function) -> Method:
        def method(count: int, chunk_size: int) -> torch.Tensor:
            return pull_in_vmap(back, start(), count, _channel_sums, chunk_size=chunk_size)

        best, details[name] = _with_chunk(method, chunk_size, classes)
        return best

    contiguous = parts(resnet20(seed, on, channels_last=False, frozen=True), channels_last=False)
    last = parts(network)
    folded = parts(fold_batch_norm(network))
    methods: dict[str, Method] = {
        'autograd.grad loop, contiguous': loop(*contiguous),
        'autograd.grad loop': loop(*last),
        'autograd.grad loop' + _FOLDED: loop(*folded),
        'vmap of vjp': vmapped('vmap of vjp', *last),
        'vmap of vjp' + _FOLDED: vmapped('vmap of vjp' + _FOLDED, *folded),
    }
    if compiled:
        code = loop(*parts(fold_batch_norm(network), compiled=True))
        details['not compiled'] = _try_to_compile(lambda: code(1))
        if not details['not compiled']:
            methods['autograd.grad loop' + _FOLDED + _COMPILED] = code
    details['differences'] = _check_agreement(methods)
    if output:
        _save(output, gradients=methods['autograd.grad loop'](classes))
    details |= {'gradients': images * classes, 'units': list(methods)}
    units = {name: functools.partial(method, classes) for name, method in methods.items()}
    return torch_device.prepared(units, details)


# -------------------------------------------------------------------------- nodal dropout


class SmallCNN(nn.Module):
    """`neuron_problems.small_cnn`: two convolutions with max-pools, a dense layer and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _FIRST_FILTERS, 3, padding=1)
        self.conv2 = nn.Conv2d(_FIRST_FILTERS, 32, 3, padding=1)
        self.dense3 = nn.Linear(32 * 7 * 7, 64)
        self.head = nn.Linear(64, 10)

    def front(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the first activation `[B, 64, H, W]` of images `[B, 1, H, W]`."""
        return functional.relu(self.conv1(x))

    def tail(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns the logits `[B, 10]` of the first activation."""
        y = functional.max_pool2d(activation, 2)
        y = functional.max_pool2d(functional.relu(self.conv2(y)), 2)
        # Flax flattens height, width, channels: in channels-last memory a view.
        y = y.permute(0, 2, 3, 1).flatten(1)
        return self.head(functional.relu(self.dense3(y)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits `[B, 10]` of images `[B, 1, H, W]`."""
        return self.tail(self.front(x))


def small_cnn(seed: int, on: torch.device, *, channels_last: bool) -> SmallCNN:
    """Returns the network of `neuron_problems.small_cnn_variables`.

    Args:
        seed: seed of the variables.
        on: where it belongs.
        channels_last: keep weights in channels-last memory.
    """
    network = SmallCNN()
    variables = neuron_problems.small_cnn_variables(seed)
    load_variables(network, neuron_problems.small_cnn(), variables)
    # The network flattens as Flax does.
    kernel = np.ascontiguousarray(variables['params']['dense3']['kernel'].T)
    network.dense3.load_state_dict({'weight': torch.from_numpy(kernel)}, strict=False)
    return network.eval().requires_grad_(False).to(on, memory_format=_layout(channels_last))


def correct_by_full_passes(
    network: SmallCNN,
    tail: Function,
    batches: Batches,
    filters: int,
) -> torch.Tensor:
    """Correctness without each filter, the whole network run over all images for each.

    Args:
        network: the network.
        tail: its tail, perhaps compiled.
        batches: images and labels.
        filters: how many filters are removed in turn.

    Returns:
        Bool `[images, filters + 1]`; the last column is of the intact network.
    """
    columns = []
    for k in range(filters + 1):
        column = []
        for x, y in batches:
            activation = network.front(x)
            if k < filters:
                activation[:, k] = 0
            column.append(tail(activation).argmax(1) == y)
        columns.append(torch.cat(column))
    return torch.stack(columns, 1)


def correct_by_tails(
    network: SmallCNN,
    tail: Function,
    batches: Batches,
    filters: int,
) -> torch.Tensor:
    """The same, with the first convolution run once for each batch.

    Args:
        network: the network.
        tail: its tail, perhaps compiled.
        batches: images and labels.
        filters: how many filters are removed in turn.

    Returns:
        Bool `[images, filters + 1]`; the last column is of the intact network.
    """
    rows = []
    for x, y in batches:
        activation = network.front(x)
        columns = []
        for k in range(filters):
            # In place: a masked copy would be the size of the whole activation.
            kept = activation[:, k].clone()
            activation[:, k] = 0
            columns.append(tail(activation).argmax(1) == y)
            activation[:, k] = kept
        columns.append(tail(activation).argmax(1) == y)
        rows.append(torch.stack(columns, 1))
    return torch.cat(rows)


_NETWORKS: dict[str, Callable[..., SmallCNN]] = {'small_cnn64': small_cnn}


def prepare_ablation(
    *,
    model: str = 'small_cnn64',
    images: int = 10_000,
    batch_size: int = 100,
    seed: int = 0,
    channels_last: bool | None = None,
    compiled: bool = True,
    keep_memory: bool = True,
    output: str = '',
) -> harness.Prepared:
    """Prepares nodal dropout: how many images stay correct without each of 64 first filters.

    Only the correctness of predictions is computed, neither loss nor margin.

    Args:
        model: name of the network; `'small_cnn64'` is the only one.
        images: images per unit.
        batch_size: images at once.
        seed: seed of variables, images and labels.
        channels_last: keep activations and weights in channels-last memory; None for the faster.
        compiled: add the compiled tail, where a compiler is found.
        keep_memory: keep freed memory.
        output: `.npz` file for `correct`, bool `[images, 64]`, `intact_correct` `[images]` and
            `responses` d_k `[64]`, or empty.

    Returns:
        One unit per way; as details the layout and the number of `passes` of one image, for the
        filters and the intact network.
    """
    on, details = _start(keep_memory)
    pixels = neuron_problems.images(images, seed, neuron_problems.SMALL_CNN_SHAPE)
    y = torch.from_numpy(neuron_problems.labels(images, seed)).to(on)

    def load(channels_last: bool) -> tuple[SmallCNN, Batches]:
        x = _image_tensor(pixels, on, channels_last)
        network = _NETWORKS[model](seed, on, channels_last=channels_last)
        return network, list(zip(x.split(batch_size), y.split(batch_size)))

    @torch.inference_mode()
    def trial(network: SmallCNN, batches: Batches) -> torch.Tensor:
        return correct_by_tails(network, network.tail, batches[:1], _FIRST_FILTERS)

    if channels_last is None:
        trials = {layout: functools.partial(trial, *load(layout)) for layout in (False, True)}
        channels_last, details['seconds by channels_last'] = _fastest(trials)
    details['channels_last'] = channels_last
    network, batches = load(channels_last)

    def method(
        function: Callable[..., torch.Tensor], tail: Function
    ) -> Callable[[Batches], torch.Tensor]:
        return torch.inference_mode()(
            lambda batches: function(network, tail, batches, _FIRST_FILTERS)
        )

    methods = {
        FULL: method(correct_by_full_passes, network.tail),
        TAIL: method(correct_by_tails, network.tail),
    }
    if compiled:
        code = method(correct_by_tails, torch.compile(network.tail, dynamic=False))
        details['not compiled'] = _try_to_compile(lambda: code(batches[:1]))
        if not details['not compiled']:
            methods[TAIL + _COMPILED] = code
    expected = methods[FULL](batches[:1])
    for name, function in methods.items():
        differing = (function(batches[:1]) != expected).float().mean()
        assert differing <= 1e-3, f'{name}: {differing}'
    if output:
        correct = methods[TAIL](batches)
        removed, intact = correct[:, :-1], correct[:, -1]
        responses = (intact[:, None].double() - removed.double()).mean(0)
        _save(output, correct=removed, intact_correct=intact, responses=responses)
    details |= {'passes': images * (_FIRST_FILTERS + 1), 'units': list(methods)}
    units = {name: functools.partial(function, batches) for name, function in methods.items()}
    return torch_device.prepared(units, details)


# ------------------------------------------------------------------------------------ script


def main() -> None:
    """Times every unit of every factory and prints seconds and details."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=500, help='images of the ablation')
    parser.add_argument('--eager', action='store_true', help='leave compiled code out')
    harness.add_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    harness.use_device(arguments.device)
    factories: dict[str, Callable[..., harness.Prepared]] = {
        'delta': prepare_delta,
        'logit gradients': prepare_logit_gradients,
        'ablation': functools.partial(prepare_ablation, images=arguments.images),
        'input gradients': prepare_input_gradients,
    }
    for title, factory in factories.items():
        prepared = factory(compiled=not arguments.eager)
        measurement = harness.alternate(prepared.units, rounds=arguments.rounds)
        print(f'\n{title}: {prepared.details}')
        for name in prepared.units:
            summary = measurement.summary(name)
            print(f'  {name}: median {summary.median:.4g} s, best {summary.minimum:.4g} s')


if __name__ == '__main__':
    main()

"""The training steps of `benchmarks.regularizers` in PyTorch, with double backpropagation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks import harness, regularizers, torch_device
from benchmarks.torch_models import CIFARResNet20, LeNet5Wide
from neurosens import data, parallel

_WEIGHT = 1e-4
_TOP, _D1, _D2 = 16, 10.0, 100.0


def make_network(name: str) -> torch.nn.Module:
    """Returns the network, channels last."""
    if name == 'ResNet-20':
        info = data.info('cifar10')
        network: torch.nn.Module = CIFARResNet20(10, info.mean, info.std)
    else:
        network = LeNet5Wide()
    return network.to(memory_format=torch.channels_last).train()


class _Hidden:
    """Catches what every ReLU returns and what enters the last layer, while it is entered."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.activations: list[torch.Tensor] = []
        self.features: list[torch.Tensor] = []
        self._head = getattr(network, 'head', None) or network.linear2

    def __enter__(self) -> _Hidden:
        self._relu, self._method = functional.relu, torch.Tensor.relu

        def relu(x: torch.Tensor) -> torch.Tensor:
            self.activations.append(torch.relu(x))
            return self.activations[-1]

        functional.relu, torch.Tensor.relu = relu, relu  # type: ignore[assignment]
        self._hook = self._head.register_forward_pre_hook(
            lambda _, inputs: self.features.append(inputs[0])
        )
        return self

    def __exit__(self, *error: object) -> None:
        functional.relu, torch.Tensor.relu = self._relu, self._method  # type: ignore[assignment]
        self._hook.remove()


def contribution(network: torch.nn.Module, features: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """T1 and T2 of Suri & Evans, with broadcasts, from the features of the same pass."""
    head = getattr(network, 'head', None) or network.linear2
    weights = head.weight
    top = min(_TOP, weights.shape[1])
    pairs = (weights[:, None] - weights[None]).abs().topk(top).values.mean(-1)
    off = weights[y][:, None] - weights[None]
    moved = (features[:, None] * off).abs().topk(top).values.mean(-1)
    shares = moved / features.sum(1, keepdim=True).clamp(min=1e-12)
    return _D1 * pairs.max() + _D2 * shares.mean()


class Pass(NamedTuple):
    """A forward pass of images that can be differentiated."""

    x: torch.Tensor
    logits: torch.Tensor
    activations: list[torch.Tensor]


def run(network: torch.nn.Module, x: torch.Tensor, *, train: bool) -> Pass:
    """Runs a network in training or in evaluation mode, and leaves it in training mode."""
    x = x.detach().requires_grad_()
    network.train(train)
    with _Hidden(network) as hidden:
        logits = network(x)
    network.train()
    return Pass(x, logits, hidden.activations)


def sensitivity(found: Pass, jacobian: float = 0.0) -> torch.Tensor:
    """Activation sensitivity by one pullback of random signs, and with it that of the logits."""
    total = found.logits.new_zeros(())
    layers = len(found.activations)
    for activation in found.activations:
        signs = torch.randint_like(activation, 2) * 2 - 1
        size = activation[0].numel()
        total = total + (signs * activation).sum() / math.sqrt(layers * size)
    if jacobian:
        signs = torch.randint_like(found.logits, 2) * 2 - 1
        total = total + math.sqrt(jacobian) * (signs * found.logits).sum()
    (slope,) = torch.autograd.grad(total, found.x, create_graph=True)
    return (slope**2).sum() / len(found.x)


def jacobian(found: Pass) -> torch.Tensor:
    """The Jacobian penalty with one random projection, as the released program computes it."""
    direction = torch.randn_like(found.logits)
    direction = direction / direction.norm(dim=1, keepdim=True)
    (slope,) = torch.autograd.grad(found.logits, found.x, direction, create_graph=True)
    return found.logits.shape[1] * (slope**2).sum() / len(found.x) / 2


_PENALTIES: dict[str, Callable[[Pass], torch.Tensor]] = {
    'activation sensitivity': sensitivity,
    regularizers.CALLED_BACK: sensitivity,
    'Jacobian, one projection': jacobian,
    'both in one pass': lambda found: sensitivity(found, 0.5),
}


def attacked(
    network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float
) -> torch.Tensor:
    """Images that PGD finds in evaluation mode, from a random start."""
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    moved = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(regularizers.PGD_STEPS):
        moved.requires_grad_()
        loss = functional.cross_entropy(network(moved), y)
        (slope,) = torch.autograd.grad(loss, moved)
        size = 2.5 * eps / regularizers.PGD_STEPS
        moved = moved.detach() + size * slope.sign()
        moved = torch.min(torch.max(moved, x - eps), x + eps).clamp(0, 1)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    network.train()
    return moved


def _loss(
    name: str, network: torch.nn.Module, eps: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if name.startswith('PGD'):
            return functional.cross_entropy(network(attacked(network, x, y, eps)), y)
        kind = name.removesuffix(regularizers.SHARED)
        if kind == 'T1 + T2':
            with _Hidden(network) as hidden:
                fit = functional.cross_entropy(network(x), y)
            if kind == name:
                network.eval()
                with _Hidden(network) as hidden:
                    network(x)
                network.train()
            return fit + _WEIGHT * contribution(network, hidden.features[0], y)
        if kind not in _PENALTIES:
            return functional.cross_entropy(network(x), y)
        if kind == name:
            fit = functional.cross_entropy(network(x), y)
            return fit + _WEIGHT * _PENALTIES[kind](run(network, x, train=False))
        found = run(network, x, train=True)
        return functional.cross_entropy(found.logits, y) + _WEIGHT * _PENALTIES[kind](found)

    return loss


def prepare(
    *, name: str, terms: list[str], batch_size: int, peak: bool = False
) -> harness.Prepared:
    """Prepares the training steps in a worker process.

    Args:
        name: one of `regularizers.NETWORKS`.
        terms: names of `regularizers.TERMS`.
        batch_size: images per step.
        peak: run the first term and note the peak of the process in MiB.

    Returns:
        A unit of a few training steps per term.
    """
    parallel.keep_freed_memory()
    on = torch_device.start()
    network_settings = regularizers.NETWORKS[name]
    batches = regularizers.noise(network_settings, batch_size)

    def make_unit(term: str) -> harness.Unit:
        network = make_network(name).to(on)
        loss = _loss(term, network, network_settings.eps)
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, nesterov=True)
        stream = itertools.cycle(batches)

        def unit() -> None:
            for batch in itertools.islice(stream, regularizers.STEPS):
                images = (
                    torch.from_numpy(batch.image)
                    .to(on)
                    .permute(0, 3, 1, 2)
                    .contiguous(memory_format=torch.channels_last)
                )
                value = loss(images.float() / 255, torch.from_numpy(batch.label).to(on).long())
                optimizer.zero_grad()
                value.backward()
                optimizer.step()

        return unit

    units = {term: make_unit(term) for term in terms}
    details = {'peak': torch_device.peak_memory(units[terms[0]])} if peak else {}
    return torch_device.prepared(units, {**details, 'threads': torch.get_num_threads()})

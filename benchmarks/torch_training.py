"""The training step of `benchmarks.training_step` in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from benchmarks import harness, torch_device, training_step
from benchmarks.torch_models import CIFARResNet20, load_variables
from neurosens import config, data, parallel
from neurosens.forward import LinenForward, Variables
from neurosens.training import objectives, step

_LOGITS_TOLERANCE = 1e-4
_LOSS_TOLERANCE = 1e-3
_PADDING = 4


def crop_flip(images: torch.Tensor) -> torch.Tensor:
    """Shifts each image by up to 4 pixels and mirrors it half of the time.

    Args:
        images: uint8 `[B, H, W, C]`.

    Returns:
        uint8 `[B, C, H, W]`, as a view of channels-last memory.
    """
    batch, height, width, _ = images.shape
    on = images.device
    padded = functional.pad(images, (0, 0, _PADDING, _PADDING, _PADDING, _PADDING))
    top, left = torch.randint(0, 2 * _PADDING + 1, (2, batch, 1), device=on)
    rows = top + torch.arange(height, device=on)
    columns = left + torch.arange(width, device=on)
    flip = torch.rand(batch, 1, device=on) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    example = torch.arange(batch, device=on)[:, None, None]
    # Indexing bytes, before the conversion to float, moves the least memory.
    return padded[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def plain(images: torch.Tensor) -> torch.Tensor:
    """Returns images `[B, H, W, C]` as a view `[B, C, H, W]`."""
    return images.permute(0, 3, 1, 2)


_AUGMENTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'pad_crop_flip': crop_flip,
    'none': plain,
}


def make_network() -> CIFARResNet20:
    """Returns the network with our initial weights, in training mode."""
    info = data.info('cifar10')
    network = CIFARResNet20(info.num_classes, info.mean, info.std)
    state, *_ = training_step.initial_state()
    load_variables(network, training_step.make_module(), state.variables)
    return network.train()


def make_optimizer(
    network: torch.nn.Module,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns SGD with our settings (decay of kernels only) and its cosine schedule."""
    settings = config.Optimizer()
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {
            'params': [parameter for parameter in parameters if parameter.ndim > 1],
            'weight_decay': settings.weight_decay,
        },
        {'params': [parameter for parameter in parameters if parameter.ndim <= 1]},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training_step.UPDATES)
    return optimizer, schedule


def make_train_step(
    *, channels_last: bool, compiled: bool
) -> Callable[[data.Batch, str], torch.Tensor]:
    """Returns a function that trains on one batch, with an augmentation, and returns its loss.

    Args:
        channels_last: keep images and weights in channels-last memory.
        compiled: compile the network and the loss with `torch.compile`.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    on = torch_device.start()
    network = make_network().to(on, memory_format=layout)  # type: ignore[call-overload]
    optimizer, schedule = make_optimizer(network)

    def loss_function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(network(x), y)

    compute_loss = torch.compile(loss_function) if compiled else loss_function

    def train_step(batch: data.Batch, augmentation: str) -> torch.Tensor:
        images = _AUGMENTATIONS[augmentation](torch.from_numpy(batch.image).to(on)).contiguous(
            memory_format=layout
        )
        loss = compute_loss(images.float() / 255, torch.from_numpy(batch.label).to(on).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return train_step


def prepare(
    *,
    channels_last: bool,
    compiled: bool,
    keep_memory: bool,
    batch_size: int,
    steps: int,
    data_dir: str,
) -> harness.Prepared:
    """Prepares PyTorch's training step in a worker process.

    Args:
        channels_last: keep images and weights in channels-last memory.
        compiled: compile the network and the loss with `torch.compile`.
        keep_memory: keep freed memory, as `train.py` does for XLA.
        batch_size: images per step.
        steps: training steps per unit of work.
        data_dir: directory of the prepared CIFAR-10, or empty.

    Returns:
        One unit per augmentation.
    """
    if keep_memory:
        parallel.keep_freed_memory()
    batches = training_step.load_batches(batch_size, data_dir)

    # One network for both augmentations: compiling it takes longer than measuring it.
    train_step = make_train_step(channels_last=channels_last, compiled=compiled)

    def make_unit(augmentation: str) -> harness.Unit:
        stream = itertools.cycle(batches)

        def unit() -> None:
            for batch in itertools.islice(stream, steps):
                train_step(batch, augmentation)

        unit()
        return unit

    units = {title: make_unit(name) for title, name in training_step.AUGMENTATIONS.items()}
    return torch_device.prepared(units, {'threads': torch.get_num_threads()})


def check_agreement(*, data_dir: str, batch_size: int = 64, steps: int = 3) -> harness.Prepared:
    """Checks that both networks, and both training steps without augmentation, are the same.

    Args:
        data_dir: directory of the prepared CIFAR-10, or empty.
        batch_size: images per step.
        steps: training steps to compare.

    Returns:
        No units; as details the number of parameters and the largest differences.
    """
    mesh = harness.start_jax(devices=1, by_onednn=False)
    batches = training_step.load_batches(batch_size, data_dir)[:steps]
    state, optimizer, schedule = training_step.initial_state()
    module = training_step.make_module()
    counts = (
        sum(leaf.size for leaf in jax.tree.leaves(state.variables['params'])),
        sum(parameter.numel() for parameter in make_network().parameters()),
    )
    assert counts == (training_step.PARAMETERS,) * 2, f'parameters of ours and theirs: {counts}'

    logits = _logits_difference(module, state.variables, batches[0].image)
    assert logits <= _LOGITS_TOLERANCE, f'logits differ by {logits}'

    ours = step.make_train_step(module, optimizer, schedule, objectives.standard(), (), mesh)
    theirs = make_train_step(channels_last=False, compiled=False)
    losses = 0.0
    for batch in batches:
        state, metrics = ours(state, batch, jax.random.key(1))
        losses = max(losses, abs(float(metrics['loss']) - float(theirs(batch, 'none'))))
    assert losses <= _LOSS_TOLERANCE, f'losses differ by {losses}'
    details = {'parameters': counts[0], 'logits': logits, 'losses': losses, 'steps': steps}
    return harness.Prepared({}, details)


def _logits_difference(module: nn.Module, variables: Variables, images: np.ndarray) -> float:
    """Largest difference of evaluation-mode logits, at weights unlike the initial ones."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # Initial scales and variances are 1, biases and means 0: mistakes there would not show.
    moved = [
        leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
        + 0.1 * (leaf.ndim == 1) * jax.random.uniform(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    variables = jax.tree.unflatten(structure, moved)
    ours, _ = LinenForward(module, {'train': False})(variables, data.to_float(jnp.asarray(images)))
    network = make_network()
    load_variables(network, module, variables)
    with torch.no_grad():
        theirs = network.eval()(plain(torch.from_numpy(images)).float() / 255)
    return float(np.abs(np.asarray(ours) - theirs.numpy()).max())

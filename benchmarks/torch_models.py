"""Networks in PyTorch, with layers named as ours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as linen
import torch
from torch import nn
from torch.nn import functional

from neurosens import interop


def padded_shortcut(x: torch.Tensor, features: int, stride: int) -> torch.Tensor:
    """Subsamples positions and pads channels with zeros, half of them on either side.

    Args:
        x: features `[B, C, H, W]`.
        features: number of channels of the result.
        stride: step of the subsampling.

    Returns:
        Features `[B, features, H / stride, W / stride]`.
    """
    missing = features - x.shape[1]
    before = missing // 2
    return functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, missing - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a parameter-free shortcut."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.features, self.stride = features, stride
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns features `[B, features, H / stride, W / stride]`."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if y.shape != x.shape:
            x = padded_shortcut(x, self.features, self.stride)
        return functional.relu(x + y)


class CIFARResNet20(nn.Module):
    """ResNet-20 for CIFAR with zero-padded shortcuts; images in [0, 1] are normalised inside."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        inputs = 16
        for i, features in enumerate((16, 32, 64), start=1):
            for j in range(1, 4):
                stride = 2 if i > 1 and j == 1 else 1
                self.add_module(f'stage{i}_block{j}', BasicBlock(inputs, features, stride))
                inputs = features
        self.head = nn.Linear(64, num_classes)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in order."""
        return {name: m for name, m in self.named_children() if isinstance(m, BasicBlock)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, K]` of images `[B, 3, H, W]`."""
        x = (x - self.mean) / self.std
        x = functional.relu(self.norm1(self.conv1(x)))
        for block in self.blocks.values():
            x = block(x)
        return self.head(x.mean((2, 3)))


class LeNet5Wide(nn.Module):
    """The network `lenet5_wide`: two convolutions with pooling and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(3136, 200)
        self.linear2 = nn.Linear(200, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, 10]` of images `[B, 1, 28, 28]`."""
        for convolution in (self.conv1, self.conv2):
            x = functional.max_pool2d(convolution(x).relu(), 2)
        return self.linear2(self.linear1(x.flatten(1)).relu())


class ResNet2B(nn.Module):
    """Two residual blocks without batch norm, and two linear layers; normalises inside."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.block1_conv1 = nn.Conv2d(8, 16, 3, 2, padding=1)
        self.block1_conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.block1_shortcut = nn.Conv2d(8, 16, 1, 2)
        self.block2_conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.block2_conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.dense = nn.Linear(1024, 100)
        self.head = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, 10]` of images `[B, 3, 32, 32]`."""
        x = self.conv1((x - self.mean) / self.std).relu()
        x = (self.block1_conv2(self.block1_conv1(x).relu()) + self.block1_shortcut(x)).relu()
        x = (self.block2_conv2(self.block2_conv1(x).relu()) + x).relu()
        return self.head(self.dense(x.flatten(1)).relu())


class CNNA(nn.Module):
    """CNN-A of the verification literature; normalises inside."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 4, 2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, 2, padding=1)
        self.dense = nn.Linear(2048, 100)
        self.head = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, 10]` of images `[B, 3, 32, 32]`."""
        x = self.conv2(self.conv1((x - self.mean) / self.std).relu()).relu()
        return self.head(self.dense(x.flatten(1)).relu())


class MLP5x100(nn.Module):
    """Five hidden layers of 100 for images of 28 x 28 pixels."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 100, 100, 100, 100, 100)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.head = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, 10]` of images `[B, 1, 28, 28]`."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


def load_variables(
    network: nn.Module, module: linen.Module, variables: Mapping[str, Any]
) -> nn.Module:
    """Gives a network the variables of a Linen module with layers of the same names.

    Args:
        network: in PyTorch.
        module: in Flax.
        variables: of the module.

    Returns:
        The network.
    """
    state = network.state_dict()
    network.load_state_dict(interop.to_torch(module, variables, like=state, tensors=True))
    return network

"""The convolutions of `benchmarks.convolution` in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, torch_device
from benchmarks.convolution import SHAPES, lasting
from neurosens import parallel


def prepare() -> harness.Prepared:
    """Prepares PyTorch's convolutions, channels last, in a worker process."""
    parallel.keep_freed_memory()
    torch_device.start()
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

        cotangents = torch.from_numpy(shape.cotangents()).permute(0, 3, 1, 2)
        strides, edges = (shape.stride,) * 2, (edge,) * 2

        def kernel_gradient(
            x: torch.Tensor = x,
            w: torch.Tensor = w,
            cotangents: torch.Tensor = cotangents,
            strides: tuple[int, int] = strides,
            edges: tuple[int, int] = edges,
        ) -> None:
            torch.ops.aten.convolution_backward(
                *(cotangents, x, w, None, strides, edges, (1, 1), False, (0, 0), 1),
                (False, True, False),
            )

        units[f'{shape} forward'], units[f'{shape} gradient'] = forward, gradient
        units[f'{shape} kernel gradient'] = kernel_gradient
    return lasting(units, threads=torch.get_num_threads())

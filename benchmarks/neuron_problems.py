"""Inputs of the neuron-measure benchmarks, the same for neurosens and for its PyTorch peers.

Everything follows from seeds, on any machine: numbers from NumPy's generator, initial weights from
JAX's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from neurosens import attacks, data, models, neurons
from neurosens.forward import LinenForward

SMALL_CNN_SHAPE = (28, 28, 1)


class DeltaProblem(NamedTuple):
    """Features and weights of a last linear layer.

    Attributes:
        features: h, what the layer is given, at least 0, `[images, neurons]`.
        weights: W, one row per class, `[classes, neurons]`.
        bias: b `[classes]`.
    """

    features: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def logits(self) -> np.ndarray:
        """Returns W h + b `[images, classes]`, rounded to float32 only at the end."""
        features, weights = self.features.astype(np.float64), self.weights.astype(np.float64)
        return (features @ weights.T + self.bias).astype(np.float32)


def delta_problem(images: int, neurons: int, classes: int, seed: int) -> DeltaProblem:
    """Makes features of which about half are 0, and weights.

    Every 64th neuron has the same weight for all classes, so that no change of it can change the
    prediction.

    Args:
        images: rows of the features.
        neurons: width of the layer.
        classes: number of logits.
        seed: seed of all values.

    Returns:
        Float32 features, weights and bias.
    """
    random = np.random.default_rng(seed)
    features = np.maximum(random.standard_normal((images, neurons), np.float32), 0)
    weights = random.standard_normal((classes, neurons), np.float32) / np.float32(neurons**0.5)
    weights[:, ::64] = weights[:1, ::64]
    return DeltaProblem(features, weights, random.standard_normal(classes, np.float32))


def images(count: int, seed: int, shape: tuple[int, ...] = (32, 32, 3)) -> np.ndarray:
    """Returns noise in [0, 1) as float32 images `[count, *shape]`, channels last."""
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def labels(count: int, seed: int, classes: int = 10) -> np.ndarray:
    """Returns random int32 labels `[count]`."""
    return np.random.default_rng(seed).integers(0, classes, count, np.int32)


def resnet20() -> nn.Module:
    """Returns the CIFAR ResNet-20 of `neurosens.models`."""
    info = data.info('cifar10')
    return models.create(
        'cifar_resnet20', num_classes=info.num_classes, mean=info.mean, std=info.std
    )


def resnet20_variables(seed: int) -> dict[str, Any]:
    """Returns variables of `resnet20` as float32 NumPy arrays, see `_moved_variables`."""
    return _moved_variables(resnet20(), data.info('cifar10').image_shape, seed)


def small_cnn() -> nn.Module:
    """Returns the network whose 64 first filters are removed in turn, for 28 x 28 grey images."""
    return models.create('cnn', num_classes=10, features=(64, 32), hidden=(64,))


def small_cnn_variables(seed: int) -> dict[str, Any]:
    """Returns variables of `small_cnn` as float32 NumPy arrays, see `_moved_variables`."""
    return _moved_variables(small_cnn(), SMALL_CNN_SHAPE, seed)


def _moved_variables(module: nn.Module, image_shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Initial variables whose vectors are moved, as after some training.

    Initial scales and variances are 1 and biases and means 0, which would hide mistakes and leave
    every convolution the same gain: they are multiplied by 0.5-1.5 and raised by 0-0.1.
    """
    shape = jnp.zeros((1, *image_shape))
    variables = jax.jit(module.init)(jax.random.key(seed), shape)
    random = np.random.default_rng(seed)
    flat = {
        path: np.array(leaf)
        for path, leaf in sorted(flax.traverse_util.flatten_dict(variables).items())
    }
    for path, leaf in flat.items():
        if leaf.ndim == 1:
            factor, term = random.random((2, *leaf.shape), np.float32)
            flat[path] = leaf * (np.float32(0.5) + factor) + np.float32(0.1) * term
    return flax.traverse_util.unflatten_dict(flat)


def single_neurons(
    forward: LinenForward, variables: dict[str, Any], x: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the easiest neurons of the last layer's input.

    Args:
        forward: the network.
        variables: its variables.
        x: images.
        count: neurons per image.

    Returns:
        Neurons `[B, count]`, the changes that flip the prediction, and the activations `[B, D]`.
    """
    found = neurons.sensitivity(forward, variables, x)
    total = neurons.statistics(forward, variables, x)
    chosen, delta = attacks.easiest_neurons(found.delta, total.mean, total.std(), count)
    features = forward(variables, x, taps=('head:in',))[1]['head:in']
    return np.asarray(chosen), np.asarray(delta), np.asarray(features)

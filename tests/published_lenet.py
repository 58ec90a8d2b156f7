"""The published LeNet-5 of MNIST in PyTorch and in Linen, both in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from neurosens import data, interop
from neurosens.forward import LinenForward


class LeNet(torch.nn.Module):
    """The network of the published weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = torch.nn.Linear(3136, 200)
        self.linear2 = torch.nn.Linear(200, 10)

    def forward(self, x):
        for convolution in (self.conv1, self.conv2):
            x = torch.nn.functional.max_pool2d(convolution(x).relu(), 2)
        return self.linear2(self.linear1(x.flatten(1)).relu())


def load(data_root, count):
    """The network on both sides, with the first images that it classifies correctly.

    Returns:
      `(network, forward, variables, x, y)`, as NumPy arrays.
    """
    path = data_root / 'weights' / 'mnist_lenet5_standard.pt'
    state = interop.read_state_dict(path)
    network = LeNet()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    network.double().eval()
    module, variables = interop.from_torch(state, 'lenet5_wide', dtype=jnp.float64)
    variables = jax.tree.map(np.float64, variables)
    source = data.open('mnist', 'test', str(data_root / 'tfds'), 0)
    batch = next(
        iter(
            source.eval_batches(batch_size=2 * count, process_index=0, process_count=1, limit=None)
        )
    )
    images = np.float64(batch.image) / 255
    with torch.no_grad():
        predicted = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).argmax(1).numpy()
    rows = np.flatnonzero(predicted == batch.label)[:count]
    forward = LinenForward(module, {'train': False})
    return network, forward, variables, images[rows], np.asarray(batch.label)[rows]

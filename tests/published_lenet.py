"""The published LeNet-5 of MNIST in PyTorch and in Linen, both in float64."""

import jax.numpy as jnp
import numpy as np
import torch

from neurosens import data, models
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
    state = torch.load(path, weights_only=True, map_location='cpu')
    network = LeNet()
    network.load_state_dict(state)
    network.double().eval()
    weights = {name: value.double().numpy() for name, value in state.items()}
    # PyTorch flattens channels first.
    hidden = weights['linear1.weight'].reshape(200, 64, 7, 7).transpose(2, 3, 1, 0)
    params = {
        name: {
            'kernel': weights[f'{name}.weight'].transpose(2, 3, 1, 0),
            'bias': weights[f'{name}.bias'],
        }
        for name in ('conv1', 'conv2')
    }
    params['dense3'] = {'kernel': hidden.reshape(3136, 200), 'bias': weights['linear1.bias']}
    params['head'] = {'kernel': weights['linear2.weight'].T, 'bias': weights['linear2.bias']}
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
    module = models.create('lenet5_wide', num_classes=10, dtype=jnp.float64)
    forward = LinenForward(module, {'train': False})
    return network, forward, {'params': params}, images[rows], np.asarray(batch.label)[rows]

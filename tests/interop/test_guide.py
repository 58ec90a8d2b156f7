"""The examples of the guide run as they stand there."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import data

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')
pytest.importorskip('foolbox', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402
from test_published import cnn_a, resnet20  # noqa: E402

pytestmark = pytest.mark.parity

GUIDE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'from_pytorch.md'


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {'cifar10_resnet20_standard.th': resnet20(), 'cifar10_cnn_a_pgd_linf2.pth': cnn_a()}
    for file, source in files.items():
        torch.save(networks.randomize(source).state_dict(), file)
    examples = re.findall(r'```python\n(.*?)```', GUIDE.read_text(encoding='utf-8'), re.DOTALL)
    load, stack, back, attack = (compile(example, GUIDE.name, 'exec') for example in examples)
    names = {'__name__': 'guide'}
    exec(load, names)
    assert names['module'].num_classes == 10 and names['module'].mean == (0.485, 0.456, 0.406)
    network = names['network'] = resnet20()
    exec(back, names)
    for name, value in files['cifar10_resnet20_standard.th'].state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    exec(stack, names)
    assert [layer.features for layer in names['module'].convolutions] == [16, 32]
    # Anything may be attacked: a linear classifier of digits compiles at once.
    test, ns = data.load('digits', 'test'), names['ns']
    weights = np.random.default_rng(0).normal(size=(10, 64))
    module, names['variables'] = ns.interop.from_torch({'head.weight': weights}, 'sequential')
    names['forward'] = ns.LinenForward(module)
    names['x'] = jnp.asarray(data.to_float(test.images[:20]))
    names['y'] = names['forward'](names['variables'], names['x'])[0].argmax(-1)
    exec(attack, names)
    assert names['success'].any()
    assert np.abs(names['adversarial'] - names['x']).max() <= 8 / 255 + 1e-6

"""Files give up their weights, and nothing that a file says is ever run."""

import collections
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from neurosens import interop

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402

pytestmark = pytest.mark.parity

GUIDE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'from_pytorch.md'
STATE = {'1.weight': torch.arange(6.0).reshape(2, 3), '1.bias': torch.tensor([0.5, -0.5])}


def assert_is_state(read):
    assert list(read) == list(STATE)
    for name, value in STATE.items():
        np.testing.assert_array_equal(read[name], value.numpy())


@pytest.mark.parametrize('suffix', interop.TORCH_SUFFIXES)
@pytest.mark.parametrize(
    'nest',
    [
        lambda state: state,
        lambda state: {'state_dict': state, 'epoch': 3, 'best_prec1': torch.tensor(91.7)},
        lambda state: {'net': collections.OrderedDict(state), 'acc': 0.9},
        lambda state: {'model': {'model_state_dict': state}},
        lambda state: [state, 5],
        lambda state: {'model': state, 'optimizer': {'state': {0: {'momentum_buffer': STATE}}}},
    ],
)
def test_a_state_dict_is_found_where_training_scripts_put_it(tmp_path, suffix, nest):
    path = tmp_path / f'weights{suffix}'
    torch.save(nest(STATE), path)
    assert_is_state(interop.read_state_dict(path))


def test_the_choice_among_several_is_the_users(tmp_path):
    path = tmp_path / 'weights.pt'
    torch.save({'net': {'a.weight': torch.ones(1, 1)}, 'ema': [STATE]}, path)
    with pytest.raises(interop.WeightsError, match=r"holds 2 state dicts; .* of 'net', 'ema/0'"):
        interop.read_state_dict(path)
    assert_is_state(interop.read_state_dict(path, 'ema/0'))
    with pytest.raises(interop.WeightsError, match="has no state dict at 'model'; it has them at"):
        interop.read_state_dict(path, 'model')


class Malicious:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('old_format', [False, True])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, old_format):
    path, proof = tmp_path / 'weights.pt', tmp_path / 'proof'
    content = {'state_dict': STATE, 'more': Malicious(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(interop.WeightsError, match=r'\.mkdir, and reading it could run any code'):
        interop.load_torch(path, 'mlp')
    assert not proof.exists()
    # It would have been run otherwise.
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize('version', ['1.13.1', '2.5.1+cu121', '2.9.1', 'unknown'])
def test_releases_that_run_what_files_say_are_not_used(tmp_path, monkeypatch, version):
    path = tmp_path / 'weights.pt'
    torch.save(STATE, path)
    monkeypatch.setattr(torch, '__version__', version)
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('The file was read.'))
    with pytest.raises(interop.WeightsError) as caught:
        interop.read_state_dict(path)
    assert f'with PyTorch {version} could run any code' in str(caught.value)
    assert 'install 2.10 or newer' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('version', ['2.10.0a0+git123', '2.13.0+cpu', '3.0'])
def test_later_releases_are_used(tmp_path, monkeypatch, version):
    path = tmp_path / 'weights.pt'
    torch.save(STATE, path)
    monkeypatch.setattr(torch, '__version__', version)
    assert_is_state(interop.read_state_dict(path))


def test_a_pickled_network_is_refused(tmp_path):
    path = tmp_path / 'network.pth'
    torch.save(networks.LeNet5(), path)
    with pytest.raises(
        interop.WeightsError, match=r'torch_networks\.LeNet5, .* save its state_dict'
    ):
        interop.read_state_dict(path)


def test_a_file_of_the_robustness_library_is_saved_anew(tmp_path, monkeypatch):
    class Parameters:
        """Stands for the settings that its files hold beside the weights."""

        def __init__(self, **settings):
            self.__dict__.update(settings)

    Parameters.__module__, Parameters.__qualname__ = 'cox.utils', 'Parameters'
    for name in ('cox', 'cox.utils'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules['cox.utils'].Parameters = Parameters
    network = networks.randomize(networks.AttackerModel(networks.LeNet5(), (0.1,), (0.3,)))
    state = {f'module.{name}': value for name, value in network.state_dict().items()}
    content = {'model': state, 'optimizer': {}, 'epoch': 3, 'args': Parameters(eps=0.5)}
    path = tmp_path / 'mnist.pt'
    # On a GPU, which most readers have none of.
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        torch.save(content, path)
    with pytest.raises(
        interop.WeightsError, match=r'object cox\.utils\.Parameters, .* save its state_dict\(\) al'
    ):
        interop.load_torch(path, 'lenet5')
    (command,) = re.findall(r'`(torch\.save\(.*)`', GUIDE.read_text(encoding='utf-8'))
    monkeypatch.chdir(tmp_path)
    exec(command, {'torch': torch, 'path': path})
    module, _ = interop.load_torch('weights.pt', 'lenet5')
    assert module.mean == pytest.approx((0.1,)) and module.std == pytest.approx((0.3,))


@pytest.mark.parametrize('name', ['cut.pt', 'text.pth', 'empty.ckpt', 'log.pt', 'text.safetensors'])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    torch.save(STATE, path)
    whole = path.read_bytes()
    content = {
        'cut': whole[: len(whole) // 2],
        'text': b'not weights at all',
        'empty': b'',
        # Its first bytes are instructions of pickles that take from an empty stack.
        'log': b'error: not found',
    }
    path.write_bytes(content[path.stem])
    with pytest.raises(interop.WeightsError) as caught:
        interop.read_state_dict(path)
    assert repr(str(path)) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [{'epoch': 3}, [], {'best': torch.tensor(3.0)}, {}])
def test_a_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / 'a.pt')
    with pytest.raises(interop.WeightsError, match=r"a\.pt' holds no state dict"):
        interop.read_state_dict(tmp_path / 'a.pt')


def test_a_file_that_is_not_there_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of weights '.*missing\.pt'"):
        interop.read_state_dict(tmp_path / 'missing.pt')
    (tmp_path / 'weights.npz').write_bytes(b'')
    with pytest.raises(interop.WeightsError, match=r"ends in '\.npz'; rename it to what it is"):
        interop.read_state_dict(tmp_path / 'weights.npz')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in STATE.items()}
    torch.save(state, tmp_path / 'weights.pt')
    assert_is_state(interop.read_state_dict(tmp_path / 'weights.pt'))
    import safetensors.torch

    safetensors.torch.save_file(state, tmp_path / 'weights.safetensors')
    read = interop.read_state_dict(tmp_path / 'weights.safetensors')
    assert_is_state({name: read[name] for name in STATE})


def test_safetensors_are_read_in_the_order_of_their_layers(tmp_path):
    layers = {f'{2 * k + 1}.weight': np.full((2, 2), k, np.float32) for k in range(6)}
    safetensors.numpy.save_file(layers, tmp_path / 'weights.safetensors')
    assert list(interop.read_state_dict(tmp_path / 'weights.safetensors')) == list(layers)


def test_safetensors_and_the_library_need_no_pytorch(tmp_path):
    network = networks.randomize(networks.LeNet5())
    module, variables = interop.from_torch(network.state_dict(), 'lenet5')
    safetensors.numpy.save_file(
        interop.to_torch(module, variables), tmp_path / 'weights.safetensors'
    )
    torch.save(network.state_dict(), tmp_path / 'weights.pt')
    code = f"""
import sys
sys.modules['torch'] = None
import neurosens as ns
module, variables = ns.interop.load_torch({str(tmp_path / 'weights.safetensors')!r}, 'lenet5')
print(module.num_classes)
try:
    ns.interop.load_torch({str(tmp_path / 'weights.pt')!r}, 'lenet5')
except ns.interop.WeightsError as error:
    print(error)
"""
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    classes, sentence = done.stdout.splitlines()
    assert classes == '10'
    assert 'needs PyTorch, which is not installed: pip install torch, or convert' in sentence


def test_what_is_no_array_is_named():
    with pytest.raises(interop.WeightsError, match="'epoch' is a int, not an array"):
        interop.from_torch({**STATE, 'epoch': 3}, 'mlp')
    sparse = {**STATE, 'sparse': torch.eye(3).to_sparse()}
    with pytest.raises(interop.WeightsError, match="'sparse' is a tensor that is no plain array"):
        interop.from_torch(sparse, 'mlp')
    with pytest.raises(interop.WeightsError, match='is empty'):
        interop.from_torch({}, 'mlp')


def test_pytorch_is_imported_by_reading_alone(monkeypatch):
    # Arrays of anything that looks like a tensor would do; NumPy's own need no PyTorch.
    monkeypatch.setitem(sys.modules, 'torch', types.ModuleType('torch'))
    state = {'a.weight': np.ones((4, 64), np.float32), 'a.bias': np.ones(4, np.float32)}
    state |= {'b.weight': np.ones((3, 4), np.float32), 'b.bias': np.ones(3, np.float32)}
    module, _ = interop.from_torch(state, 'mlp', hidden=(4,))
    assert module.num_classes == 3

"""The same iterates as PyTorch libraries, step for step, on a published network."""

import copy
import sys

import jax
import numpy as np
import pytest

from neurosens.attacks import Threat, apgd, fab, fgsm, mi_fgsm, pgd

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')
torchattacks = pytest.importorskip('torchattacks', reason='parity needs requirements-bench.txt')
foolbox = pytest.importorskip('foolbox', reason='parity needs requirements-bench.txt')

pytestmark = pytest.mark.parity

COUNT = 8


@pytest.fixture(scope='module')
def pair(data_root):
    """The network on both sides in double precision, with the first images it classifies."""
    # Imported here: it needs torch.
    import published_lenet

    return published_lenet.load(data_root, COUNT)


def ours(pair, attack, threat, **options):
    _, forward, variables, x, y = pair
    with jax.enable_x64(True):
        result = attack(
            forward, variables, x, y, jax.random.key(0), threat=threat, keep='last', **options
        )
        return np.asarray(result.x_adv)


def theirs(pair, attack):
    network, _, _, x, y = pair
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    adversarial = attack(network)(images, torch.from_numpy(y.astype(np.int64)))
    assert adversarial.dtype == torch.float64
    return adversarial.detach().numpy().transpose(0, 2, 3, 1)


def assert_same(one, other, clean):
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert np.abs(other - clean).max() > 0.05


@pytest.mark.parametrize('steps', [1, 10])
def test_linf_pgd_is_that_of_torchattacks(pair, steps):
    mine = ours(pair, pgd, Threat('linf', 0.2), steps=steps, step_size=0.06, start='clean')
    expected = theirs(
        pair,
        lambda network: torchattacks.PGD(network, 0.2, 0.06, steps, random_start=False),
    )
    assert_same(mine, expected, pair[3])


def test_l2_pgd_is_that_of_torchattacks(pair):
    mine = ours(pair, pgd, Threat('l2', 2.0), steps=10, step_size=0.4, start='clean')
    expected = theirs(
        pair,
        lambda network: torchattacks.PGDL2(
            network, 2.0, 0.4, 10, random_start=False, eps_for_division=1e-30
        ),
    )
    assert_same(mine, expected, pair[3])


def test_fgsm_is_that_of_torchattacks(pair):
    mine = ours(pair, fgsm, Threat('linf', 0.1))
    assert_same(mine, theirs(pair, lambda network: torchattacks.FGSM(network, 0.1)), pair[3])


def test_momentum_is_that_of_torchattacks(pair):
    mine = ours(pair, mi_fgsm, Threat('linf', 0.2), steps=10, step_size=0.03, momentum=0.9)
    expected = theirs(pair, lambda network: torchattacks.MIFGSM(network, 0.2, 0.03, 10, 0.9))
    assert_same(mine, expected, pair[3])


@pytest.mark.parametrize('loss', ['cross_entropy', 'dlr'])
def test_auto_pgd_is_that_of_torchattacks_from_the_same_start(pair, loss, monkeypatch):
    """With its comparison of the first loss with 0, which ours makes only if asked.

    In l2: steps of signs go either way where a pixel's gradient is nothing but rounding.
    """
    network, forward, variables, x, y = pair
    # Off the edges of the box: of pixels that are clipped alike, rounding alone says which one max
    # pooling takes, and that differs between processors.
    x = 0.1 + 0.8 * x + 0.1 * (np.random.default_rng(1).random(x.shape) - 0.5)
    eps, draws = 1.5, np.random.default_rng(0).normal(size=x.shape)
    lengths = np.linalg.norm(draws.reshape(COUNT, -1), axis=1)[:, None, None, None]
    start = np.clip(x + eps * draws / (lengths + 1e-12), 0, 1)
    with jax.enable_x64(True):
        result = apgd(
            forward,
            variables,
            x,
            y,
            jax.random.key(0),
            threat=Threat('l2', eps),
            steps=100,
            loss=loss,
            start=start,
            first_rises=True,
        )
        mine, success = np.asarray(result.x_adv), np.asarray(result.success)
    kind = {'cross_entropy': 'ce', 'dlr': 'dlr'}[loss]
    attack = torchattacks.APGD(network, norm='L2', eps=eps, steps=100, loss=kind)
    images, labels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(np.int64(y))
    rows = torch.from_numpy(draws.transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(torch, 'randn', lambda shape: rows)
    # Else it makes step sizes and notes losses in single precision.
    torch.set_default_dtype(torch.float64)
    try:
        best, still_correct, _, last = attack.attack_single_run(images, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(success, ~still_correct.numpy())
    assert 0 < success.sum() < COUNT
    # It keeps the last iterate that fools and, apart, the one of the largest loss.
    expected = np.where(success[:, None, None, None], *(
        found.detach().numpy().transpose(0, 2, 3, 1) for found in (last, best)
    ))  # fmt: skip
    if loss == 'cross_entropy':
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-7)
    # The ratio changes its classes on the way, and with them what rounding grows to.
    assert np.abs(mine - expected).mean() < 2e-3


@pytest.mark.parametrize(('norm', 'eps'), [('linf', 0.2), ('l2', 2.0)])
def test_fgsm_is_that_of_foolbox(pair, norm, eps):
    network, _, _, x, y = pair
    kind = {
        'linf': foolbox.attacks.LinfFastGradientAttack,
        'l2': foolbox.attacks.L2FastGradientAttack,
    }[norm]
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(y.astype(np.int64))
    _, clipped, _ = kind(random_start=False)(model, images, labels, epsilons=eps)
    mine = ours(pair, fgsm, Threat(norm, eps))
    assert_same(mine, clipped.detach().numpy().transpose(0, 2, 3, 1), x)


@pytest.mark.parametrize(('norm', 'eps', 'size'), [('linf', 0.2, 0.05), ('l2', 2.0, 0.4)])
def test_pgd_is_that_of_foolbox(pair, norm, eps, size):
    network, _, _, x, y = pair
    mine = ours(pair, pgd, Threat(norm, eps), steps=10, step_size=size, start='clean')
    kind = {'linf': foolbox.attacks.LinfPGD, 'l2': foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=size, steps=10, random_start=False)
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(y.astype(np.int64))
    _, clipped, _ = attack(model, images, labels, epsilons=eps)
    assert clipped.dtype == torch.float64
    assert_same(mine, clipped.detach().numpy().transpose(0, 2, 3, 1), x)


@pytest.fixture
def art_classifier(pair, monkeypatch):
    """The network for ART, which takes float32 unless told otherwise in each of its modules."""
    pytest.importorskip('art', reason='parity needs requirements-bench.txt')
    from art.attacks.evasion import fast_gradient  # noqa: F401
    from art.estimators.classification import PyTorchClassifier

    for name, module in list(sys.modules.items()):
        if name.split('.')[0] == 'art' and hasattr(module, 'ART_NUMPY_DTYPE'):
            monkeypatch.setattr(module, 'ART_NUMPY_DTYPE', np.float64)
    return PyTorchClassifier(
        pair[0], torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0.0, 1.0),
        device_type='cpu',
    )  # fmt: skip


def of_art(pair, attack):
    _, _, _, x, y = pair
    return attack.generate(x.transpose(0, 3, 1, 2), np.int64(y)).transpose(0, 2, 3, 1)


def test_fgsm_is_that_of_art(pair, art_classifier):
    from art.attacks.evasion import FastGradientMethod

    found = of_art(pair, FastGradientMethod(art_classifier, eps=0.2))
    np.testing.assert_allclose(ours(pair, fgsm, Threat('linf', 0.2)), found, rtol=1e-9)


def test_ten_steps_of_pgd_are_those_of_art(pair, art_classifier):
    from art.attacks.evasion import ProjectedGradientDescentNumpy

    attack = ProjectedGradientDescentNumpy(
        art_classifier, eps=0.2, eps_step=0.03, max_iter=10, verbose=False
    )
    found = ours(pair, pgd, Threat('linf', 0.2), steps=10, step_size=0.03, start='clean')
    np.testing.assert_allclose(found, of_art(pair, attack), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('norm', 'kind'), [('linf', 'Linf'), ('l2', 'L2')])
@pytest.mark.parametrize('aimed', [False, True])
def test_fab_from_the_image_is_that_of_torchattacks(pair, norm, kind, aimed):
    """In single precision, which it turns images into: distances agree as far as rounding lets."""
    network, forward, variables, x, y = pair
    single = copy.deepcopy(network).float()
    images = torch.from_numpy(np.float32(x.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(np.int64(y))
    module = type(forward)(forward.module.clone(dtype=np.float32), {'train': False})
    arrays = jax.tree.map(np.float32, variables)
    order = np.asarray(module(arrays, np.float32(x))[0]).argsort(-1)
    attack = torchattacks.FAB(single, norm=kind, eps=1e6, steps=20)
    if aimed:
        attack.multi_targeted, attack.target_class = True, 2
        found = attack.attack_single_run_targeted(images, labels, use_rand_start=False)
    else:
        found = attack.attack_single_run(images, labels, use_rand_start=False)
    change = (found - images).numpy().reshape(COUNT, -1)
    expected = np.linalg.norm(np.float64(change), np.inf if norm == 'linf' else 2, axis=1)
    target = order[:, -2] if aimed else None
    result = fab(
        module, arrays, np.float32(x), y, jax.random.key(0),
        threat=Threat(norm, np.inf), steps=20, target=target,
    )  # fmt: skip
    distance = np.asarray(result.distance)
    assert np.isfinite(distance).all() and (distance > 0).all()
    ratio = distance / expected
    assert abs(np.median(ratio) - 1) < 1e-3
    np.testing.assert_allclose(ratio, 1, atol=0.02)

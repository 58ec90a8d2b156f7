"""The sides of torchattacks and foolbox in `benchmarks.attack_parity`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import eagerpy as ep
import foolbox
import numpy as np
import torch
import torchattacks

from benchmarks import published, torch_attacks
from benchmarks.attack_settings import Setting


class _ProjectingFMN(foolbox.attacks.L2FMNAttack):
    """FMN of foolbox in l2 with projections onto the ball.

    Its own divide norms by themselves, so that nothing is ever projected.
    """

    def project(self, x: ep.Tensor, x0: ep.Tensor, epsilon: ep.Tensor) -> ep.Tensor:
        """Returns what lies in the ball around `x0` of radius `epsilon`, one for each image."""
        lengths = ep.norms.l2(ep.astensor(x - x0).flatten(start=1), axis=-1)
        factor = ep.minimum(1, epsilon / ep.maximum(lengths, 1e-12))
        return x0 + (x - x0) * factor.reshape((-1, *(1,) * (x.ndim - 1)))


_SMALLEST: dict[tuple[str, str], Callable[[], foolbox.Attack]] = {
    ('deepfool', 'l2'): lambda: foolbox.attacks.L2DeepFoolAttack(steps=50),
    ('deepfool', 'linf'): lambda: foolbox.attacks.LinfDeepFoolAttack(steps=50),
    ('fmn', 'l2'): lambda: foolbox.attacks.L2FMNAttack(steps=100),
    ('fmn', 'linf'): lambda: foolbox.attacks.LInfFMNAttack(steps=100),
    ('fmn', 'l1'): lambda: foolbox.attacks.L1FMNAttack(steps=100),
    ('fmn, projecting', 'l2'): lambda: _ProjectingFMN(steps=100),
    ('carlini_wagner', 'l2'): lambda: foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=5, steps=200
    ),
}
_ORDERS = {'linf': np.inf, 'l2': 2, 'l1': 1}


def _tensors(
    network: torch.nn.Module, x: np.ndarray, y: np.ndarray, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields images and labels in batches, where the network is."""
    on = next(network.parameters()).device
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        labels = torch.from_numpy(np.int64(y[rows])).to(on)
        yield published.torch_images(x[rows]).to(on), labels


def withstood(
    network: torch.nn.Module,
    attack: str,
    setting: Setting,
    seed: int,
    x: np.ndarray,
    y: np.ndarray,
    *,
    draws: np.ndarray | None = None,
) -> np.ndarray:
    """Returns which images an attack of torchattacks leaves classified correctly `[N]`.

    Args:
        network: in PyTorch.
        attack: one of `attack_settings.ATTACKS`, or `'square-whole'`.
        setting: threat and budgets.
        seed: of its randomness.
        x: images `[N, ...]`.
        y: labels `[N]`.
        draws: what Auto-PGD takes from `torch.rand` for each image, shaped as the images; or for
            every image alike, shaped as one.
    """
    torch.manual_seed(seed)
    run = torch_attacks.torchattacks_attacks(network, setting, seed)[attack]
    given = None
    if draws is not None:
        given = published.torch_images(draws.reshape(-1, *x.shape[1:]))
    found = []
    for images, labels in _tensors(network, x, y, setting.batch_size):
        correct = network(images).argmax(1) == labels
        still = correct.clone()
        own = contextlib.nullcontext()
        if given is not None and draws is not None and draws.ndim < x.ndim:
            own = mock.patch('torch.rand', side_effect=given.expand)
        elif given is not None:
            rows, given = given[: len(images)], given[len(images) :]
            own = mock.patch('torch.rand', return_value=rows[correct.cpu()])
        # Only images that are classified correctly are attacked, as in ours.
        with own:
            adversarial = run(images[correct], labels[correct])
        still[correct] = network(adversarial).argmax(1) == labels[correct]
        found.append(still.cpu().numpy())
    return np.concatenate(found)


def correct(network: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns which images are classified correctly `[N]`."""
    ((images, labels),) = _tensors(network, x, y, len(x))
    return (network(images).argmax(1) == labels).cpu().numpy()


def smallest(
    network: torch.nn.Module, attack: str, norm: str, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Returns the size of the perturbations that an attack of foolbox finds, inf for none `[N]`.

    Its attack of Carlini & Wagner returns a black image where it has found none, and names that a
    success if the network takes black for another class; here it is none.
    """
    ((images, labels),) = _tensors(network, x, y, len(x))
    # Else it moves the network to a GPU where there is one.
    device = next(network.parameters()).device
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=device)
    _, found, success = _SMALLEST[attack, norm]()(model, images, labels, epsilons=None)
    if attack == 'carlini_wagner':
        success &= found.flatten(1).ne(0).any(1)
    change = (found - images).detach().flatten(1).cpu().numpy()
    sizes = np.linalg.norm(change, _ORDERS[norm], axis=1)
    return np.where(success.cpu().numpy(), sizes, np.inf)


def broken(
    network: torch.nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: float,
    steps: int,
    step_size: float,
    random_start: bool,
    batch_size: int,
) -> float:
    """Returns the share of correctly classified images that PGD of torchattacks breaks.

    Args:
        network: in PyTorch.
        x: images.
        y: labels.
        eps: linf radius.
        steps: of PGD.
        step_size: their length.
        random_start: whether to start at random, or from the image.
        batch_size: images at once.
    """
    torch.manual_seed(0)
    run = torchattacks.PGD(network, eps, step_size, steps, random_start)
    found = []
    for images, labels in _tensors(network, x, y, batch_size):
        right = network(images).argmax(1) == labels
        adversarial = run(images[right], labels[right])
        found.append((network(adversarial).argmax(1) != labels[right]).cpu().numpy())
    return float(np.concatenate(found).mean())

"""Attacks of torchattacks, foolbox and ART on published networks, with one call form.

Each attack is a function from images and labels to adversarial images, as tensors
`[B, C, H, W]` in PyTorch. Networks are frozen and, as their images, channels last. Those that
torchattacks is timed with are also compiled, with batch normalisation folded into kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import foolbox
import numpy as np
import torch
import torchattacks
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    ProjectedGradientDescentPyTorch,
    SquareAttack,
)
from art.estimators.classification import PyTorchClassifier

from benchmarks import harness, neuron_problems, published, torch_device
from benchmarks.attack_settings import ENSEMBLE, Setting
from benchmarks.attacks import PAIR_SHARE, PAIRS
from benchmarks.torch_models import CIFARResNet20
from benchmarks.torch_neurons import fold_batch_norm

Attack: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_NORMS = {'linf': 'Linf', 'l2': 'L2'}
# Those that leave images out as they are fooled meet batches of ever other sizes.
_COMPILED = ('pgd', 'apgd-ce', 'apgd-dlr')


class _PlainOrder:
    """What of torchattacks fails on gradients whose memory is channels last."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Attacks with the network and images in plain order."""
        self.model.to(memory_format=torch.contiguous_format)
        try:
            return super().forward(images.contiguous(), labels)
        finally:
            self.model.to(memory_format=torch.channels_last)


class _FAB(_PlainOrder, torchattacks.FAB):
    """FAB of torchattacks."""


class _PGDL2(_PlainOrder, torchattacks.PGDL2):
    """PGD of torchattacks in l2."""


class _SquareL2(_PlainOrder, torchattacks.Square):
    """Square of torchattacks in l2; in linf it takes either order."""


class _WholeSquare(torchattacks.Square):
    """Square of torchattacks with windows anywhere in the image.

    Its own never reach the last row and column, as the places it draws exclude the upper end.
    """

    def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> torch.Tensor:
        """Draws from `low` to `high`, both included."""
        return super().random_int(low, high + 1, shape)


def torchattacks_attacks(
    network: torch.nn.Module, setting: Setting, seed: int
) -> dict[str, Attack]:
    """Returns the attacks of torchattacks by the names of `attack_settings.ATTACKS`.

    `'square-whole'` stands beside them: Square with windows up to every border.
    """
    norm, eps = _NORMS[setting.norm], setting.eps
    common = {'norm': norm, 'eps': eps, 'seed': seed}
    pgd = {'linf': torchattacks.PGD, 'l2': _PGDL2}[setting.norm]
    parts = {
        'apgd-ce': torchattacks.APGD(network, steps=setting.steps, loss='ce', **common),
        'apgd-dlr': torchattacks.APGD(network, steps=setting.steps, loss='dlr', **common),
        'apgd-t': torchattacks.APGDT(network, steps=setting.steps, n_classes=10, **common),
        'fab-t': _FAB(network, steps=setting.steps, multi_targeted=True, n_classes=10, **common),
        # By default it stretches the schedule of windows; AutoAttack and ours do not.
        'square': {'linf': torchattacks.Square, 'l2': _SquareL2}[setting.norm](
            network, n_queries=setting.queries, resc_schedule=False, **common
        ),
        'square-whole': _WholeSquare(
            network, n_queries=setting.queries, resc_schedule=False, **common
        ),
    }
    # Its own AutoAttack takes 10 steps in place of the 100 of the paper.
    ensemble = [parts[name] for name in ENSEMBLE]
    return {
        'pgd': pgd(
            network,
            eps,
            setting.step_size,
            setting.pgd_steps,
            random_start=setting.pgd_start == 'random',
        ),
        **parts,
        'autoattack': torchattacks.MultiAttack(ensemble),
    }


def compile_network(network: torch.nn.Module) -> torch.nn.Module:
    """Returns a frozen network compiled, with batch normalisation in its kernels if it has any.

    It is compiled when it first meets a size of batches.
    """
    folded = fold_batch_norm(network) if isinstance(network, CIFARResNet20) else network
    return torch.compile(folded.eval(), dynamic=False)


def foolbox_attacks(network: torch.nn.Module, setting: Setting) -> dict[str, Attack]:
    """Returns the attack of foolbox that the others have too."""
    kind = {'linf': foolbox.attacks.LinfPGD, 'l2': foolbox.attacks.L2PGD}[setting.norm]
    attack = kind(abs_stepsize=setting.step_size, steps=setting.pgd_steps, random_start=True)
    # Else it moves the network to a GPU where there is one.
    device = next(network.parameters()).device
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=device)
    return {'pgd': lambda x, y: attack(model, x, y, epsilons=setting.eps)[1]}


def art_attacks(network: torch.nn.Module, setting: Setting, shape: tuple[int, ...]) -> dict:
    """Returns the attacks of ART by the names of `attack_settings.ATTACKS`; `shape` is C, H, W."""
    classifier = PyTorchClassifier(
        network,
        torch.nn.CrossEntropyLoss(),
        shape,
        10,
        clip_values=(0.0, 1.0),
        device_type=harness.device(),
    )
    common = {'norm': {'linf': np.inf, 'l2': 2}[setting.norm], 'eps': setting.eps}
    common |= {'batch_size': setting.batch_size, 'verbose': False}
    pgd = ProjectedGradientDescentPyTorch(
        classifier,
        eps_step=setting.step_size,
        max_iter=setting.pgd_steps,
        num_random_init=1,
        **common,
    )
    apgd = functools.partial(
        AutoProjectedGradientDescent,
        classifier,
        eps_step=2 * setting.eps,
        max_iter=setting.steps,
        nb_random_init=1,
        **common,
    )
    attacks = {
        'pgd': pgd,
        'apgd-ce': apgd(loss_type='cross_entropy'),
        'square': SquareAttack(classifier, max_iter=setting.queries, **common),
    }
    return {name: functools.partial(_art, attack) for name, attack in attacks.items()}


def _art(attack: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy()))


def neuron_attack(
    network: torch.nn.Module,
    x: torch.Tensor,
    target: torch.Tensor,
    neuron: torch.Tensor,
    *,
    eps: float,
    steps: int,
    weight: float = 10.0,
) -> torch.Tensor:
    """Moves one neuron of the last layer's input in each image (Suri & Evans 2020), in an l2 ball.

    Args:
        network: one of `published`; its last layer is `head` or `linear2`.
        x: images.
        target: activations to reach `[B, D]`.
        neuron: neuron of each image `[B]`.
        eps: radius.
        steps: steps of length 2.5 eps / steps.
        weight: weight of the neuron's own distance.

    Returns:
        Of the iterates the one with the largest cross-entropy of the clean prediction.
    """
    head = getattr(network, 'head', None) or network.linear2
    caught = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    label = network(x).argmax(1)
    place = neuron[:, None]
    whole = target.norm(dim=1)
    part = target.gather(1, place)[:, 0].abs().clamp(min=1e-12)
    moved, best, strongest = x, x, torch.full((len(x),), -torch.inf, device=x.device)
    for step in range(steps + 1):
        moved = moved.detach().requires_grad_(step < steps)
        caught.clear()
        logits = network(moved)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(logits, label, reduction='none')
            better = loss > strongest
            strongest = torch.where(better, loss, strongest)
            best = torch.where(better[:, None, None, None], moved.detach(), best)
        if step == steps:
            break
        off = caught[0] - target
        own = off.gather(1, place)[:, 0].abs()
        value = (off.norm(dim=1) / whole + weight * own / part).sum()
        (gradient,) = torch.autograd.grad(value, moved)
        with torch.no_grad():
            size = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
            change = moved - 2.5 * eps / steps * gradient / size - x
            length = change.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
            moved = (x + change * (eps / length).clamp(max=1)).clamp(0, 1)
    hook.remove()
    return best


def prepare(*, name: str, weights: str, data_dir: str, setting: dict) -> harness.Prepared:
    """Prepares the peers in a worker process.

    Args:
        name: one of `published.NAMES`.
        weights: folder of the weights.
        data_dir: directory of TFDS.
        setting: fields of `Setting`.

    Returns:
        Units named `'library attack'`.
    """
    on = torch_device.start()
    chosen = Setting(**setting)
    pair = published.load(name, weights)
    pair.network.to(on)
    images, labels = published.images(pair.data_set, data_dir, chosen.batch_size)
    x = published.torch_images(images).to(on)
    y = torch.from_numpy(labels.astype(np.int64)).to(on)
    compiled = torchattacks_attacks(compile_network(pair.network), chosen, 0)
    libraries = {
        'torchattacks': torchattacks_attacks(pair.network, chosen, 0),
        'torchattacks, compiled': {name: compiled[name] for name in _COMPILED},
        'foolbox': foolbox_attacks(pair.network, chosen),
        'ART': art_attacks(pair.network, chosen, tuple(x.shape[1:])),
    }
    units: dict[str, harness.Unit] = {
        f'{library} {attack}': functools.partial(function, x, y)
        for library, attacks in libraries.items()
        for attack, function in attacks.items()
    }
    neurons, delta, features = neuron_problems.single_neurons(
        pair.forward, pair.variables, images, chosen.neurons
    )
    rows = np.eye(features.shape[1], dtype=np.float32)
    targets = [
        torch.from_numpy(features + delta[:, i : i + 1] * rows[neurons[:, i]]).to(on)
        for i in range(chosen.neurons)
    ]
    places = torch.from_numpy(neurons.astype(np.int64)).to(on)

    def through(rows: slice, i: int) -> torch.Tensor:
        return neuron_attack(
            pair.network,
            x[rows],
            targets[i][rows],
            places[rows, i],
            eps=chosen.neuron_eps,
            steps=chosen.neuron_steps,
        )

    def neurons_in_turn() -> None:
        for i in range(chosen.neurons):
            through(slice(None), i)

    def pairs_in_turn() -> None:
        # One of so many images: all of them take too long.
        for row in range(0, len(x), PAIR_SHARE):
            for i in range(chosen.neurons):
                through(slice(row, row + 1), i)

    units['PyTorch neurons in turn'] = neurons_in_turn
    units[PAIRS] = pairs_in_turn
    return torch_device.prepared(units, {'units': list(units)})

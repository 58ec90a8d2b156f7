"""What attacks are compared: the settings that neurosens and its peers share."""

from __future__ import annotations

import dataclasses

ATTACKS = ('pgd', 'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab-t', 'square', 'autoattack')
# The parts of AutoAttack.
ENSEMBLE = ('apgd-ce', 'apgd-t', 'fab-t', 'square')


@dataclasses.dataclass(frozen=True)
class Setting:
    """One threat and its budgets.

    Attributes:
        norm: `'linf'` or `'l2'`.
        eps: radius.
        pgd_steps: steps of PGD, of length 2.5 eps / steps.
        pgd_start: where it begins, `'random'` or, at the image, `'clean'`.
        steps: steps of APGD and FAB.
        queries: of Square.
        batch_size: images per batch.
        neurons: neurons per image of the attack through single neurons.
        neuron_eps: its radius, in l2.
        neuron_steps: its steps.
    """

    norm: str = 'linf'
    eps: float = 8 / 255
    pgd_steps: int = 20
    pgd_start: str = 'random'
    steps: int = 100
    queries: int = 5000
    batch_size: int = 128
    neurons: int = 16
    neuron_eps: float = 0.5
    neuron_steps: int = 10

    @property
    def step_size(self) -> float:
        """Length of a step of PGD."""
        return 2.5 * self.eps / self.pgd_steps

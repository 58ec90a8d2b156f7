"""Which attacks the versions of AutoAttack are made of, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from neurosens import _validate

VERSIONS = ('standard', 'plus', 'rand')
ATTACKS = ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square')
# Draws over which gradients are averaged in the version for random models.
RANDOM_DRAWS = 20
# Classes that targeted attacks aim at, one after the other.
TARGETS = {'apgd-t': 9, 'fab-t': 9}
# The ratio of logits is not defined for fewer classes.
LEAST_CLASSES = {'apgd-dlr': 3, 'apgd-t': 4}


class Run(NamedTuple):
    """One attack of the ensemble on the images that are still robust.

    Attributes:
      name: its name in logs.
      attack: which of `ATTACKS`.
      rank: for targeted attacks, the place of the target among the other classes' clean logits,
        from 0.
    """

    name: str
    attack: str
    rank: int = 0


def runs(
    norm: str, version: str, classes: int, attacks: Sequence[str] | None = None
) -> tuple[Run, ...]:
    """The runs of a version of AutoAttack.

    Args:
      norm: norm of the threat.
      version: `'standard'`, `'plus'` (more restarts and attacks) or `'rand'` (for random models).
      classes: number of classes; limits the targets to one less.
      attacks: names of `ATTACKS` to use in place of the version's.

    Returns:
      Runs in order: one for each restart and target class, so that later ones only see what
      earlier ones left.

    Raises:
      ValueError: a name is unknown.
    """
    if version not in VERSIONS:
        raise ValueError(_validate.unknown('version', version, VERSIONS))
    chosen: Sequence[str] = {
        'standard': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
        'plus': ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'),
        'rand': ('apgd-ce', 'apgd-dlr'),
    }[version]
    chosen = chosen if attacks is None else attacks
    restarts = {'apgd-ce': 1, 'apgd-dlr': 1, 'fab': 1, 'square': 1}
    targets = dict(TARGETS)
    if version == 'plus':
        restarts.update({'apgd-ce': 5, 'apgd-dlr': 5, 'fab': 5})
    elif norm == 'l1' and version == 'standard':
        restarts['apgd-ce'] = 5
        targets['apgd-t'] = 5
    found = []
    for attack in chosen:
        if attack not in ATTACKS:
            raise ValueError(_validate.unknown('attack', attack, ATTACKS))
        count = min(targets[attack], classes - 1) if attack in targets else restarts[attack]
        numbered = attack in targets or count > 1
        for number in range(count):
            name = f'{attack} {number + 1}' if numbered else attack
            found.append(Run(name, attack, number))
    return tuple(found)

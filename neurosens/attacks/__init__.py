"""Adversarial attacks: one call form, per-example results, any `Forward`.

result = attack(forward, variables, x, y, key, *, threat, ...) -> AttackResult
"""

from neurosens.attacks.pgd import AttackResult, fgsm, pgd, pgd_example
from neurosens.attacks.threat import Threat, inside, project, random_start, steepest_ascent

__all__ = [
    'AttackResult',
    'Threat',
    'fgsm',
    'inside',
    'pgd',
    'pgd_example',
    'project',
    'random_start',
    'steepest_ascent',
]

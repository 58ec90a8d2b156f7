"""How each sign of gradient masking is judged, from what attacks did to each image.

Carlini et al. 2019 (https://arxiv.org/abs/1902.06705) and Athalye et al. 2018
(https://arxiv.org/abs/1802.00420) list the signs. Every check counts images that a weaker attack
fools and a stronger one does not, or the like; `slack` and `exceeds` say what may be chance. A
check that could not have warned does not pass, such as one of images that a stronger attack finds
where no image is left to find: it does not apply.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Below this the square of a gradient is 0 in float32, and so is the norm that many attacks divide
# by.
TINY_GRADIENT = math.sqrt(float(np.finfo(np.float32).tiny))
# Logits of two passes over the same images differ by rounding up to this share of the largest.
_ROUNDING = 1e-3
_GRADIENT_ATTACKS = ('pgd', 'steps', 'restarts', 'margin', 'scaled')


@dataclasses.dataclass(frozen=True)
class Check:
    """One sign of gradient masking, looked for.

    Attributes:
      name: its name, such as `'black_box'`.
      passed: whether the sign is absent; None where the check does not apply.
      figures: what was counted, by name; counts are of images unless the name says otherwise.
      message: one sentence: what holds, why the check does not apply, or what to do.
    """

    name: str
    passed: bool | None
    figures: Mapping[str, float]
    message: str

    @property
    def verdict(self) -> str:
        """`'pass'`, `'warn'` or `'n/a'`."""
        return 'n/a' if self.passed is None else 'pass' if self.passed else 'warn'


class Evidence(NamedTuple):
    """What attacks did to N images.

    Attributes:
      labels: their labels `[N]`.
      correct: whether the model classifies them correctly without attack `[N]`.
      gradient: largest magnitude of the gradient of the cross-entropy, per pixel unit `[N]`.
      saturated: whether the label's probability is 1 in float32 `[N]`.
      change: largest change of a logit between two draws or passes, as a share of the largest
        logit, infinite where one of them is no number `[N]`.
      changes_class: whether the predicted class changes between them `[N]`.
      declared_random: whether the model is a random one that attacks can redraw.
      draws: draws over which gradients were averaged.
      fooled: whether each attack fools the model `[N]`, or fewer first images, by its name.
      by_radius: the same of PGD of equal steps, by radius in pixel units, smallest first.
      limit: the radius at which any image can become any constant one, in pixel units.
      replaced: how many transforms and edits were made straight-through.
      absent: why an attack was not run, by its name.
      reported: whether any attack of a report at this radius fools the model `[N]`; None where
        there is nothing to compare.
    """

    labels: Int[np.ndarray, ' images']
    correct: Bool[np.ndarray, ' images']
    gradient: Float[np.ndarray, ' images']
    saturated: Bool[np.ndarray, ' images']
    change: Float[np.ndarray, ' images']
    changes_class: Bool[np.ndarray, ' images']
    declared_random: bool
    draws: int
    fooled: Mapping[str, Bool[np.ndarray, ' images']]
    by_radius: Mapping[float, Bool[np.ndarray, ' images']]
    limit: float
    replaced: Mapping[str, int]
    absent: Mapping[str, str]
    reported: Bool[np.ndarray, ' images'] | None = None


def slack(images: int) -> int:
    """How many images may go against what a sound attack guarantees, by chance alone.

    Attacks search from random starts: one in a hundred images may end the other way round. Allowed
    is that share and two standard deviations of a Poisson count above it, N/100 + 2 sqrt(N/100),
    rounded down, but one image at least: 1 of 30, 3 of 100, 4 of 200, 16 of 1000.

    Args:
      images: number of images, N.

    Returns:
      The largest count that is no warning.
    """
    expected = 0.01 * images
    return max(1, math.floor(expected + 2 * math.sqrt(expected)))


def exceeds(gained: int, lost: int, images: int) -> bool:
    """Whether one of two attacks of equal effort is the stronger one, by more than chance.

    If neither is, an image that only one of them fools is as often one of the first as of the
    second, and the difference of the counts has the variance of their sum (McNemar 1947).

    Args:
      gained: how many images only the first fools.
      lost: how many only the second fools.
      images: number of images.

    Returns:
      Whether the difference is above `slack` and above two standard deviations.
    """
    return gained - lost > max(slack(images), 2 * math.sqrt(gained + lost))


def judge(evidence: Evidence) -> tuple[Check, ...]:
    """Every check, in the order in which reports show them.

    Args:
      evidence: what attacks did.

    Returns:
      The checks; those that do not apply say why.
    """
    return tuple(check(evidence) for check in _CHECKS)


def _judged(
    name: str,
    passed: bool,
    figures: Mapping[str, float],
    holds: str,
    advice: str,
    empty: str = '',
) -> Check:
    """A check of counts; `empty` says why it could not have failed, where it could not."""
    values = {key: float(value) for key, value in figures.items()}
    if empty:
        return Check(name, None, values, empty)
    return Check(name, bool(passed), values, holds if passed else advice)


def _nothing_left(fooled: Bool[np.ndarray, ' images'], attack: str = 'PGD') -> str:
    """Why nothing can be found beyond an attack, if it leaves no more images than chance may."""
    left = int((~fooled).sum())
    if left > slack(len(fooled)):
        return ''
    return (
        f'{attack} leaves {left} of {len(fooled)} images right, so that nothing can be found '
        'beyond it; look at a smaller radius.'
    )


def _no_excess(fooled: Bool[np.ndarray, ' images']) -> str:
    """The same for a stronger attack of equal effort."""
    left = int((~fooled).sum())
    if exceeds(left, 0, len(fooled)):
        return ''
    return (
        f'PGD leaves {left} of {len(fooled)} images right, too few to tell another attack of '
        'its effort from chance; look at a smaller radius, or at more images.'
    )


def _few_correct(evidence: Evidence) -> str:
    """Why nothing can be seen of images that are wrong without an attack."""
    correct = int(evidence.correct.sum())
    if correct > slack(len(evidence.correct)):
        return ''
    return (
        f'The model is right about {correct} of {len(evidence.correct)} images without an attack, '
        'too few to attack; take more images, or a model that is trained.'
    )


def _by_gradients(evidence: Evidence) -> Bool[np.ndarray, ' images']:
    """Whether any attack by the model's own gradients fools each image."""
    return np.any([evidence.fooled[name] for name in _GRADIENT_ATTACKS], axis=0)


def _monotone(evidence: Evidence) -> Check:
    """Accuracy falls with the radius: every image of a ball lies in the larger one too."""
    radii = list(evidence.by_radius)
    correct = [int((~evidence.fooled['clean']).sum())]
    correct += [int((~fooled).sum()) for fooled in evidence.by_radius.values()]
    rise = max(0, *np.diff(correct))
    figures = {f'correct_at_{radius:.3g}': n for radius, n in zip([0.0, *radii], correct)}
    return _judged(
        'monotone',
        rise <= slack(len(evidence.labels)),
        {**figures, 'largest_rise': rise},
        'Accuracy falls as the radius grows.',
        'Accuracy rises with the radius, which no sound attack allows: gradients mislead far from '
        'the image; use smaller steps and more restarts, or attacks without gradients (square).',
        _few_correct(evidence),
    )


def _chance(evidence: Evidence) -> Check:
    """At the largest radius nothing of the image is left.

    Every image can then become the same grey one, for which the model has one answer: no attack
    worth its name leaves more images right than the most frequent label has.
    """
    radius = max(evidence.by_radius)
    right = int((~evidence.by_radius[radius]).sum())
    most = int(np.bincount(evidence.labels).max())
    allowed = most + slack(len(evidence.labels))
    empty = _few_correct(evidence)
    if not empty and evidence.correct.sum() <= allowed:
        empty = (
            f'{most} of {len(evidence.labels)} images have the same label, so that no accuracy is '
            'above chance; take images of several classes, and more of them.'
        )
    return _judged(
        'chance',
        right <= allowed,
        {'radius': radius, 'grey_radius': evidence.limit, 'correct': right, 'most_frequent': most},
        'At a radius where nothing of an image is left, accuracy is at chance or below.',
        'PGD leaves images right at a radius where all of them can become the same grey: gradients '
        'do not show the way; attack through a smooth substitute (straight_through), with square '
        'and by transfer.',
        empty,
    )


def _effort(evidence: Evidence) -> Check:
    """More steps and restarts fool at least the images that fewer fool.

    The first restart is the attack of one, so that of restarts only a random model loses images.
    """
    short = evidence.fooled['pgd']
    won = int((short & evidence.correct).sum())
    empty = ''
    if won <= slack(len(short)):
        empty = (
            f'PGD fools {won} of {len(short)} images, so that no stronger attack can lose any; '
            'look at a larger radius.'
        )
    lost = {name: int((short & ~evidence.fooled[name]).sum()) for name in ('steps', 'restarts')}
    return _judged(
        'effort',
        max(lost.values()) <= slack(len(short)),
        {f'lost_by_{name}': count for name, count in lost.items()},
        'More steps and more restarts help no image.',
        'More steps or restarts leave images right that fewer fool: gradients mislead at small '
        'steps; take the worst case over step sizes, and add attacks without gradients (square).',
        empty,
    )


def _converged(evidence: Evidence) -> Check:
    """And not many more: or else the attack could still be made stronger."""
    short = evidence.fooled['pgd']
    gained = {name: int((evidence.fooled[name] & ~short).sum()) for name in ('steps', 'restarts')}
    return _judged(
        'converged',
        max(gained.values()) <= slack(len(short)),
        {f'gained_by_{name}': count for name, count in gained.items()},
        'More steps and more restarts fool no further images.',
        'More steps or restarts fool further images, so that accuracy under this attack is too '
        'good: raise steps or restarts, or take apgd or autoattack (not for l0), before you report '
        'a figure.',
        _nothing_left(short),
    )


def _reported(evidence: Evidence) -> Check:
    """A report's attacks together fool what these short ones fool."""
    if evidence.reported is None:
        return Check('reported', None, {}, evidence.absent['reported'])
    # What only a surrogate or a substitute for gradients shows has checks of its own.
    names = {'clean', 'noise', 'fgsm', 'square', *_GRADIENT_ATTACKS} & evidence.fooled.keys()
    here = np.any([evidence.fooled[name] for name in names], axis=0)
    gained = int((here & ~evidence.reported).sum())
    return _judged(
        'reported',
        gained <= slack(len(here)),
        {'reported': evidence.reported.sum(), 'diagnosis': here.sum(), 'only_diagnosis': gained},
        'The attacks of the report fool what those of this diagnosis fool.',
        'Attacks of this diagnosis fool images that none of the report does, so that its accuracy '
        'under attack is too good: leave step_size and loss at their defaults, raise steps and '
        'restarts, or add apgd or autoattack.',
        _nothing_left(evidence.reported, 'The report'),
    )


def _single_step(evidence: Evidence) -> Check:
    gained = int((evidence.fooled['fgsm'] & ~evidence.fooled['pgd']).sum())
    return _judged(
        'single_step',
        gained <= slack(len(evidence.labels)),
        {
            'fgsm': evidence.fooled['fgsm'].sum(),
            'pgd': evidence.fooled['pgd'].sum(),
            'only_fgsm': gained,
        },
        'Many steps fool what one step fools.',
        'One step fools images that many steps do not: gradients hold on the images alone, as '
        'after single-step adversarial training; attack from the clean image (bim) with several '
        'step sizes, and with square.',
        _nothing_left(evidence.fooled['pgd']),
    )


def _found_beyond(evidence: Evidence, name: str, attack: str, holds: str, advice: str) -> Check:
    """An attack that does not see gradients finds nothing that they do not show."""
    if attack not in evidence.fooled:
        return Check(name, None, {}, evidence.absent[attack])
    fooled, white_box = evidence.fooled[attack], _by_gradients(evidence)
    gained = int((fooled & ~white_box).sum())
    figures = {attack: fooled.sum(), 'white_box': white_box.sum(), f'only_{attack}': gained}
    empty = _nothing_left(white_box, 'PGD of all kinds')
    return _judged(name, gained <= slack(len(fooled)), figures, holds, advice, empty)


def _transfer(evidence: Evidence) -> Check:
    return _found_beyond(
        evidence,
        'transfer',
        'transfer',
        'Images made for the other model fool no more than its own gradients.',
        'Images made for another model fool this one where its own gradients fail: report transfer '
        'as an attack of its own, and start PGD from its images.',
    )


def _black_box(evidence: Evidence) -> Check:
    return _found_beyond(
        evidence,
        'black_box',
        'square',
        'Random search finds no more than gradients.',
        'Random search fools images that gradients do not: report square or autoattack, with many '
        'queries, and look for what hides the gradients (straight_through).',
    )


def _noise(evidence: Evidence) -> Check:
    noise = int((evidence.fooled['noise'] & evidence.correct).sum())
    attack = int((evidence.fooled['pgd'] & evidence.correct).sum())
    return _judged(
        'noise',
        2 * (noise - slack(len(evidence.labels))) <= attack,
        {'noise': noise, 'pgd': attack},
        'Random noise fools fewer than half as many images as the attack.',
        'Random noise of the same radius fools at least half as many images as the attack: either '
        'gradients mislead (look at square) or the radius is beyond what means anything; lower it.',
        _few_correct(evidence),
    )


def _gradients(evidence: Evidence) -> Check:
    """Of the images that there is something to attack of."""
    size = evidence.gradient[evidence.correct]
    finite = size[np.isfinite(size)]
    useless = len(size) - int((finite >= TINY_GRADIENT).sum())
    return _judged(
        'gradients',
        useless <= slack(len(evidence.labels)),
        {
            'zero': (size == 0).sum(),
            'tiny': (size < TINY_GRADIENT).sum(),
            'not_finite': len(size) - len(finite),
            'saturated': (evidence.saturated & evidence.correct).sum(),
            'median_gradient': np.median(finite) if len(finite) else 0.0,
            'correct': len(size),
        },
        'The cross-entropy has a gradient for the images.',
        'Images have no gradient that float32 can hold, or one that is no number: use a loss that '
        'does not saturate (scaled_cross_entropy, margin), and straight_through where an operation '
        'has no derivative.',
        _few_correct(evidence),
    )


def _losses(evidence: Evidence) -> Check:
    plain, others = evidence.fooled['pgd'], ('margin', 'scaled')
    gained = {name: int((evidence.fooled[name] & ~plain).sum()) for name in others}
    lost = {name: int((plain & ~evidence.fooled[name]).sum()) for name in others}
    return _judged(
        'losses',
        not any(exceeds(gained[name], lost[name], len(plain)) for name in others),
        {
            'cross_entropy': plain.sum(),
            **{f'only_{name}': count for name, count in gained.items()},
            **{f'not_{name}': count for name, count in lost.items()},
        },
        'Other losses find no more.',
        'A loss that does not saturate fools images that cross-entropy does not: attack with '
        "loss='margin', 'dlr' or 'scaled_cross_entropy' (apgd_dlr, autoattack; not for l0).",
        _no_excess(plain),
    )


def _precision(evidence: Evidence) -> Check:
    if 'float64' not in evidence.fooled:
        return Check('precision', None, {}, evidence.absent['float64'])
    double = evidence.fooled['float64']
    single = evidence.fooled['pgd'][: len(double)]
    gained, lost = int((double & ~single).sum()), int((single & ~double).sum())
    return _judged(
        'precision',
        not exceeds(gained, lost, len(double)),
        {
            'images': len(double),
            'float32': single.sum(),
            'only_float64': gained,
            'not_float64': lost,
        },
        'Gradients in float64 find no more.',
        'Gradients computed in float64 fool images that those of the model do not: rounding hides '
        'them; attack in float64 (jax.enable_x64) or with loss scaled_cross_entropy or margin.',
        _no_excess(single),
    )


def _randomness(evidence: Evidence) -> Check:
    moved = evidence.change > _ROUNDING
    random = evidence.declared_random or bool(moved.any())
    holds = 'Two passes over the same images agree.'
    if random:
        holds = f'The model is random, and gradients are averaged over {evidence.draws} draws.'
    return _judged(
        'randomness',
        not random or (evidence.declared_random and evidence.draws > 1),
        {
            'changed_logits': moved.sum(),
            'changed_class': evidence.changes_class.sum(),
            'largest_change': evidence.change.max(),
            'draws': evidence.draws,
        },
        holds,
        'The model is random, so single draws judge neither attack nor image: average gradients '
        'over draws (draws=, autoattack_rand)'
        + ('.' if evidence.declared_random else ', after making it a random_forward.'),
    )


def _straight_through(evidence: Evidence) -> Check:
    names = [f'straight_{kind}' for kind, count in evidence.replaced.items() if count]
    if not names:
        return Check('straight_through', None, {}, evidence.absent['straight'])
    white_box = _by_gradients(evidence)
    found = {name: evidence.fooled[name] & ~white_box for name in names}
    return _judged(
        'straight_through',
        int(np.any(list(found.values()), axis=0).sum()) <= slack(len(white_box)),
        {
            **{kind: count for kind, count in evidence.replaced.items() if count},
            **{f'only_{name}': gained.sum() for name, gained in found.items()},
            'white_box': white_box.sum(),
        },
        'Gradients that pass transforms straight through find nothing more.',
        'Gradients that pass transforms or edits straight through fool further images: attack the '
        'model with them replaced by attacks.straight_through (BPDA), or a better substitute.',
        _nothing_left(white_box, 'PGD of all kinds'),
    )


_CHECKS: tuple[Callable[[Evidence], Check], ...] = (
    _monotone,
    _chance,
    _effort,
    _converged,
    _reported,
    _single_step,
    _transfer,
    _black_box,
    _noise,
    _gradients,
    _losses,
    _precision,
    _randomness,
    _straight_through,
)

"""What AutoAttack warns of: signs that its result may overestimate robustness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from neurosens.attacks.autoattack_runs import LEAST_CLASSES, TARGETS, Run


def clean_warnings(
    version: str,
    plan: Sequence[Run],
    clean: Mapping[str, np.ndarray],
    differ: bool,
    random: bool,
) -> Iterator[str]:
    """What clean images show before any attack; the reference program warns of most of it too.

    Args:
      version: of AutoAttack.
      plan: its runs.
      clean: of N images their `logits` `[N, K]`, and whether gradients of the loss with respect to
        the image are all zero (`zero_gradient`) or not all finite (`infinite_gradient`) `[N]`.
      differ: whether two passes over the same images gave different logits.
      random: whether the model is known to be random, see `is_random`.

    Yields:
      Sentences.
    """
    logits = clean['logits']
    if (differ or random) and version != 'rand':
        yield "The model is random: use version='rand', which averages gradients over draws."
    if version == 'rand' and not differ:
        yield "The model is not random: version='standard' is the stronger choice."
    count, total = int(clean['zero_gradient'].sum()), len(clean['zero_gradient'])
    if count:
        yield (
            f'{count:,} of {total:,} clean images have no gradient at all: gradient-based attacks '
            'cannot see the model there; look at Square, at a smooth substitute for what hides the '
            'gradient (straight_through), and at transfer attacks.'
        )
    count = int(clean['infinite_gradient'].sum())
    if count:
        yield (
            f'{count:,} of {total:,} clean images have gradients that are not finite: attacks that '
            'follow them go astray; mend what divides by zero in the model.'
        )
    sums = logits.sum(-1)
    if logits.min() >= 0 and np.allclose(sums, 1, atol=1e-3):
        yield 'The model returns probabilities: attack its logits, before the softmax.'
    classes = logits.shape[-1]
    for name, wanted in TARGETS.items():
        # In l1 fewer are wanted of Auto-PGD, which as many classes may have.
        if sum(run.attack == name for run in plan) == classes - 1 < wanted:
            yield f'With {classes} classes {name} aims at {classes - 1} of them, not at {wanted}.'
    replaced = [name for name, least in LEAST_CLASSES.items() if classes < least]
    replaced = [name for name in replaced if any(run.attack == name for run in plan)]
    if replaced:
        yield (
            f'With {classes} classes the DLR loss of {" and ".join(replaced)} is not defined: the '
            'margin took its place.'
        )


def square_warning(plan: Sequence[Run], broken_by: Int[np.ndarray, ' examples']) -> tuple[str, ...]:
    """A warning where random search found what gradients missed, which it should not.

    Args:
      plan: runs of AutoAttack, Square among them.
      broken_by: which of them broke each image `[N]`.

    Returns:
      A sentence, or none.
    """
    place = next(number for number, run in enumerate(plan) if run.attack == 'square')
    count = int((broken_by == place).sum())
    if place == 0 or not count:
        return ()
    return (
        f'Square broke {count} images that the gradient-based attacks before it left: '
        'the gradients of this model may mislead.',
    )

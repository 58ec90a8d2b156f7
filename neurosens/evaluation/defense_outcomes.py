"""What a defence withstood: outcomes of attacks, and the report that gathers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from neurosens.evaluation import accuracy, masking, masking_checks, robustness

STATIC, ADAPTIVE = 'static', 'adaptive'
# Adaptive attacks that do not follow gradients of what they attack.
WITHOUT_GRADIENTS = ('square', 'noise', 'transfer')
GROUPS = ('front', 'middle', 'tail')


class DefenseOutcome(NamedTuple):
    """One attack on a defended model.

    Attributes:
      kind: `'static'` (made on the undefended model) or `'adaptive'` (made with knowledge of the
        defence).
      attack: its name, with the surrogate whose gradients it followed.
      norm: norm of the threat.
      eps: radius in pixel units.
      success: the defended model misclassifies the image found, bool `[M]`.
      fooled: of a static attack, whether the undefended model takes the clean image for its class
        and the attacked one for another, which is there to be recovered, bool `[M]`; None for
        others.
      warnings: why the result may overestimate robustness.
      blind: of an ensemble, whether a run without gradients broke the image, which those before it
        did not, bool `[M]`; None for others.
      undefended: of a static attack, whether the undefended model misclassifies the image found,
        logits that are NaN among that, bool `[M]`; None for others.
    """

    kind: str
    attack: str
    norm: str
    eps: float
    success: Bool[np.ndarray, ' images']
    fooled: Bool[np.ndarray, ' images'] | None = None
    warnings: tuple[str, ...] = ()
    blind: Bool[np.ndarray, ' images'] | None = None
    undefended: Bool[np.ndarray, ' images'] | None = None

    @property
    def name(self) -> str:
        """Such as `'static/pgd-linf-0.1'`, the key of this outcome in result files."""
        return f'{self.kind}/{self.attack}-{self.norm}-{self.eps:.3g}'


class Moves(NamedTuple):
    """What moves of the input recover of a static attack, and what the attack does to neurons.

    Attributes:
      attack: name of its outcome, the strongest of its radius.
      controls: for each move of `oracles.NAMES`, and each size rho, the share of the images fooled
        that it recovers.
      shifts: for each layer, how the attack changes front, middle and tail neurons of the images
        fooled: by group, the mean change of a neuron in units of the layer's mean |activation|.
      noise: the same of random noise of the attack's l2 size before it is clipped, on the same
        images: what any change of the input does to neurons that are chosen by the clean image.
    """

    attack: str
    controls: Mapping[str, Mapping[float, float]]
    shifts: Mapping[str, Mapping[str, Float[np.ndarray, ' fooled']]]
    noise: Mapping[str, Mapping[str, Float[np.ndarray, ' fooled']]]


@dataclasses.dataclass(frozen=True)
class DefenseReport:
    """What a defence did on M images.

    Attributes:
      defense: its name.
      settings: of its calibration, as plain values.
      undefended: what the model says of clean images.
      defended: what it says of them through the defence.
      outcomes: attacks by kind and radius.
      moves: of inverse perturbation, controls at each radius.
      passes: forward passes of the model for one image.
      cost: time for one image relative to the undefended model, measured.
      diagnoses: of gradient masking by the defence, at each radius; none where not asked for.
      uncontrolled: why there are no controls although they were asked for, or empty.
      adaptive: attacks on the defended model along its own gradient, with example images; None in
        reports made by hand.
      calibration: how it was calibrated beyond the settings, as of `defenses.calibration_of`.
      found: what the calibration found, in short.
    """

    defense: str
    settings: dict[str, Any]
    undefended: accuracy.Predictions
    defended: accuracy.Predictions
    outcomes: tuple[DefenseOutcome, ...]
    moves: tuple[Moves, ...]
    passes: int
    cost: float
    diagnoses: tuple[masking.Diagnosis, ...] = ()
    uncontrolled: str = ''
    adaptive: robustness.RobustnessReport | None = None
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def undiagnosed(self) -> str:
        """Why gradient masking by the defence was not looked for, or empty."""
        return '' if self.adaptive is None else self.adaptive.undiagnosed

    @property
    def warnings(self) -> dict[str, tuple[str, ...]]:
        """Why robustness may be overestimated, by the names of outcomes."""
        found = {outcome.name: outcome.warnings for outcome in self.outcomes if outcome.warnings}
        images = len(self.defended.labels)
        for norm, eps in radii(self):
            missed = self.missed_by_gradients(eps)
            if missed is not None and (count := int(missed.sum())) > masking_checks.slack(images):
                found[f'worst/all-{norm}-{eps:.3g}'] = (
                    f'{count} of {images} images withstand every attack along gradients, but not '
                    'those without or made on another model: something hides the gradients, and '
                    'more steps, restarts or other gradients would find more.',
                )
        return found

    def missed_by_gradients(self, eps: float) -> Bool[np.ndarray, ' images'] | None:
        """Images that fall, but to no attack along gradients of the defended model or a surrogate.

        Args:
          eps: the radius.

        Returns:
          Whether only a static, transferred or gradient-free attack fools the model, or such a run
          of an ensemble `[M]`. None where no attack of this radius follows gradients.
        """
        along = [
            outcome.success if outcome.blind is None else outcome.success & ~outcome.blind
            for outcome in self.outcomes
            if outcome.eps == eps
            and outcome.kind == ADAPTIVE
            and not outcome.attack.startswith(WITHOUT_GRADIENTS)
        ]
        if not along:
            return None
        robust = self.defended.correct & ~np.any(along, axis=0)
        return robust & ~self.worst_case(eps)

    def undefended_worst_case(self, eps: float) -> np.ndarray:
        """Whether the undefended model withstands every static attack of a radius `[M]`."""
        robust = self.undefended.correct
        for outcome in self.outcomes:
            if outcome.eps == eps and outcome.undefended is not None:
                robust = robust & ~outcome.undefended
        return robust

    def worst_case(self, eps: float, kinds: Sequence[str] = (STATIC, ADAPTIVE)) -> np.ndarray:
        """Whether each image stays classified correctly under every attack of a radius `[M]`."""
        robust = self.defended.correct
        for outcome in self.outcomes:
            if outcome.eps == eps and outcome.kind in kinds:
                robust = robust & ~outcome.success
        return robust


def radii(report: DefenseReport) -> list[tuple[str, float]]:
    """Norm and radius of every threat that was tried, smallest first."""
    return sorted({(outcome.norm, outcome.eps) for outcome in report.outcomes})


def success_rate(
    fooled: Bool[np.ndarray, ' images'],
    recovered: Bool[np.ndarray, ' images'],
    valid: Bool[np.ndarray, ' images'] | None = None,
) -> float:
    """Defence success rate: of the attacked images that fooled the model, the share recovered.

    Args:
      fooled: the undefended model was right about the clean image and is wrong about the attacked
        one `[M]`.
      recovered: the defended model is right about the attacked one `[M]`.
      valid: whether an attacked image can be used, such as that it is finite; all by default.

    Returns:
      A share in [0, 1]; NaN where nothing fooled the model.

    Raises:
      ValueError: the arguments are of different shapes.
    """
    shapes = {np.shape(flags) for flags in (fooled, recovered, valid) if flags is not None}
    if len(shapes) > 1:
        raise ValueError(
            f'fooled, recovered and valid have shapes {sorted(shapes)}; they must be of the same '
            'images.'
        )
    counted = np.asarray(fooled, bool) & (True if valid is None else np.asarray(valid, bool))
    if not counted.any():
        return float('nan')
    return float((np.asarray(recovered, bool) & counted).sum() / counted.sum())

"""How accurate a model is, on clean images and under attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PRNGKeyArray

from neurosens import attacks, data
from neurosens import config as config_lib
from neurosens.evaluation import accuracy
from neurosens.forward import Forward, Variables


@dataclasses.dataclass(frozen=True)
class AttackOutcome:
    """One attack at one radius.

    Attributes:
      attack: its name.
      norm: norm of the threat.
      eps: radius in pixel units.
      attacked: per-image results.
    """

    attack: str
    norm: str
    eps: float
    attacked: accuracy.Attacked

    @property
    def name(self) -> str:
        """Such as `'pgd-linf-0.0314'`, the key of this outcome in result files."""
        return f'{self.attack}-{self.norm}-{self.eps:.3g}'


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """Everything that `evaluate.py` measured.

    Attributes:
      info: the data set.
      split: its split.
      predictions: per-image results on clean images.
      outcomes: per attack and radius.
    """

    info: data.DatasetInfo
    split: str
    predictions: accuracy.Predictions
    outcomes: tuple[AttackOutcome, ...]

    def worst_case(self, eps: float) -> Bool[np.ndarray, ' examples']:
        """Whether each image stays classified correctly under every attack of radius `eps`."""
        robust = self.predictions.correct
        for outcome in self.outcomes:
            if outcome.eps == eps:
                robust = robust & ~outcome.attacked.success
        return robust


def evaluate(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Evaluation,
    key: PRNGKeyArray,
    *,
    progress: Callable[[str], accuracy.Progress] = lambda name: iter,
) -> RobustnessReport:
    """Measures clean accuracy and accuracy under FGSM and PGD.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: attacks and radii.
      key: randomness of attacks; folded with each image's position in the data set, so that
        results do not depend on batches and devices.
      progress: from a label to a wrapper of an iterator of batches.

    Returns:
      The report.
    """
    limit = settings.limit or None
    predictions = accuracy.predict(
        forward,
        variables,
        source,
        mesh,
        batch_size=settings.batch_size,
        limit=limit,
        progress=progress('clean'),
    )
    outcomes = []
    for name in settings.attacks:
        for eps in settings.eps:
            run = _attack(name, forward, variables, settings, eps, key)
            attacked = accuracy.attack(
                run,
                forward,
                variables,
                source,
                mesh,
                batch_size=settings.batch_size,
                limit=limit,
                keep=settings.examples,
                progress=progress(f'{name} {eps:g}'),
            )
            outcomes.append(AttackOutcome(name, settings.norm, eps, attacked))
    return RobustnessReport(source.info, settings.split, predictions, tuple(outcomes))


def _attack(
    name: str,
    forward: Forward,
    variables: Variables,
    settings: config_lib.Evaluation,
    eps: float,
    key: PRNGKeyArray,
) -> Callable[[Array, Array, Array], attacks.AttackResult]:
    threat = attacks.Threat(settings.norm, eps)

    def run(x: Array, y: Array, index: Array) -> attacks.AttackResult:
        if name == 'fgsm':
            return attacks.fgsm(forward, variables, x, y, key, threat=threat, index=index)
        return attacks.pgd(
            forward,
            variables,
            x,
            y,
            key,
            threat=threat,
            steps=settings.steps,
            step_size=settings.step_size * eps or None,
            restarts=settings.restarts,
            index=index,
        )

    return run


def fixed_key(seed: int) -> PRNGKeyArray:
    """The key of an evaluation: apart from every key that training used."""
    return jax.random.fold_in(jax.random.key(seed), 2)

"""How accurate a model is, on clean images and under attack."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from neurosens import attacks, data, parallel
from neurosens import config as config_lib
from neurosens.evaluation import accuracy, masking
from neurosens.forward import Forward, Variables


@dataclasses.dataclass(frozen=True)
class AttackOutcome:
    """One attack at one radius.

    Attributes:
      attack: its name, with what it aims at, such as `'pgd'` or `'pgd_random'`.
      norm: norm of the threat.
      eps: radius in pixel units.
      attacked: per-image results.
      broken_by: of an ensemble, the run that broke each image, 'clean' where none was needed, ''
        where none succeeded.
      warnings: why the result may overestimate robustness.
    """

    attack: str
    norm: str
    eps: float
    attacked: accuracy.Attacked
    broken_by: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

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
      diagnoses: of gradient masking, at each radius, smallest first; none where not asked for.
      lengths: norm of each clean image, where an attack looked for the smallest perturbation.
      undiagnosed: why gradient masking was not looked for although there were attacks, or empty.
    """

    info: data.DatasetInfo
    split: str
    predictions: accuracy.Predictions
    outcomes: tuple[AttackOutcome, ...]
    diagnoses: tuple[masking.Diagnosis, ...] = ()
    lengths: Float[np.ndarray, ' examples'] | None = None
    undiagnosed: str = ''

    def worst_case(self, eps: float) -> Bool[np.ndarray, ' examples']:
        """Whether each image stays classified correctly under every attack of radius `eps`."""
        robust = self.predictions.correct
        for outcome in self.outcomes:
            if outcome.eps == eps:
                robust = robust & ~outcome.attacked.success
        return robust

    def distances(self) -> dict[str, Float[np.ndarray, ' examples']]:
        """Of attacks that look for them, the smallest perturbation of each image, by attack."""
        return {
            outcome.attack: outcome.attacked.distance
            for outcome in self.outcomes
            if outcome.attacked.distance is not None
        }

    def median_distances(self) -> dict[str, attacks.Median]:
        """Medians of `distances` with their intervals, by names such as `'fab-linf'`."""
        return {
            f'{attack}-{self.outcomes[0].norm}': attacks.median_distance(distance)
            for attack, distance in self.distances().items()
        }

    def relative_distances(self) -> dict[str, float]:
        """Means over images of the smallest perturbation over the image itself, both in norm.

        The robustness rho_adv of Moosavi-Dezfooli et al. 2016 and Jakubovitz & Giryes 2018, there
        of DeepFool in l2. By names such as `'deepfool-l2'`; infinite where an image has none, and
        without black images, which have no size.
        """
        if self.lengths is None:
            return {}
        seen = self.lengths > 0
        return {
            f'{attack}-{self.outcomes[0].norm}': float(
                np.mean(np.float64(distance[seen]) / self.lengths[seen])
            )
            for attack, distance in self.distances().items()
        }


def evaluate(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Evaluation,
    key: PRNGKeyArray,
    *,
    progress: Callable[[str], accuracy.Progress] = lambda name: iter,
    ensemble_progress: attacks.Progress | None = None,
    directory: pathlib.Path | None = None,
    surrogate: tuple[Forward, Variables] | None = None,
) -> RobustnessReport:
    """Measures clean accuracy and accuracy under attack, and looks for gradient masking.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: attacks and radii.
      key: randomness of attacks; folded with each image's position in the data set, so that
        results do not depend on batches and devices.
      progress: from a label to a wrapper of an iterator of batches.
      ensemble_progress: called before each batch of AutoAttack, see `attacks.autoattack`.
      directory: where AutoAttack notes finished work, to go on after an interruption with the same
        settings.
      surrogate: another model and its variables, replicated: adds the attack `transfer`, which
        finds its images by PGD on that model, and a check of masking.

    Returns:
      The report, of radii smallest first.
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
    outcomes: list[AttackOutcome] = []
    radii = sorted(set(settings.eps))
    for name in (*settings.attacks, *(['transfer'] if surrogate is not None else [])):
        if name.startswith('autoattack'):
            ensemble = functools.partial(
                run_autoattack, name, forward, variables, source, mesh, settings, key
            )
            for eps in radii:
                found = ensemble(eps, directory, ensemble_progress)
                judged = accuracy.predict_images(
                    forward,
                    variables,
                    found.result.x_adv,
                    predictions.labels,
                    mesh,
                    settings.batch_size,
                )
                outcome = _outcome_of(found, judged, name, eps, settings)
                wrong = outcome.attacked.success | ~predictions.correct
                attacked = outcome.attacked._replace(success=wrong)
                outcomes.append(dataclasses.replace(outcome, attacked=attacked))
            continue
        # What looks for the smallest perturbation finds the answer for all radii at once.
        smallest = name in MINIMUM
        for eps in radii[-1:] if smallest else radii:
            attacked = accuracy.attack(
                make_attack(name, forward, variables, settings, eps, key, surrogate),
                forward,
                variables,
                source,
                mesh,
                batch_size=settings.batch_size,
                limit=limit,
                keep=settings.examples,
                targeted=bool(settings.target),
                progress=progress(f'{name} {eps:g}'),
            )
            # An image that is wrong as it is stays so, wherever an attack has moved it, and one
            # whose logits are NaN shows an attack nothing.
            attacked = attacked._replace(success=attacked.success | ~predictions.correct)
            if attacked.distance is not None and not settings.target:
                # Of others that are wrong as they are the attack says so itself.
                nearest = np.where(predictions.predictions < 0, 0, attacked.distance)
                attacked = attacked._replace(distance=nearest)
            outcomes += (
                _at_each_radius(name, settings, attacked, predictions)
                if smallest
                else [AttackOutcome(_label(name, settings), settings.norm, eps, attacked)]
            )
    lengths = None
    if any(name in MINIMUM for name in settings.attacks):

        def of_batch(batch: data.Batch) -> dict[str, Array]:
            size = functools.partial(attacks.length, settings.norm)
            return {'length': jax.vmap(size)(data.to_float(batch.image))}

        lengths = accuracy.stream(
            source, mesh, settings.batch_size, jax.jit(of_batch), limit=limit
        )['length']
    report = RobustnessReport(
        source.info, settings.split, predictions, tuple(outcomes), lengths=lengths
    )
    if not outcomes:
        return report
    undiagnosed = _undiagnosed(settings)
    if undiagnosed:
        return dataclasses.replace(report, undiagnosed=undiagnosed)
    diagnoses = _diagnose(
        forward, variables, source, mesh, settings, key, report, surrogate, progress
    )
    return dataclasses.replace(report, diagnoses=diagnoses)


def _undiagnosed(settings: config_lib.Evaluation) -> str:
    """Why attacks are not followed by a diagnosis of gradient masking; empty where they are."""
    reason = ''
    if settings.norm == 'spatial':
        # Its checks are steps of gradients, and radii of balls.
        reason = (
            "its checks follow gradients, which the motions of evaluation.norm 'spatial' do not"
        )
    elif not settings.masking_images:
        reason = 'evaluation.masking_images is 0'
    elif not any(settings.eps):
        reason = 'no radius of evaluation.eps is above 0'
    return reason and f'Gradient masking was not looked for: {reason}.'


def _diagnose(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Evaluation,
    key: PRNGKeyArray,
    report: RobustnessReport,
    surrogate: tuple[Forward, Variables] | None,
    progress: Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]],
) -> tuple[masking.Diagnosis, ...]:
    """Signs of gradient masking on the first images, which every process holds, at each radius."""
    limit = min(settings.masking_images, settings.limit or settings.masking_images)
    held = accuracy.stream(source, mesh, settings.batch_size, _held, limit=limit)
    x = held['image'].astype(np.float32) / np.float32(255)
    return tuple(
        masking.diagnose(
            forward,
            variables,
            x,
            held['label'],
            key,
            threat=attacks.Threat(settings.norm, eps),
            steps=settings.steps,
            restarts=settings.restarts,
            queries=min(settings.queries, _DIAGNOSIS_QUERIES),
            draws=settings.draws,
            surrogate=surrogate,
            batch_size=settings.batch_size,
            mesh=mesh,
            index=held['index'],
            # An attack that misses its aim may have left the class all the same.
            reported=None if settings.target else ~report.worst_case(eps)[: len(x)],
            progress=progress(f'masking {eps:g}'),
        )
        for eps in sorted({eps for eps in settings.eps if eps})
    )


def _digest(settings: config_lib.Evaluation, mesh: Mesh, key: PRNGKeyArray) -> str:
    """Tells apart the settings whose unfinished AutoAttacks have nothing to say to each other."""
    seed = np.asarray(jax.random.key_data(key).addressable_data(0)).tolist()
    chosen = (settings.split, settings.limit, settings.auto_steps, settings.queries)
    text = repr((*chosen, parallel.round_up(settings.batch_size, mesh), seed))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _held(batch: data.Batch) -> dict[str, Array]:
    return {'image': batch.image, 'label': batch.label, 'index': batch.index}


def _at_each_radius(
    name: str,
    settings: config_lib.Evaluation,
    attacked: accuracy.Attacked,
    clean: accuracy.Predictions,
) -> list[AttackOutcome]:
    """Outcomes for all radii from the smallest perturbations found, of one run."""
    outcomes = []
    assert attacked.distance is not None
    for eps in sorted(set(settings.eps)):
        found = attacked.distance <= eps
        success = found | ~clean.correct
        shown = found[: len(attacked.x)].reshape(-1, *[1] * (attacked.x.ndim - 1))
        at_radius = attacked._replace(
            success=success,
            margin=np.where(found, attacked.margin, clean.margin),
            predictions=np.where(found, attacked.predictions, clean.predictions),
            reached=None if attacked.reached is None else found,
            x_adv=np.where(shown, attacked.x_adv, attacked.x / np.float32(255)),
        )
        outcomes.append(AttackOutcome(_label(name, settings), settings.norm, eps, at_radius))
    return outcomes


def _label(name: str, settings: config_lib.Evaluation) -> str:
    """An attack's name, with what it aims at."""
    return f'{name}_{settings.target}' if settings.target else name


class Ensemble(NamedTuple):
    """AutoAttack over a data set.

    Attributes:
      result: of all images, which every process holds.
      image: the clean images, uint8 `[N, ...]`.
      broken_by: see `AttackOutcome`.
    """

    result: attacks.AutoAttackResult
    image: UInt8[np.ndarray, 'examples height width channels']
    broken_by: tuple[str, ...]


def run_autoattack(
    name: str,
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    settings: config_lib.Evaluation,
    key: PRNGKeyArray,
    eps: float,
    directory: pathlib.Path | None = None,
    progress: attacks.Progress | None = None,
) -> Ensemble:
    """AutoAttack over a data set.

    Args:
      name: `'autoattack'`, `'autoattack_plus'` or `'autoattack_rand'`.
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      settings: norm, steps, queries and images.
      key: randomness of the attacks.
      eps: radius in pixel units.
      directory: under which finished work is noted, apart for each threat and settings; None notes
        nothing.
      progress: called before each batch, see `attacks.autoattack`.

    Returns:
      Its result.
    """
    if directory is not None:
        directory /= f'{name}-{settings.norm}-{eps:g}-{_digest(settings, mesh, key)}'
    held = accuracy.stream(source, mesh, settings.batch_size, _held, limit=settings.limit or None)
    version = name.partition('_')[2] or 'standard'
    result = attacks.autoattack(
        forward,
        variables,
        held['image'].astype(np.float32) / np.float32(255),
        held['label'],
        key,
        threat=attacks.Threat(settings.norm, eps),
        version=version,
        steps=settings.auto_steps,
        queries=settings.queries,
        batch_size=settings.batch_size,
        mesh=mesh,
        index=held['index'],
        directory=directory,
        progress=progress,
    )
    names = {attacks.ROBUST: '', attacks.CLEAN: 'clean', **dict(enumerate(result.runs))}
    broken_by = tuple(names[int(number)] for number in result.broken_by)
    return Ensemble(result, held['image'], broken_by)


def _outcome_of(
    found: Ensemble,
    judged: Int[np.ndarray, ' examples'],
    name: str,
    eps: float,
    settings: config_lib.Evaluation,
) -> AttackOutcome:
    result, keep = found.result, settings.examples
    attacked = accuracy.Attacked(
        result.success,
        result.margin,
        judged,
        result.x_adv[:keep],
        found.image[:keep],
        queries=result.queries,
    )
    return AttackOutcome(name, settings.norm, eps, attacked, found.broken_by, result.warnings)


# Queries that a diagnosis of masking can do with.
_DIAGNOSIS_QUERIES = 500
# Attacks that look for the smallest perturbation, and stop at the boundary.
MINIMUM = ('fab', 'deepfool', 'fmn', 'carlini_wagner')


Found: TypeAlias = attacks.AttackResult | attacks.MinimumResult | attacks.SpatialResult


def make_attack(
    name: str,
    forward: Forward,
    variables: Variables,
    settings: config_lib.Evaluation,
    eps: float,
    key: PRNGKeyArray,
    surrogate: tuple[Forward, Variables] | None = None,
) -> Callable[[Array, Array, Array], Found]:
    """An attack with everything bound but images, labels and their positions.

    Args:
      name: one of `config.ATTACKS` but AutoAttack, or `'transfer'`.
      forward: the model to attack.
      variables: its variables, replicated.
      settings: norm, steps, restarts, loss and target.
      eps: radius in pixel units.
      key: randomness of the attack.
      surrogate: the model and its variables that `'transfer'` runs PGD on.

    Returns:
      A function of images `[B, ...]`, labels `[B]` and positions in the data set `[B]`.
    """
    method: Callable[..., Any]
    options: dict[str, Any] = {}
    if name in ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mi_fgsm', 'ni_fgsm', 'transfer'):
        method, options['loss'] = getattr(attacks, name), settings.loss
        options['draws'] = settings.draws
        if name == 'transfer':
            assert surrogate is not None
            options['surrogate'], options['surrogate_variables'] = surrogate
        if name in ('bim', 'pgd', 'mi_fgsm', 'ni_fgsm', 'transfer'):
            options['steps'] = settings.steps
            if settings.step_size:
                options['step_size'] = settings.step_size * eps
        if name in ('pgd', 'transfer'):
            options['restarts'] = settings.restarts
    elif name in ('apgd', 'apgd_dlr'):
        method = attacks.apgd
        options = {
            'steps': settings.auto_steps,
            'restarts': settings.restarts,
            'loss': 'dlr' if name == 'apgd_dlr' else 'cross_entropy',
            'draws': settings.draws,
            'large_start': settings.norm == 'l1',
        }
    elif name == 'square':
        method = attacks.square
        options = {'queries': settings.queries, 'restarts': settings.restarts}
    elif name == 'fab':
        method = attacks.fab
        options = {'steps': settings.auto_steps, 'restarts': settings.restarts}
    elif name == 'fmn':
        method, options = attacks.fmn, {'steps': settings.auto_steps}
    elif name == 'latent':
        method = attacks.latent_attack
        options = {
            'layer': settings.layer,
            'steps': settings.steps,
            'restarts': settings.restarts,
        }
        if settings.step_size:
            options['step_size'] = settings.step_size * eps
    elif name == 'noise':
        method, options = attacks.noise, {'restarts': settings.restarts}
    elif name == 'spatial':
        method = attacks.spatial
    else:
        method = attacks.deepfool if name == 'deepfool' else attacks.carlini_wagner
        if settings.search_steps:
            options['steps'] = settings.search_steps
    threat: Any
    if settings.norm == 'spatial':
        threat = attacks.Motion(eps, settings.shift)
    else:
        threat = attacks.Threat(settings.norm, eps)

    def run(x: Array, y: Array, index: Array) -> Found:
        aim: dict[str, Any] = {}
        if settings.target:
            # No example has this index.
            own = jax.random.fold_in(key, 2**32 - 1)
            aim['target'] = attacks.target_classes(
                forward, variables, x, y, own, kind=settings.target, index=index
            )
        return method(forward, variables, x, y, key, threat=threat, index=index, **options, **aim)

    return run


def fixed_key(seed: int) -> PRNGKeyArray:
    """The key of an evaluation: apart from every key that training used."""
    return jax.random.fold_in(jax.random.key(seed), 2)

"""What a defence is worth: undefended against defended, with attacks that know it.

An attack is made on the undefended model (`static`), on the defended one (`adaptive`), or on that
model with the gradients of a surrogate that hides them less (`adaptive` too, see
`inverse_perturbation.adaptive`); the defended model judges all. A defence withstands a radius only
where no attack of any kind succeeds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from neurosens import attacks, data, defenses, fingerprints, parallel
from neurosens import config as config_lib
from neurosens.defenses import inverse_perturbation, pruning, rescaling
from neurosens.evaluation import accuracy, robustness
from neurosens.evaluation.defense_moves import measure_moves, strongest_static
from neurosens.evaluation.defense_outcomes import (
    ADAPTIVE,
    STATIC,
    WITHOUT_GRADIENTS,
    DefenseOutcome,
    DefenseReport,
)
from neurosens.forward import Forward, Variables

_TIMED = 7


def evaluate_defense(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    evaluation: config_lib.Evaluation,
    settings: config_lib.Defense,
    key: PRNGKeyArray,
    *,
    parameters: Any,
    progress: Callable[[str], accuracy.Progress] = lambda name: iter,
    ensemble_progress: attacks.Progress | None = None,
    directory: pathlib.Path | None = None,
    surrogate: tuple[Forward, Variables] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> DefenseReport:
    """Measures a defence.

    The undefended model meets every attack that the defended one does, but for those that follow
    gradients of surrogates, and for images transferred from it or another model.

    Args:
      forward: the undefended model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      evaluation: attacks, radii, steps and images.
      settings: further attacks, what else the defended model is attacked through, and whether
        controls are measured.
      key: randomness of attacks.
      parameters: of the defence, replicated over the mesh.
      progress: from a label to a wrapper of an iterator of batches.
      ensemble_progress: called before each batch of AutoAttack.
      directory: where AutoAttack notes finished work, see `robustness.evaluate`; what that noted
        of the undefended model is not done again.
      surrogate: another model and its variables, replicated, whose images are transferred too.
      calibration: how the parameters were found, see `calibration_facts`, for the report.

    Returns:
      The report.
    """
    defended = defenses.DEFENSES[defenses.name_of(parameters)].apply(parameters, forward)
    surrogates = _surrogates(parameters, forward, settings)
    limit = evaluation.limit or None
    stream = functools.partial(accuracy.stream, source, mesh, evaluation.batch_size, limit=limit)
    undefended = accuracy.predict(
        forward,
        variables,
        source,
        mesh,
        batch_size=evaluation.batch_size,
        limit=limit,
        progress=progress('clean'),
    )
    names = tuple(dict.fromkeys((*evaluation.attacks, *settings.attacks)))
    digest = _digest(parameters)

    def attacked(
        model: Forward, part: str, names: tuple[str, ...], **options: Any
    ) -> robustness.RobustnessReport:
        return robustness.evaluate(
            model,
            variables,
            source,
            mesh,
            dataclasses.replace(evaluation, attacks=names, **options),
            key,
            progress=lambda name: progress(f'{part} {name}'),
            ensemble_progress=ensemble_progress,
            directory=directory and directory / f'{part.replace(" ", "_")}-{digest}',
            # Images made for the undefended model are another check of the gradients.
            surrogate=(forward, variables) if model is defended else None,
        )

    report = attacked(defended, 'defended', names)
    outcomes: list[DefenseOutcome] = []
    for name in names:
        for eps in sorted(set(evaluation.eps)):
            warnings: tuple[str, ...] = ()
            if name.startswith('autoattack'):
                ensemble = robustness.run_autoattack(
                    name,
                    forward,
                    variables,
                    source,
                    mesh,
                    evaluation,
                    key,
                    eps,
                    directory,
                    ensemble_progress,
                )
                images, labels = ensemble.result.x_adv, undefended.labels
                before, judged = (
                    accuracy.predict_images(
                        model, variables, images, labels, mesh, evaluation.batch_size
                    )
                    for model in (forward, defended)
                )
                found = {
                    'undefended': ensemble.result.success,
                    'seen': before,
                    'broken': judged != labels,
                }
                warnings = ensemble.result.warnings
            else:
                run = robustness.make_attack(name, forward, variables, evaluation, eps, key)
                judge = functools.partial(_static, run, forward, defended, variables)
                found = stream(judge, progress=progress(f'static {name} {eps:g}'))
            # Logits that are NaN show nothing to recover.
            fooled = undefended.correct & found['undefended'] & (found['seen'] >= 0)
            outcomes.append(
                DefenseOutcome(
                    STATIC,
                    name,
                    evaluation.norm,
                    eps,
                    found['broken'] | ~report.predictions.correct,
                    fooled,
                    warnings,
                    undefended=found['undefended'],
                )
            )
    outcomes += _adaptive(report)
    if surrogate is not None:
        other = robustness.evaluate(
            defended,
            variables,
            source,
            mesh,
            dataclasses.replace(evaluation, attacks=(), examples=0, masking_images=0),
            key,
            progress=lambda name: progress(f'other model, {name}'),
            surrogate=surrogate,
        )
        outcomes += _adaptive(other, '_other')
    for label, hidden in surrogates.items():
        through = attacks.with_gradients_of(defended, hidden)
        part = f'defended by {label}'
        outcomes += _adaptive(
            attacked(through, part, settings.surrogate_attacks, masking_images=0, examples=0),
            f'_{label}',
        )
    moves = []
    known = isinstance(parameters, inverse_perturbation.Parameters)
    if known and settings.controls:
        for strongest in strongest_static(outcomes):
            run = robustness.make_attack(
                strongest.attack, forward, variables, evaluation, strongest.eps, key
            )
            moves.append(
                measure_moves(
                    run,
                    forward,
                    variables,
                    functools.partial(stream, progress=progress(f'controls {strongest.eps:g}')),
                    parameters,
                    key,
                    mesh,
                    strongest,
                )
            )
    uncontrolled = ''
    if known and settings.controls and not moves:
        uncontrolled = (
            'Controls were not measured: they move images of one attack, and ensembles make theirs '
            'by several, or attacks for the smallest perturbation theirs at the boundary; add one '
            "such as 'pgd' to defense.attacks."
        )
    return DefenseReport(
        defenses.name_of(parameters),
        dataclasses.asdict(parameters.settings),
        undefended,
        report.predictions,
        tuple(outcomes),
        tuple(moves),
        inverse_perturbation.passes(parameters) if known else 1,
        relative_cost(forward, defended, variables, source, mesh, evaluation.batch_size),
        report.diagnoses,
        uncontrolled,
        report,
        dict(calibration or {}),
        _in_short(parameters),
    )


def _in_short(parameters: Any) -> dict[str, Any]:
    """What a calibration found, beside its settings."""
    if isinstance(parameters, rescaling.Parameters):
        scale = np.asarray(parameters.scale)
        return {
            'neurons': len(scale),
            'amplified': int((scale > 1).sum()),
            'compressed': int((scale < 1).sum()),
            'smallest factor': float(scale.min()),
            'largest factor': float(scale.max()),
        }
    if isinstance(parameters, pruning.Parameters):
        removed = np.asarray(parameters.removed)
        return {'neurons': len(removed), 'removed': np.flatnonzero(removed).tolist()}
    return {'classes': len(parameters.directions)}


def _surrogates(
    parameters: Any, forward: Forward, settings: config_lib.Defense
) -> dict[str, Forward]:
    """Whose gradients attacks on the defended model follow, of what the settings ask for."""
    if not isinstance(parameters, inverse_perturbation.Parameters):
        # Edits of activations are differentiated as they are.
        return {}
    return {
        name: surrogate
        for name, surrogate in inverse_perturbation.adaptive(parameters, forward).items()
        if name in settings.surrogates
        or (name.startswith('candidate_') and 'candidates' in settings.surrogates)
    }


def _digest(parameters: Any) -> str:
    """Tells apart defences whose unfinished AutoAttacks have nothing to say to each other."""
    kind = defenses.name_of(parameters), parameters.settings, fingerprints.of_tree(parameters)
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:8]


def _adaptive(report: robustness.RobustnessReport, suffix: str = '') -> list[DefenseOutcome]:
    return [
        DefenseOutcome(
            ADAPTIVE,
            f'{outcome.attack}{suffix}',
            outcome.norm,
            outcome.eps,
            outcome.attacked.success,
            warnings=outcome.warnings,
            blind=np.array([run.startswith(WITHOUT_GRADIENTS) for run in outcome.broken_by])
            if outcome.broken_by
            else None,
        )
        for outcome in report.outcomes
    ]


def _static(
    run: Callable[..., Any],
    forward: Forward,
    defended: Forward,
    variables: Variables,
    batch: data.Batch,
) -> dict[str, Array]:
    """An attack on the undefended model, judged by both."""
    x_adv = run(data.to_float(batch.image), batch.label, batch.index).x_adv
    seen = accuracy.classify(forward, variables, x_adv)
    return {
        'seen': seen,
        'undefended': seen != batch.label,
        'broken': accuracy.classify(defended, variables, x_adv) != batch.label,
    }


def relative_cost(
    forward: Forward,
    defended: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    batch_size: int,
) -> float:
    """Time of a batch through the defence, relative to the undefended model.

    Args:
      forward: the undefended model.
      defended: the model behind the defence.
      variables: variables of both, replicated over the mesh.
      source: the data; its first batch is timed.
      mesh: devices to run on.
      batch_size: images over all devices.

    Returns:
      The median ratio of alternating runs, on the primary process's clock.
    """
    batch = next(
        iter(
            source.eval_batches(
                batch_size=parallel.round_up(batch_size, mesh),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
    )
    placed = parallel.shard(mesh, batch)
    x = data.to_float(placed.image)
    ratios = []
    for _ in range(_TIMED + 1):
        seconds = []
        for model in (forward, defended):
            start = time.perf_counter()
            jax.block_until_ready(accuracy.classify(model, variables, x))
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    # The first round compiles.
    return statistics.median(ratios[1:])

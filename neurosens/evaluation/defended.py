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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from neurosens import attacks, data, defenses, fingerprints, parallel
from neurosens import config as config_lib
from neurosens.attacks.result import predicted_classes
from neurosens.defenses import inverse_perturbation, oracles
from neurosens.evaluation import accuracy, masking, robustness
from neurosens.forward import Forward, Variables
from neurosens.neurons import units
from neurosens.neurons.influence import FRONT, MIDDLE, TAIL, labels

STATIC, ADAPTIVE = 'static', 'adaptive'
GROUPS = ('front', 'middle', 'tail')
_TIMED = 7


class DefenseOutcome(NamedTuple):
    """One attack on a defended model.

    Attributes:
      kind: `'static'` (made on the undefended model) or `'adaptive'` (made with knowledge of the
        defence).
      attack: its name, with the surrogate whose gradients it followed.
      norm: norm of the threat.
      eps: radius in pixel units.
      success: the defended model misclassifies the image found, bool `[M]`.
      fooled: of a static attack, whether the undefended model classifies the clean image correctly
        and the attacked one not, bool `[M]`; None for others.
      warnings: why the result may overestimate robustness.
    """

    kind: str
    attack: str
    norm: str
    eps: float
    success: Bool[np.ndarray, ' images']
    fooled: Bool[np.ndarray, ' images'] | None = None
    warnings: tuple[str, ...] = ()

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
    """

    attack: str
    controls: Mapping[str, Mapping[float, float]]
    shifts: Mapping[str, Mapping[str, Float[np.ndarray, ' fooled']]]


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
      diagnosis: of gradient masking by the defence; None where it was not asked for.
      uncontrolled: why there are no controls although they were asked for, or empty.
    """

    defense: str
    settings: dict[str, Any]
    undefended: accuracy.Predictions
    defended: accuracy.Predictions
    outcomes: tuple[DefenseOutcome, ...]
    moves: tuple[Moves, ...]
    passes: int
    cost: float
    diagnosis: masking.Diagnosis | None = None
    uncontrolled: str = ''

    @property
    def warnings(self) -> dict[str, tuple[str, ...]]:
        """Why robustness may be overestimated, by the names of outcomes."""
        return {outcome.name: outcome.warnings for outcome in self.outcomes if outcome.warnings}

    def undefended_worst_case(self, eps: float) -> np.ndarray:
        """Whether the undefended model withstands every static attack of a radius `[M]`."""
        robust = self.undefended.correct
        for outcome in self.outcomes:
            if outcome.eps == eps and outcome.fooled is not None:
                robust = robust & ~outcome.fooled
        return robust

    def worst_case(self, eps: float, kinds: Sequence[str] = (STATIC, ADAPTIVE)) -> np.ndarray:
        """Whether each image stays classified correctly under every attack of a radius `[M]`."""
        robust = self.defended.correct
        for outcome in self.outcomes:
            if outcome.eps == eps and outcome.kind in kinds:
                robust = robust & ~outcome.success
        return robust


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
    """
    counted = np.asarray(fooled, bool) & (True if valid is None else np.asarray(valid, bool))
    if not counted.any():
        return float('nan')
    return float((np.asarray(recovered, bool) & counted).sum() / counted.sum())


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
            dataclasses.replace(evaluation, attacks=names, examples=0, **options),
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
        for eps in evaluation.eps:
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
                judged = accuracy.predict_images(
                    defended, variables, images, labels, mesh, evaluation.batch_size
                )
                found = {'fooled': ensemble.result.success, 'broken': judged != labels}
                warnings = ensemble.result.warnings
            else:
                run = robustness.make_attack(name, forward, variables, evaluation, eps, key)
                judge = functools.partial(_static, run, forward, defended, variables)
                found = stream(judge, progress=progress(f'static {name} {eps:g}'))
            fooled = undefended.correct & found['fooled']
            success = found['broken'] | ~report.predictions.correct
            outcomes.append(
                DefenseOutcome(STATIC, name, evaluation.norm, eps, success, fooled, warnings)
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
            attacked(through, part, settings.surrogate_attacks, masking_images=0), f'_{label}'
        )
    moves = []
    known = isinstance(parameters, inverse_perturbation.Parameters)
    if known and settings.controls:
        for strongest in _strongest_static(outcomes):
            run = robustness.make_attack(
                strongest.attack, forward, variables, evaluation, strongest.eps, key
            )
            moves.append(
                _moves(
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
            "by several; add one such as 'pgd' to defense.attacks."
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
        report.diagnosis,
        uncontrolled,
    )


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
        )
        for outcome in report.outcomes
    ]


@jax.jit
def _classes(forward: Forward, variables: Variables, x: Array) -> Array:
    return predicted_classes(forward(variables, x)[0])


def _static(
    run: Callable[..., Any],
    forward: Forward,
    defended: Forward,
    variables: Variables,
    batch: data.Batch,
) -> dict[str, Array]:
    """An attack on the undefended model, judged by both."""
    x_adv = run(data.to_float(batch.image), batch.label, batch.index).x_adv
    seen = _classes(forward, variables, x_adv)
    return {
        # Logits that are NaN show nothing to recover.
        'fooled': (seen != batch.label) & (seen >= 0),
        'broken': _classes(defended, variables, x_adv) != batch.label,
    }


def _strongest_static(outcomes: Sequence[DefenseOutcome]) -> list[DefenseOutcome]:
    """Of each radius the static attack that fools the undefended model most often.

    Ensembles are left out, whose images come of several attacks.
    """
    strongest: dict[float, tuple[int, DefenseOutcome]] = {}
    for outcome in outcomes:
        if outcome.fooled is not None and not outcome.attack.startswith('autoattack'):
            count = int(outcome.fooled.sum())
            if outcome.eps not in strongest or count > strongest[outcome.eps][0]:
                strongest[outcome.eps] = count, outcome
    return [outcome for _, outcome in strongest.values()]


def _moves(
    run: Callable[..., Any],
    forward: Forward,
    variables: Variables,
    stream: Callable[..., dict[str, np.ndarray]],
    parameters: inverse_perturbation.Parameters,
    key: PRNGKeyArray,
    mesh: Mesh,
    outcome: DefenseOutcome,
) -> Moves:
    """What moves of each size recover, and what the attack does to front and tail."""
    settings = parameters.settings
    sizes = [parallel.replicate(mesh, jnp.float32(rho)) for rho in settings.rho]
    key = parallel.replicate(mesh, key)

    def step(batch: data.Batch) -> dict[str, Array]:
        x = data.to_float(batch.image)
        x_adv = run(x, batch.label, batch.index).x_adv
        found = {}
        for rho, size in zip(settings.rho, sizes):
            moved = oracles.moved(
                forward,
                variables,
                x,
                x_adv,
                batch.label,
                key,
                rho=size,
                parameters=parameters,
                index=batch.index,
            )
            for name, images in moved.items():
                right = _classes(forward, variables, images) == batch.label
                found[f'{rho}|{name}'] = right
        return {**found, **_shift(forward, variables, x, x_adv, settings)}

    arrays = stream(step)
    fooled = outcome.fooled
    assert fooled is not None
    controls = {
        name: {rho: success_rate(fooled, arrays[f'{rho}|{name}']) for rho in settings.rho}
        for name in oracles.NAMES
    }
    shifts = {
        layer: {group: arrays[f'{layer}|{group}'][fooled] for group in GROUPS}
        for layer in settings.layers
    }
    return Moves(outcome.name, controls, shifts)


@functools.partial(jax.jit, static_argnames='settings')
def _shift(
    forward: Forward,
    variables: Variables,
    x: Array,
    x_adv: Array,
    settings: inverse_perturbation.Settings,
) -> dict[str, Array]:
    """Mean change of the neurons of each group, of each image's own partition."""

    def example(x: Array, x_adv: Array) -> dict[str, Array]:
        clean = inverse_perturbation.direction_example(forward, variables, x, settings=settings)
        attacked = forward(variables, x_adv[None], taps=settings.layers)[1]
        found = {}
        for layer in settings.layers:
            before = clean.activation[layer]
            change = units.pool(attacked[layer][0], settings.unit) - before
            scale = jnp.maximum(jnp.abs(before).mean(), jnp.finfo(jnp.float32).tiny)
            part = inverse_perturbation.partition(clean.influence[layer], settings)
            label = labels(part, len(before))
            for group, value in zip(GROUPS, (FRONT, MIDDLE, TAIL)):
                members = label == value
                total = jnp.where(members, change, 0).sum() / jnp.maximum(members.sum(), 1)
                found[f'{layer}|{group}'] = total / scale
        return found

    return jax.vmap(example)(x, x_adv)


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
            jax.block_until_ready(_classes(model, variables, x))
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    # The first round compiles.
    return statistics.median(ratios[1:])

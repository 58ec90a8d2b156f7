"""Gradient masking: whether the attacks of an evaluation were held up rather than withstood.

A model whose gradients are zero, random or misleading looks robust to attacks that follow them.
`diagnose` attacks a few images in ways whose order is known for every honest model, and says where
that order is broken; `neurosens.evaluation.masking_checks` has the rules.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate, parallel
from neurosens.attacks import (
    AttackResult,
    Threat,
    is_random,
    losses,
    pgd_example,
    project,
    redraw,
    square,
    steepest_ascent,
)
from neurosens.attacks.batches import attack_batch
from neurosens.attacks.objective import objective
from neurosens.attacks.result import logits_of
from neurosens.attacks.threat import SPARSE_SHARE, default_step
from neurosens.defenses import images
from neurosens.evaluation.masking_checks import Check, Evidence, judge, slack
from neurosens.evaluation.masking_models import (
    EDITS,
    TRANSFORMS,
    float64_forward,
    straight_forward,
)
from neurosens.forward import Forward, Variables

# How many times the steps, or the restarts, stronger attacks have.
_MORE = 5
# Sparse steps of l1 stop where the few pixels that they move come to the end of the box: so many
# pixels move at least, and this share of them at the largest radius.
_SPARSE_PIXELS, _WIDE_SHARE = 10, 0.2
# Weights of the losses of `_pgd_example`.
_CROSS_ENTROPY, _MARGIN, _SCALED = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was looked for, and found.

    Attributes:
      checks: the checks, in the order of the report.
      images: number of images attacked.
      norm: norm of the threat.
      eps: its radius, in pixel units.
    """

    checks: tuple[Check, ...]
    images: int
    norm: str
    eps: float

    @property
    def name(self) -> str:
        """Such as `'linf-0.0314'`, its key in result files."""
        return f'{self.norm}-{self.eps:.3g}'

    @property
    def passed(self) -> bool:
        """Whether no check warns."""
        return all(check.passed is not False for check in self.checks)

    @property
    def slack(self) -> int:
        """How many images may go against a rule by chance; see `masking_checks.slack`."""
        return slack(self.images)


class _View(NamedTuple):
    """What a model shows of one image, or of each of a batch.

    Attributes:
      logits: of one draw.
      again: of another draw; the same for a model that is not random.
      gradient: largest magnitude of the gradient of the cross-entropy.
      fooled: whether the image is misclassified.
      fgsm: whether it is, or is after one step.
    """

    logits: Float[Array, '... classes']
    again: Float[Array, '... classes']
    gradient: Float[Array, '...']
    fooled: Bool[Array, '...']
    fgsm: Bool[Array, '...']


def _view_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    draws: int,
) -> _View:
    look, climb = objective(forward, variables, y, losses.cross_entropy, draws=draws)
    gradient, clean = climb(x, key)
    moved = project(
        threat, x, x + default_step(threat, x.shape, 1.0) * steepest_ascent(threat, gradient)
    )
    keys = jax.random.split(key)
    # Traced twice: randomness that a model draws while it is traced shows too.
    one, two = (logits_of(redraw(forward, keys[draw]), variables, x) for draw in range(2))
    fooled = clean.fools | look(moved, key).fools
    return _View(one, two, jnp.abs(gradient).max(), clean.fools, fooled)


def _pgd_example(
    forward: Forward,
    variables: Variables,
    x: Float[Array, '...'],
    y: Int[Array, ''],
    key: PRNGKeyArray,
    *,
    weights: tuple[float | Array, ...],
    **options: Any,
) -> AttackResult:
    """PGD whose loss is traced: one compiled program serves all losses, radii and steps.

    Without steps, what counts is the random start: noise.
    """
    known = (losses.cross_entropy, losses.margin, losses.scaled_cross_entropy)

    def loss(logits: Array, y: Array) -> Array:
        values = [each(logits, y) for each in known]
        return sum(w * value for w, value in zip(weights, values))  # type: ignore[return-value]

    return pgd_example(forward, variables, x, y, key, loss=loss, **options)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What stays the same over the attacks of a diagnosis."""

    forward: Forward
    variables: Variables
    x: np.ndarray
    y: np.ndarray
    index: np.ndarray
    key: PRNGKeyArray
    threat: Threat
    steps: int
    restarts: int
    draws: int
    mesh: Mesh | None
    batch_size: int

    def run(
        self,
        attack: Callable[..., Any],
        names: Sequence[str],
        *,
        number: int = 0,
        **arguments: Any,
    ) -> dict[str, np.ndarray]:
        """Named results of an attack `(forward, variables, x, y, key, *, index, ...)`, by image."""
        key = jax.random.fold_in(self.key, number)
        if self.mesh is not None:
            key = parallel.replicate(self.mesh, key)

        def named(*batch: Array) -> dict[str, Array]:
            x, y, index = batch
            result = attack(self.forward, self.variables, x, y, key, index=index, **arguments)
            return {name: getattr(result, name) for name in names}

        return parallel.in_batches(named, (self.x, self.y, self.index), self.batch_size, self.mesh)

    def view(self) -> dict[str, np.ndarray]:
        """What the model shows of each image; the fields of `_View`."""

        def attack(*arguments: Any, index: Array) -> _View:
            return attack_batch(
                _view_example,
                *arguments,
                threat=self.threat,
                index=index,
                options={'draws': self.draws},
            )

        return self.run(attack, _View._fields)

    def pgd(
        self,
        *,
        radius: float | None = None,
        steps: int | None = None,
        restarts: int | None = None,
        weights: tuple[float, ...] = _CROSS_ENTROPY,
        share: float | None = None,
        number: int = 0,
        names: Sequence[str] = ('success',),
    ) -> dict[str, np.ndarray]:
        """PGD on each image, by default as the evaluation runs it; the fields of its result."""
        radius = float(self.threat.eps) if radius is None else radius
        steps = self.steps if steps is None else steps
        threat = dataclasses.replace(self.threat, eps=radius)
        shared = {
            'steps': steps,
            'step_size': default_step(threat, self.x.shape[1:], 2.5 / max(steps, 1)),
            'restarts': self.restarts if restarts is None else restarts,
            'weights': weights,
            'share': max(SPARSE_SHARE, _SPARSE_PIXELS / self.x[0].size) if share is None else share,
        }

        def attack(*arguments: Any, index: Array) -> AttackResult:
            return attack_batch(
                _pgd_example,
                *arguments,
                threat=threat,
                index=index,
                shared=shared,
                options={'draws': self.draws},
            )

        return self.run(attack, names, number=number)


def diagnose(
    forward: Forward,
    variables: Variables,
    x: Float[np.ndarray, 'images ...'],
    y: Int[np.ndarray, ' images'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    steps: int = 20,
    restarts: int = 1,
    queries: int = 500,
    float64_images: int = 64,
    surrogate: tuple[Forward, Variables] | None = None,
    draws: int = 1,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    index: Int[np.ndarray, ' images'] | None = None,
    reported: Bool[np.ndarray, ' images'] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Diagnosis:
    """Looks for signs that a model hides its gradients (Athalye et al. 2018, Carlini et al. 2019).

    The checks, all on the same images:

    - `monotone`: accuracy under PGD falls as the radius grows (eps / 2, eps, 2 eps and the last);
    - `chance`: at the last radius, where any image can become the same grey, no more images are
      right than the most frequent label has;
    - `effort`: five times the steps, or the restarts, leave no image right that fewer fool;
    - `converged`: nor do they fool more, or the attack is too weak to report;
    - `reported`: the attacks of a report at this radius fool what these attacks fool (PGD of all
      steps, restarts and losses, FGSM, Square, noise);
    - `single_step`: PGD fools what FGSM fools;
    - `transfer`, `black_box`: images made for the surrogate, and Square, fool no image that no
      attack by gradients fools (PGD of all these steps, restarts and losses);
    - `noise`: one random image of the ball fools fewer than half as many images as PGD;
    - `gradients`: the cross-entropy of the correct images has a gradient whose square is not 0 in
      float32;
    - `losses`: margin and scale-invariant cross-entropy fool no more than cross-entropy;
    - `precision`: nor does PGD by gradients in float64, whose images the model itself judges;
    - `randomness`: two draws, or passes, give the same logits up to rounding (1e-3 of the largest),
      unless gradients are averaged over draws;
    - `straight_through`: input transforms and edits that are wrapped around the model, at any
      depth, show no more with the derivative of the identity in place of theirs (BPDA).

    The rule: each compares images one by one, or counts of them, and N/100 + 2 sqrt(N/100) of N
    images, rounded down and one at least, may go the wrong way by chance (3 of 100, 16 of 1000);
    `masking_checks.slack`. A check that could not have warned, as no image was left for a stronger
    attack to find, does not apply, and says so. Where the two attacks are of equal effort, as for
    `losses` and `precision`, images that only the second fools are held against those that only the
    first does; see `masking_checks.exceeds`. A diagnosis that passes is no proof: it attacks few
    images with short attacks, and cannot see an operation inside of the model's modules.

    It costs about as much as 17 times this PGD and `queries` forward passes of each image, and four
    compilations; further ones for a surrogate and for each kind of wrapper.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh if there is one.
      x: images `[N, ...]` inside the threat's bounds, on the host, the same on every process.
      y: labels `[N]`.
      key: randomness of all attacks.
      threat: the perturbations allowed, of finite eps above 0.
      steps: steps of PGD, whose step size is 2.5 eps / steps; for l1 each moves 10 pixels or more.
      restarts: its restarts.
      queries: of Square; 0 leaves it out.
      float64_images: on how many first images PGD is repeated in float64; 0 leaves it out.
      surrogate: another model and its variables, replicated, whose images are transferred.
      draws: draws of a random model that every gradient is averaged over.
      batch_size: images per batch, over all devices; results do not depend on it.
      mesh: devices to split batches over; only one by default.
      index: identity of each image `[N]`, by default its place.
      reported: whether any attack of a report at this radius, or none being needed, fools the model
        `[N]`; without it that is not compared.
      progress: wraps an iterable over the attacks, as `tqdm` does.

    Returns:
      The checks, equal on every process.

    Raises:
      ValueError: a number is out of range, there are no images, or they are not finite or out of
        bounds, or a label is not one of the model's classes.
    """
    x, y = np.asarray(x, np.float32), np.asarray(y)
    for name, value, low in (
        ('steps', steps, 1),
        ('restarts', restarts, 1),
        ('queries', queries, 0),
        ('float64_images', float64_images, 0),
        ('draws', draws, 1),
        ('batch_size', batch_size, 1),
    ):
        _validate.check_whole(name, value, low=low)
    _validate.check_range('eps', float(threat.eps), low=0, low_open=True)
    if not len(x) or y.shape != x.shape[:1]:
        raise ValueError(
            f'images have shape {x.shape} and labels {y.shape}; they must be [N, ...] and [N].'
        )
    if reported is not None and np.shape(reported) != y.shape:
        raise ValueError(
            f'reported has shape {np.shape(reported)}; it must be {y.shape}, one flag for each '
            'image.'
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f'labels are of type {y.dtype}; they must be integers.')
    images.check_labels(y, images.count_classes(forward, variables, x))
    y = y.astype(np.int32)
    task = _Task(
        forward,
        variables,
        x,
        y,
        np.arange(len(x), dtype=np.int32) if index is None else np.asarray(index, np.int32),
        key,
        threat,
        steps,
        restarts,
        draws,
        mesh,
        batch_size,
    )
    attacks, absent, replaced = _plan(task, queries, float64_images, surrogate)
    found = {name: attacks[name]() for name in progress(list(attacks))}
    view, again = found.pop('view'), found.pop('again')
    radii = _radii(threat, x.shape[1:])
    # What is misclassified without an attack counts under each of them.
    clean = view['fooled'] | np.isnan(view['logits']).any(-1)
    fooled = {
        name: result['success'] | clean[: len(result['success'])] for name, result in found.items()
    }
    fooled |= {'clean': clean, 'fgsm': view['fgsm']}
    logits = view['logits'].astype(np.float64)
    others = np.stack([view['again'], again['logits']]).astype(np.float64)
    evidence = Evidence(
        labels=y,
        correct=~clean,
        gradient=view['gradient'],
        saturated=_saturated(view['logits'], y),
        change=_change(logits, others),
        changes_class=(others.argmax(-1) != logits.argmax(-1)).any(0),
        declared_random=is_random(forward),
        draws=draws,
        fooled=fooled,
        by_radius={radius: fooled[_at(radius, threat)] for radius in radii},
        limit=_grey_radius(threat, x.shape[1:]),
        replaced=replaced,
        absent=absent,
        reported=None if reported is None else np.asarray(reported, bool),
    )
    return Diagnosis(judge(evidence), len(x), threat.norm, float(threat.eps))


def _plan(
    task: _Task,
    queries: int,
    float64_images: int,
    surrogate: tuple[Forward, Variables] | None,
) -> tuple[dict[str, Callable[[], dict[str, np.ndarray]]], dict[str, str], dict[str, int]]:
    """The attacks by name, why others are absent, and how many functions are made straight."""
    pgd, threat = task.pgd, task.threat
    attacks: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        'view': task.view,
        'again': task.view,
        'pgd': pgd,
        'steps': functools.partial(pgd, steps=_MORE * task.steps),
        'restarts': functools.partial(pgd, restarts=_MORE * task.restarts),
        'margin': functools.partial(pgd, weights=_MARGIN),
        'scaled': functools.partial(pgd, weights=_SCALED),
        # Other starts than the attack's, which would else include them.
        'noise': functools.partial(pgd, steps=0, restarts=1, number=1),
    }
    limit = _grey_radius(threat, task.x.shape[1:])
    for radius in _radii(threat, task.x.shape[1:]):
        share = _WIDE_SHARE if radius >= limit else None
        attacks.setdefault(_at(radius, threat), functools.partial(pgd, radius=radius, share=share))
    absent = {}
    if task.x.ndim != 4:
        absent['square'] = 'Square needs images of height, width and channels.'
    elif threat.norm == 'l0':
        absent['square'] = 'Square does not count pixels; other norms have it.'
    elif not queries:
        absent['square'] = 'Square was left out; give it queries.'
    else:
        attacks['square'] = functools.partial(_square, task, queries)
    if surrogate is None:
        absent['transfer'] = 'Name a second model to make images for (surrogate, --transfer_from).'
    else:
        attacks['transfer'] = functools.partial(_transferred, task, *surrogate)
    if float64_images:
        few = _first(task, float64_images)
        with jax.enable_x64(True):
            wide = float64_forward(task.forward, task.variables, task.x)
        if wide is None:
            absent['float64'] = (
                'The model casts to float32 or narrower inside, so that its gradients cannot be '
                'repeated in float64; leave the dtype of its modules at None, or float64.'
            )
        else:
            attacks['float64'] = functools.partial(_double, few, *wide)
    else:
        absent['float64'] = 'The repeat in float64 was left out; give it images.'
    absent['reported'] = (
        'Nothing was given to compare: which images the attacks of a report fool at this radius '
        '(reported); attacks that aim at a class are not compared.'
    )
    absent['straight'] = (
        'No transform or edit is wrapped around the model; of those inside of its modules nothing '
        'is known.'
    )
    replaced = {}
    for kind in (TRANSFORMS, EDITS):
        straight, replaced[kind] = straight_forward(task.forward, kind)
        if replaced[kind]:
            attacks[f'straight_{kind}'] = dataclasses.replace(task, forward=straight).pgd
    return attacks, absent, replaced


def _grey_radius(threat: Threat, shape: tuple[int, ...]) -> float:
    """The radius within which every image of the box has the middle of the box."""
    half = (threat.bounds[1] - threat.bounds[0]) / 2
    pixels = math.prod(shape)
    if threat.norm == 'l0':
        return float(pixels // shape[-1] if len(shape) == 3 else pixels)
    return half * {'linf': 1.0, 'l2': math.sqrt(pixels), 'l1': float(pixels)}[threat.norm]


def _radii(threat: Threat, shape: tuple[int, ...]) -> list[float]:
    eps, limit = float(threat.eps), _grey_radius(threat, shape)
    return sorted({eps / 2, eps, min(2 * eps, max(eps, limit)), max(eps, limit)})


def _at(radius: float, threat: Threat) -> str:
    """The name of the attack of a radius."""
    return 'pgd' if radius == float(threat.eps) else f'pgd {radius:.3g}'


def _first(task: _Task, images: int) -> _Task:
    x, y, index = task.x[:images], task.y[:images], task.index[:images]
    return dataclasses.replace(task, x=x, y=y, index=index)


def _square(task: _Task, queries: int) -> dict[str, np.ndarray]:
    attack = functools.partial(square, threat=task.threat, queries=queries, rescale=True)
    return task.run(attack, ('success',), number=2)


def _transferred(task: _Task, forward: Forward, variables: Variables) -> dict[str, np.ndarray]:
    other = dataclasses.replace(task, forward=forward, variables=variables)
    return _judged_by(task, other.pgd(number=3, names=('x_adv',))['x_adv'])


def _double(task: _Task, forward: Forward, variables: Variables) -> dict[str, np.ndarray]:
    """PGD by gradients in float64; the model itself judges what they find."""
    with jax.enable_x64(True):
        wide = dataclasses.replace(
            task, forward=forward, variables=variables, x=task.x.astype(np.float64)
        )
        x_adv = wide.pgd(number=4, names=('x_adv',))['x_adv']
    return _judged_by(task, x_adv.astype(np.float32))


def _judged_by(task: _Task, x_adv: np.ndarray) -> dict[str, np.ndarray]:
    return {'success': dataclasses.replace(task, x=x_adv).view()['fooled']}


def _change(
    logits: Float[np.ndarray, 'images classes'], others: Float[np.ndarray, 'passes images classes']
) -> Float[np.ndarray, ' images']:
    """See `Evidence.change`; what is infinite, or no number, in every pass has not changed."""
    same = (others == logits) | (np.isnan(others) & np.isnan(logits))
    with np.errstate(invalid='ignore'):
        moved = np.where(same, 0.0, np.abs(others - logits))
    finite = np.abs(np.where(np.isfinite(logits), logits, 0))
    largest = np.maximum(finite.max(-1), np.finfo(np.float32).tiny)
    return np.nan_to_num(moved, nan=np.inf, posinf=np.inf).max((0, -1)) / largest


def _saturated(
    logits: Float[np.ndarray, 'images classes'], y: Int[np.ndarray, ' images']
) -> Bool[np.ndarray, ' images']:
    """Whether the softmax gives the label all of float32's probability."""
    shifted = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64))
    others = shifted.sum(-1) - np.take_along_axis(shifted, y[:, None], 1)[:, 0]
    return others / shifted.sum(-1) < np.finfo(np.float32).eps / 2

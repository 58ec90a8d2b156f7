"""AutoAttack: the worst case over an ensemble of attacks without free parameters.

Croce & Hein 2020 (https://arxiv.org/abs/2003.01690), and 2021 for l1
(https://arxiv.org/abs/2103.01208).
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neurosens import _validate, parallel
from neurosens.attacks.adaptive import is_random
from neurosens.attacks.apgd import apgd
from neurosens.attacks.autoattack_notes import Notes
from neurosens.attacks.autoattack_runs import LEAST_CLASSES, RANDOM_DRAWS, Run, runs
from neurosens.attacks.autoattack_warnings import clean_warnings, square_warning
from neurosens.attacks.batches import check_batch, check_images, check_labels, check_radius
from neurosens.attacks.fab import fab
from neurosens.attacks.losses import label_margin
from neurosens.attacks.objective import drawn_logits
from neurosens.attacks.result import AttackResult, predicted_classes
from neurosens.attacks.square import square
from neurosens.attacks.threat import Threat, require_ball
from neurosens.forward import Forward, Variables

# `broken_by` of images that are robust, and of those misclassified without an attack.
ROBUST = -1
CLEAN = -2
# The size of a last batch is a multiple of the full size divided by this, and of no less than that.
_PARTS, _SMALLEST_PART = 8, 16

# Called before each batch with a short text, the number of batches left in this run, and the robust
# accuracy so far.
Progress: TypeAlias = Callable[[str, int, float], None]


class AutoAttackResult(NamedTuple):
    """What the ensemble found of N images; with the fields of `AttackResult`.

    Attributes:
      x_adv: a misclassified image inside the threat if any attack found one, else the clean one
        `[N, ...]`.
      success: whether an attack broke the image or it was misclassified without `[N]`.
      margin: logit of the label minus the largest other, on `x_adv` `[N]`.
      queries: forward passes made `[N]`.
      broken_by: which of `runs` broke each image `[N]`: -1 none, -2 misclassified without attack.
      runs: names of the runs in order, such as `apgd-t 3` for the third target class.
      accuracy: robust accuracy before the first run and after each `[R + 1]`.
      warnings: sentences on why the result may overestimate robustness.
    """

    x_adv: Float[np.ndarray, 'examples ...']
    success: Bool[np.ndarray, ' examples']
    margin: Float[np.ndarray, ' examples']
    queries: Int[np.ndarray, ' examples']
    broken_by: Int[np.ndarray, ' examples']
    runs: tuple[str, ...]
    accuracy: Float[np.ndarray, ' stages']
    warnings: tuple[str, ...]


@jax.jit
def _clean(
    forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray, index: Array
) -> dict[str, Array]:
    logits = drawn_logits(forward, variables, x, key, index).astype(jnp.float32)
    others = jnp.where(jax.nn.one_hot(y, logits.shape[-1]) > 0, -jnp.inf, logits)

    def loss(image: Array, label: Array) -> Array:
        values = forward(variables, image[None])[0][0].astype(jnp.float32)
        return jax.nn.logsumexp(values) - values[label]

    gradients = jax.vmap(jax.grad(loss))(x, y)
    return {
        'logits': logits,
        'margin': jax.vmap(label_margin)(logits, y),
        'predictions': predicted_classes(logits),
        # The other classes, the most likely first.
        'order': jnp.argsort(-others, axis=-1)[:, :-1].astype(jnp.int32),
        'zero_gradient': (gradients == 0).all(tuple(range(1, x.ndim))),
        'infinite_gradient': ~jnp.isfinite(gradients).all(tuple(range(1, x.ndim))),
    }


class _Task(NamedTuple):
    """Everything that stays the same over the runs."""

    forward: Forward
    variables: Variables
    x: np.ndarray
    y: np.ndarray
    identity: np.ndarray
    order: np.ndarray
    key: PRNGKeyArray
    threat: Threat
    mesh: Mesh | None
    batch_size: int
    steps: int
    queries: int
    draws: int


def _attack(task: _Task, number: int, run: Run, rows: np.ndarray) -> AttackResult:
    """Dispatches one run on one full batch."""
    x, y, index = task.x[rows], task.y[rows], task.identity[rows]
    target = None
    if run.attack in ('apgd-t', 'fab-t'):
        target = task.order[rows, run.rank]
    if task.mesh is not None:
        x, y, index = parallel.shard_global(task.mesh, (x, y, index))
        target = None if target is None else parallel.shard_global(task.mesh, target)
    attacks: Mapping[str, Callable[..., Any]] = {'apgd': apgd, 'fab': fab, 'square': square}
    call = functools.partial(
        attacks[run.attack.split('-')[0]],
        task.forward,
        task.variables,
        x,
        y,
        jax.random.fold_in(task.key, number),
        threat=task.threat,
        index=index,
    )
    if run.attack.startswith('apgd'):
        classes = task.order.shape[1] + 1
        loss = 'cross_entropy' if run.attack == 'apgd-ce' else 'dlr'
        # The numerator of the ratio is always defined.
        few = classes < LEAST_CLASSES.get(run.attack, 0)
        return call(
            steps=task.steps,
            loss='margin' if few else loss,
            target=target,
            large_start=task.threat.norm == 'l1',
            draws=task.draws,
        )
    if run.attack.startswith('fab'):
        return call(steps=task.steps, target=target, random_first=target is None and run.rank > 0)
    return call(queries=task.queries)


def _batches(
    rows: np.ndarray, size: int, devices: int = 1, compiled: Collection[int] = ()
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in batches of one size, the last filled up with its first row, and how many count.

    Args:
      rows: what is divided.
      size: of every batch but the last, whose size may be one of `compiled` or a new one.
      devices: the last size is a multiple of them too.
      compiled: sizes for which there is a program.

    Yields:
      The rows of a batch, and how many of them are not filling.
    """
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        own = _last_size(len(part), size, devices, compiled)
        yield np.concatenate([part, np.full(own - len(part), part[0])]), len(part)


def _last_size(count: int, size: int, devices: int, compiled: Collection[int]) -> int:
    """The batch that so few images are attacked in.

    In eighths of the full size, so that images that only fill up cost little. A program that exists
    is taken where it does at most a third more work than needed: it saves a compilation.
    """
    part = max(-(-size // _PARTS), min(_SMALLEST_PART, size))
    part = -(-part // devices) * devices
    needed = min(-(-count // part) * part, size)
    near = [one for one in compiled if count <= one <= needed * 4 / 3]
    return min(near, default=needed)


def autoattack(
    forward: Forward,
    variables: Variables,
    x: Float[np.ndarray, 'examples ...'],
    y: Int[np.ndarray, ' examples'],
    key: PRNGKeyArray,
    *,
    threat: Threat,
    version: str = 'standard',
    attacks: Sequence[str] | None = None,
    steps: int = 100,
    queries: int = 5000,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    index: Int[np.ndarray, ' examples'] | None = None,
    directory: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> AutoAttackResult:
    """Attacks a data set with an ensemble (Croce & Hein 2020), each image until one succeeds.

    A loop on the host over compiled attacks: between them the images that are still robust are
    gathered into full batches of one size (the last in eighths of it), so that little is compiled
    twice. Images that are misclassified already are not attacked.
    The randomness of an image depends on the key, on `index` and on the run, not on batches or
    devices.

    Args:
      forward: the model to attack.
      variables: its variables, replicated over the mesh if there is one.
      x: images `[N, ...]` on the host, the same on every process.
      y: labels `[N]`.
      key: randomness of all attacks.
      threat: the perturbations allowed, of finite eps.
      version: `'standard'`, `'plus'` or `'rand'`, see `autoattack_runs.runs`.
      attacks: names of `autoattack_runs.ATTACKS` in place of the version's.
      steps: of APGD and FAB.
      queries: of Square.
      batch_size: images per batch, over all devices.
      mesh: devices to split batches over; only one by default.
      index: identity of each example `[N]`, by default its place.
      directory: where finished work is noted, so that the same call goes on after an interruption;
        the notes of other calls are refused, those of a finished one are read. A model is known by
        its arrays and by its logits of the clean images: give models that differ in gradients alone
        (`with_gradients_of`) directories of their own.
      progress: called before each batch.

    Returns:
      Results of all images, on every process.

    Raises:
      ValueError: a name or number is out of range, there are no images, they are not
        floating-point, not finite or out of bounds, a label is not one of the model's classes, or
        the directory has notes of another call.
    """
    x, y = np.asarray(x), np.asarray(y)
    for name, value in (('steps', steps), ('queries', queries), ('batch_size', batch_size)):
        _validate.check_whole(name, value)
    require_ball('autoattack', threat)
    check_radius(threat)
    check_batch(x, y)
    check_images(x, threat.bounds)
    check_labels(forward, variables, x, y)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    if mesh is not None:
        batch_size = parallel.round_up(batch_size, mesh)
    draws = RANDOM_DRAWS if version == 'rand' else 1
    task = _Task(
        forward,
        variables,
        x,
        y,
        index,
        np.zeros((len(x), 0), np.int32),
        key,
        threat,
        mesh,
        batch_size,
        steps,
        queries,
        draws,
    )
    clean, differ = _look(task)
    task = task._replace(order=clean['order'])
    plan = runs(threat.norm, version, clean['logits'].shape[1], attacks)
    warnings = tuple(clean_warnings(version, plan, clean, differ, is_random(forward)))
    notes = Notes(directory, _identity(task, version, plan), clean['logits'])
    found = _Found(
        x.copy(),
        np.where(clean['predictions'] == y, ROBUST, CLEAN),
        clean['margin'].copy(),
        np.ones(len(x), np.int64),
    )
    accuracy = [found.accuracy()]
    compiled: dict[str, set[int]] = {run.attack: set() for run in plan}
    for number, run in enumerate(plan):
        robust = np.flatnonzero(found.broken_by == ROBUST)
        devices = 1 if mesh is None else mesh.size
        batches = list(_batches(robust, batch_size, devices, compiled[run.attack]))
        compiled[run.attack].update(len(rows) for rows, _ in batches)
        for place, (rows, count) in enumerate(batches):
            stored = notes.read(number, place)
            if stored is None:
                if progress is not None:
                    progress(run.name, len(batches) - place, found.accuracy())
                result = _fetch(_attack(task, number, run, rows))
                stored = {name: values[:count] for name, values in result.items()}
                stored['x_adv'] = stored['x_adv'][stored['success']]
                notes.write(number, place, stored)
            found.add(number, rows[:count], stored)
        accuracy.append(found.accuracy())
    if any(run.attack == 'square' for run in plan):
        warnings += square_warning(plan, found.broken_by)
    return AutoAttackResult(
        found.x_adv,
        found.broken_by != ROBUST,
        found.margin,
        found.queries,
        found.broken_by,
        tuple(run.name for run in plan),
        np.array(accuracy),
        warnings,
    )


class _Found(NamedTuple):
    """What is known of each image so far; the arrays are written to."""

    x_adv: np.ndarray
    broken_by: np.ndarray
    margin: np.ndarray
    queries: np.ndarray

    def accuracy(self) -> float:
        return float((self.broken_by == ROBUST).mean())

    def add(self, run: int, rows: np.ndarray, result: Mapping[str, np.ndarray]) -> None:
        broken = result['success']
        self.queries[rows] += result['queries']
        self.x_adv[rows[broken]] = result['x_adv']
        self.broken_by[rows[broken]] = run
        self.margin[rows[broken]] = result['margin'][broken]


def _fetch(result: Any) -> dict[str, np.ndarray]:
    names = ('x_adv', 'success', 'margin', 'queries')
    return dict(parallel.gather({name: getattr(result, name) for name in names}))


def _look(task: _Task) -> tuple[dict[str, np.ndarray], bool]:
    """Logits and gradients of the clean images, and whether a second look differs."""
    parts: list[dict[str, np.ndarray]] = []
    differ = False
    devices = 1 if task.mesh is None else task.mesh.size
    for rows, count in _batches(np.arange(len(task.x)), task.batch_size, devices):
        x, y, index = task.x[rows], task.y[rows], task.identity[rows]
        if task.mesh is not None:
            x, y, index = parallel.shard_global(task.mesh, (x, y, index))
        keys = jax.random.split(jax.random.fold_in(task.key, 2**31 - 1))
        if task.mesh is not None:
            keys = parallel.replicate(task.mesh, keys)
        first, second = (
            parallel.gather(_clean(task.forward, task.variables, x, y, key, index)) for key in keys
        )
        differ |= not np.array_equal(first['logits'], second['logits'], equal_nan=True)
        parts.append({name: values[:count] for name, values in first.items()})
    clean = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return clean, differ


def _identity(task: _Task, version: str, plan: Iterable[Run]) -> dict[str, Any]:
    """What another call must share to go on with the notes of this one."""
    digest = hashlib.sha256()
    leaves = jax.tree.leaves((task.forward, task.variables))
    for array in (task.x, task.y, task.identity, *map(_bits, leaves)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        'images': len(task.x),
        'norm': task.threat.norm,
        'eps': float(task.threat.eps),
        'bounds': list(task.threat.bounds),
        'version': version,
        'runs': [run.name for run in plan],
        'steps': task.steps,
        'queries': task.queries,
        'batch_size': task.batch_size,
        'key': _bits(task.key).ravel().tolist(),
        'contents': digest.hexdigest(),
    }


def _bits(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    return np.asarray(leaf)

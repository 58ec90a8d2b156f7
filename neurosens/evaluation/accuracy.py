"""Predictions and attacks over whole data sets, sharded over all devices.

Results are per example and in the order of the data set; they do not depend on the batch size or
on the number of devices and processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from neurosens import data, parallel
from neurosens.attacks import AttackResult, MinimumResult, SpatialResult
from neurosens.attacks.result import label_margin, predicted_classes
from neurosens.defenses import images
from neurosens.forward import Forward, Variables

# Wraps an iterator of batches and yields the same batches, as `tqdm` does.
Progress: TypeAlias = Callable[[Iterable[data.Batch]], Iterable[data.Batch]]


class Predictions(NamedTuple):
    """What a model says of N images.

    Attributes:
      labels: their labels, int32 `[N]`.
      predictions: the classes of largest logit, int32 `[N]`; the first of equal ones, and -1 where
        a logit is NaN, which counts as wrong.
      loss: cross-entropy, float32 `[N]`.
      margin: logit of the label minus the largest other, float32 `[N]`.
    """

    labels: Int[np.ndarray, ' examples']
    predictions: Int[np.ndarray, ' examples']
    loss: Float[np.ndarray, ' examples']
    margin: Float[np.ndarray, ' examples']

    @property
    def correct(self) -> np.ndarray:
        """Whether each image is classified correctly, bool `[N]`."""
        return self.predictions == self.labels

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly."""
        return float(self.correct.mean())


def stream(
    source: data.Source,
    mesh: Mesh,
    batch_size: int,
    function: Callable[[data.Batch], Mapping[str, Array]],
    *,
    limit: int | None = None,
    progress: Progress = iter,
) -> dict[str, np.ndarray]:
    """Applies a function to every example of a data set, batch by batch.

    The next batch is dispatched before the last one's results are fetched, so that devices do not
    wait for the host.

    Args:
      source: the data.
      mesh: devices to run on.
      batch_size: images per batch over all devices; rounded up to a multiple of them.
      function: from a global batch, split over the mesh, to per-example arrays `[B, ...]`.
      limit: only the first so many examples.
      progress: wraps the iterator of batches, as `tqdm` does.

    Returns:
      The arrays of all examples `[N, ...]`, in order, without padding, on every process.

    Raises:
      ValueError: the data set has no example.
    """
    batches = source.eval_batches(
        batch_size=parallel.round_up(batch_size, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=limit,
    )
    parts: list[dict[str, np.ndarray]] = []
    pending: dict[str, Array] | None = None
    for batch in progress(_sharded(batches, mesh)):
        results = {**function(batch), '': batch.mask}
        if pending is not None:
            parts.append(_fetch(pending))
        pending = results
    if pending is None:
        raise ValueError('The data set has no example to evaluate; use a larger split or limit.')
    parts.append(_fetch(pending))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sharded(batches: Iterable[data.Batch], mesh: Mesh) -> Iterator[data.Batch]:
    for batch in batches:
        yield parallel.shard(mesh, batch)


def _fetch(results: dict[str, Array]) -> dict[str, np.ndarray]:
    arrays = parallel.gather(results)
    mask = arrays.pop('')
    return {name: np.asarray(values)[mask] for name, values in arrays.items()}


@jax.jit
def _predict_batch(forward: Forward, variables: Variables, batch: data.Batch) -> dict[str, Array]:
    logits = forward(variables, data.to_float(batch.image))[0].astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
    return {
        'labels': batch.label,
        'predictions': predicted_classes(logits),
        'loss': loss,
        'margin': jax.vmap(label_margin)(logits, batch.label),
        'classes': jnp.full_like(batch.label, logits.shape[-1]),
    }


def predict(
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    progress: Progress = iter,
) -> Predictions:
    """Classifies every image of a data set.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      batch_size: images per batch over all devices.
      limit: only the first so many images.
      progress: wraps the iterator of batches, as `tqdm` does.

    Returns:
      Labels, predictions and losses in the order of the data set.

    Raises:
      ValueError: a label is not one of the model's classes.
    """
    function = functools.partial(_predict_batch, forward, variables)
    found = stream(source, mesh, batch_size, function, limit=limit, progress=progress)
    images.check_labels(found['labels'], int(found.pop('classes')[0]))
    return Predictions(**found)


@jax.jit
def classify(
    forward: Forward, variables: Variables, x: Float[Array, 'batch ...']
) -> Int[Array, ' batch']:
    """Classifies images.

    Args:
      forward: the model.
      variables: its variables.
      x: images `[B, ...]` in [0, 1].

    Returns:
      Classes `[B]`, -1 where logits are NaN.
    """
    return predicted_classes(forward(variables, x)[0])


def predict_images(
    forward: Forward,
    variables: Variables,
    x: Float[np.ndarray, 'examples height width channels'],
    labels: Int[np.ndarray, ' examples'],
    mesh: Mesh,
    batch_size: int,
) -> Int[np.ndarray, ' examples']:
    """Classifies images that every process holds.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      x: pixels in [0, 1] `[N, H, W, C]`.
      labels: their labels `[N]`.
      mesh: devices to run on.
      batch_size: images per batch over all devices.

    Returns:
      The predicted classes, int32 `[N]`.
    """

    def judge(x: Array, y: Array) -> Array:
        everything = jnp.ones(y.shape, bool)
        batch = data.Batch(x, y, everything, jnp.zeros_like(y))
        return _predict_batch(forward, variables, batch)['predictions']

    return parallel.in_batches(judge, (x, labels), batch_size, mesh)


class Attacked(NamedTuple):
    """What an attack did to N images.

    Attributes:
      success: misclassified after the attack (or before it), bool `[N]`.
      margin: label logit minus the largest other, after the attack, float32 `[N]`.
      predictions: classes of the attacked images, int32 `[N]`.
      x_adv: the attacked images of the first examples, float32 `[n, H, W, C]`.
      x: the clean images of the same.
      distance: for attacks that look for the smallest perturbation its norm, whatever the radius,
        float32 `[N]`; None for others.
      reached: of attacks that aim at a class, whether the image is taken for it, bool `[N]`; None
        for others.
      queries: forward passes made for the image, `[N]`; None where they were not counted.
    """

    success: np.ndarray
    margin: np.ndarray
    predictions: np.ndarray
    x_adv: Float[np.ndarray, 'n height width channels']
    x: UInt8[np.ndarray, 'n height width channels']
    distance: Float[np.ndarray, ' examples'] | None = None
    reached: Bool[np.ndarray, ' examples'] | None = None
    queries: Int[np.ndarray, ' examples'] | None = None


def attack(
    run: Callable[[Array, Array, Array], AttackResult | MinimumResult | SpatialResult],
    forward: Forward,
    variables: Variables,
    source: data.Source,
    mesh: Mesh,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    keep: int = 0,
    targeted: bool = False,
    progress: Progress = iter,
) -> Attacked:
    """Attacks every image of a data set.

    Args:
      run: from images `[B, ...]`, labels `[B]` and positions in the data set `[B]` to a
        `neurosens.attacks.AttackResult`: a jitted attack with everything else bound.
      forward: the model that judges the attacked images.
      variables: its variables, replicated over the mesh.
      source: the data.
      mesh: devices to run on.
      batch_size: images per batch over all devices.
      limit: only the first so many images.
      keep: of how many first images to return the attacked versions.
      targeted: whether the attack aims at a class, so that it succeeds where that is reached.
      progress: wraps the iterator of batches, as `tqdm` does.

    Returns:
      The results in the order of the data set.
    """
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def function(batch: data.Batch) -> dict[str, Array]:
        result = run(data.to_float(batch.image), batch.label, batch.index)
        if sum(len(x) for x, _ in kept) < keep:
            pair = parallel.gather({'x': batch.image, 'x_adv': result.x_adv})
            kept.append((pair['x'], pair['x_adv']))
        judged = _predict_batch(forward, variables, batch._replace(image=result.x_adv))
        found = {'distance': result.distance} if isinstance(result, MinimumResult) else {}
        success = result.success
        if targeted:
            # Some other class than the one aimed at is an error too.
            found['reached'], success = success, judged['predictions'] != batch.label
        return {
            **found,
            'success': success,
            'margin': result.margin,
            'predictions': judged['predictions'],
            'queries': result.queries,
        }

    arrays = stream(source, mesh, batch_size, function, limit=limit, progress=progress)
    total = min(keep, len(arrays['success']))
    shape = source.info.image_shape
    x = np.concatenate([x for x, _ in kept])[:total] if kept else np.zeros((0, *shape), np.uint8)
    x_adv = np.concatenate([a for _, a in kept])[:total] if kept else np.zeros((0, *shape), 'f4')
    return Attacked(x_adv=x_adv, x=x, **arrays)

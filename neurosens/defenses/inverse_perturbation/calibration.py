"""Directions of classes, from benign images."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import ArrayLike, Float, Int

from neurosens import _validate, parallel
from neurosens.defenses import images
from neurosens.defenses.inverse_perturbation.direction import (
    Direction,
    directions,
    normalize,
    partition,
)
from neurosens.defenses.inverse_perturbation.settings import DEFAULT, Parameters, Settings
from neurosens.forward import Forward, Variables


def calibrate(
    forward: Forward,
    variables: Variables,
    x: Float[ArrayLike, 'examples ...'],
    y: Int[ArrayLike, ' examples'],
    *,
    settings: Settings = DEFAULT,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> Parameters:
    """Finds the directions of every class on benign images.

    Images that the model misclassifies are left out.

    Args:
      forward: the model.
      variables: its variables, replicated over the mesh.
      x: benign images with pixels in [0, 1] `[M, ...]`, the same on every process.
      y: their classes `[M]`.
      settings: what directions are made of.
      batch_size: images at once over all devices.
      mesh: devices to run on; all of them by default.
      seed: of the clustering, where there are several prototypes.

    Returns:
      Directions, neurons and benign statistics of each class.

    Raises:
      LayerError: a layer cannot be tapped.
      ValueError: the images are empty, outside [0, 1] or not finite, labels do not fit, or a class
        has too few correctly classified images, or one without a finite direction.
    """
    x, y = images.check(x, y)
    _validate.check_whole('batch_size', batch_size)
    classes = images.count_classes(forward, variables, x)
    images.check_labels(y, classes)
    mesh = parallel.data_mesh() if mesh is None else mesh
    run = functools.partial(directions, forward, variables, settings=settings)
    found = parallel.in_batches(run, (x, y), batch_size, mesh)
    correct = (found.logits.argmax(-1) == y) & ~np.isnan(found.logits).any(-1)
    members = [np.flatnonzero(correct & (y == label)) for label in range(classes)]
    for label, rows in enumerate(members):
        if len(rows) < settings.prototypes:
            raise ValueError(
                f'Class {label} has {len(rows)} correctly classified calibration images, fewer '
                f'than its {settings.prototypes} directions need; calibrate with more images.'
            )
        _check_finite(found, rows, label)
    front, rear = {}, {}
    for layer in settings.layers:
        means = [found.influence[layer][rows].mean(0, dtype=np.float64) for rows in members]
        parts = [partition(jnp.asarray(mean, jnp.float32), settings) for mean in means]
        front[layer] = np.stack([part.front for part in parts])
        rear[layer] = np.stack([part.tail for part in parts])
    lifts = [
        sum(
            found.activation[layer][np.ix_(rows, front[layer][label])].sum(1, dtype=np.float64)
            - found.activation[layer][np.ix_(rows, rear[layer][label])].sum(1, dtype=np.float64)
            for layer in settings.layers
        )
        for label, rows in enumerate(members)
    ]
    centres = [_centres(found.direction[rows], settings.prototypes, seed) for rows in members]
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Parameters(
        as_float(np.stack(centres)),
        jax.tree.map(jnp.asarray, front),
        jax.tree.map(jnp.asarray, rear),
        as_float([np.mean(lift) for lift in lifts]),
        as_float([np.std(lift) for lift in lifts]),
        settings,
    )


def _check_finite(found: Direction, rows: np.ndarray, label: int) -> None:
    """Raises a ValueError where one of the images of a class would make its mean no number."""

    def spoilt(values: ArrayLike) -> np.ndarray:
        return ~np.isfinite(np.asarray(values)[rows].reshape(len(rows), -1)).all(1)

    layers = {
        name: spoilt(found.influence[name]) | spoilt(found.activation[name])
        for name in found.influence
    }
    lost = np.any([spoilt(found.direction), *layers.values()], axis=0)
    if lost.any():
        # Where all layers are finite, the gradient is lost on the way from them to the image.
        named = [name for name, each in layers.items() if each.any()] or list(layers)
        raise ValueError(
            f'Class {label} has {lost.sum()} calibration images whose activations or gradients '
            f'at {", ".join(map(repr, named))} are not finite; mend what divides by zero in the '
            'model, or name other layers.'
        )


def _centres(vectors: np.ndarray, prototypes: int, seed: int) -> np.ndarray:
    """The directions that stand for many: their mean, or the centres of clusters, of rms 1."""
    shape = vectors.shape[1:]
    flat = vectors.reshape(len(vectors), -1)
    if prototypes == 1:
        means = flat.mean(0, keepdims=True, dtype=np.float64)
    else:
        # Imported here because it takes a second, and one direction is the default.
        from sklearn.cluster import KMeans

        means = KMeans(prototypes, n_init=4, random_state=seed).fit(flat).cluster_centers_
    unit = [normalize(jnp.asarray(mean, jnp.float32)) for mean in means]
    return np.stack(unit).reshape(prototypes, *shape)

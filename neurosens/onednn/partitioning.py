"""Jitted functions of images and one other array whose partitioning keeps batches split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Local: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def split_over_images(name: str, local: Local) -> Local:
    """A function of images and a kernel whose result has one entry per image.

    Args:
      name: of the jitted function. JAX leaves what partitioned calls close over out of the keys of
        its compilation cache; names are in them.
      local: from images `[N, H, W, C]` and a kernel `[I, J, C, D]` to `[N, Y, X, D]`.

    Returns:
      `local`, on as many devices as the images are split over.
    """

    def shardings(mesh: Mesh, shapes: Any) -> tuple[NamedSharding, tuple[NamedSharding, ...]]:
        split = NamedSharding(mesh, PartitionSpec(_batch_axes(shapes), None, None, None))
        return split, (split, NamedSharding(mesh, PartitionSpec()))

    def partition(mesh: Mesh, shapes: Any, result: Any) -> tuple[Any, ...]:
        del result
        return mesh, local, *shardings(mesh, shapes)

    call = _partitioned(local)
    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, shapes, result: shardings(mesh, shapes)[0],
        sharding_rule='n h w c, i j c d -> n y x d',
        need_replication_factors=('h', 'w', 'c', 'i', 'j', 'd', 'y', 'x'),
    )
    return _named(name, call)


def summed_over_images(name: str, local: Local) -> Local:
    """A function of images and cotangents whose result is a sum over the images.

    Args:
      name: as of `split_over_images`.
      local: from images `[N, H, W, C]` and cotangents `[N, Y, X, D]` to `[I, J, C, D]`, or of other
        arrays of four axes to one whose third is C; no axis but the first is split.

    Returns:
      `local`, on as many devices as the images are split over, and the sum on all of them.
    """

    def partition(mesh: Mesh, shapes: Any, result: Any) -> tuple[Any, ...]:
        del result
        axes = _batch_axes(shapes)
        split = NamedSharding(mesh, PartitionSpec(axes, None, None, None))

        def summed(images: jax.Array, cotangents: jax.Array) -> jax.Array:
            own = local(images, cotangents)
            return own if axes is None else lax.psum(own, axes)

        return mesh, summed, NamedSharding(mesh, PartitionSpec()), (split, split)

    call = _partitioned(local)
    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, shapes, result: NamedSharding(
            mesh, PartitionSpec()
        ),
        sharding_rule='n h w c, n y x d -> i j c d',
        reduction_factors=('n',),
        need_replication_factors=('h', 'w', 'c', 'y', 'x', 'd', 'i', 'j'),
    )
    return _named(name, call)


def _batch_axes(shapes: Any) -> Any:
    """The axes of the mesh that the images are split over."""
    spec = shapes[0].sharding.spec
    return spec[0] if spec else None


def _partitioned(local: Local) -> Any:
    # Of plain arguments, which is all that it accepts.
    return custom_partitioning(lambda images, other: local(images, other))


def _named(name: str, call: Any) -> Local:
    def named(images: jax.Array, other: jax.Array) -> jax.Array:
        return call(images, other)

    named.__name__ = name
    return jax.jit(named)

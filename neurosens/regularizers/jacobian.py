"""Jacobian regularization: small derivatives of the logits with respect to the input.

Hoffman, Roberts & Yaida 2019 (https://arxiv.org/abs/1908.02729) and Jakubovitz & Giryes 2018
(https://arxiv.org/abs/1803.08680). J(x) = d logits / d x, with x as the model is given it: a model
that normalises inside has J per unit of pixels in [0, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neurosens import _validate
from neurosens.forward import Forward, Variables
from neurosens.regularizers import passes
from neurosens.regularizers.regularizer import Regularizer, keys_of, single

PROBES = ('output', 'input')
# Stands for all classes in place of random directions.
EXACT = -1


def squared_jacobian_norm(
    forward: Forward,
    variables: Variables,
    x: Float[Array, 'batch ...'],
    key: PRNGKeyArray,
    *,
    projections: int = 1,
    probe: str = 'output',
) -> Float[Array, ' batch']:
    """||J(x)||_F^2 of every image, exactly or by an unbiased estimate.

    Args:
      forward: the model.
      variables: its variables.
      x: images `[B, ...]`.
      key: randomness of the directions.
      projections: random directions per image; -1 sums over all classes, which is exact, and has
        no probe but `'output'`.
      probe: `'output'`, C ||J^T v||^2 for v uniform on the unit sphere of the C logits (reverse
        mode, Hoffman et al.), or `'input'`, ||J u||^2 for signs u (forward mode, ours).

    Returns:
      The norms, or means of the estimates, `[B]`.

    Raises:
      ValueError: the number of directions is 0 or below -1, the probe is unknown, or `'input'` is
        to be exact.
    """
    _check(projections, probe)

    def read(logits: Array, tapped: Mapping[str, Array]) -> Array:
        del tapped
        return single(logits)

    def squares(values: Array) -> Array:
        """Sums over directions and entries of `[directions, B, ...]`."""
        return (single(values) ** 2).sum((0, *range(2, values.ndim)))

    keys = keys_of(key, x)
    if probe == 'input':

        def signs(key: PRNGKeyArray, x: Array) -> Array:
            draw = functools.partial(jax.random.rademacher, shape=x.shape, dtype=x.dtype)
            return jax.vmap(draw)(jax.random.split(key, projections))

        _, push = passes.linearize(forward, variables, x, read)
        directions = jax.vmap(signs, out_axes=1)(keys, x)
        return squares(passes.each(push, directions)) / projections
    logits, pull = passes.vjp(forward, variables, x, read)
    classes = logits.shape[-1]
    if projections == EXACT:
        basis = jnp.eye(classes, dtype=logits.dtype)[:, None]
        directions = jnp.broadcast_to(basis, (classes, *logits.shape))
        scale = 1.0
    else:
        directions = jax.vmap(
            lambda key: jax.random.normal(key, (projections, classes), logits.dtype), out_axes=1
        )(keys)
        directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
        if classes == 1:
            # The only directions are 1 and -1: no randomness is left.
            directions = jnp.ones_like(directions)
        scale = classes / projections
    return scale * squares(passes.each(pull, directions))


def jacobian(*, projections: int = 1, probe: str = 'output') -> Regularizer:
    """Half the mean over images of ||J(x)||_F^2 (Hoffman et al. 2019, equation 4).

    Args:
      projections: random directions per image, independent of each other; -1 for the exact norm.
        Of `'output'` fewer than the square root of the number of classes make sense.
      probe: `'output'` or `'input'`, see `squared_jacobian_norm`.

    Returns:
      The regularizer; it logs `norm`, the root of the mean of ||J||_F^2.

    Raises:
      ValueError: as for `squared_jacobian_norm`.
    """
    _check(projections, probe)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del y

        mean = squared_jacobian_norm(
            forward, variables, x, key, projections=projections, probe=probe
        ).mean()
        return mean / 2, {'norm': jnp.sqrt(jax.lax.stop_gradient(mean))}

    return regularizer


def jacobian_root(
    *, projections: int = EXACT, probe: str = 'output', first_sample_only: bool = False
) -> Regularizer:
    """The root of the sum of ||J(x)||_F^2 over a batch (Jakubovitz & Giryes 2018).

    A single root over the whole batch, not divided by its size: the weight that suits it depends on
    the size. The authors add it in a short phase after training has converged.

    Args:
      projections: random directions per image; -1, the default, for the exact norms. A root of an
        estimate is biased.
      probe: `'output'`, or `'input'` with a number of projections, see `squared_jacobian_norm`.
      first_sample_only: take only the first image of the batch, as the released program does.

    Returns:
      The regularizer; it logs nothing besides.

    Raises:
      ValueError: as for `jacobian`.
    """
    _check(projections, probe)
    _validate.check_flag('first_sample_only', first_sample_only)

    def regularizer(
        forward: Forward, variables: Variables, x: Array, y: Array, key: PRNGKeyArray
    ) -> tuple[Array, Mapping[str, Array]]:
        del y

        chosen = x[:1] if first_sample_only else x
        total = squared_jacobian_norm(
            forward, variables, chosen, key, projections=projections, probe=probe
        ).sum()
        # The root has no derivative at 0, where nothing is left to reduce.
        positive = total > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0), {}

    return regularizer


def _check(projections: int, probe: str) -> None:
    if projections != EXACT:
        _validate.check_whole('projections', projections)
    _validate.check_choice('probe', probe, PROBES)
    if probe == 'input' and projections == EXACT:
        raise ValueError(
            f"probe is 'input', but projections {EXACT} sums over all classes, without directions "
            'of the input; give projections of at least 1, or leave the probe out.'
        )

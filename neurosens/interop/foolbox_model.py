"""Models for the attacks of foolbox."""

from __future__ import annotations

import functools
from typing import Any

import jax

from neurosens.forward import Forward, Variables


def foolbox_model(
    forward: Forward, variables: Variables, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> Any:
    """A model that foolbox's attacks take.

        model = foolbox_model(forward, variables)
        _, adversarial, success = foolbox.attacks.LinfPGD()(model, x, y, epsilons=8 / 255)

    Args:
      forward: the classifier, defended or not.
      variables: its variables.
      bounds: smallest and largest pixel.

    Returns:
      A `foolbox.models.JAXModel` with channels last; images and labels are JAX arrays
      `[B, H, W, C]` and `[B]`. Where an attack of foolbox asks for a device, it is that of JAX.

    Raises:
      ImportError: foolbox is not installed.
    """
    try:
        from foolbox.models import JAXModel
    except ImportError:
        raise ImportError(
            'A model for foolbox needs foolbox, which is not installed: pip install foolbox.'
        ) from None
    return JAXModel(
        jax.jit(functools.partial(_logits, forward, variables)), bounds, data_format='channels_last'
    )


def _logits(forward: Forward, variables: Variables, x: jax.Array) -> jax.Array:
    return forward(variables, x)[0]

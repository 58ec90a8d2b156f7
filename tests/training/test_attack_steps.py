"""Attacks of adversarial objectives, step by step, on a linear model whose gradients are known."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from neurosens.attacks import Threat
from neurosens.training import adversarial, inner, multi_norm

KEY = jax.random.key(3)


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name='head')(x.reshape(len(x), -1))


def flat(images):
    return np.asarray(images, np.float64).reshape(len(images), -1)


def shares(x, kernel, bias):
    exponentials = np.exp(flat(x) @ np.float64(kernel) + bias)
    return exponentials / exponentials.sum(1, keepdims=True)


def moved(norm, clean, current, slope, eps, size):
    """One steepest step, and back into the ball."""
    if norm == 'linf':
        return clean + np.clip(current + size * np.sign(slope) - clean, -eps, eps)
    change = current + size * slope / np.linalg.norm(slope, axis=1, keepdims=True) - clean
    return clean + change * np.minimum(1, eps / np.linalg.norm(change, axis=1, keepdims=True))


def climbed(norm, x, first, slope, *, eps, size, steps):
    """Projected steepest ascent; `slope` gives the gradients of a batch."""
    current = flat(first)
    for _ in range(steps):
        current = moved(norm, flat(x), current, slope(current), eps, size)
    return current


def found(objective, x, y, kernel, bias):
    """Its loss, and the images that it is of."""
    variables = {'params': {'head': {'kernel': kernel, 'bias': bias}}}
    loss, outcome = jax.jit(functools.partial(objective, Linear()))(variables, x, y, KEY)
    attacked = flat(outcome.attacked)
    np.testing.assert_allclose(outcome.logits, attacked @ kernel + bias, atol=1e-5)
    return float(loss), attacked


# -------------------------------------------------------------------------------- one norm


EPS = 0.2
# Far enough from 0 and 1 that no step ends there.
X = np.random.default_rng(0).uniform(0.4, 0.6, (4, 2, 3, 1)).astype(np.float32)
Y = np.array([0, 1, 2, 0])
KERNEL = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
BIAS = np.array([0.3, -0.2, 0.1], np.float32)
# Cross-entropy leads the shares of the classes away from the labels, a divergence from the clean
# images' shares.
LABELS, CLEAN = np.eye(3)[Y], shares(X, KERNEL, BIAS)

PGD = functools.partial(adversarial.pgd, eps=EPS)
FGSM_RS = functools.partial(adversarial.fgsm_rs, eps=EPS)
TRADES = functools.partial(adversarial.trades, eps=EPS)
MART = functools.partial(adversarial.mart, eps=EPS)
# Objective, norm, where the attack starts, what it leads away from, steps and their share of eps.
STEPS = {
    'pgd': (PGD(norm='l2', steps=2), 'l2', 'random', LABELS, 2, 1.25),
    'pgd, 5 steps': (PGD(norm='l2', steps=5, clean_share=0.5), 'l2', 'random', LABELS, 5, 0.5),
    'pgd, a given length': (PGD(steps=2, step_size=0.3), 'linf', 'random', LABELS, 2, 0.3),
    'pgd, from the clean image': (
        PGD(norm='l2', steps=1, step_size=0.6, random_start=False), 'l2', 'clean', LABELS, 1, 0.6
    ),
    'fgsm_rs': (FGSM_RS(), 'linf', 'random', LABELS, 1, 1.25),
    'fgsm_rs, l2': (FGSM_RS(norm='l2'), 'l2', 'random', LABELS, 1, 1.25),
    'trades': (TRADES(norm='l2', steps=1), 'l2', 'near', CLEAN, 1, 2.5),
    'trades, a given length': (
        TRADES(norm='l2', steps=2, step_size=0.8), 'l2', 'near', CLEAN, 2, 0.8
    ),
    'mart': (MART(norm='l2', steps=1), 'l2', 'near', LABELS, 1, 2.5),
    'mart, a given length': (
        MART(norm='l2', steps=2, step_size=0.3), 'l2', 'near', LABELS, 2, 0.3
    ),
}  # fmt: skip


def start_of(kind, norm):
    """Where an attack starts: at a random image of the ball, next to the clean image, or there."""
    key = jax.random.split(KEY, 4)[0]
    if kind == 'random':
        return inner.start(Threat(norm, EPS), X, key)
    return X + 1e-3 * jax.random.normal(key, X.shape) if kind == 'near' else X


@pytest.mark.parametrize('name', STEPS)
def test_attacked_images_are_those_of_steps_by_hand(name):
    objective, norm, kind, target, steps, length = STEPS[name]
    expected = climbed(
        norm,
        X,
        start_of(kind, norm),
        lambda x: (shares(x, KERNEL, BIAS) - target) @ KERNEL.T,
        eps=EPS,
        size=length * EPS,
        steps=steps,
    )
    # Next to the clean image the gradient of a divergence is a difference of nearly equal shares.
    atol = 5e-3 * EPS if target is CLEAN else 1e-5
    attacked = found(objective, X, Y, KERNEL, BIAS)[1]
    np.testing.assert_allclose(attacked, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------------- several norms


# All pixels change the first class's logit, one the second's: that class's image suffers most in
# l2, the other in linf.
PAIR, OWN = np.full((2, 2, 3, 1), 0.5, np.float32), np.array([0, 1])
PAIR_KERNEL = np.stack([np.ones(6), 6 * np.eye(6)[0], np.zeros(6)], axis=1).astype(np.float32)
# The classes have equal shares of these images.
PAIR_BIAS = np.array([-3.0, -3.0, 0.0], np.float32)
RADII = {'linf': 0.1, 'l2': 0.18}


def pair_losses(x):
    return -np.log(shares(x, PAIR_KERNEL, PAIR_BIAS)[[0, 1], OWN])


def pair_slope(x):
    return (shares(x, PAIR_KERNEL, PAIR_BIAS) - np.eye(3)[OWN]) @ PAIR_KERNEL.T


def worst(tried):
    """Of each image the change of largest loss, which is the first of one and not of the other."""
    chosen = np.argmax([pair_losses(images) for images in tried], axis=0)
    assert chosen.tolist() == [0, 1]
    return np.stack([tried[number][image] for image, number in enumerate(chosen)])


@pytest.mark.parametrize('strategy', multi_norm.STRATEGIES)
def test_each_image_is_attacked_in_the_norm_that_is_worst_for_it(strategy):
    steps = 3
    threats = [(norm, eps, 2.5 * eps / steps) for norm, eps in RADII.items()]
    keys = jax.random.split(jax.random.split(KEY, 3)[0], len(threats))
    if strategy == 'msd':
        clean = expected = flat(PAIR)
        for _ in range(steps):
            slope = pair_slope(expected)
            tried = [moved(norm, clean, expected, slope, eps, size) for norm, eps, size in threats]
            expected = worst(tried)
        losses = pair_losses(expected)
    else:
        tried = []
        for (norm, eps, size), key in zip(threats, keys):
            first = inner.start(Threat(norm, eps), PAIR, key)
            tried.append(climbed(norm, PAIR, first, pair_slope, eps=eps, size=size, steps=steps))
        expected = worst(tried) if strategy == 'max' else tried[-1]
        losses = pair_losses(expected) if strategy == 'max' else list(map(pair_losses, tried))
    objective = multi_norm.multi_norm(
        norms=tuple(RADII), eps=tuple(RADII.values()), steps=steps, strategy=strategy
    )
    loss, attacked = found(objective, PAIR, OWN, PAIR_KERNEL, PAIR_BIAS)
    np.testing.assert_allclose(attacked, expected, rtol=0, atol=1e-5)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)

"""Objectives: the standard one against a computation by hand, and the registry's messages."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import config
from neurosens.training import OBJECTIVES, objectives, run_training_mode, standard


class Net(nn.Module):
    """A linear classifier with running statistics and dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name='norm')(x)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(3, name='head')(x)


X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 1], np.int32)
VARIABLES = Net().init(jax.random.key(0), X)


def logits_by_hand():
    head = jax.tree.map(np.float64, VARIABLES['params']['head'])
    normalised = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    return normalised @ head['kernel'] + head['bias']


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
def test_the_standard_loss_is_the_mean_cross_entropy_with_smoothed_labels(smoothing):
    loss, outcome = standard(label_smoothing=smoothing)(Net(), VARIABLES, X, Y, jax.random.key(1))
    logits = logits_by_hand()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.eye(3)[Y] * (1 - smoothing) + smoothing / 3
    assert float(loss) == pytest.approx(-(targets * np.log(probabilities)).sum(1).mean(), rel=1e-5)
    np.testing.assert_allclose(outcome.logits, logits, rtol=1e-4, atol=1e-5)
    assert outcome.metrics == {}


def test_labels_are_not_smoothed_by_default():
    losses = [
        make(Net(), VARIABLES, X, Y, jax.random.key(1))[0]
        for make in (standard(), standard(label_smoothing=0.0))
    ]
    assert losses[0] == losses[1]


def test_an_objective_returns_the_new_running_statistics():
    _, outcome = standard()(Net(), VARIABLES, X, Y, jax.random.key(1))
    assert set(outcome.updates) == {'batch_stats'}
    statistics = outcome.updates['batch_stats']['norm']
    np.testing.assert_allclose(statistics['mean'], 0.5 * X.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics['var'], 0.5 + 0.5 * X.var(0), rtol=1e-4)


def test_dropout_follows_the_key():
    def run(seed):
        return run_training_mode(Net(rate=0.5), VARIABLES, X, jax.random.key(seed))[0]

    assert jnp.array_equal(run(0), run(0))
    assert not jnp.array_equal(run(0), run(1))


def test_a_model_without_running_statistics_has_no_updates():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(x)

    variables = Plain().init(jax.random.key(0), X)
    _, updates = run_training_mode(Plain(), variables, X, jax.random.key(0))
    assert updates == {}


@pytest.mark.parametrize('smoothing', [-0.1, 1.0, 1.5, float('nan')])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=f'^label_smoothing is {smoothing}; it must be'):
        standard(label_smoothing=smoothing)


# ------------------------------------------------------------------------------ registry


def strict(*, strength, power=2):
    return strength, power


REGISTRY = {'strict': strict, 'standard': standard}


def test_a_registered_factory_gets_its_options():
    assert objectives.create('objective', 'strict', {'strength': 3}, REGISTRY) == (3, 2)
    assert objectives.create('objective', 'strict', {'strength': 3, 'power': 1}, REGISTRY) == (3, 1)


def test_the_standard_objective_is_registered():
    made = objectives.create('objective', 'standard', {'label_smoothing': 0.1}, OBJECTIVES)
    expected = standard(label_smoothing=0.1)
    arguments = (Net(), VARIABLES, X, Y, jax.random.key(1))
    assert made(*arguments)[0] == expected(*arguments)[0]


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('standart', {}, ["Unknown objective 'standart'", 'standard', 'strict']),
        ('strict', {'strenght': 1}, ["option 'strenght'", 'strict', 'strength, power']),
        ('strict', {'power': 1}, ["The objective 'strict' needs the option 'strength'"]),
        ('standard', {'label_smoothing': 2.0}, ['label_smoothing is 2.0', 'less than 1']),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_with_the_remedy(name, options, words):
    with pytest.raises(ValueError, match=r'^.+\.$') as error:
        objectives.create('objective', name, options, REGISTRY)
    assert all(word in str(error.value) for word in words)
    assert '\n' not in str(error.value)


def test_the_kind_is_named_in_messages():
    with pytest.raises(ValueError, match=r"^Unknown regularizer 'l1'"):
        objectives.create('regularizer', 'l1', {}, {})


# ------------------------------------------------------------------------- attacked images


def test_of_several_norms_regularizers_see_the_images_of_the_last_alone():
    """With 'average', as the guide and the settings say."""
    radii = {'linf': 0.1, 'l2': 0.5}
    for norms in (('linf', 'l2'), ('l2', 'linf')):
        eps = tuple(radii[norm] for norm in norms)
        objective = OBJECTIVES['multi_norm'](norms=norms, eps=eps, steps=3, strategy='average')
        x = np.full((6, 4), 0.5, np.float32)
        outcome = objective(Net(), VARIABLES, x, Y, jax.random.key(1))[1]
        moved = np.abs(outcome.attacked - x)
        largest = moved.max(1) if norms[-1] == 'linf' else np.sqrt((moved**2).sum(1))
        assert (largest <= eps[-1] * (1 + 1e-5)).all() and largest.max() > 0.5 * eps[-1]
        assert (moved.max() > 0.11) == (norms[-1] == 'l2')
    guide = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'training.md'
    text = ' '.join(guide.read_text(encoding='utf-8').split())
    assert 'with the `average` of `multi_norm` those of the last of its norms alone' in text
    settings = ' '.join(config.Config.__doc__.split())
    assert "with the strategy 'average' those of the last norm alone" in settings

"""Evaluation visits every example once, in order, whatever the batches and devices."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import attacks, config, data, evaluation, models, parallel
from neurosens.evaluation import accuracy
from neurosens.forward import LinenForward, with_input_transform

COUNT = 53  # Divides by no batch size below.


@pytest.fixture(scope='module')
def source():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (COUNT, 8, 8, 1), np.uint8)
    labels = generator.integers(0, 10, COUNT).astype(np.int32)
    return data.ArrayDataset(images, labels, data.info('digits'))


@pytest.fixture(scope='module')
def model():
    module = models.create('mlp', num_classes=10, hidden=(8,))
    return LinenForward(module), module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))


def predict(model, source, devices, batch_size, **options):
    mesh = parallel.data_mesh(devices)
    forward, variables = model
    variables = parallel.replicate(mesh, variables)
    return accuracy.predict(forward, variables, source, mesh, batch_size=batch_size, **options)


@pytest.mark.parametrize(('devices', 'batch_size'), [(1, 53), (1, 10), (8, 16), (8, 11), (3, 100)])
def test_predictions_are_those_of_one_plain_pass(model, source, devices, batch_size):
    result = predict(model, source, devices, batch_size)
    forward, variables = model
    logits = np.asarray(forward(variables, data.to_float(source.images))[0], np.float64)
    assert np.array_equal(result.labels, source.labels)
    assert np.array_equal(result.predictions, logits.argmax(-1))
    shifted = logits - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(COUNT), source.labels]
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)
    assert result.accuracy == np.mean(logits.argmax(-1) == source.labels)


def test_limit_takes_the_first_examples(model, source):
    whole, part = predict(model, source, 8, 16), predict(model, source, 8, 16, limit=21)
    assert np.array_equal(part.predictions, whole.predictions[:21])


def test_progress_wraps_the_batches(model, source):
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(int(batch.mask.sum()))
            yield batch

    predict(model, source, 8, 16, progress=progress)
    assert seen == [16, 16, 16, 5]


def test_attacks_give_the_same_images_for_any_batches_and_devices(model, source):
    forward, variables = model
    results = []
    for devices, batch_size in ((1, 53), (8, 16), (8, 56)):
        mesh = parallel.data_mesh(devices)
        run = functools.partial(_pgd, forward, parallel.replicate(mesh, variables))
        results.append(
            accuracy.attack(
                run,
                forward,
                parallel.replicate(mesh, variables),
                source,
                mesh,
                batch_size=batch_size,
                keep=20,
            )
        )
    for result in results[1:]:
        assert np.array_equal(result.success, results[0].success)
        assert np.array_equal(result.predictions, results[0].predictions)
        np.testing.assert_allclose(result.x_adv, results[0].x_adv, atol=1e-6)
    first = results[0]
    assert first.x_adv.shape == (20, 8, 8, 1)
    assert np.array_equal(first.x, source.images[:20])
    assert np.abs(first.x_adv - first.x / 255).max() <= 0.1 + 1e-6
    # Misclassified after the attack means exactly that the judge disagrees with the label.
    assert np.array_equal(first.success, first.predictions != source.labels)


def _pgd(forward, variables, x, y, index):
    threat = attacks.Threat('linf', 0.1)
    key = jax.random.key(3)
    return attacks.pgd(forward, variables, x, y, key, threat=threat, steps=4, index=index)


class Undefined(nn.Module):
    """Logits that are not numbers for dark images, and show the last class for others."""

    @nn.compact
    def __call__(self, x):
        bright = x.reshape(len(x), -1).mean(-1, keepdims=True) - 0.45
        logits = jnp.sqrt(bright) * nn.Dense(10, name='head')(x.reshape(len(x), -1))
        return logits.at[:, 9].add(100.0)


def test_logits_that_are_not_numbers_are_no_class_under_any_attack(source, tmp_path):
    dark = np.arange(COUNT) % 4 == 1
    images = np.where(dark[:, None, None, None], source.images // 2, source.images // 2 + 120)
    labels = np.where(np.arange(COUNT) % 2, 9, 0).astype(np.int32)
    source = data.ArrayDataset(np.uint8(images), labels, data.info('digits'))
    module = Undefined()
    variables = module.init(jax.random.key(0), np.ones((1, 8, 8, 1), np.float32))
    forward, mesh = LinenForward(module), parallel.data_mesh()
    variables = parallel.replicate(mesh, variables)
    settings = config.Evaluation(
        batch_size=16,
        attacks=('fgsm', 'fab', 'autoattack'),
        examples=6,
        eps=(0.01,),
        queries=2,
        auto_steps=2,
        masking_images=40,
        steps=2,
    )
    report = evaluation.evaluate(forward, variables, source, mesh, settings, jax.random.key(0))
    undefined = np.isnan(np.asarray(forward(variables, data.to_float(source.images))[0])).any(-1)
    assert 5 < undefined.sum() < COUNT - 5
    # argmax takes NaN for the largest: these would be of the first class, as half the labels are.
    np.testing.assert_array_equal(report.predictions.predictions == -1, undefined)
    np.testing.assert_array_equal(report.predictions.correct, ~undefined & (labels == 9))
    for outcome in report.outcomes:
        assert outcome.attacked.success[undefined].all()
    (diagnosis,) = report.diagnoses
    (check,) = (check for check in diagnosis.checks if check.name == 'gradients')
    assert check.figures['correct'] == (~undefined & (labels == 9))[:40].sum()
    (check,) = (check for check in diagnosis.checks if check.name == 'randomness')
    assert check.passed and check.figures['largest_change'] == 0
    assert evaluation.results(report, {})['clean_loss'] is None
    # What needs no perturbation has none.
    (fab,) = (outcome for outcome in report.outcomes if outcome.attack == 'fab')
    np.testing.assert_array_equal(fab.attacked.distance[~report.predictions.correct], 0)
    evaluation.table(report)
    evaluation.write(report, tmp_path, {})
    page = (tmp_path / 'index.html').read_text(encoding='utf-8')
    assert '>–<' in page


def test_gradients_of_a_random_model_are_averaged_over_draws(source):
    module = models.create('mlp', num_classes=10, hidden=(8,))
    variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))

    def draw(key):
        def noisy(x):
            return x + 0.3 * jax.random.normal(key, x.shape)

        return with_input_transform(LinenForward(module), noisy)

    forward = attacks.random_forward(draw, jax.random.key(1))
    mesh, key = parallel.data_mesh(1), jax.random.key(0)
    settings = config.Evaluation(
        attacks=('pgd',), eps=(0.1,), steps=2, batch_size=COUNT, masking_images=12, queries=1,
        draws=4,
    )  # fmt: skip
    found = evaluation.evaluate(forward, variables, source, mesh, settings, key)
    x, threat = data.to_float(source.images), attacks.Threat('linf', 0.1)
    options = {'threat': threat, 'steps': 2, 'draws': 4}
    expected = attacks.pgd(forward, variables, x, source.labels, key, **options)
    attacked = found.outcomes[0].attacked
    np.testing.assert_allclose(attacked.x_adv, expected.x_adv[: len(attacked.x_adv)], atol=1e-6)
    (diagnosis,) = found.diagnoses
    (check,) = [check for check in diagnosis.checks if check.name == 'randomness']
    assert check.passed and check.figures['draws'] == 4


def test_every_radius_is_diagnosed_and_attacks_too_weak_for_it_are_found(model, source):
    forward, variables = model
    mesh = parallel.data_mesh(1)
    variables = parallel.replicate(mesh, variables)
    right = np.asarray(forward(variables, data.to_float(source.images))[0]).argmax(-1)
    source = data.ArrayDataset(source.images, right.astype(np.int32), source.info)
    settings = config.Evaluation(
        attacks=('pgd',), eps=(0.2, 0.05), steps=5, batch_size=COUNT, queries=20, masking_images=50
    )

    def checks(**changes):
        changed = dataclasses.replace(settings, **changes)
        report = evaluation.evaluate(forward, variables, source, mesh, changed, jax.random.key(0))
        assert [outcome.eps for outcome in report.outcomes] == [0.05, 0.2]
        return report, [{check.name: check for check in d.checks} for d in report.diagnoses]

    report, found = checks()
    assert [diagnosis.eps for diagnosis in report.diagnoses] == [0.05, 0.2]
    for each, outcome in zip(found, report.outcomes):
        assert each['reported'].figures['reported'] == outcome.attacked.success[:50].sum()
    weak, (small, _) = checks(step_size=1e-4)
    assert small['reported'].passed is False
    left = small['reported'].figures['only_diagnosis']
    fooled = weak.outcomes[0].attacked.success[:50].sum()
    assert left + fooled == small['reported'].figures['diagnosis'] > fooled + 3
    # The diagnosis itself takes steps that reach the edge, and sees nothing wrong.
    assert small['single_step'].figures == found[0]['single_step'].figures
    # What misses its aim may have left the class all the same.
    _, aimed = checks(target='least_likely')
    assert [each['reported'].passed for each in aimed] == [None, None]
    assert 'aim at a class' in aimed[0]['reported'].message


def test_a_label_that_is_no_class_is_named(model, source):
    labels = source.labels.copy()
    labels[17] = 10
    with pytest.raises(ValueError, match='Label 10 is not one of the 10 classes of the model'):
        predict(model, data.ArrayDataset(source.images, labels, source.info), 8, 16)

"""Each sign of gradient masking is found in a model built to show it, and none in an honest one.

All models but the random ones are one linear classifier behind one transform, whose tables make its
gradients lie: they differ in arrays alone, and share compiled programs.
"""

import csv
import dataclasses
import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import evaluation, parallel
from neurosens.attacks import Threat, pgd, random_forward
from neurosens.defenses import inverse_perturbation
from neurosens.evaluation import masking, masking_checks
from neurosens.evaluation.masking_checks import slack
from neurosens.evaluation.masking_models import (
    EDITS,
    TRANSFORMS,
    float64_forward,
    straight_forward,
)
from neurosens.forward import LinenForward, with_edits, with_input_transform

IMAGES, SIDE, CLASSES, BINS = 40, 6, 4, 10
EPS = 0.1
KEY = jax.random.key(0)


class Linear(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, dtype=self.dtype, name='head')(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def problem():
    """Images of three shades, between a template of their class and one of another."""
    generator = np.random.default_rng(0)
    templates = generator.choice([0.25, 0.5, 0.75], (CLASSES, SIDE * SIDE))
    y = np.arange(IMAGES) % CLASSES
    other = (y + generator.integers(1, CLASSES, IMAGES)) % CLASSES
    share = np.linspace(0.2, 0.45, IMAGES)[:, None]
    swapped = generator.random((IMAGES, SIDE * SIDE)) < share
    x = np.where(swapped, templates[other], templates[y])
    return x.reshape(IMAGES, SIDE, SIDE, 1).astype(np.float32), y.astype(np.int32), templates


def classifier(templates, scale=10.0):
    """Variables of the nearest template: logits scale (x t - |t|^2 / 2)."""
    kernel, bias = scale * templates.T, -scale * (templates**2).sum(1) / 2
    return {'params': {'head': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}}


def distort(slopes, values, x):
    """Changes and differentiates each pixel by its distance d from the shade that it had.

    The pixel becomes shade + values d, with slopes as derivative; both by the size of d.
    """
    shade = jnp.round(4 * x) / 4
    d = x - shade
    place = jnp.minimum(jnp.abs(d) * (8 * BINS), BINS - 1).astype(jnp.int32)
    value = jax.lax.stop_gradient(shade + values[place] * d)
    return value + jax.lax.stop_gradient(slopes[place]) * (x - jax.lax.stop_gradient(x))


def model(slopes=1.0, values=1.0):
    def tables(of):
        return jnp.broadcast_to(jnp.asarray(of, jnp.float32), (BINS,))

    partial = jax.tree_util.Partial(distort, tables(slopes), tables(values))
    return with_input_transform(LinenForward(Linear()), partial)


@pytest.fixture(scope='module')
def diagnose(problem):
    x, y, templates = problem

    def run(forward, *, scale=10.0, eps=EPS, norm='linf', images=IMAGES, **options):
        options = {'queries': 200, 'steps': 10, **options}
        threat = Threat(norm, eps)
        variables = classifier(templates, scale)
        return evaluation.diagnose(
            forward, variables, x[:images], y[:images], KEY, threat=threat, **options
        )

    return run


@pytest.fixture(scope='module')
def honest(diagnose, problem):
    x, y, templates = problem
    surrogate = model(), classifier(templates)
    found = pgd(model(), surrogate[1], x, y, KEY, threat=Threat('linf', EPS), steps=10)
    return diagnose(model(), surrogate=surrogate, reported=found.success)


def warnings(diagnosis):
    print(evaluation.masking_table(diagnosis))
    return {check.name for check in diagnosis.checks if check.passed is False}


def figures(diagnosis, name):
    (check,) = (check for check in diagnosis.checks if check.name == name)
    return check.figures


def skipped(checks):
    return {check.name: check.message for check in checks if check.passed is None}


def test_an_honest_model_passes_every_check(honest):
    assert all(check.passed for check in honest.checks), evaluation.masking_table(honest)
    assert honest.passed and len(honest.checks) == 14
    # And the attacks had something to show.
    assert 10 < figures(honest, 'single_step')['pgd'] < 35


def test_saturated_logits_hide_gradients_from_cross_entropy(diagnose):
    found = diagnose(model(), scale=400.0)
    assert warnings(found) >= {'gradients', 'losses', 'chance'}
    assert figures(found, 'gradients')['zero'] > 10
    # The margin does not saturate, so that gradients still beat random search.
    assert not warnings(found) & {'black_box', 'straight_through', 'randomness'}


def test_gradients_that_float32_rounds_off_are_found_in_float64(diagnose):
    found = diagnose(model(), scale=40.0)
    assert 'precision' in warnings(found)
    assert figures(found, 'precision')['images'] == IMAGES


def test_dead_gradients_are_found_by_all_that_needs_none(diagnose, problem):
    found = diagnose(model(slopes=0), surrogate=(model(), classifier(problem[2])))
    assert warnings(found) >= {'gradients', 'black_box', 'transfer', 'straight_through', 'chance'}
    gradients = figures(found, 'gradients')
    assert gradients['zero'] == gradients['tiny'] == gradients['correct'] > 20
    assert figures(found, 'straight_through')['transforms'] == 1
    assert not warnings(found) & {'losses', 'precision', 'randomness'}


def test_quantised_inputs_hide_gradients(diagnose):
    found = diagnose(model(slopes=0, values=0), eps=0.2)
    assert warnings(found) >= {'gradients', 'black_box', 'straight_through', 'chance'}


def root_of_nothing(x):
    return x + 0 * jnp.sqrt(x - x)


def test_gradients_that_are_no_numbers_are_no_gradients(diagnose):
    found = diagnose(with_input_transform(LinenForward(Linear()), root_of_nothing))
    gradients = figures(found, 'gradients')
    assert 'gradients' in warnings(found)
    assert gradients['not_finite'] == gradients['correct'] > 20


def nearest_level(x):
    """Each pixel as the level that an argmax over a one-hot code of sixteen picks."""
    levels = jnp.linspace(0.0, 1.0, 17)
    return levels[jnp.argmax(-jnp.abs(x[..., None] - levels), -1)]


def test_an_argmax_before_the_model_hides_all_gradients(diagnose):
    found = diagnose(with_input_transform(LinenForward(Linear()), nearest_level))
    assert warnings(found) >= {'gradients', 'black_box', 'straight_through', 'chance'}
    gradients = figures(found, 'gradients')
    assert gradients['zero'] == gradients['correct'] > 20


def test_gradients_on_a_few_pixels_at_a_time_call_for_more_restarts(diagnose):
    # Only pixels that the random start has left near where they were have one.
    found = diagnose(model(slopes=[1.0] * 2 + [0.0] * 8))
    assert 'converged' in warnings(found)
    gained = figures(found, 'converged')
    assert max(gained['gained_by_steps'], gained['gained_by_restarts']) > slack(IMAGES)


def test_noise_that_does_as_much_as_the_attack_is_found(diagnose):
    found = diagnose(model(slopes=0, values=8.0))
    assert 'noise' in warnings(found)
    assert figures(found, 'noise')['noise'] > 5


def test_gradients_on_the_images_alone_mislead_many_steps(diagnose):
    found = diagnose(model(slopes=[1.0] + [0.0] * (BINS - 1)))
    assert warnings(found) >= {'single_step', 'straight_through'}
    assert 'gradients' not in warnings(found)


def test_accuracy_that_rises_with_the_radius_is_found(diagnose):
    near = [1.0] * 5 + [0.0] * 5
    assert warnings(diagnose(model(slopes=near, values=near))) >= {'monotone', 'chance'}


def test_small_steps_that_are_trapped_are_found(diagnose):
    # Only pixels near the edge of the ball count, and before it stands a gradient that turns back.
    far = model(slopes=[1.0] * 5 + [-1.0] * 2 + [1.0] * 3, values=[0.0] * 7 + [1.0] * 3)
    found = diagnose(far, steps=2, eps=0.12)
    assert 'effort' in warnings(found)
    assert figures(found, 'effort')['lost_by_steps'] > slack(IMAGES)


def noisy(x, key):
    return x + 0.3 * jax.random.normal(key, x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyForward:
    """What a random model draws."""

    key: jax.Array

    def __call__(self, variables, x, edits={}, taps=()):  # noqa: B006
        return LinenForward(Linear())(variables, noisy(x, self.key), edits, taps)


class NoisyLinear(Linear):
    """A model that draws while it is traced, which nothing declares."""

    def __call__(self, x):
        return super().__call__(noisy(x, jax.random.key(next(NUMBERS))))


NUMBERS = itertools.count()


@pytest.mark.parametrize(('declared', 'draws'), [(True, 1), (True, 8), (False, 1)])
def test_randomness_is_found_declared_or_not(diagnose, declared, draws):
    forward = random_forward(NoisyForward, KEY) if declared else LinenForward(NoisyLinear())
    found = diagnose(forward, queries=0, float64_images=0, draws=draws)
    # What is declared is averaged over draws.
    assert ('randomness' in warnings(found)) == (draws == 1)
    assert figures(found, 'randomness')['changed_logits'] == IMAGES
    assert figures(found, 'randomness')['changed_class'] > 0


def test_the_same_is_found_on_any_devices_and_batches(honest, diagnose):
    mesh = parallel.data_mesh()
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    few = {'queries': 0, 'float64_images': 0}
    found = diagnose(model(), mesh=mesh, batch_size=13, progress=progress, **few)
    for check, alone in zip(found.checks, honest.checks):
        if check.passed is not None:
            assert check.passed == alone.passed
            assert check.figures == pytest.approx(alone.figures, rel=1e-4), check.name
    assert {check.name for check in found.checks if check.passed is None} == {
        'black_box',
        'precision',
        'reported',
        'transfer',
    }
    assert {'view', 'steps', 'noise', 'straight_transforms'} <= set(seen)


# ----------------------------------------------------------------------------------- the rules


N = 100


def flags(count):
    return np.arange(N) < count


@pytest.fixture
def sound():
    """What attacks do to an honest model: 60 of 100 images are fooled."""
    names = ('pgd', 'steps', 'restarts', 'margin', 'scaled', 'fgsm', 'square', 'transfer')
    fooled = {name: flags(60) for name in (*names, 'float64', 'straight_transforms')}
    return masking_checks.Evidence(
        labels=np.arange(N) % 10,
        correct=np.full(N, True),
        gradient=np.ones(N),
        saturated=np.full(N, False),
        change=np.zeros(N),
        changes_class=np.full(N, False),
        declared_random=False,
        draws=1,
        fooled={**fooled, 'clean': flags(0), 'noise': flags(5)},
        by_radius={0.05: flags(30), 0.1: flags(60), 0.5: flags(100)},
        limit=0.5,
        replaced={'transforms': 1, 'edits': 0},
        absent={},
        reported=flags(60),
    )


def fooling(evidence, **counts):
    fooled = {name: flags(count) for name, count in counts.items()}
    return evidence._replace(fooled={**evidence.fooled, **fooled})


def judged(evidence):
    return {check.name for check in masking_checks.judge(evidence) if check.passed is False}


# What attacks find where n images more go against the rule.
BROKEN = {
    'monotone': lambda e, n: e._replace(by_radius={**e.by_radius, 0.1: flags(30 - n)}),
    'chance': lambda e, n: e._replace(by_radius={**e.by_radius, 0.5: flags(90 - n)}),
    'effort': lambda e, n: fooling(e, steps=60 - n),
    'converged': lambda e, n: fooling(e, restarts=60 + n)._replace(reported=flags(60 + n)),
    'reported': lambda e, n: e._replace(reported=flags(60 - n)),
    'single_step': lambda e, n: fooling(e, fgsm=60 + n)._replace(reported=flags(60 + n)),
    'transfer': lambda e, n: fooling(e, transfer=60 + n),
    'black_box': lambda e, n: fooling(e, square=60 + n)._replace(reported=flags(60 + n)),
    'noise': lambda e, n: fooling(e, noise=30 + n),
    'gradients': lambda e, n: e._replace(gradient=np.where(flags(n), 1e-30, 1.0)),
    'gradients, not finite': lambda e, n: e._replace(gradient=np.where(flags(n), np.nan, 1.0)),
    'losses': lambda e, n: fooling(e, scaled=60 + n)._replace(reported=flags(60 + n)),
    'precision': lambda e, n: fooling(e, float64=60 + n),
    'straight_through': lambda e, n: fooling(e, straight_transforms=60 + n),
}


@pytest.mark.parametrize('name', BROKEN)
def test_as_many_images_as_chance_allows_are_no_warning(sound, name):
    assert not judged(sound)
    # Two standard deviations of what only one of two equal attacks fools are more than the slack.
    most = 4 if name in ('losses', 'precision') else slack(N)
    check = name.partition(',')[0]
    assert judged(BROKEN[name](sound, most)) == set()
    assert judged(BROKEN[name](sound, most + 1)) == {check}


def test_the_slack_is_a_count_that_grows_slower_than_the_images():
    assert [slack(n) for n in (1, 30, 100, 200, 1000, 10_000)] == [1, 1, 3, 4, 16, 120]


def test_equal_attacks_may_differ_both_ways(sound):
    assert not masking_checks.exceeds(20, 12, N) and masking_checks.exceeds(21, 9, N)
    differing = fooling(sound)
    swapped = np.roll(flags(60), 15)
    differing.fooled['margin'] = differing.fooled['float64'] = swapped
    differing = differing._replace(reported=flags(60) | swapped)
    # What gradients in float64 find counts for them alone, what another loss finds for gradients.
    assert judged(differing) == set()
    differing.fooled['scaled'] = flags(60) | swapped
    assert judged(differing) == {'losses'}


def test_a_random_model_passes_once_its_gradients_are_averaged(sound):
    random = sound._replace(change=np.full(N, 0.1), declared_random=True)
    assert judged(random) == {'randomness'}
    assert judged(random._replace(draws=10)) == set()
    # What only a second pass shows cannot be averaged.
    assert judged(random._replace(draws=10, declared_random=False)) == {'randomness'}
    assert judged(sound._replace(change=np.full(N, 1e-5))) == set()


BEYOND = {'converged', 'reported', 'single_step', 'transfer', 'black_box', 'straight_through'}
EQUAL = {'losses', 'precision'}


@pytest.mark.parametrize(
    ('left', 'expected'), [(3, BEYOND | EQUAL), (4, EQUAL), (5, set()), (0, BEYOND | EQUAL)]
)
def test_where_nothing_is_left_to_find_finding_nothing_is_no_pass(sound, left, expected):
    strong = fooling(sound, **dict.fromkeys(sound.fooled.keys() - {'clean', 'noise'}, N - left))
    strong = strong._replace(reported=flags(N - left))
    empty = skipped(masking_checks.judge(strong))
    assert empty.keys() == expected
    for message in empty.values():
        assert f'{left} of {N} images' in message and 'smaller radius' in message
    # All that is left would be a warning exactly where the check applies.
    for name in (BEYOND | EQUAL) - {'reported'}:
        assert (name in judged(BROKEN[name](strong, N - 60))) == (name not in expected)


def test_a_check_of_what_is_not_there_does_not_apply(sound):
    weak = fooling(sound, **dict.fromkeys(sound.fooled.keys() - {'clean', 'noise'}, 3))
    weak = weak._replace(reported=flags(3))
    assert skipped(masking_checks.judge(weak)).keys() == {'effort'}
    assert skipped(masking_checks.judge(fooling(weak, pgd=4))).keys() == set()
    one = sound._replace(labels=np.zeros(N, int))
    assert '100 of 100 images have the same label' in skipped(masking_checks.judge(one))['chance']
    untrained = sound._replace(
        correct=flags(3),
        fooled={name: ~flags(3) | values for name, values in sound.fooled.items()},
        by_radius={radius: ~flags(3) | values for radius, values in sound.by_radius.items()},
        reported=flags(N),
    )
    checks = masking_checks.judge(untrained)
    assert [check.name for check in checks if check.passed is not None] == ['randomness']
    assert 'right about 3 of 100 images' in skipped(checks)['gradients']


def test_what_was_not_run_is_not_judged(sound):
    absent = {'square': 'No queries.', 'transfer': 'No model.', 'float64': 'No images.'}
    absent['reported'] = 'No report.'
    fooled = {name: values for name, values in sound.fooled.items() if name not in absent}
    checks = masking_checks.judge(
        sound._replace(
            fooled=fooled,
            absent={**absent, 'straight': 'Nothing.'},
            replaced={'transforms': 0},
            reported=None,
        )
    )
    assert skipped(checks) == {
        'reported': 'No report.',
        'black_box': 'No queries.',
        'transfer': 'No model.',
        'precision': 'No images.',
        'straight_through': 'Nothing.',
    }


# ---------------------------------------------------------------------------------- other models


def test_transforms_and_edits_are_found_at_any_depth(problem):
    x, _, templates = problem
    variables, step = classifier(templates), jnp.float32(4)

    def rounded(step, x):
        return jnp.round(x * step) / step

    def draw(key):
        shift = functools.partial(jnp.add, 0.1 * jax.random.normal(key, x.shape[1:]))
        return with_input_transform(LinenForward(Linear()), shift)

    inner = random_forward(draw, KEY)
    edited = with_edits(inner, {'head': jnp.round, 'head:in': functools.partial(rounded, step)})
    forward = with_input_transform(edited, jax.tree_util.Partial(rounded, step))

    @jax.jit
    def gradient(forward, x):
        return jax.grad(lambda x: forward(variables, x)[0].max())(x)

    transforms, edits = (straight_forward(forward, kind) for kind in (TRANSFORMS, EDITS))
    assert (transforms[1], edits[1]) == (2, 2)
    for other, _ in (transforms, edits):
        np.testing.assert_array_equal(other(variables, x)[0], forward(variables, x)[0])
        assert not gradient(other, x).any(), 'the other kind still hides them'
    both, _ = straight_forward(transforms[0], EDITS)
    assert gradient(both, x).any()
    assert straight_forward(LinenForward(Linear()), EDITS)[1] == 0


@pytest.fixture(scope='module')
def inverse():
    """What inverse perturbation moves images of each class by."""
    settings = inverse_perturbation.Settings(front=1, tail=1, rho=(0.05,), top=1)
    directions = jax.random.normal(KEY, (CLASSES, 1, SIDE, SIDE, 1))
    return dataclasses.replace(inverse_perturbation.skeleton(settings), directions=directions)


def test_an_inverse_perturbation_takes_its_own_straight_gradients(problem, inverse):
    x, _, templates = problem
    variables = classifier(templates)
    edited = with_edits(LinenForward(Linear()), {'head': jnp.round})
    # At the border clipping has no derivative towards the outside.
    dark = np.zeros_like(x[:4])

    @jax.jit
    def look(forward):
        def total(x):
            logits = forward(variables, x)[0]
            return logits[:, 0].sum(), logits

        return jax.grad(total, has_aux=True)(dark)

    gradient, logits = look(inverse_perturbation.apply(inverse, LinenForward(Linear())))
    own = inverse_perturbation.apply(inverse, LinenForward(Linear()), gradient='straight_through')
    straight, count = straight_forward(
        inverse_perturbation.apply(inverse, LinenForward(Linear())), TRANSFORMS
    )
    found, same = look(straight)
    assert count == 1
    np.testing.assert_allclose(same, logits, rtol=1e-5)
    np.testing.assert_array_equal(found, look(own)[0])
    assert (np.abs(found - gradient) > 1e-3).any()
    # Edits inside of it are another matter.
    rounded = inverse_perturbation.apply(inverse, edited)
    straight, count = straight_forward(rounded, EDITS)
    found, same = look(straight)
    assert count == 1 and straight.gradient == 'exact' and not look(rounded)[0].any()
    np.testing.assert_array_equal(same, look(rounded)[1])
    np.testing.assert_allclose(found, gradient, rtol=1e-5)
    both, count = straight_forward(rounded, TRANSFORMS)
    assert count == 1 and both.gradient == 'straight_through'


def test_an_inverse_perturbation_is_diagnosed_whole(diagnose, inverse):
    defended = inverse_perturbation.apply(inverse, LinenForward(Linear()))
    found = diagnose(defended, images=8, queries=0, steps=3, float64_images=4)
    assert {check.name for check in found.checks if check.figures} >= {
        'precision',
        'straight_through',
    }
    assert figures(found, 'straight_through')['transforms'] == 1
    assert figures(found, 'precision')['images'] == 4


def test_a_transform_of_another_shape_keeps_its_derivative(problem):
    x, _, templates = problem
    forward = with_input_transform(LinenForward(Linear()), lambda x: x[:, :, :, 0])
    straight, count = straight_forward(forward, TRANSFORMS)
    variables = classifier(templates)
    gradient = jax.grad(lambda x: straight(variables, x)[0].sum())(x)
    assert count == 1 and gradient.shape == x.shape


@pytest.mark.parametrize(
    ('dtype', 'transform', 'possible'),
    [
        (None, lambda x: x, True),
        (jnp.float32, lambda x: x, True),
        (jnp.bfloat16, lambda x: x, True),
        (None, lambda x: x.astype(jnp.float32), False),
        (None, jax.jit(lambda x: x.astype(jnp.bfloat16)), False),
        (None, lambda x: jnp.float32(2) * x, True),
    ],
)
def test_what_stays_narrow_is_not_called_float64(problem, dtype, transform, possible):
    x, _, templates = problem
    forward = with_input_transform(LinenForward(Linear(dtype)), transform)
    with jax.enable_x64(True):
        wide = float64_forward(forward, classifier(templates), x)
        assert (wide is not None) == possible
        if wide is not None:
            assert wide[0](wide[1], x.astype(np.float64))[0].dtype == jnp.float64
    assert not jax.config.jax_enable_x64


# --------------------------------------------------------------------------------------- reports


def test_every_check_is_in_the_table_and_the_files(sound, tmp_path):
    checks = masking_checks.judge(fooling(sound, square=80)._replace(reported=flags(97)))
    diagnosis = evaluation.Diagnosis(checks, N, 'linf', 0.1)
    other = evaluation.Diagnosis(masking_checks.judge(sound), N, 'linf', 0.05)
    assert not diagnosis.passed
    lines = evaluation.masking_table(diagnosis).splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith('warn'))
    assert 'only_square 20' in lines[place] and 'Random search fools' in lines[place + 1]
    assert sum(line.startswith('pass') for line in lines) == len(checks) - 2
    assert 'n/a    reported' in '\n'.join(lines) and 'The report leaves 3 of 100' in ''.join(lines)
    facts = json.loads(json.dumps(evaluation.masking_facts((other, diagnosis))))
    assert facts['masking/passed'] is False and facts['masking/linf-0.05/passed'] is True
    found = {key.removeprefix('masking/linf-0.1/'): value for key, value in facts.items()}
    assert (found['images'], found['slack'], found['eps']) == (N, slack(N), 0.1)
    assert found['black_box'] is False and found['black_box/only_square'] == 20
    assert {key for key in found if key.endswith('/message')} == {
        'black_box/message',
        'reported/message',
    }
    assert evaluation.masking_facts(()) == {}
    evaluation.write_masking((other, diagnosis), tmp_path / 'masking.csv')
    with (tmp_path / 'masking.csv').open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        key = f'masking/{row["norm"]}-{row["eps"]}/{row["check"]}/{row["figure"]}'
        assert float(row['value']) == facts[key]
    assert {row['check'] for row in rows} == {check.name for check in checks}
    assert {row['eps'] for row in rows} == {'0.05', '0.1'}


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'steps': 0}, 'steps is 0; it must be at least 1'),
        ({'eps': 0.0}, 'eps is 0.0; it must be greater than 0'),
        ({'images': 0}, r'they must be \[N, ...\]'),
        ({'queries': -1}, 'queries is -1'),
        ({'reported': [True]}, r'reported has shape \(1,\); it must be \(40,\), one flag'),
    ],
)
def test_a_mistake_is_named(diagnose, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        diagnose(model(), **options)


def test_labels_that_are_no_classes_are_named(problem):
    x, y, templates = problem
    for labels, sentence in (
        (np.where(y == 1, CLASSES, y), f'Label {CLASSES} is not one of the {CLASSES} classes'),
        (np.where(y == 1, -1, y), 'Label -1 is not one of'),
        (y + 0.5, 'labels are of type float64; they must be integers'),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluation.diagnose(
                model(), classifier(templates), x, labels, KEY, threat=Threat('linf', 0.1)
            )


def test_images_that_are_none_are_named(problem):
    x, y, templates = problem
    for images, sentence in (
        (255 * x, r'Pixels reach from \S+ to \S+, but the bounds of the threat are 0 and 1'),
        (np.where(x == x.max(), np.nan, x), 'An image has pixels that are NaN'),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluation.diagnose(
                model(), classifier(templates), images, y, KEY, threat=Threat('linf', 0.1)
            )


def test_what_is_infinite_in_every_pass_does_not_change():
    logits = np.array([[1.0, -np.inf], [np.nan, 1.0], [2.0, 1.0], [2.0, 1.0]])
    others = np.stack([logits, logits])
    others[1, 2, 1], others[0, 3, 0] = 2.0, np.nan
    np.testing.assert_array_equal(masking._change(logits, others), [0, 0, 0.5, np.inf])

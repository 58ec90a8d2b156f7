"""AutoAttack: the plan, the worst case, batches and devices, interruptions, and warnings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import parallel
from neurosens.attacks import Threat, autoattack, random_forward, straight_through
from neurosens.attacks.autoattack import CLEAN, ROBUST, _batches
from neurosens.attacks.autoattack_runs import runs
from neurosens.forward import with_input_transform

EPS = {'linf': 0.05, 'l2': 0.35, 'l1': 2.0}
SMALL = {'steps': 8, 'queries': 25, 'batch_size': 8}


def attack(net, norm='linf', seed=0, forward=None, **options):
    threat = options.pop('threat', Threat(norm, EPS[norm]))
    return autoattack(
        forward or net.forward,
        options.pop('variables', net.variables),
        np.asarray(net.x),
        np.asarray(net.y),
        jax.random.key(seed),
        threat=threat,
        **{**SMALL, **options},
    )


@pytest.mark.parametrize(
    ('norm', 'version', 'classes', 'expected'),
    [
        ('linf', 'standard', 10, {'apgd-ce': 1, 'apgd-t': 9, 'fab-t': 9, 'square': 1}),
        ('l2', 'standard', 4, {'apgd-ce': 1, 'apgd-t': 3, 'fab-t': 3, 'square': 1}),
        ('l1', 'standard', 10, {'apgd-ce': 5, 'apgd-t': 5, 'fab-t': 9, 'square': 1}),
        (
            'linf',
            'plus',
            10,
            {'apgd-ce': 5, 'apgd-dlr': 5, 'fab': 5, 'square': 1, 'apgd-t': 9, 'fab-t': 9},
        ),
        ('l2', 'rand', 10, {'apgd-ce': 1, 'apgd-dlr': 1}),
    ],
)
def test_the_runs_are_those_of_the_paper(norm, version, classes, expected):
    plan = runs(norm, version, classes)
    counts = {}
    for run in plan:
        counts[run.attack] = counts.get(run.attack, 0) + 1
    assert counts == expected and list(counts) == list(expected)
    assert len({run.name for run in plan}) == len(plan)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_the_result_is_inside_the_threat_and_what_it_claims(net, norm):
    result = attack(net, norm)
    change = np.float64(result.x_adv - net.x).reshape(16, -1)
    order = {'linf': np.inf, 'l2': 2, 'l1': 1}[norm]
    assert (np.linalg.norm(change, order, axis=1) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    logits = np.asarray(net.forward(net.variables, result.x_adv)[0])
    np.testing.assert_array_equal(result.success, logits.argmax(-1) != net.y)
    np.testing.assert_array_equal(result.broken_by == CLEAN, ~net.correct)
    np.testing.assert_array_equal(result.broken_by == ROBUST, ~result.success)
    assert (result.broken_by >= 0).any() and (result.broken_by == ROBUST).any()
    # The accuracy after each run follows from who broke what.
    broken = np.bincount(result.broken_by[result.broken_by >= 0], minlength=len(result.runs))
    np.testing.assert_allclose(
        result.accuracy, net.correct.mean() - np.concatenate([[0], broken.cumsum()]) / 16
    )
    assert (result.queries[~net.correct] == 1).all()
    assert result.queries[result.broken_by == ROBUST].min() > 25


def test_batches_and_devices_change_nothing(net):
    alone = attack(net)
    small = attack(net, batch_size=3)
    mesh = parallel.data_mesh()
    variables = parallel.replicate(mesh, net.variables)
    together = attack(net, mesh=mesh, variables=variables, batch_size=10)
    for other in (small, together):
        np.testing.assert_array_equal(other.broken_by, alone.broken_by)
        np.testing.assert_allclose(other.x_adv, alone.x_adv, atol=1e-5)
        np.testing.assert_array_equal(other.queries, alone.queries)
        np.testing.assert_array_equal(other.accuracy, alone.accuracy)


@pytest.mark.parametrize(
    ('norm', 'version', 'attacks', 'expected'),
    [
        # A clean pass, and for each run one more, a start, and the steps; for l1 three starts.
        ('linf', 'standard', ('apgd-ce',), 1 + (1 + 8 + 1)),
        ('l1', 'standard', ('apgd-ce',), 1 + 5 * (1 + 8 + 3)),
        ('linf', 'plus', ('apgd-ce',), 1 + 5 * (1 + 8 + 1)),
        ('linf', 'rand', ('apgd-ce', 'apgd-dlr'), 1 + 2 * 20 * (1 + 8 + 1)),
    ],
)
def test_restarts_draws_and_balls_are_those_of_the_version(net, norm, version, attacks, expected):
    result = attack(net, norm, version=version, attacks=attacks, threat=Threat(norm, 1e-4))
    assert (result.queries[result.broken_by == ROBUST] == expected).all()
    assert (result.broken_by == ROBUST).any()


def test_the_plus_version_is_not_weaker_than_the_standard_one(net):
    standard, plus = attack(net), attack(net, version='plus')
    assert plus.runs[:2] == ('apgd-ce 1', 'apgd-ce 2') and len(plus.runs) == len(
        runs('linf', 'plus', 4)
    )
    assert plus.success.sum() >= standard.success.sum()


def test_progress_tells_of_each_batch(net):
    told = []
    result = attack(net, attacks=('apgd-ce', 'square'), progress=lambda *args: told.append(args))
    correct = int(net.correct.sum())
    assert told[0] == ('apgd-ce', -(-correct // 8), net.correct.mean())
    assert {name for name, _, _ in told} == {'apgd-ce', 'square'}
    assert result.runs == ('apgd-ce', 'square')


def test_an_interrupted_run_goes_on_without_doing_anything_twice(net, tmp_path):
    class Stop(Exception):
        pass

    whole = attack(net, batch_size=4)
    told = []

    def interrupt(*args):
        told.append(args)
        if len(told) == 5:
            raise Stop

    directory = tmp_path / 'notes'
    with pytest.raises(Stop):
        attack(net, batch_size=4, directory=directory, progress=interrupt)
    again = []
    resumed = attack(
        net, batch_size=4, directory=directory, progress=lambda *args: again.append(args)
    )
    every = []
    attack(net, batch_size=4, progress=lambda *args: every.append(args))
    assert len(again) == len(every) - 4
    finished = attack(net, batch_size=4, directory=directory, progress=interrupt)
    assert len(told) == 5, 'a finished attack is read, not repeated'
    for result in (resumed, finished):
        jax.tree.map(np.testing.assert_array_equal, result, whole)


def test_notes_of_another_attack_are_refused(net, tmp_path):
    attack(net, attacks=('apgd-ce',), directory=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for options, names in (
        ({'threat': Threat('linf', 0.06)}, 'eps'),
        ({'seed': 1}, 'key'),
        ({'steps': 9}, 'steps'),
        ({'variables': jax.tree.map(lambda leaf: 1.01 * leaf, net.variables)}, 'contents'),
    ):
        with pytest.raises(ValueError, match=f'notes of another AutoAttack, .* in {names}; choose'):
            attack(net, directory=tmp_path, **{'attacks': ('apgd-ce',), **options})
    # The same arrays, put to another use.
    dimmed = with_input_transform(net.forward, lambda x: 0.9 * x)
    with pytest.raises(ValueError, match=r'notes of another AutoAttack, .* in logits; choose'):
        attack(net, forward=dimmed, directory=tmp_path, attacks=('apgd-ce',))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert json.loads((tmp_path / 'autoattack.json').read_text())['runs'] == ['apgd-ce']


def test_an_attack_of_its_own_is_never_stronger_than_the_whole(net):
    whole = attack(net)
    for name in ('apgd-ce', 'apgd-t', 'fab-t', 'square'):
        part = attack(net, attacks=(name,))
        assert (part.success <= whole.success).all() or name == 'square'


# -------------------------------------------------------------------------------- warnings


def only_warning(result):
    (warning,) = result.warnings
    return warning


def test_an_honest_model_warns_of_nothing(net):
    assert attack(net, attacks=('apgd-ce', 'apgd-dlr')).warnings == ()


def test_few_classes_are_named(net):
    """The network has four."""
    fewer = only_warning(attack(net, attacks=('fab-t',)))
    assert fewer == 'With 4 classes fab-t aims at 3 of them, not at 9.'


def test_random_models_are_found(net):
    def draw(key):
        return with_input_transform(
            net.forward, lambda x: x + 0.05 * jax.random.normal(key, x.shape)
        )

    forward = random_forward(draw, jax.random.key(0))
    result = attack(net, forward=forward, attacks=('apgd-ce',))
    assert only_warning(result).startswith('The model is random')
    careful = attack(net, forward=forward, version='rand', attacks=('apgd-ce',))
    assert careful.warnings == ()
    idle = attack(net, version='rand', attacks=('apgd-ce',))
    assert only_warning(idle).startswith('The model is not random')


def test_missing_gradients_are_found(net):
    def quantize(x):
        return jnp.round(x * 8) / 8

    hidden = with_input_transform(net.forward, quantize)
    result = attack(net, forward=hidden, attacks=('apgd-ce', 'square'), queries=100)
    first, second = result.warnings
    assert first.startswith('16 of 16 clean images have no gradient at all')
    assert second.startswith('Square broke')
    smooth = with_input_transform(net.forward, straight_through(quantize))
    assert attack(net, forward=smooth, attacks=('apgd-ce',)).warnings == ()


def test_logits_that_are_not_numbers_are_wrong_and_their_gradients_are_found(net):
    means = np.asarray(net.x).mean((1, 2, 3))
    level = float(np.sort(means)[-4:-2].mean())
    brightest = means > level

    def spoil(x):
        bright = x.mean((-3, -2, -1), keepdims=True) > level
        return x * jnp.where(bright, jnp.nan, 1.0)

    spoilt = with_input_transform(net.forward, spoil)
    # The class that NumPy finds among NaN is not right by accident.
    result = attack(net, forward=spoilt, attacks=('apgd-ce',))
    np.testing.assert_array_equal(result.broken_by == CLEAN, brightest | ~net.correct)
    assert only_warning(result).startswith('3 of 16 clean images have gradients that are not')
    zeros = autoattack(
        spoilt,
        net.variables,
        np.asarray(net.x),
        np.zeros(16, np.int32),
        jax.random.key(0),
        threat=Threat('linf', 0.0),
        attacks=('apgd-ce',),
        **SMALL,
    )
    assert (zeros.broken_by == CLEAN)[brightest].all()


def test_probabilities_are_found(net):
    class Softmax:
        def __call__(self, variables, x, edits=None, taps=()):
            logits, tapped = net.forward(variables, x, edits or {}, taps)
            return jax.nn.softmax(logits), tapped

    forward = jax.tree_util.register_static(Softmax)()
    assert 'returns probabilities' in only_warning(attack(net, forward=forward, attacks=('fab',)))


def test_two_classes_use_the_margin(linear, linear_forward):
    variables, x, y, weight, margin = linear
    threat = Threat('l2', float(np.median(margin) / np.linalg.norm(weight)), (-10.0, 10.0))
    result = autoattack(
        linear_forward,
        variables,
        x.reshape(8, 3, 4, 1),
        y,
        jax.random.key(0),
        threat=threat,
        steps=20,
        queries=5,
        batch_size=4,
    )
    assert result.runs == ('apgd-ce', 'apgd-t 1', 'fab-t 1', 'square')
    *fewer, replaced = result.warnings
    assert fewer == [
        f'With 2 classes {name} aims at 1 of them, not at 9.' for name in ('apgd-t', 'fab-t')
    ]
    assert replaced.startswith('With 2 classes the DLR loss of apgd-t is not defined')
    np.testing.assert_array_equal(result.success, margin / np.linalg.norm(weight) < threat.eps)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'version': 'fast'}, "Unknown version 'fast'"),
        ({'attacks': ('pgd',)}, "Unknown attack 'pgd'"),
        ({'batch_size': 0}, 'batch_size is 0; it must be at least 1'),
        ({'threat': Threat('l2', float('inf'))}, 'eps of the threat is inf; without a radius'),
        ({'threat': Threat('l2', 1.0, (0.0, 0.5))}, r'Pixels reach from .* bounds of the threat'),
    ],
)
def test_an_impossible_attack_is_refused(net, options, message):
    with pytest.raises(ValueError, match=message):
        attack(net, **options)


def test_nan_is_named(net):
    spoiled = net.x.at[3, 0, 0].set(np.nan)
    with pytest.raises(ValueError, match='pixels that are NaN'):
        autoattack(
            net.forward,
            net.variables,
            spoiled,
            net.y,
            jax.random.key(0),
            threat=Threat('linf', 0.1),
        )


@pytest.mark.parametrize(
    ('count', 'size', 'devices', 'shapes'),
    [
        (300, 128, 2, [128, 128, 48]),
        (256, 128, 2, [128, 128]),
        (129, 128, 1, [128, 16]),
        (65, 128, 1, [80]),
        (33, 128, 1, [48]),
        (1, 128, 1, [16]),
        (1, 96, 8, [16]),
        (1, 100, 8, [16]),
        (3, 16, 1, [16]),
        (99, 100, 8, [100]),
    ],
)
def test_the_last_batch_is_as_small_as_it_may_be(count, size, devices, shapes):
    found = list(_batches(np.arange(count), size, devices))
    assert [len(rows) for rows, _ in found] == shapes
    assert all(len(rows) % devices == 0 for rows, _ in found if size % devices == 0)
    counted = np.concatenate([rows[:number] for rows, number in found])
    np.testing.assert_array_equal(counted, np.arange(count))


def test_a_program_that_exists_is_taken_where_it_costs_little_more():
    def last(count, compiled):
        (batch,) = _batches(np.arange(count), 128, 1, compiled)
        return len(batch[0])

    assert last(65, {96, 128}) == 96
    assert last(65, {112, 128}) == 80
    assert last(90, {80, 96, 112}) == 96
    assert last(90, {80}) == 96
    assert last(20, {32, 48, 128}) == 32

"""The suite of benchmarks: its registry, its reports and the blocks of the documentation."""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import runpy
import sys
import time
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import (
    attack_loop,
    attacks,
    batch_norm,
    choices,
    convolution,
    documents,
    harness,
    neuron_problems,
    neurons,
    registry,
    regularizers,
    scaling,
    step_profile,
    training_step,
)
from benchmarks.attack_settings import Setting
from neurosens import models
from neurosens.forward import LinenForward
from neurosens.models import BatchNorm, common

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = REPOSITORY / 'docs'
TEXT = """# Title

Prose.

<!-- begin one -->
| 1 |
<!-- end one -->

More prose.

<!-- begin two.part -->
<!-- end two.part -->
The end.
"""
PATHS = {'weights': 'W', 'data_dir': 'D', 'output': 'O', 'plot': 'P.png'}


def test_only_the_own_block_is_replaced():
    text = documents.replaced(TEXT, {'one': 'new\n\ntable\n'})
    assert text == TEXT.replace('| 1 |', 'new\n\ntable')
    assert documents.replaced(text, {'one': '| 1 |'}) == TEXT


def test_several_blocks_are_replaced_whatever_their_order():
    text = documents.replaced(TEXT, {'two.part': 'second', 'one': 'a longer first block'})
    assert text.index('a longer first block') < text.index('second') < text.index('The end.')
    assert text.count('<!--') == 4 and '| 1 |' not in text


def test_the_content_of_a_block_may_hold_what_patterns_and_formats_take_for_their_own():
    content = r'\1 \g<0> {braces} %s'
    assert content in documents.replaced(TEXT, {'one': content})


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('<!-- end one -->', '', 'inside the block'),
        ('<!-- begin one -->', '', 'has not begun'),
        ('<!-- end two.part -->', '', 'does not end'),
        ('<!-- begin two.part -->\n<!-- end two.part -->', '', 'no markers for two.part'),
        ('two.part', 'one', 'second time'),
        ('<!-- end one -->', '| <!-- end one --> |', 'shares its line'),
    ],
)
def test_damaged_markers_are_refused(old, new, message):
    with pytest.raises(documents.MarkerError, match=message):
        documents.replaced(TEXT.replace(old, new), {'two.part': 'new'})


def script_of(subject):
    """What a subject runs; skips where a peer that it imports is not installed."""
    try:
        return importlib.import_module(subject.module)
    except ModuleNotFoundError as error:
        if error.name not in subject.packages:
            raise
        pytest.skip(f'{subject.module} needs {error.name} (requirements-bench.txt)')


def test_the_documentation_has_a_block_for_every_subject_and_no_other():
    for page in DOCUMENTS.glob('*.md'):
        expected = {name for name, one in registry.SUBJECTS.items() if one.document == page.name}
        assert documents.blocks(page.read_text(encoding='utf-8')).keys() == expected
    assert {one.document for one in registry.SUBJECTS.values()} <= {
        page.name for page in DOCUMENTS.glob('*.md')
    }


@pytest.mark.parametrize('subject', registry.SUBJECTS.values(), ids=lambda subject: subject.name)
def test_documented_reports_are_of_the_registered_command_with_date_and_machine(subject):
    text = (DOCUMENTS / subject.document).read_text(encoding='utf-8')
    report = text[slice(*documents.blocks(text)[subject.name])]
    shown = re.match(r'\s*```sh\n(.*?)\n```\n', report, re.DOTALL)
    assert shown
    assert shown[1].replace(' \\\n  ', ' ') == subject.shown()
    assert re.match(r'\s*> 20\d\d-\d\d-\d\d: .*\d cores', report[shown.end() :])


@pytest.mark.parity
@pytest.mark.parametrize('subject', registry.SUBJECTS.values(), ids=lambda subject: subject.name)
def test_commands_are_understood_by_what_they_run(subject):
    _, module, *arguments = subject.command(PATHS, rounds=3, device=subject.devices[-1])
    assert module == subject.module
    parsed = script_of(subject).parse_arguments(
        [*arguments, '--json', 'file.json', '--markdown', 'file.md']
    )
    assert getattr(parsed, 'rounds', 3) == 3 or '--rounds' not in subject.arguments
    assert parsed.device == subject.devices[-1] and parsed.markdown == 'file.md'
    assert ('--plot' in arguments) == bool(subject.plot)


@pytest.mark.parity
@pytest.mark.parametrize('subject', registry.SUBJECTS.values(), ids=lambda subject: subject.name)
def test_workers_are_there(subject):
    # Peers need packages that need not be installed; ours must be found without them.
    source = pathlib.Path(script_of(subject).__file__).read_text()
    for module, function in set(re.findall(r"'(benchmarks\.\w+):(\w+)'", source)):
        if '.torch_' not in module:
            assert callable(getattr(importlib.import_module(module), function))
        else:
            assert f'def {function}(' in (REPOSITORY / f'{module.replace(".", "/")}.py').read_text()


def test_an_unknown_subject_is_refused_with_the_names_there_are(capsys):
    assert suite.main(['--only', 'training_step', 'nonsense']) == 2
    error = capsys.readouterr().err
    assert "no subject 'nonsense'" in error and 'neurons.delta' in error


def test_the_list_has_every_subject_with_its_command(capsys):
    assert suite.main(['--list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(registry.SUBJECTS)
    assert any('python -m benchmarks.neurons delta --rounds 9' in line for line in lines)


def test_what_a_subject_lacks_is_said():
    subject = registry.SUBJECTS['attacks.steps']
    assert subject.lacks({**PATHS, 'weights': ''}) == 'It needs --weights.'
    assert subject.lacks({**PATHS, 'data_dir': ''}) == 'It needs --data_dir.'
    missing = registry.Subject('s', 'm', (), ('no_such_package',), 1, devices=('cpu',))
    assert 'no_such_package' in missing.lacks(PATHS)
    alone = registry.Subject('s', 'm', (), (), 1, devices=('cpu',))
    assert 'gpu' in alone.lacks(PATHS, 'gpu') and not alone.lacks(PATHS, 'cpu')


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Three subjects, of which the second fails, and a document with their blocks."""
    (tmp_path / 'toy.py').write_text(
        'import sys\n'
        'name, markdown = sys.argv[1], sys.argv[sys.argv.index("--markdown") + 1]\n'
        'if name == "bad":\n'
        '    raise SystemExit("It is broken.")\n'
        'device = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "found"\n'
        'open(markdown, "w").write(f"table of {name}, device {device}")\n'
        'if name == "drawn":\n'
        '    open(sys.argv[3], "w").write("plot")\n'
    )
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    subjects = (
        registry.Subject('good', 'toy', ('good',), (), 1),
        registry.Subject('bad', 'toy', ('bad',), (), 1),
        registry.Subject('drawn', 'toy', ('drawn', '--plot', registry.PLOT), (), 1, 'figure.png'),
    )
    monkeypatch.setattr(registry, 'SUBJECTS', {subject.name: subject for subject in subjects})
    docs = tmp_path / 'docs'
    docs.mkdir()
    blocks = (f'<!-- begin {name} -->\nold\n<!-- end {name} -->' for name in registry.SUBJECTS)
    (docs / 'benchmarks.md').write_text('\n\n'.join(blocks))
    return tmp_path


def test_a_failing_subject_is_named_and_the_others_are_written(toys, capsys):
    output, docs = toys / 'output', toys / 'docs'
    assert suite.main(['--output', str(output), '--docs', str(docs)]) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith('bad: ') and 'It is broken.' in error
    text = (docs / 'benchmarks.md').read_text()
    assert 'table of good' in text and 'table of drawn' in text
    assert '<!-- begin bad -->\nold\n<!-- end bad -->' in text
    assert (docs / 'figures' / 'figure.png').read_text() == 'plot'
    assert 'It is broken.' in (output / 'bad.log').read_text()


def test_runs_on_a_gpu_write_reports_alone(toys, monkeypatch, capsys):
    subjects = {
        name: dataclasses.replace(one, devices=('cpu',) if name == 'bad' else ('cpu', 'gpu'))
        for name, one in registry.SUBJECTS.items()
    }
    monkeypatch.setattr(registry, 'SUBJECTS', subjects)
    monkeypatch.chdir(toys)
    document = toys / 'docs' / 'benchmarks.md'
    before = document.read_text()
    # Those that run on a CPU alone are left out, unless they are asked for.
    assert suite.main(['--device', 'gpu']) == 0
    assert 'bad' not in capsys.readouterr().out
    reports = toys / 'runs' / 'benchmarks'
    assert (reports / 'good.md').exists() and document.read_text() == before
    assert suite.main(['--device', 'gpu', '--only', 'bad']) == 1
    assert 'It does not run on a gpu.' in capsys.readouterr().err
    assert suite.main(['--device', 'gpu', '--docs', 'docs']) == 2
    assert 'figures of a CPU' in capsys.readouterr().err
    # Nor does one that is found, or a short run, write any.
    monkeypatch.setattr(harness, 'found_device', lambda: 'gpu')
    assert suite.main(['--only', 'good']) == 0
    monkeypatch.setattr(harness, 'found_device', lambda: 'cpu')
    assert suite.main(['--only', 'good', '--rounds', '1']) == 0
    assert document.read_text() == before
    # On a CPU the documentation beside is written by default.
    assert suite.main(['--only', 'good']) == 0
    # With the command as it is registered, which names no device.
    assert 'table of good, device found' in document.read_text()
    assert suite.main(['--only', 'good', '--device', 'cpu']) == 0
    assert 'table of good, device cpu' in document.read_text()


def test_a_missing_marker_ends_the_suite_before_anything_runs(toys, capsys):
    document = toys / 'docs' / 'benchmarks.md'
    damaged = document.read_text().replace('<!-- end good -->', '')
    document.write_text(damaged)
    assert suite.main(['--output', str(toys / 'output'), '--docs', str(toys / 'docs')]) == 2
    assert "inside the block 'good'" in capsys.readouterr().err
    assert document.read_text() == damaged and not (toys / 'output').exists()


def test_reports_show_commands_without_paths():
    shown = harness.command(
        'benchmarks.attacks', ['steps', '--weights', '/secret', '--json', 'x', '--only', 'a b', 'c']
    )
    assert shown == "python -m benchmarks.attacks steps --weights DIR --only 'a b' c"
    long = harness.command('benchmarks.attacks', ['steps', *(f'--option{i}' for i in range(20))])
    assert all(len(line) <= 100 for line in long.splitlines())
    assert long.replace(' \\\n ', '').split() == [
        'python', '-m', 'benchmarks.attacks', 'steps', *(f'--option{i}' for i in range(20))
    ]  # fmt: skip


def test_processors_of_one_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(harness.platform, 'machine', lambda: 'x86_64')
    monkeypatch.setattr(harness.kernel_gradient, 'has_avx512', lambda: True)
    plain = harness.machine()['cpu']
    monkeypatch.setattr(harness.kernel_gradient, 'has_avx512', lambda: False)
    assert harness.machine()['cpu'] == f'{plain} without AVX-512'


def test_a_report_names_command_machine_and_date(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x.py', 'delta', '--markdown', 'y'])
    spec = types.SimpleNamespace(name='benchmarks.neurons')
    monkeypatch.setitem(sys.modules, '__main__', types.SimpleNamespace(__spec__=spec))
    arguments = argparse.Namespace(
        markdown=str(tmp_path / 'a' / 'b.md'), json=str(tmp_path / 'c.json')
    )
    measurement = harness.Measurement({'one': (1.0, 2.0)})
    harness.report(arguments, 'Floor: none.', '', '| t |', measurements={'m': measurement})
    text = (tmp_path / 'a' / 'b.md').read_text()
    assert text.startswith('```sh\npython -m benchmarks.neurons delta\n```\n\n> 2')
    assert text.endswith('\n\nFloor: none.\n\n| t |\n') and capsys.readouterr().out.strip()
    written = json.loads((tmp_path / 'c.json').read_text())
    assert written['measurements']['m']['one']['seconds'] == [1.0, 2.0]
    assert written['machine']['date'] in text


def test_candidates_take_turns_in_an_order_that_changes():
    calls, said = [], []
    candidates = {name: functools.partial(calls.append, name) for name in 'abc'}
    measurement = harness.alternate(
        candidates, rounds=4, warmup=2, repeats=2, announce=lambda name, _: said.append(name)
    )
    assert calls[:6] == list('abcabc')
    # From another one in each round, and backwards in every other; each twice in its turn.
    assert ''.join(calls[6::2]) == ''.join(calls[7::2]) == ''.join(said) == 'abcacbcabcba'
    assert {len(values) for values in measurement.seconds.values()} == {4}
    assert min(min(values) for values in measurement.seconds.values()) >= 0


def test_a_turn_lasts_until_its_arrays_are_there():
    class Late:
        def block_until_ready(self):
            time.sleep(0.05)

    measurement = harness.alternate({'late': Late}, rounds=1, warmup=0)
    assert measurement.seconds['late'][0] >= 0.05


TOY = """
import os
from benchmarks import harness


def prepare(*, number):
    def write():
        print('not a reply')
        open(os.environ['LOG'], 'a').write(f'{number} ')

    def fail():
        raise ArithmeticError('no such number')

    if number < 0:
        raise ValueError('too small')
    return harness.Prepared({'write': write, 'fail': fail}, {'twice': 2 * number})
"""


def test_a_worker_prepares_runs_and_ends(tmp_path):
    (tmp_path / 'toy.py').write_text(TOY)
    log = tmp_path / 'log'
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = {'PYTHONPATH': paths, 'LOG': str(log)}

    def spec(number):
        return harness.WorkerSpec('toy:prepare', {'number': number}, environment)

    with harness.worker(spec(7)) as worker:
        assert worker.details == {'twice': 14} and not log.exists()
        write = worker.unit('write')
        write()
        write()
        assert log.read_text() == '7 7 '
        with pytest.raises(harness.WorkerError, match=r'ArithmeticError: no such number'):
            worker.unit('fail')()
        with pytest.raises(harness.WorkerError, match="KeyError: 'other'"):
            worker.unit('other')()
        write()
    assert log.read_text() == '7 7 7 ' and worker.process.returncode == 0
    few = contextlib.ExitStack()
    with few, pytest.raises(harness.WorkerError, match='ValueError: too small'):
        few.enter_context(harness.worker(spec(-1)))


def test_shares_of_floors_are_formed_inside_of_rounds():
    measurement = harness.Measurement({'one': (2.0, 4.0, 10.0), 'two': (1.0, 1.0, 1.0)})
    assert measurement.share('one', measurement.seconds['two']) == 0.25
    assert measurement.scaled('two', 3) == (3.0, 3.0, 3.0)
    assert harness.percent(0.25) == '25 %' and harness.percent(0.00042) == '0.04 %'
    floors = harness.Floors((4e9,), (2e9, 1e9), (1e9,), 'a shape')
    assert floors.convolution_seconds(2e9) == (1.0, 2.0) and floors.matmul_seconds(2e9) == (0.5,)
    assert floors.memory_seconds(3e9) == (3.0,)
    assert floors.pace(harness.Measurement({'a': (2.0, 4.0)}), {'a': 1e9, 'b': 1e9}) == (
        f'Of the peak of convolutions, a: 1 GFLOP at 25 %. {floors}'
    )
    assert harness.fastest(measurement, ['one', 'two']) == 'two'
    assert harness.fastest(measurement, []) == ''


def test_operations_of_a_device_that_jax_does_not_analyse_are_not_known():
    unknown = types.SimpleNamespace(cost_analysis=lambda: None)
    lowered = types.SimpleNamespace(lower=lambda lowering_platforms: unknown)
    function = types.SimpleNamespace(trace=lambda *_: lowered)
    count = harness.count_flops(function, 1.0, calls=20)
    floors = harness.Floors((4e9,), (2e9,), (1e9,), 'a shape')
    assert count is None
    assert floors.pace(harness.Measurement({'a': (2.0,)}), {'a': count}) == str(floors)


def test_operations_of_several_calls_are_counted():
    square = jax.jit(lambda x: x @ x)
    assert harness.count_flops(square, np.ones((3, 3), 'f4'), calls=5) == 5 * 2 * 3**3


@pytest.mark.parametrize(
    ('side', 'window', 'stride', 'met'),
    [
        (4, 3, 1, 2 + 3 + 3 + 2),
        (4, 3, 2, 2 + 3),
        (5, 5, 1, 3 + 4 + 5 + 4 + 3),
        (7, 1, 1, 7),
    ],
)
def test_products_with_zeros_around_images_are_no_operations(side, window, stride, met):
    assert harness.convolution_flops(side, 3, 5, window, stride) == 2 * met**2 * 3 * 5


@pytest.mark.parametrize('shape', convolution.SHAPES, ids=str)
def test_operations_of_convolutions_are_those_that_xla_counts(shape):
    arrays = (*shape.arrays(), shape.cotangents())
    x, w, y = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    run = functools.partial(convolution._convolve, shape=shape)

    def of_images(y, w):
        return jax.linear_transpose(lambda x: run(x, w), x)(y)

    def of_kernel(x, y):
        return jax.linear_transpose(lambda w: run(x, w), w)(y)

    for function, arguments in ((run, (x, w)), (of_images, (y, w)), (of_kernel, (x, y))):
        counted = harness.count_flops(jax.jit(function), *arguments)
        # XLA adds up in float32.
        assert counted == pytest.approx(shape.flops(), rel=1e-6)


def test_the_floor_of_ablation_is_one_pass_and_the_dense_layers_of_all_others():
    module = neuron_problems.small_cnn()
    x = jax.ShapeDtypeStruct((1, *neuron_problems.SMALL_CNN_SHAPE), 'f4')
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    counted = harness.count_flops(jax.jit(module.apply), variables, x)
    once = neurons._least_ablation_flops() - 64 * 2 * (7 * 7 * 32 * 64 + 64 * 10)
    # Biases, ReLUs and pooling are not in it.
    assert 0.95 * counted < once < counted


def test_floors_of_neuron_measures_are_of_the_parts_that_they_need():
    x = jax.ShapeDtypeStruct((4, 28, 28, 1), 'f4')
    module = models.create('mlp', num_classes=10, hidden=(64, 256))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    found = neurons.least_flops(LinenForward(module), variables, x, linear='dense2', pulled='')
    front, second, head = (4 * 2 * size for size in (784 * 64, 64 * 256, 256 * 10))
    whole = front + second + head
    assert found == pytest.approx(
        {
            'forward': whole,
            'sensitivity': whole + 10 * (second + head),
            'influence': whole + second + head,
            'ablation': whole + 64 * head,
            'statistics': front,
            'shift': 2 * front,
            'probes': 5 * whole,
            'gradients': front,
        },
        rel=0.15,
    )
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), 'f4')
    module = models.create('cifar_resnet20', num_classes=10)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    found = neurons.least_flops(
        LinenForward(module), variables, x, linear='stage1_block1/conv1', pulled='head:in'
    )
    first, second = (2 * harness.convolution_flops(32, inputs, 16, 3) for inputs in (3, 16))
    whole = found['forward']
    assert found['statistics'] == pytest.approx(first, rel=0.15)
    assert found['ablation'] == pytest.approx(whole + 16 * (whole - first - second), rel=0.02)
    assert found['sensitivity'] == pytest.approx(whole + 10 * (whole - first), rel=0.02)
    assert found['gradients'] == pytest.approx(65 * whole, rel=0.01)


def test_nothing_is_known_of_measures_that_jax_does_not_count(monkeypatch):
    monkeypatch.setattr(harness, 'count_flops', lambda *_: None)
    module = models.create('mlp', num_classes=10, hidden=(4, 8))
    options = {'linear': 'dense2', 'pulled': ''}
    assert neurons.least_flops(LinenForward(module), {}, np.ones(1), **options) == {}


def test_calls_are_repeated_until_they_last(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, '_least_seconds', lambda unit: 0.004)
    unit, count = harness.lasting(lambda: calls.append(1), 0.03)
    unit()
    assert count == len(calls) == 8
    assert harness.lasting(calls.clear, 0.001)[1] == 1
    prepared = convolution.lasting({'a': calls.clear}, devices=2)
    assert prepared.details == {'devices': 2, 'calls': {'a': 8}}
    prepared.units['a']()
    assert not calls
    measured = harness.Measurement({'a': (0.04, 0.08), 'b': (1.0, 2.0)})
    assert measured.per_call({'a': 8, 'b': 1}).seconds == {'a': (0.005, 0.01), 'b': (1.0, 2.0)}


def test_a_turn_of_the_floors_lasts_as_long_for_any_number_of_units(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def noting(spec):
        asked.append(spec.options['seconds'])
        yield FakeWorker(DETAILS['harness:prepare_floors'])

    monkeypatch.setattr(harness, 'worker', noting)
    for repeats in (1, 4):
        harness.beside_floors({'a': lambda: None}, rounds=1, repeats=repeats)
    assert asked == [harness._FLOOR_SECONDS, harness._FLOOR_SECONDS / 4]


def test_the_work_of_floors_is_that_of_all_calls(monkeypatch):
    mesh = harness.parallel.data_mesh(1)
    monkeypatch.setattr(harness, 'start_jax', lambda: mesh)
    monkeypatch.setattr(harness, '_compiled', lambda function, *arrays: lambda: None)
    monkeypatch.setattr(harness, '_least_seconds', lambda unit: 0.1)
    work = harness.prepare_floors(seconds=0.45, size=8, megabytes=1, images=1).details['work']
    assert work['matmul'] == 5 * 2 * 8**3 and work['memory'] == 5 * 2 * 2**20
    assert work['convolution'] == 5 * 2 * 16**2 * 9 * 128 * 128


def test_a_single_round_has_no_spread():
    once = harness.Measurement({'a': (1.5,), 'b': (1.0,)})
    assert harness.ratio_text(once.ratio('a', 'b')) == '1.50'
    assert harness.time_text(once.summary('a'), 1e3, 0) == '1,500'
    several = harness.Measurement({'a': (1.0, 2.0, 3.0), 'b': (1.0, 1.0, 1.0)})
    assert harness.ratio_text(several.ratio('a', 'b')) == '2.00 (1.20-2.80)'
    assert harness.ratio_text(several.ratio('a', 'a')) == '1.00'
    assert harness.time_text(several.summary('a'), 1, 1) == '2.0 (1.5-2.5)'
    assert neurons._ratio(harness.Ratio(1274.4, 131.0, 205.0)) == '1,274 (131-205)'


def test_convolutions_stand_with_quartiles_and_their_share_of_the_peak(monkeypatch):
    shape = convolution.Shape(4, 1, 1, 3, 1)
    monkeypatch.setattr(convolution, 'SHAPES', (shape,))
    times = {'XLA': (4e-3, 5e-3, 6e-3), 'oneDNN': (2e-3,) * 3, 'PyTorch': (1e-3,) * 3}
    measured = harness.Measurement(
        {
            convolution.unit_name(side, shape, kind): seconds
            for side, seconds in times.items()
            for kind in convolution.KINDS
        }
    )
    # A forward pass has 2 * 100 operations on each image, half a millisecond of them.
    peak = (convolution.BATCH_SIZE * 200 / 0.5e-3,) * 3
    forward, gradient, kernel = cells_of(
        convolution.table(measured, harness.Floors(peak, peak, peak, 'a shape'))
    )[2:]
    assert forward == [
        *('4 x 4 x 1 to 1, 3 x 3 forward', '5.00 (4.50-5.50)', '2.00', '**1.00**'),
        *('2.50 (2.10-2.90)', '0.50', '10 %', '25 %', '50 %'),
    ]
    assert gradient[-3:] == ['20 %', '50 %', '100 %'] and kernel[-3:] == forward[-3:]


def test_compiling_has_the_floor_of_what_is_compiled():
    training = harness.Measurement({choices._TRAINING: (4.0,)})
    sizes = harness.Measurement({str(choices.BATCH_SIZE): (1.0,)})
    programs = harness.Measurement({choices._WHOLE: (2.0, 4.0, 6.0)})
    floors = (1.0,), (0.5,), (1.0, 1.0, 1.0)
    rows = cells_of(choices.table(training, sizes, programs, *floors))[2:]
    assert [row[1:] for row in rows] == [
        ['1,000 ms', '1', '25 %'],
        ['1,000 ms', '1', '50 %'],
        ['4.00 (3.00-5.00) s', '1', '25 %'],
    ]
    unknown = choices.table(training, sizes, programs, *floors[:2], None)
    assert cells_of(unknown)[-1][-1] == '-'


def test_bars_are_as_long_as_the_medians(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(harness.plots, 'save', lambda figure, path: drawn.append(figure))
    measured = harness.Measurement({'neurosens a': (1.0, 2.0, 9.0), 'ART a': (4.0, 4.0, 4.0)})
    harness.draw_times({'N': measured}, tmp_path / 'a.png', 'ms', 1e3)
    (axes,) = drawn[0].axes
    ours, theirs = axes.patches
    assert (ours.get_width(), theirs.get_width()) == (2000, 4000)
    assert ours.get_facecolor() != theirs.get_facecolor()


def test_a_spread_that_draws_cannot_tell_has_no_line_of_equal_work():
    points = {
        'sensitivity, one': (40.0, 0.5),
        'sensitivity, exact': (90.0, 0.0),
        'Jacobian, one': (40.0, float('inf')),
    }
    sensitivity, jacobian = regularizers._scatter(points).axes
    assert len(sensitivity.lines) == 1 and not jacobian.lines
    times, spread = sensitivity.lines[0].get_data()
    np.testing.assert_allclose(times * (spread / 100) ** 2, 40 * 0.5**2, rtol=1e-6)


def test_a_plot_of_devices_shows_shares_of_work_and_ratios_of_time():
    counted = {n: {'step': {'flops': 8e9 / n, 'collectives': {}}} for n in (1, 2, 4)}
    seconds = {'step, 1': (2.0, 4.0), 'step, 2': (1.0, 2.0), 'step, 4': (3.0, 6.0)}
    work, time = scaling.figure(counted, harness.Measurement(seconds)).axes
    np.testing.assert_allclose(work.lines[0].get_ydata(), [1, 0.5, 0.25])
    np.testing.assert_allclose(time.lines[0].get_ydata(), [1, 0.5, 1.5])


def test_the_choice_of_normalisation_is_the_one_that_runs(monkeypatch):
    module = models.create('cifar_resnet20', num_classes=10)
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), 'f4')

    def normalisations():
        seen = []

        def note(run, arguments, options, context):
            if 'BatchNorm' in type(context.module).__name__:
                seen.append((type(context.module), context.module.momentum, context.module.epsilon))
            return run(*arguments, **options)

        with nn.intercept_methods(note):
            jax.eval_shape(functools.partial(module.init, train=True), jax.random.key(0), image)
        return set(seen)

    assert normalisations() == {(BatchNorm, 0.9, 1e-5)}
    monkeypatch.setattr(common, 'BatchNorm', common.BatchNorm)
    choices.normalise_by_flax()
    assert normalisations() == {(nn.BatchNorm, 0.9, 1e-5)}


def test_flax_s_relu_takes_the_place_of_ours(monkeypatch):
    monkeypatch.setattr(common, 'ACTIVATIONS', common.ACTIVATIONS)
    assert common.ACTIVATIONS['relu'] is common.relu
    module = models.create('mlp', num_classes=3, hidden=(4,))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 1))
    variables = module.init(jax.random.key(1), x)
    program = lambda: str(jax.make_jaxpr(module.apply)(variables, x))  # noqa: E731
    ours = program()
    choices.rectify_by_flax()
    assert common.ACTIVATIONS['relu'] is nn.relu
    assert ' max ' in program() and ' max ' not in ours


def test_a_device_is_chosen_for_this_process_and_its_workers(monkeypatch):
    updates = {}
    monkeypatch.setattr(harness.jax.config, 'update', updates.__setitem__)
    monkeypatch.setattr(harness.os, 'environ', {})
    assert harness.device() == 'cpu'
    harness.use_device('gpu')
    assert harness.device() == 'gpu' and updates['jax_platforms'] == 'cuda,cpu'
    assert updates['jax_default_matmul_precision'] == 'highest'
    assert harness.os.environ['NVIDIA_TF32_OVERRIDE'] == '0'
    harness.use_device('cpu')
    assert harness.device() == 'cpu' and updates['jax_platforms'] == 'cpu'


def test_a_gpu_is_left_as_it_is_when_jax_is_set_up(monkeypatch):
    monkeypatch.setattr(harness, 'device', lambda: 'gpu')
    monkeypatch.setattr(harness.parallel, 'use_cpu_devices', lambda *_: pytest.fail('of a CPU'))
    monkeypatch.setattr(harness.onednn, 'use_onednn', lambda: pytest.fail('of a CPU'))
    assert harness.start_jax(128).size == 1


def test_the_machine_line_names_a_gpu_and_its_precision():
    description = {
        'cpu': 'C', 'cores': 2, 'memory_gib': 1.0, 'system': 'S', 'python': '3', 'versions': {},
    }  # fmt: skip
    line = harness.machine_line({**description, 'accelerator': 'NVIDIA H100'})
    assert 'NVIDIA H100 (TF32 off on both sides)' in line
    assert 'TF32' not in harness.machine_line({**description, 'accelerator': 'cpu'})


def test_collectives_are_counted():
    program = (
        '  %a = f32[3] all-reduce(%b), replica_groups={}\n'
        '  %c = (f32[3], f32[3]) all-reduce-start(%b)\n'
        '  %d = f32[3] all-reduce-done(%c)\n'
        '  %e = f32[8] all-gather(%d)\n'
        '  %all-to-all.1 = f32[8] add(%e, %e)\n'
    )
    assert scaling.collectives(program) == {'all-gather': 1, 'all-reduce': 2}


def test_the_first_round_of_autoattack_stands_apart():
    seconds = {
        attacks.GRADIENTS: (2.0, 2.0, 2.0),
        attacks.FORWARDS: (1.0, 1.0, 1.0),
        'neurosens autoattack': (100.0, 40.0, 40.0),
        'torchattacks autoattack': (50.0, 60.0, 60.0),
    }
    needed = {'gradients': 200.0, 'forwards': 0.0}
    first, later = attacks.ensemble_rows('N', harness.Measurement(seconds), needed)
    assert first[:4] == ('N', 'first', '100', '50') and later[:4] == ('N', 'later', '40', '60')
    assert first[4].startswith('0.50') and later[4].startswith('1.50')
    assert '20' in first[5] and '50' in later[5]
    alone = harness.Measurement({name: values[:1] for name, values in seconds.items()})
    assert attacks.ensemble_rows('N', alone, needed) == [first]


def test_steps_stand_beside_plain_calls_and_the_peak_of_convolutions():
    measured = harness.Measurement(
        {
            attacks.GRADIENTS: (2.0, 2.0),
            'neurosens pgd': (1.0, 1.0),
            'torchattacks pgd': (4.0, 4.0),
            'torchattacks, compiled pgd': (3.0, 3.0),
        }
    )
    # Twenty gradients would take half a second at the peak.
    timed = attacks.Timed(measured, '', {}, {attacks.GRADIENTS: (0.5, 0.5)})
    table = attacks.steps_table(timed, attacks.setting('resnet20', pgd_steps=20))
    rows = {row[0].strip('*'): row[3:] for row in cells_of(table)[2:]}
    assert rows == {
        attacks.GRADIENTS: ['-', '-', '25 %'],
        'neurosens pgd (20 steps)': ['-', '200 %', '50 %'],
        'torchattacks pgd': ['4.00', '50 %', '12 %'],
        'torchattacks, compiled pgd': ['3.00', '67 %', '17 %'],
    }
    assert '**torchattacks, compiled pgd**' in table


def test_deepfool_is_timed_where_it_takes_all_steps():
    taken = []

    def step_counter(forward, variables, x, y, key, *, threat, steps):
        taken.append((isinstance(x, jax.core.Tracer), threat, steps))
        return y + variables

    one = attacks._OVERHEADS['deepfool']
    threat = attacks.attacks.Threat('linf', 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks.attacks, 'deepfool', step_counter)
        unit = attacks._overhead_unit(one, (None, 1, np.ones(2), np.zeros(2), 0), threat)
        assert np.asarray(unit()).tolist() == [1, 1]
        patch.setattr(attacks.attacks, 'pgd', step_counter)
        attacks._overhead_unit(
            attacks._OVERHEADS['pgd'], (None, 1, np.ones(2), np.zeros(2), 0), threat
        )()
    assert taken == [(True, threat, 20), (False, threat, 20)]


def test_the_floor_of_autoattack_counts_what_robust_images_take():
    result = types.SimpleNamespace(
        runs=('apgd-ce', 'fab-t 1', 'square'),
        accuracy=[1.0, 0.5, 0.25, 0.25],
        success=[False, True, True, True],
    )
    setting = Setting(steps=10, queries=100, batch_size=2)
    # Of four images two, one and one are left, in batches of two.
    assert attacks._necessary(result, setting) == {'gradients': 15.0, 'forwards': 50.0}


class FakeWorker:
    """Stands for a worker process: knows details without computing, and every unit."""

    def __init__(self, details):
        self.details = details

    def unit(self, name):
        return lambda: None


MEASURES = ('forward', 'sensitivity', 'ablation', 'statistics')
SIZES = [f'width {size}' for size in neurons.WIDTHS] + [f'depth {size}' for size in neurons.DEPTHS]
PROGRAM = {'flops': 1e9, 'collectives': {'all-reduce': 3}}
CALLS = {f'{shape} {kind}': 10 for shape in convolution.SHAPES for kind in convolution.KINDS}
DETAILS = {
    'harness:prepare_floors': {
        'work': {'matmul': 1e9, 'convolution': 1e9, 'memory': 1e9}, 'fastest': 'a shape'
    },
    'torch_training:check_agreement': {
        'parameters': 7, 'logits': 1e-5, 'losses': 1e-5, 'steps': 3
    },
    'training_step:count': {'flops': 1e9},
    'choices:prepare': {'donated': 2.0 * 2**20},
    'choices:prepare_programs': {'flops': 1e9},
    'convolution:prepare': {'calls': CALLS},
    'torch_convolution:prepare': {'calls': CALLS},
    'batch_norm:prepare': {
        'units': [f'{name}, {kind}' for name in (batch_norm.FORWARD, batch_norm.GRADIENT)
                  for kind in batch_norm.KINDS],
        'flops': 1e9,
    },
    'attack_loop:prepare': {
        'units': [attack_loop.FLOOR, 'neurosens.attacks.pgd'], 'flops': 1e9
    },
    'attacks:prepare': {
        'units': [name for names in attacks.SUBJECTS.values() for name in names
                  if 'neurosens' in name or name[0].isdigit()],
        'flops': dict.fromkeys((attacks.GRADIENTS, attacks.FORWARDS, attacks.JACOBIANS), 1e9),
    },
    'regularizers:prepare': {'temporary': 1.0, 'peak': 2.0, 'flops': 1e9},
    'torch_regularizers:prepare': {'peak': 3.0},
    'neurons:prepare_delta': {
        'units': ['neurosens', 'arithmetic', 'traffic'], 'multiply_compares': 100
    },
    'torch_neurons:prepare_delta': {
        'units': ['slow', 'fast'], 'pairs': {'slow': 512, 'fast': 5_120_000}
    },
    'neurons:prepare_input_gradients': {
        'units': ['neurosens', 'neurosens, forward pass'], 'flops': {'neurosens, forward pass': 1e9}
    },
    'torch_neurons:prepare_input_gradients': {'units': ['loop']},
    'neurons:prepare_probes': {
        'units': ['forward pass', '1 probe', '8 probes'], 'flops': {'forward pass': 1e9}
    },
    'neurons:prepare_logit_gradients': {
        'units': ['neurosens', '10 backward passes, one call each'],
        'flops': {'10 backward passes, one call each': 1e9},
    },
    'torch_neurons:prepare_logit_gradients': {'units': ['loop']},
    'neurons:prepare_few_neurons': {
        'units': ['neurosens', '16 backward passes, one call each'],
        'neurons': 16,
        'classes': 100,
        'flops': {'16 backward passes, one call each': 1e9},
    },
    'neurons:prepare_ablation': {'units': ['neurosens']},
    'torch_neurons:prepare_ablation': {'units': ['loop']},
    'neurons:prepare_memory': {'temporary': 4.0, 'floor': 1.0, 'grown': 2.0},
    'neurons:prepare_scaling': {
        'units': [f'{size} {measure}' for size in SIZES for measure in MEASURES],
        'flops': {f'{size} {measure}': 1e9 for size in SIZES for measure in MEASURES},
    },
    'memory:prepare_pgd': {'temporary': 4.0, 'floor': 1.0, 'peak': 2.0},
    'memory:prepare_delta': {'temporary': 4.0, 'floor': 1.0, 'peak': 2.0},
    'scaling:count': {
        'programs': dict.fromkeys((scaling.TRAINING, scaling.PGD, scaling.DELTA), PROGRAM),
        'least': dict.fromkeys((scaling.TRAINING, scaling.PGD, scaling.DELTA), 1e9),
    },
}  # fmt: skip


@contextlib.contextmanager
def fake_worker(spec):
    factory = spec.factory.removeprefix('benchmarks.')
    if factory == 'attacks:prepare':
        necessary = {'gradients': 30.0, 'forwards': 50.0}
        pathlib.Path(spec.options['output']).write_text(json.dumps(necessary))
    yield FakeWorker(DETAILS.get(factory, {}))


# The others compute in their own process.
REPORTED = [
    subject
    for subject in registry.SUBJECTS.values()
    if not subject.name.startswith(('attack_parity', 'robust_training', 'defenses', 'published'))
    and subject.name not in ('attacks.compile', 'regularizers.variance', 'step_profile')
]


# What has been measured since then is in them, but not all that the script prints by now.
OF_EARLIER_SCRIPTS = {
    'defenses.defended.lenet5',
    'defenses.defended.lenet5_robust',
    'defenses.defended.resnet20',
    'robust_training.cifar10',
    'robust_training.mnist',
}


def shape_of(report):
    """The headers of a report's tables, and whether it says how fast the machine was."""
    headers = re.findall(r'(?m)^(\| .*)\n\| --- \|', report)
    return headers, bool(re.search(r'Peaks\s+in\s+the\s+same\s+rounds', report))


def check_documented(subject, text):
    """Compares a report with what the documentation has of an earlier one."""
    document = (DOCUMENTS / subject.document).read_text(encoding='utf-8')
    documented = document[slice(*documents.blocks(document)[subject.name])]
    same = shape_of(documented) == shape_of(text)
    assert same == (subject.name not in OF_EARLIER_SCRIPTS), (shape_of(documented), shape_of(text))


@pytest.mark.parametrize('subject', REPORTED, ids=lambda subject: subject.name)
def test_every_report_is_made(subject, tmp_path, monkeypatch):
    paths = {**PATHS, 'plot': str(tmp_path / 'figures' / 'plot.png')}
    _, module, *arguments = subject.command(paths, rounds=2)
    files = ['--markdown', str(tmp_path / 'a.md'), '--json', str(tmp_path / 'a.json')]
    monkeypatch.setattr(sys, 'argv', ['x.py', *arguments, *files])
    spec = types.SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, '__main__', types.SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(harness, 'worker', fake_worker)
    monkeypatch.setattr(harness, 'use_device', lambda name: None)
    monkeypatch.setattr(neurons, '_compare', lambda *_, **__: 'All agrees.')
    script = importlib.import_module(module)
    script.main()
    text = (tmp_path / 'a.md').read_text()
    assert text.startswith('```sh\npython -m benchmarks') and '\n> 2' in text
    assert max(map(len, (line for line in text.splitlines() if line[:1] != '|'))) <= 100
    tables = re.findall(r'(?m)^\| .*\n\| --- \|.*\n(?:\|.*\n?)+', text)
    assert tables, 'a report has a table'
    for table in tables:
        assert len({line.count(' | ') for line in table.strip().splitlines()}) == 1
    if subject.name not in ('memory', 'neurons.memory', 'regularizers.memory'):
        assert re.search(r'Peaks\s+in\s+the\s+same\s+rounds', text)
    assert 'Floor' in text and 'share of floor' in text
    check_documented(subject, text)
    assert (tmp_path / 'figures' / 'plot.png').exists() == bool(subject.plot)
    assert json.loads((tmp_path / 'a.json').read_text())['machine']


def test_own_times_of_a_profile_leave_out_what_is_inside():
    events = [
        step_profile.Event(*event)
        for event in (
            ('onednn_convolution.1__onednn$convolution', 0, 10),
            ('while.2', 10, 40),
            ('onednn_convolution.3__onednn$convolution', 12, 20),
            ('while.4', 35, 10),
            ('multiply_add_fusion.5', 36, 5),
            # As on processors where gradients of kernels are products.
            ('while.11', 91, 5),
            ('onednn_product.12', 92, 3),
            # Begins where the loop before ended.
            ('while.6', 50, 20),
            ('bitcast_add_fusion.7', 50, 15),
            ('select_fusion.8', 70, 6),
            ('psum.9', 80, 9),
            ('Rendezvous', 81, 7),
            ('copy.10', 90, 1),
        )
    ]
    found = step_profile.own_times(reversed(events))
    assert list(found.values()) == [(10, 1), (45, 6), (20, 2), (6, 1), (9, 2), (1, 1)]


def test_a_profile_is_a_table_of_a_step_on_a_device(tmp_path, monkeypatch):
    mesh = types.SimpleNamespace(size=2)
    # A convolution, sums of a normalisation and elementwise operations, one after the other.
    events = [
        step_profile.Event('onednn_convolution.1', 0, 40e6),
        step_profile.Event('while.2', 40e6, 5e6),
        step_profile.Event('multiply_add_fusion.3', 45e6, 5e6),
    ]
    monkeypatch.setattr(harness, 'use_device', lambda name: None)
    monkeypatch.setattr(harness, 'start_jax', lambda batch_size: mesh)
    monkeypatch.setattr(training_step, 'training_unit', lambda *_: lambda: None)
    monkeypatch.setattr(training_step, 'step_flops', lambda batch_size: 3e9)
    peak = harness.Floors(*[(1e12,) * 3] * 3, 'a shape')
    seconds = harness.Measurement({'step': (0.03,) * 3})
    monkeypatch.setattr(harness, 'beside_floors', lambda units, rounds: (seconds, peak))
    monkeypatch.setattr(step_profile, 'profiled', lambda unit: [events, events])
    monkeypatch.setattr(step_profile, 'normalised_bytes', lambda batch_size: batch_size * 1e6)
    spec = types.SimpleNamespace(name='benchmarks.step_profile')
    monkeypatch.setitem(sys.modules, '__main__', types.SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, 'argv', ['x.py', '--steps', '5', '--markdown', str(tmp_path / 'a.md')])
    step_profile.main()
    text = (tmp_path / 'a.md').read_text()
    # Five steps of 3 ms at the peak took 30 ms; two thirds of a step are that of convolutions.
    assert re.search(r'a\s+step\s+took\s+6\s+ms,\s+50\s+%', text)
    rows = cells_of(text)
    assert rows[2] == [step_profile.KINDS[0], '0', '8.0', '25 %']
    assert rows[3][3] == '-' and rows[-1] == ['all', '1', '10.0', '30 %']
    # 3 and 5 times 128 MB at 1 TB/s, of a millisecond each.
    assert rows[4][2:] == ['1.0', '38 %'] and rows[5][2:] == ['1.0', '64 %']
    assert 'the 128 MB of the' in ' '.join(text.split())
    monkeypatch.setattr(sys, 'argv', ['x.py', '--batch_size', '64'])
    with pytest.raises(SystemExit, match='64 images are 32 on each of 2 devices'):
        step_profile.main()


def test_normalisations_of_all_blocks_are_read():
    sizes = 7 * 32 * 32 * 16 + 6 * 16 * 16 * 32 + 6 * 8 * 8 * 64
    assert step_profile.normalised_bytes(3) == 3 * 4 * sizes


def test_the_network_of_mnist_is_that_of_its_config():
    settings = runpy.run_path(str(REPOSITORY / 'configs' / 'mnist.py'))['get_config']()
    model, options = training_step._NETWORKS['mnist']
    assert (model, options) == (settings.model, settings.model_options)


def test_every_kind_of_normalisation_is_a_program_of_its_own():
    module = BatchNorm(use_running_average=True, epsilon=0.0)
    variables = {
        'params': {'scale': np.full(2, 2.0), 'bias': np.full(2, 3.0)},
        'batch_stats': {'mean': np.ones(2), 'var': np.full(2, 4.0)},
    }
    x = np.full((1, 2), 5.0, np.float32)
    found = [
        float(batch_norm._unit(module.apply, interceptor, (variables, x))()[0, 0])
        for interceptor in batch_norm.KINDS.values()
    ]
    assert found == [(5 - 1) / 2 * 2 + 3, 5 + 3, 5]


# ------------------------------------------------- reports of what is kept in the output folder


def made(monkeypatch, script, name, tmp_path):
    """Runs a subject of the registry; returns its report."""
    subject = registry.SUBJECTS[name]
    paths = {**PATHS, 'output': str(tmp_path / 'kept'), 'plot': str(tmp_path / 'plot.png')}
    _, module, *arguments = subject.command(paths)
    monkeypatch.setattr(sys, 'argv', ['x.py', *arguments, '--markdown', str(tmp_path / 'a.md')])
    spec = types.SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, '__main__', types.SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(harness, 'use_device', lambda name: None)
    monkeypatch.setattr(harness, 'start_jax', lambda batch_size: None)
    script.main()
    assert (tmp_path / 'plot.png').exists() == bool(subject.plot)
    text = (tmp_path / 'a.md').read_text()
    assert text.startswith('```sh\npython -m benchmarks') and '\n> 2' in text
    check_documented(subject, text)
    return text


def cells_of(text):
    return [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('| ')
    ]


def test_ways_of_training_are_averaged_over_seeds(tmp_path, monkeypatch):
    from benchmarks import robust_training

    kept, calls = tmp_path / 'kept', []

    def run(setting, method, seed, folder, arguments):
        del folder
        calls.append((method, seed))
        assert arguments.queries == 1000 and arguments.attacks == ['apgd-ce', 'apgd-t', 'square']
        share = 0.1 * seed
        clean = {'clean': 0.9, 'clean_of_attacked': 0.95, 'noise': 0.8}
        warnings = {'linf': ['single_step'] if seed else [], 'l2': [], 'l1': ['Too few classes.']}
        robust = {'linf': share, 'l2': 2 * share, 'l1': 3 * share}
        return {**clean, **robust, 'warnings': warnings if method.objective == 'pgd' else {}}

    def costs(setting, data_dir):
        del data_dir
        return harness.Measurement(dict.fromkeys(setting.methods, (1.0, 2.0)))

    monkeypatch.setattr(robust_training, 'run', run)
    monkeypatch.setattr(robust_training, 'costs', costs)
    text = made(monkeypatch, robust_training, 'robust_training.mnist', tmp_path)
    methods = robust_training.SETTINGS['mnist'].methods
    assert len(calls) == 3 * len(methods) == len(list(kept.glob('*.json')))
    header, _, *rows = cells_of(text)
    of_all = ['clean %', 'clean %, attacked images', 'noise 0.3']
    robust = ['linf 0.1', 'l2 1', 'l1 5']
    assert header[1:] == [*of_all, *robust, 'warnings, of seeds', 'step / standard']
    assert [row[0] for row in rows] == list(methods)
    shares = ['90.0 ± 0.0', '95.0 ± 0.0', '80.0 ± 0.0', '10.0 ± 10.0']
    assert all(row[1:5] == shares for row in rows)
    warned = {row[0]: row[7] for row in rows}
    assert warned['standard'] == '-'
    assert warned['PGD-7 training'] == 'Too few classes., l1: 3 of 3; single step, linf: 2 of 3'
    # What is there is not made again.
    assert cells_of(made(monkeypatch, robust_training, 'robust_training.mnist', tmp_path))
    assert len(calls) == 3 * len(methods)
    made(monkeypatch, robust_training, 'robust_training.cifar10', tmp_path)
    assert len(calls) == 3 * len(methods) + len(robust_training.SETTINGS['cifar10'].methods)


def test_what_is_kept_is_of_the_same_settings(tmp_path, monkeypatch):
    def make(value):
        return harness.kept(tmp_path, 'a', {'images': 8}, lambda: value)

    assert make([1]) == make([2]) == [1]
    assert harness.kept(tmp_path, 'a', {'images': 9}, lambda: [3]) == [3]
    assert harness.kept(tmp_path, 'b', {'images': 8}, lambda: [4]) == [4]
    # Nor is what ran elsewhere taken for what would run here, or half a file for a whole one.
    described = harness.machine()
    monkeypatch.setattr(harness, 'machine', lambda: {**described, 'accelerator': 'another'})
    with pytest.raises(ZeroDivisionError):
        harness.kept(tmp_path, 'a', {'images': 8}, lambda: 1 / 0)
    assert make([5]) == [5]
    monkeypatch.undo()
    assert make([6]) == [1]


@pytest.fixture
def defences(tmp_path, monkeypatch):
    """The script, with networks that are never used."""
    script = pytest.importorskip('benchmarks.defenses', exc_type=ImportError)

    def load(name, arguments, mesh):
        return script.Problem(name, script.SETTINGS[name], *[None] * 4, mesh)

    monkeypatch.setattr(script, 'load', load)
    return script


@pytest.mark.parity
def test_every_defence_has_a_row_for_each_radius(defences, tmp_path, monkeypatch):
    def found(problem, defence, folder):
        (folder / f'{problem.name}_{defence.name}').mkdir(exist_ok=True)
        if defence.name == 'inverse_perturbation':
            (folder / f'{problem.name}_{defence.name}' / 'defense_shifts.png').write_bytes(b'plot')
        facts = {
            'defense/undefended/clean_accuracy': 0.99,
            'defense/clean_accuracy': 0.98,
            'defense/relative_cost': 7.04,
            'defense/images': 128,
            'defense/masking/passed': defence.name != 'inverse_perturbation',
        }
        for eps in problem.setting.eps:
            threat = f'linf-{eps:.3g}'
            first = eps == problem.setting.eps[0]
            facts |= {
                f'defense/masking/{threat}/passed': not first,
                f'defense/masking/{threat}/eps': eps,
                f'defense/masking/{threat}/monotone': True,
                f'defense/masking/{threat}/single_step': not first,
                f'defense/masking/{threat}/single_step/pgd': 3,
                f'defense/masking/{threat}/black_box': None if first else True,
                f'defense/masking/{threat}/transfer': None,
            }
            for place, kind in enumerate(('undefended', 'static', 'all')):
                facts[f'defense/worst/{kind}-{threat}'] = (3 - place) / 10
            facts[f'defense/worst/all-{threat}/low'] = 0.05
            facts[f'defense/worst/all-{threat}/high'] = 0.15
            facts[f'defense/static/pgd-{threat}'] = 0.4
            facts[f'defense/adaptive/apgd_dlr_soft-{threat}'] = 0.12
            facts[f'defense/adaptive/pgd_soft-{threat}'] = 0.15
            facts[f'defense/adaptive/pgd-{threat}'] = 0.2
            facts[f'defense/success_rate/pgd-{threat}'] = 0.25
            facts[f'defense/success_rate/pgd-{threat}/fooled'] = 8
            facts[f'defense/missed_by_gradients/{threat}'] = 2
            for rho in problem.setting.rho:
                facts[f'defense/control/pgd-{threat}/random/{rho:g}'] = rho
            facts[f'defense/shift/pgd-{threat}/act2/front'] = -2.5
            facts[f'defense/shift/pgd-{threat}/act2/middle'] = None
            facts[f'defense/shift/pgd-{threat}/act2/tail'] = 0.5
            for group in ('front', 'middle', 'tail'):
                facts[f'defense/noise_shift/pgd-{threat}/act2/{group}'] = 0.125
        return facts

    monkeypatch.setattr(defences, '_defended', found)
    text = made(monkeypatch, defences, 'defenses.defended.lenet5', tmp_path)
    assert (tmp_path / 'plot.png').read_bytes() == b'plot'
    rows = [row for row in cells_of(text) if row[0] in defences.SETTINGS]
    assert len(rows) == 3 * 2
    assert rows[0] == [
        *('lenet5', 'inverse perturbation', '0.1', '99.0', '98.0', '30.0', '20.0', '25.0 of 8'),
        *('10.0 (5.0-15.0)', '12.0, adaptive/apgd dlr soft', '2 of 128', 'single step of 2', '7.0'),
    ]
    assert rows[1][-2] == rows[3][-2] == '- of 3' and rows[2][-2] == 'single step of 2'
    cells = cells_of(text)
    assert ['its own', '20.0', '20.0'] in cells and ['soft choices', '12.0', '12.0'] in cells
    assert ['single candidates', '-', '-'] in cells
    assert ['pgd-linf-0.1', 'random', '1.0', '3.0', '10.0', '30.0'] in cells
    assert ['pgd-linf-0.3', '-2.50', '-', '+0.50'] in cells
    assert ['noise of the size of pgd-linf-0.3', '+0.12', '+0.12', '+0.12'] in cells
    assert len(re.findall(r'(?m)^\| --- \|', text)) == 4
    for network in defences.SETTINGS:
        assert f'| {network} |' in made(
            monkeypatch, defences, f'defenses.defended.{network}', tmp_path
        )


@pytest.mark.parity
def test_a_stopped_run_of_curves_goes_on_where_it_was(defences, tmp_path, monkeypatch):
    problem = types.SimpleNamespace(name='net', setting=(), forward='plain')
    changed = {
        'prune most': {'10': defences.Changed('a'), '20': defences.Changed('b')},
        'prune least': {'10': defences.Changed('c', {'soft': 'surrogate'})},
    }
    measured, fails = [], ['c']

    def accuracies(problem, model, surrogates):
        if model in fails:
            raise KeyboardInterrupt
        measured.append(model)
        return {'clean': len(measured), 'through': len(surrogates)}

    monkeypatch.setattr(defences, '_accuracies', accuracies)
    monkeypatch.setattr(defences, '_changed', lambda problem: changed)
    with pytest.raises(KeyboardInterrupt):
        defences.found_curves(problem, tmp_path)
    assert measured == ['plain', 'a', 'b']
    fails.clear()
    found = defences.found_curves(problem, tmp_path)
    assert measured == ['plain', 'a', 'b', 'c']
    plain, (a, b, c) = {'clean': 1, 'through': 0}, range(2, 5)
    assert found == {
        'prune most': {
            '0': plain,
            '10': {'clean': a, 'through': 0},
            '20': {'clean': b, 'through': 0},
        },
        'prune least': {'0': plain, '10': {'clean': c, 'through': 1}},
    }
    # All of it is known by now.
    assert defences.found_curves(problem, tmp_path) == found and len(measured) == 4


@pytest.mark.parity
def test_curves_and_filters_have_a_row_for_each_degree_and_network(defences, tmp_path, monkeypatch):
    values = {'clean': 0.9, 'fgsm': 0.5, 'pgd': 0.4, 'apgd_dlr': 0.3, 'square': 0.35, 'worst': 0.2}
    found = {
        'inverse perturbation': {'0': values, '0.1': values},
        'compress/amplify': {'0': values, '1': values},
        'prune most scaled_sensitivity': {'0': values, '10': values},
    }
    facts = {'filters': 32, 'fragile': 13, 'response': 0.00125, 'response_attacked': -0.02}
    facts |= {'agreement_of_accuracy': 0.5, 'agreement_of_loss': -0.25}
    for score in ('l2', 'relative_l2', 'mean_log'):
        for kind in ('score', 'histogram'):
            for of in ('correlation', 'partial'):
                facts[f'targeting_{score}_{kind}_{of}'] = 0.25
                facts[f'targeting_{score}_{kind}_{of}_p'] = 0.0312
    facts['targeting_l2_score_partial'] = None
    monkeypatch.setattr(defences, '_changed', lambda problem: {})
    monkeypatch.setattr(defences, '_curves', lambda *_: found)
    monkeypatch.setattr(defences, '_fragile', lambda problem: facts)
    text = made(monkeypatch, defences, 'defenses.curves.lenet5', tmp_path)
    rows = [row for row in cells_of(text) if row[0] in found]
    assert len(rows) == 6
    assert rows[1][1:] == ['0.1', '90.0', '50.0', '40.0', '30.0', '35.0', '20.0']
    (tmp_path / 'plot.png').unlink()
    text = made(monkeypatch, defences, 'defenses.fragile', tmp_path)
    rows = [row for row in cells_of(text) if row[0] in defences.SETTINGS]
    names = list(defences.SETTINGS)
    assert [row[0] for row in rows] == names + [name for name in names for _ in range(3)]
    assert rows[0][1:] == ['0.1', '32, 13', '+0.125', '-2.000', '+0.50', '-0.25']
    assert rows[3][1:] == ['l2 norm', '+0.25 (0.031)', '-', '+0.25 (0.031)', '+0.25 (0.031)']

"""What the README shows runs as it stands there."""

import inspect
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest

import neurosens as ns
from neurosens import models, training

REPOSITORY = pathlib.Path(__file__).parent.parent
README = (REPOSITORY / 'README.md').read_text(encoding='utf-8')


def test_the_library_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    # The first changes this process; each of the others goes on where the one before ends.
    assert len(examples) == 6 and 'use_onednn' in examples[0]
    exec(compile('\n'.join(examples[1:]), 'README.md', 'exec'), {'__name__': 'readme'})
    out = capsys.readouterr().out
    assert "'conv': ShapeDtypeStruct(shape=(8, 28, 28, 16)" in out
    assert "'head': ShapeDtypeStruct(shape=(8, 10)" in out
    assert '[[' in out, 'the change of the logits is printed'
    assert '(8, 16)' in out, 'one Delta per image and neuron'
    losses = [float(line) for line in out.splitlines()[-3:]]
    assert losses[2] < losses[0], 'the regularized loss falls'
    assert (tmp_path / 'report' / 'neurons' / 'conv.npz').exists()


def test_every_config_is_listed():
    configs = pathlib.Path(__file__).parent.parent / 'configs'
    listed = set(re.findall(r'`(configs/[\w/]+\.py)`', README))
    assert listed == {f'configs/{path.name}' for path in configs.glob('*.py')}


def test_the_training_loop_of_the_docs_runs(capsys):
    text = (REPOSITORY / 'docs' / 'training.md').read_text(encoding='utf-8')
    (example,) = (
        block
        for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL)
        if 'import neurosens' in block
    )
    exec(compile(example, 'training.md', 'exec'), {'__name__': 'training'})
    assert 0 < float(capsys.readouterr().out) < 10


def test_the_report_of_neurons_of_the_docs_is_written(capsys, tmp_path, monkeypatch):
    text = (REPOSITORY / 'docs' / 'neurons.md').read_text(encoding='utf-8')
    *_, example = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, 'neurons.md', 'exec'), {'__name__': 'neurons'})
    assert 'act1: 8 neurons' in capsys.readouterr().out
    written = {path.name for path in (tmp_path / 'report' / 'neurons').iterdir()}
    assert {'neurons.csv', 'agreement.csv', 'agreement.md', 'head-in.npz'} <= written


@pytest.mark.parametrize(
    ('page', 'printed'), [('index.md', r'^\[(\d ){7}\d\] -?\d$'), ('pods.md', r'^\(1\d\d, 16\)$')]
)
def test_the_examples_of_a_page_run(page, printed, capsys):
    text = (REPOSITORY / 'docs' / page).read_text(encoding='utf-8')
    examples = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    # Each goes on where the one before ends.
    exec(compile('\n'.join(examples), page, 'exec'), {'__name__': 'page'})
    assert re.search(printed, capsys.readouterr().out, re.MULTILINE)


@pytest.fixture(scope='module')
def shown():
    """What the examples of guides take as given: a small network, images, and a second network."""
    net = models.create('mlp', num_classes=3, hidden=(16,))
    x = jax.random.uniform(jax.random.key(0), (32, 6, 6, 1))
    variables, other = (net.init(jax.random.key(seed), x) for seed in (1, 2))
    forward = ns.LinenForward(net, {'train': False})
    predictions = forward(variables, x)[0].argmax(-1)
    return {
        '__name__': 'guide',
        'ns': ns,
        'forward': forward,
        'variables': variables,
        'other_forward': forward,
        'other_variables': other,
        'x': x,
        'y': predictions,
        'predictions': predictions,
        'images': x,
        'labels': predictions,
        'key': jax.random.key(3),
    }


def test_the_attacks_of_the_guide_run(shown, capsys):
    text = (REPOSITORY / 'docs' / 'attacks.md').read_text(encoding='utf-8')
    examples = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    pgd, turned, diagnosis, neuron = (dict(shown) for _ in examples)
    for example, names in zip(examples, (pgd, turned, diagnosis, neuron)):
        exec(compile(example, 'attacks.md', 'exec'), names)
    largest = abs(pgd['result'].x_adv - shown['x']).max()
    assert 0 < largest <= 8 / 255 + 1e-6 and pgd['result'].queries.shape == (32,)
    assert turned['turned'].x_adv.shape == shown['x'].shape
    out = capsys.readouterr().out
    assert 'gradient masking, linf 0.1, 32 images' in out and 'transfer' in out
    assert re.search(r'(?m) (True|False)$', out), 'whether it passed is printed'
    moved = neuron['result'].x_adv - shown['x'][:, None]
    assert moved.shape[:2] == neuron['neurons'].shape == (32, 16)
    assert 0 < jnp.sqrt((moved**2).sum((2, 3, 4))).max() <= 0.5 + 1e-5


def test_the_defence_of_the_guide_runs(shown, tmp_path, monkeypatch):
    text = (REPOSITORY / 'docs' / 'defenses.md').read_text(encoding='utf-8')
    (example,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = dict(shown)
    exec(compile(example, 'defenses.md', 'exec'), names)
    kept = ns.defenses.load('runs/digits/defense', variables=shown['variables'])
    chex.assert_trees_all_equal(kept, names['parameters'])
    logits = names['defended'](shown['variables'], names['found'].x_adv)[0]
    assert (names['found'].success == (logits.argmax(-1) != shown['y'])).all()


def test_every_page_and_only_those_are_in_the_navigation():
    config = (REPOSITORY / 'mkdocs.yml').read_text(encoding='utf-8')
    listed = set(re.findall(r': ([\w/]+\.md)$', config, re.MULTILINE))
    pages = {path.relative_to(REPOSITORY / 'docs') for path in (REPOSITORY / 'docs').rglob('*.md')}
    assert listed == {path.as_posix() for path in pages}


@pytest.mark.parametrize(
    'name',
    [
        name
        for name in ns.__all__
        if hasattr(getattr(ns, name), '__path__')  # a package, which says what is public
    ],
)
def test_the_reference_has_every_public_name(name):
    text = (REPOSITORY / 'docs' / 'api' / f'{name}.md').read_text(encoding='utf-8')
    members = ', '.join(re.findall(r'members: \[(.*)\]', text)).split(', ')
    alone = re.findall(rf'^::: neurosens\.{name}\.(\w+)$', text, re.MULTILINE)
    described = re.findall(r'`(\w+)`', ''.join(re.findall(r'^### .*', text, re.MULTILINE)))
    assert not set(getattr(ns, name).__all__) - {*members, *alone, *described}


def test_every_objective_and_regularizer_is_documented():
    text = (REPOSITORY / 'docs' / 'training.md').read_text(encoding='utf-8')
    listed = set(re.findall(r'^\| `(\w+)` \|', text, re.MULTILINE))
    assert listed == {*training.OBJECTIVES, *training.REGULARIZERS}


@pytest.mark.parametrize('name', training.OBJECTIVES)
def test_every_option_of_an_objective_is_documented(name):
    """In the guide, and one by one in the reference."""
    text = (REPOSITORY / 'docs' / 'training.md').read_text(encoding='utf-8')
    options = text.split('\nTheir options,')[1].split('\n## ')[0]
    factory = training.OBJECTIVES[name]
    for option in inspect.signature(factory).parameters:
        assert f'`{option}`' in options, option
        assert re.search(rf'^ +{option}: ', factory.__doc__, re.MULTILINE), option
    reference = (REPOSITORY / 'docs' / 'api' / 'training.md').read_text(encoding='utf-8')
    members = re.search(rf'::: {factory.__module__}\n.*\n +members: \[(.*)\]', reference).group(1)
    assert name in members.split(', ')


@pytest.mark.parametrize('name', training.REGULARIZERS)
def test_every_option_of_a_regularizer_is_documented(name):
    factory = training.REGULARIZERS[name]
    for option in inspect.signature(factory).parameters:
        assert re.search(rf'^ +{option}: ', factory.__doc__, re.MULTILINE), option
    reference = (REPOSITORY / 'docs' / 'api' / 'regularizers.md').read_text(encoding='utf-8')
    assert re.search(rf'members: \[.*\b{name}\b.*\]', reference)


def test_the_guide_lists_no_configs_in_which_nothing_is_watched():
    """Such a list would have to follow the configs."""
    text = (REPOSITORY / 'docs' / 'training.md').read_text(encoding='utf-8')
    watched = text.split('\n## What is watched')[1].split('\n## ')[0]
    assert 'every config that does not set `monitor.images`' in ' '.join(watched.split())
    assert not re.findall(r'configs/|\w+\.py', watched.replace('evaluate.py', ''))

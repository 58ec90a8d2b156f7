"""Settings: overrides on the command line, their checks, and what a checkpoint stores."""

import copy
import dataclasses
import json
import pathlib

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from neurosens import command_line
from neurosens import config as config_lib
from neurosens.config import Config, ConfigError, Evaluation, Optimizer, Schedule

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 'configs'
DIGITS = CONFIGS / 'digits.py'


def parse(*arguments):
    own = flags.FlagValues()
    flags.DEFINE_string('workdir', '', 'A directory.', flag_values=own)
    flags.DEFINE_boolean('progress', True, 'Whether to show it.', flag_values=own)
    return command_line.parse(arguments, own, DIGITS)


def overridden(*arguments):
    """The settings that the arguments change, by dotted key."""
    before, after = (config_lib.flatten(parse(*a).config) for a in ((), arguments))
    return {key: after[key] for key in after if after[key] != before[key]}


def refusal(*arguments):
    """The sentence that the arguments are refused with."""
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    sentence = str(error.value)
    assert '\n' not in sentence and sentence.endswith('.')
    return sentence


# ------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ('argument', 'key', 'value'),
    [
        ('--config.steps=5', 'steps', 5),
        ('--config.epochs=2.5', 'epochs', 2.5),
        ('--config.epochs=3', 'epochs', 3.0),
        ('--config.optimizer.learning_rate=1e-3', 'optimizer.learning_rate', 1e-3),
        ('--config.optimizer.nesterov=false', 'optimizer.nesterov', False),
        ('--noconfig.optimizer.nesterov', 'optimizer.nesterov', False),
        ('--config.model=mlp', 'model', 'mlp'),
        ('--config.schedule.name=onecycle', 'schedule.name', 'onecycle'),
        ('--config.schedule.boundaries=(0.1, 0.2, 0.3)', 'schedule.boundaries', [0.1, 0.2, 0.3]),
        ('--config.evaluation.eps=(0.25,)', 'evaluation.eps', [0.25]),
        ('--config.evaluation.eps=(1, 2)', 'evaluation.eps', [1.0, 2.0]),
        ('--config.evaluation.eps=()', 'evaluation.eps', []),
        ('--config.evaluation.attacks=("pgd",)', 'evaluation.attacks', ['pgd']),
        ('--config.model_options={"hidden": (64,)}', 'model_options', {'hidden': [64]}),
        (
            '--config.regularizers={"small": {"weight": 0.5}}',
            'regularizers',
            {'small': {'weight': 0.5}},
        ),
    ],
)
def test_a_setting_of_any_type_can_be_overridden(argument, key, value):
    assert overridden(argument) == {key: value}
    name, text = argument.split('=', 1) if '=' in argument else (argument, None)
    if text is not None and key != 'optimizer.nesterov':
        assert overridden(name, text) == {key: value}


def test_the_types_of_overrides_are_those_of_the_fields():
    config = parse(
        '--config.epochs=3',
        '--config.evaluation.eps=(1, 0.5)',
        '--config.model_options={"a": (1,)}',
    ).config
    assert type(config.epochs) is float
    assert config.evaluation.eps == (1.0, 0.5)
    assert [type(eps) for eps in config.evaluation.eps] == [float, float]
    assert config.model_options == {'a': (1,)}


def test_of_two_overrides_the_last_one_counts():
    assert overridden('--config.steps=1', '--config.steps=2') == {'steps': 2}


def test_an_override_leaves_the_given_config_as_it_is():
    config = Config()
    changed, _ = command_line.override(
        config,
        ['--config.steps=9', '--config.optimizer.momentum=0.5', '--config.evaluation.eps=(1,)'],
        flags.FlagValues(),
    )
    assert config == Config()
    assert (changed.steps, changed.optimizer.momentum, changed.evaluation.eps) == (9, 0.5, (1.0,))


def test_flags_of_the_script_are_returned_beside_the_config():
    command = parse('--workdir=here', '--config.steps=3', '--noprogress')
    assert command.flags == {'workdir': 'here', 'progress': False}
    assert command.config.steps == 3
    assert parse().flags == {'workdir': '', 'progress': True}


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('key', 'value', 'kind'),
    [
        ('steps', '5.5', 'int'),
        ('steps', 'many', 'int'),
        ('steps', 'True', 'int'),
        ('epochs', 'long', 'float'),
        ('optimizer.nesterov', 'maybe', 'bool'),
        ('optimizer.accumulate', '1.5', 'int'),
        ('model_options', '3', 'dict'),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_right_one(key, value, kind):
    expected = f'Config key {key!r} cannot take {value!r}; it must be of type {kind}.'
    assert refusal(f'--config.{key}={value}') == expected


@pytest.mark.parametrize(
    ('key', 'value', 'kind'),
    [
        ('evaluation.eps', '("a",)', 'float'),
        ('evaluation.eps', '(True,)', 'float'),
        ('evaluation.eps', '(0.1, None)', 'float'),
        ('evaluation.attacks', '(1,)', 'str'),
    ],
)
def test_an_item_of_another_type_is_refused_with_the_right_one(key, value, kind):
    sentence = refusal(f'--config.{key}={value}')
    assert sentence.startswith(f'{key} holds ')
    assert sentence.endswith(f'every item must be of type {kind}.')


@pytest.mark.parametrize(
    ('key', 'close'),
    [
        ('epoch', 'epochs'),
        ('learning_rate', 'optimizer.learning_rate'),
        ('optimiser.name', 'optimizer.name'),
        ('optimizer.learnin_rate', 'optimizer.learning_rate'),
        ('evaluation.epsilon', 'evaluation.eps'),
        ('optimizer.name.x', 'optimizer.name'),
        ('model_options.hidden', 'model_options'),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_ones(key, close):
    for argument in (f'--config.{key}=1', f'-config.{key}=1', f'--noconfig.{key}'):
        sentence = refusal(argument)
        assert sentence.startswith(f"Unknown config key '{key}'; the closest names are ")
        assert close in sentence


def test_a_key_like_no_other_is_refused_with_all_keys():
    sentence = refusal('--config.zzz=1')
    assert all(key in sentence for key in config_lib.flatten(Config()))


@pytest.mark.parametrize('group', ['optimizer', 'schedule', 'evaluation'])
def test_a_group_cannot_be_set_as_a_whole(group):
    sentence = refusal(f'--config.{group}=1')
    assert sentence.startswith(f"Config key '{group}' is a group; set one of {group}.")
    fields = dataclasses.fields(getattr(Config(), group))
    assert all(f'{group}.{field.name}' in sentence for field in fields)


@pytest.mark.parametrize(
    ('argument', 'sentence'),
    [
        ('batch_size=0', 'batch_size is 0; it must be at least 1.'),
        ('epochs=0', 'epochs is 0.0; it must be greater than 0.'),
        ('optimizer.momentum=1', 'optimizer.momentum is 1.0; it must be at least 0, less than 1.'),
        ('schedule.end=1.5', 'schedule.end is 1.5; it must be at least 0, at most 1.'),
        (
            'schedule.boundaries=(0.5, 1.0)',
            'schedule.boundaries item is 1.0; it must be greater than 0, less than 1.',
        ),
        ('evaluation.eps=(0.1, -0.1)', 'evaluation.eps item is -0.1; it must be at least 0.'),
        ('evaluation.eps=(0.0314, 0.03137)', 'evaluation.eps holds 0.0314 and 0.03137, which'),
        ('evaluation.eps=(0.1, 0.1)', 'evaluation.eps holds 0.1 and 0.1, which are the same'),
        ('epochs=nan', 'epochs is nan; it must be finite, greater than 0.'),
        ('optimizer.learning_rate=1e400', 'optimizer.learning_rate is inf; it must be finite, '),
        ('seed=-1', 'seed is -1; it must be at least 0, at most '),
        ('dtype=float16', "Unknown dtype 'float16'; valid names are float32, bfloat16."),
        (
            'evaluation.norm=l3',
            "Unknown evaluation.norm 'l3'; valid names are linf, l2, l1, l0, spatial.",
        ),
        ('evaluation.attacks=("carlini_wagner",)', "evaluation.attacks has 'carlini_wagner', "),
        (
            'evaluation.target=next',
            "Unknown evaluation.target 'next'; valid names are most_likely, least_likely, random.",
        ),
        ('evaluation.queries=0', 'evaluation.queries is 0; it must be at least 1'),
        ('evaluation.split=train', "Unknown evaluation.split 'train'; valid names are "),
        ('evaluation.attacks=("cw",)', "Unknown evaluation.attacks item 'cw'; valid names are "),
        (
            'neurons.fragile=often',
            "Unknown neurons.fragile 'often'; valid names are mean, median, zero, a number.",
        ),
        ('neurons.ranking=size', "Unknown neurons.ranking 'size'; valid names are scaled, "),
        ('neurons.ablation=mask', "Unknown neurons.ablation 'mask'; valid names are activation, "),
        ('neurons.score=loss', "Unknown neurons.score 'loss'; valid names are logit, probability."),
        ('neurons.search_limit=-1.0', 'neurons.search_limit is -1.0; it must be'),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(argument, sentence):
    assert refusal(f'--config.{argument}').startswith(sentence)


def test_a_defence_is_not_evaluated_against_motions():
    config = Config()
    config.defense.name = 'pruning'
    config.evaluation.norm, config.evaluation.attacks = 'spatial', ('spatial',)
    config.defense.attacks = ('spatial',)
    with pytest.raises(ConfigError, match='evaluate the defence in linf, l2 or l1'):
        config_lib.validate(config)


def test_kept_parameters_of_a_defence_need_its_name_and_no_options():
    config = Config()
    config.defense.parameters = 'runs/mnist/defense'
    with pytest.raises(ConfigError, match="'runs/mnist/defense', but no defence is named"):
        config_lib.validate(config)
    config.defense.name = 'pruning'
    config_lib.validate(config)
    for name, value in (('options', {'count': 3}), ('images', 5), ('measure', 'ablation')):
        changed = copy.deepcopy(config)
        setattr(changed.defense, name, value)
        with pytest.raises(ConfigError, match=f'defense.{name} is for a calibration'):
            config_lib.validate(changed)


def float_keys():
    groups = {'': Config, 'optimizer.': Optimizer, 'schedule.': Schedule, 'evaluation.': Evaluation}
    for prefix, group in groups.items():
        for field in dataclasses.fields(group):
            if field.type in (float, tuple[float, ...]):
                yield prefix + field.name, field.type is not float


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize(('key', 'many'), list(float_keys()))
def test_no_float_may_be_infinite_or_not_a_number(key, many, value):
    config = Config()
    *group, name = key.split('.')
    holder = getattr(config, group[0]) if group else config
    setattr(holder, name, (0.5, value) if many else value)
    with pytest.raises(ConfigError, match=rf'^{key}( item)? is {value}; it must be .*finite'):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'steps': 1.0}, 'steps is 1.0; it must be of type int.'),
        ({'steps': True}, 'steps is True; it must be of type int.'),
        ({'epochs': '3'}, "epochs is '3'; it must be of type float."),
        ({'epochs': True}, 'epochs is True; it must be of type float.'),
        ({'model': None}, 'model is None; it must be of type str.'),
        ({'model_options': ()}, 'model_options is (); it must be of type dict.'),
        ({'optimizer': {}}, 'optimizer is {}; it must be a Optimizer.'),
        (
            {'evaluation': Evaluation(eps=[0.1])},
            'evaluation.eps is [0.1]; it must be of type tuple.',
        ),
        ({'schedule': Schedule(name=3)}, 'schedule.name is 3; it must be of type str.'),
    ],
)
def test_a_config_file_may_not_mix_up_types(changes, sentence):
    with pytest.raises(ConfigError) as error:
        config_lib.validate(dataclasses.replace(Config(), **changes))
    assert str(error.value) == sentence


def test_an_unknown_flag_is_refused_with_the_closest_one():
    sentence = refusal('--wrokdir=x')
    assert 'wrokdir' in sentence and 'workdir' in sentence


def test_a_positional_argument_is_refused():
    expected = "Unexpected argument 'x'; settings are given as --config.key=value."
    assert refusal('x') == refusal('--config.steps=1', 'x') == expected


@pytest.mark.parametrize('argument', ['--config.steps', '--workdir'])
def test_a_flag_without_its_value_is_refused(argument):
    assert refusal(argument) == f'Missing value for flag {argument}.'


# ----------------------------------------------------------------------------- config files


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_of_the_repository_is_valid(path):
    config = command_line.load_file(path)
    config_lib.validate(config)
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


@pytest.mark.parametrize('form', ['--config={}', '-config={}', '--config {}', '-config {}'])
def test_a_config_file_is_chosen_anywhere_among_the_arguments(tmp_path, form):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from neurosens.config import Config\n\ndef get_config():\n    return Config(seed=77)\n'
    )
    chosen = form.format(file).split()
    for arguments in (
        (*chosen, '--config.steps=3', '--workdir=x'),
        ('--config.steps=3', *chosen, '--workdir=x'),
        ('--config.steps=3', '--workdir=x', *chosen),
    ):
        command = parse(*arguments)
        assert (command.name, command.config) == ('mine', Config(seed=77, steps=3))
        assert command.flags['workdir'] == 'x'


def test_without_a_choice_the_default_file_is_taken():
    assert parse().name == 'digits'
    assert parse().config == command_line.load_file(DIGITS)


@pytest.mark.parametrize('arguments', [['--config='], ['--config'], ['--workdir=x', '--config']])
def test_a_choice_without_a_file_is_refused(arguments):
    assert refusal(*arguments) == '--config needs a file, such as --config=configs/digits.py.'


def test_a_missing_config_file_is_refused_with_those_that_exist(tmp_path):
    assert refusal(f'--config={tmp_path}/x.py') == (
        f"Config file '{tmp_path}/x.py' does not exist; beside it stand (none)."
    )
    for name in ('b.py', 'a.py', 'c.txt'):
        (tmp_path / name).touch()
    assert refusal(f'--config={tmp_path}/x.py') == (
        f"Config file '{tmp_path}/x.py' does not exist; beside it stand {tmp_path}/a.py, "
        f'{tmp_path}/b.py.'
    )


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('import does_not_exist', 'ModuleNotFoundError'),
        ('def get_config(:', 'SyntaxError'),
        ('value = 3', 'AttributeError'),
        (
            'from neurosens.config import Config\ndef get_config(): return Config(step=1)',
            'TypeError',
        ),
        ('def get_config(): return undefined', 'NameError'),
        ('def get_config(): return {"steps": 3}', 'returned a dict; it must return a neurosens'),
        ('def get_config(): pass', 'returned a NoneType; it must return a neurosens'),
    ],
)
def test_a_config_file_that_fails_is_refused_with_the_reason(tmp_path, content, words):
    file = tmp_path / 'bad.py'
    file.write_text(content)
    sentence = refusal(f'--config={file}')
    assert words in sentence and str(file) in sentence


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / 'config.yaml').write_text('steps: 3')
    assert refusal(f'--config={tmp_path}/config.yaml') == (
        f"Config file '{tmp_path}/config.yaml' is not a Python file (.py)."
    )


# -------------------------------------------------------------------------------- storage

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
options = st.recursive(
    values,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)
configs = st.builds(
    Config,
    model=st.text(),
    model_options=st.dictionaries(st.text(), options, max_size=3),
    steps=st.integers(),
    epochs=st.floats(allow_nan=False),
    optimizer=st.builds(Optimizer, nesterov=st.booleans(), momentum=st.floats(0, 1)),
    schedule=st.builds(Schedule, boundaries=st.lists(st.floats(0, 1), max_size=3).map(tuple)),
    evaluation=st.builds(Evaluation, attacks=st.lists(st.text(), max_size=2).map(tuple)),
)


@hypothesis.given(configs)
def test_a_stored_config_comes_back_equal(config):
    stored = config_lib.to_dict(config)
    assert json.loads(json.dumps(stored)) == stored
    assert config_lib.from_dict(stored) == config


@pytest.mark.parametrize(
    ('stored', 'message'),
    [
        ({'stepps': 3}, "Unknown config key 'stepps'"),
        ({'optimizer': {'lr': 0.1}}, "Unknown config key 'optimizer.lr'"),
        ({'optimizer': 3}, 'optimizer is 3; it must be'),
        ({'steps': 'many'}, "steps is 'many'; it must be of type int"),
        ({'evaluation': {'eps': ['a']}}, "evaluation.eps holds 'a'"),
    ],
)
def test_a_stored_config_that_does_not_fit_is_refused(stored, message):
    with pytest.raises(ConfigError, match='^' + message):
        config_lib.from_dict(stored)


def test_a_stored_config_may_lack_keys():
    assert config_lib.from_dict({'steps': 3, 'optimizer': {'momentum': 0.5}}) == Config(
        steps=3, optimizer=Optimizer(momentum=0.5)
    )


def test_flat_keys_are_those_of_the_command_line():
    flat = config_lib.flatten(Config(model_options={'features': (4,)}))
    assert flat['optimizer.learning_rate'] == 0.1
    assert flat['model_options'] == {'features': [4]}
    assert not {'optimizer', 'schedule', 'evaluation'} & flat.keys()
    assert flat == config_lib.flatten(config_lib.to_dict(Config(model_options={'features': (4,)})))


def test_equal_configs_differ_in_no_key():
    config = Config(model_options={'features': (4,)}, evaluation=Evaluation(eps=(0.1,)))
    assert config_lib.differences(config_lib.to_dict(config), config) == {}


def test_differing_keys_are_named_in_full_and_sorted():
    saved = config_lib.to_dict(Config(seed=1, optimizer=Optimizer(momentum=0.5)))
    saved['retired'] = 3
    now = Config(model_options={'hidden': (4,)})
    differing = config_lib.differences(saved, now)
    assert list(differing.items()) == [
        ('model_options', ({}, {'hidden': [4]})),
        ('optimizer.momentum', (0.5, now.optimizer.momentum)),
        ('retired', (3, None)),
        ('seed', (1, 0)),
    ]


def test_regularizers_in_another_order_differ():
    terms = {'jacobian': {'weight': 0.1}, 'activation_norm': {'order': 2, 'weight': 0.2}}
    saved = config_lib.to_dict(Config(regularizers=terms))
    assert config_lib.differences(saved, Config(regularizers=terms)) == {}
    options = {'jacobian': {'weight': 0.1}, 'activation_norm': {'weight': 0.2, 'order': 2}}
    assert config_lib.differences(saved, Config(regularizers=options)) == {}
    turned = Config(regularizers=dict(reversed(terms.items())))
    assert config_lib.differences(saved, turned) == {
        'order of regularizers': (['jacobian', 'activation_norm'], ['activation_norm', 'jacobian'])
    }


def test_a_setting_that_is_newer_than_the_saved_config_had_its_default():
    saved = config_lib.to_dict(Config())
    del saved['schedule']['end'], saved['weights'], saved['monitor']
    assert config_lib.differences(saved, Config()) == {}
    differing = config_lib.differences(saved, Config(schedule=Schedule(end=0.5)))
    assert differing == {'schedule.end': (Schedule().end, 0.5)}


@pytest.mark.parametrize('key', config_lib.FREE_KEYS)
def test_settings_without_influence_on_training_may_differ(key):
    assert key in {field.name for field in dataclasses.fields(Config)}
    values = {'evaluation': Evaluation(eps=(0.9,), split='validation'), 'data_dir': 'elsewhere'}
    changed = dataclasses.replace(Config(), **{key: values.get(key, 9)})
    assert changed != Config()
    assert config_lib.differences(config_lib.to_dict(Config()), changed) == {}


def test_every_other_setting_may_not_differ():
    free = config_lib.FREE_KEYS
    names = [field.name for field in dataclasses.fields(Config) if field.name not in free]
    for name in names:
        saved = config_lib.to_dict(Config())
        saved[name] = {'name': 'other'} if isinstance(saved[name], dict) else 'other'
        assert config_lib.differences(saved, Config()), name


def test_runs_that_would_all_be_the_same_are_refused():
    config = Config()
    config.neurons.attack_restarts = 3
    with pytest.raises(ConfigError, match=r'attack_restarts is 3.*attack_start to .random'):
        config_lib.validate(config)
    config.neurons.attack_start = 'random'
    config_lib.validate(config)

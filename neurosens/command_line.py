"""The command line of the scripts: a config file, overrides of its settings, and own flags.

`--config=FILE` chooses an experiment and `--config.key=value` (dots for nested keys) overrides
single settings, checked against their types. Tuples and dicts are Python literals:
`--config.evaluation.eps="(0.1, 0.2)"`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from absl import flags
from ml_collections import config_flags

from neurosens import _validate
from neurosens.config import Config, ConfigError, flatten, validate


class _DictParser(flags.ArgumentParser):
    """Parses a dict written as a Python literal."""

    def parse(self, argument: Any) -> dict:
        """Returns the dict; raises ValueError for anything else."""
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise ValueError('expected a dict such as "{\'hidden\': (64, 64)}"')
        return value

    def flag_type(self) -> str:
        """The name of the type in help texts."""
        return 'dict'


config_flags.register_flag_parser_for_type(dict, _DictParser())


class Command(NamedTuple):
    """A parsed command line.

    Attributes:
      config: the config with its overrides, validated.
      name: the config file's name without suffix, or ''.
      flags: values of the script's own flags by name.
    """

    config: Config
    name: str
    flags: dict[str, Any]


def load_file(path: str | pathlib.Path) -> Config:
    """Runs a config file.

    Args:
      path: a Python file with a function `get_config()`.

    Returns:
      The `Config` it returns.

    Raises:
      ConfigError: the file is missing, fails, or does not return a `Config`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        here = sorted(str(file) for file in path.parent.glob('*.py')) or ['(none)']
        raise ConfigError(
            f'Config file {str(path)!r} does not exist; beside it stand {", ".join(here)}.'
        )
    spec = importlib.util.spec_from_file_location(f'neurosens_config_{path.stem}', path)
    if spec is None or spec.loader is None:
        raise ConfigError(f'Config file {str(path)!r} is not a Python file (.py).')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (AttributeError, ImportError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f'Config file {str(path)!r} failed with {type(error).__name__}: {error}.'
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f'get_config() of {str(path)!r} returned a {type(config).__name__}; it must return a '
            'neurosens.config.Config.'
        )
    return config


def split_config_argument(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--config=FILE` (or `--config FILE`) out of command-line arguments.

    Returns:
      `(FILE or None, the other arguments)`.

    Raises:
      ConfigError: `--config` has no value.
    """
    chosen, rest, pending = None, [], False
    for argument in arguments:
        if pending:
            chosen, pending = argument, False
        elif argument in ('--config', '-config'):
            pending = True
        elif match := re.fullmatch(r'--?config=(.*)', argument):
            chosen = match.group(1)
        else:
            rest.append(argument)
    if pending or chosen == '':
        raise ConfigError('--config needs a file, such as --config=configs/digits.py.')
    return chosen, rest


def override(
    config: Config,
    arguments: Sequence[str],
    own_flags: flags.FlagValues,
    *,
    checked: bool = True,
) -> tuple[Config, dict[str, Any]]:
    """Applies `--config.key=value` arguments and parses a script's own flags.

    Args:
      config: the config to start from, left as it is.
      arguments: command-line arguments without the program's name.
      own_flags: the script's own flags.
      checked: whether values have to be in range and fit each other; not where the arguments are
        meant for another config, which is not known yet.

    Returns:
      `(the config with its overrides, {name of own flag: value})`.

    Raises:
      ConfigError: a key or flag is unknown, or a value has the wrong type or range.
    """
    for argument in arguments:
        if match := re.match(r'--?(?:no)?config\.([^=]*)', argument):
            _check_key(match.group(1))
    names = list(own_flags)
    argv = ['neurosens', *arguments]
    try:
        config_flags.DEFINE_config_dataclass('config', config, flag_values=own_flags, sys_argv=argv)
        positional = own_flags(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(
            _validate.unknown('flag', f'--{error.flagname}', [f'--{n}' for n in ('config', *names)])
        ) from None
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(_flag_sentence(str(error), config, arguments)) from None
    if positional:
        raise ConfigError(
            f'Unexpected argument {positional[0]!r}; settings are given as --config.key=value.'
        )
    config = cast(Config, own_flags['config'].value)
    if checked:
        validate(config)
    return config, {name: own_flags[name].value for name in names}


def _flag_sentence(message: str, config: Config, arguments: Sequence[str]) -> str:
    """A parser's message as one sentence, with the expected type where a value was refused."""
    text = ' '.join(message.split()).rstrip('.')
    if match := re.match(r'flag --config\.([\w.]+)=(.*)', text):
        # The parser's own reason, which may itself hold colons, follows the value.
        key, value = match.group(1), match.group(2)
        value = next((a.split('=', 1)[1] for a in arguments if f'config.{key}=' in a), value)
        holder: Any = config
        *groups, name = key.split('.')
        for group in groups:
            holder = getattr(holder, group)
        kind = next(f.type for f in dataclasses.fields(holder) if f.name == name)
        wanted = kind.__name__ if isinstance(kind, type) and kind is not tuple else str(kind)
        return f'Config key {key!r} cannot take {value!r}; it must be of type {wanted}.'
    if match := re.match(r'flag (--\w+)=(.*?): ', text):
        return f'Flag {match.group(1)} cannot take {match.group(2)!r}; --help says what it takes.'
    return f'{text[:1].upper()}{text[1:]}.'


def _check_key(key: str) -> None:
    valid = flatten(Config())
    groups = {name.split('.')[0] for name in valid if '.' in name}
    if key in groups:
        inside = ', '.join(name for name in valid if name.startswith(f'{key}.'))
        raise ConfigError(f'Config key {key!r} is a group; set one of {inside}.')
    if key not in valid:
        raise ConfigError(_validate.unknown('config key', key, valid))


def parse(
    arguments: Sequence[str], own_flags: flags.FlagValues, default_file: pathlib.Path
) -> Command:
    """Parses a whole command line of a script that takes `--config=FILE`.

    Args:
      arguments: command-line arguments without the program's name.
      own_flags: the script's own flags.
      default_file: the config file used without `--config`.

    Returns:
      The parsed command.

    Raises:
      ConfigError: as of `load_file` and `override`.
    """
    chosen, rest = split_config_argument(arguments)
    path = pathlib.Path(chosen) if chosen else default_file
    config, values = override(load_file(path), rest, own_flags)
    return Command(config, path.stem, values)

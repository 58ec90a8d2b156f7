"""Settings as plain values, which checkpoints store and compare."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from neurosens import _validate
from neurosens.config.checks import check_types
from neurosens.config.settings import FREE_KEYS, GROUPS, Config, ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """A config as nested plain dicts, equal to what `json` would give back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` made `values` from.

    Raises:
      ConfigError: a key is unknown or a value has the wrong type.
    """
    config = _build(Config, values, '')
    check_types(config)
    return config


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(_validate.unknown('config key', prefix + name, fields))
    arguments = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f'{prefix}{name} is {value!r}; it must be a group of settings.')
            arguments[name] = _build(kind, value, f'{prefix}{name}.')  # type: ignore[arg-type]
        else:
            arguments[name] = _untuple(value) if isinstance(value, (list, dict)) else value
    return cls(**arguments)


def _untuple(value: Any) -> Any:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {key: _untuple(item) for key, item in value.items()}
    return tuple(_untuple(item) for item in value) if isinstance(value, list) else value


def flatten(config: Config | dict[str, Any]) -> dict[str, Any]:
    """A config as one flat dict from dotted keys to values; option dicts stay whole."""
    values = to_dict(config) if isinstance(config, Config) else config
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in GROUPS:
            flat.update({f'{name}.{key}': item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def differences(saved: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between a saved config and this one, `FREE_KEYS` aside.

    A setting that came after the config was saved counts as its default, which is what the
    training did.

    Args:
      saved: as of `to_dict`, by this version or an older one.
      config: the config now.

    Returns:
      By dotted key, sorted, the saved value and the one now; None where there is no such setting.
      Under `order of regularizers` their names, where nothing but their order differs.
    """
    ours, theirs = flatten(config), flatten(Config()) | flatten(saved)
    found = {
        key: (theirs[key], ours.get(key))
        for key in theirs
        if key.split('.')[0] not in FREE_KEYS and (key not in ours or theirs[key] != ours[key])
    }
    # Their random directions go by their place, and losses are added up in this order.
    order = list(theirs['regularizers']), list(ours['regularizers'])
    if 'regularizers' not in found and order[0] != order[1]:
        found['order of regularizers'] = order
    return dict(sorted(found.items()))

"""Parameters of defences on disk, beside the model they belong to."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from neurosens import _validate, fingerprints, parallel
from neurosens.defenses import inverse_perturbation, pruning, rescaling
from neurosens.forward import Variables

DEFENSES: dict[str, ModuleType] = {
    'inverse_perturbation': inverse_perturbation,
    'rescaling': rescaling,
    'pruning': pruning,
}
_ITEM = 'parameters'
# What Orbax and TensorStore raise for missing, cut and unreadable files.
_UNREADABLE = (KeyError, ValueError, OSError, TypeError)


class DefenseError(RuntimeError):
    """Stored parameters that cannot be used; the message says why and what to do."""


def name_of(parameters: Any) -> str:
    """The name, among `DEFENSES`, of the defence whose parameters these are.

    Raises:
      TypeError: they are of no defence.
    """
    for name, module in DEFENSES.items():
        if isinstance(parameters, module.Parameters):
            return name
    raise TypeError(f'{type(parameters).__name__} are not the parameters of a defence.')


def make_settings(name: str, options: dict[str, Any]) -> Any:
    """Settings of a defence from plain values.

    Args:
      name: one of `DEFENSES`.
      options: values of its settings by name; defaults for those that are missing.

    Returns:
      Its frozen settings.

    Raises:
      ValueError: the name, an option or a value is wrong.
    """
    if name not in DEFENSES:
        raise ValueError(_validate.unknown('defense', name, tuple(DEFENSES)))
    kind = DEFENSES[name].Settings
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for option, value in options.items():
        if option not in fields:
            raise ValueError(_validate.unknown(f'option of {name}', option, tuple(fields)))
        default = fields[option].default
        # Of a union the default has one type.
        allowed = typing.get_args(hints[option]) or (type(default),)
        if isinstance(default, tuple):
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            allowed = (tuple,)
        elif float in allowed and type(value) is int:
            value = float(value)
        if type(value) not in allowed:
            raise ValueError(
                f'Option {option} of {name} is {value!r}; it must be of type '
                f'{" or ".join(kind.__name__ for kind in allowed)}.'
            )
        values[option] = value
    return kind(**values)


def save(
    directory: str | pathlib.Path,
    parameters: Any,
    *,
    variables: Variables | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Writes the parameters of a defence, in place of older ones there.

    Every process calls it. The directory appears only when it is whole, and older parameters stay
    until then.

    Args:
      directory: where they go, such as `WORKDIR/defense`.
      parameters: of the `calibrate` function of a defence.
      variables: of the model that they were calibrated on, whose fingerprint is kept with them.
      calibration: how they were found beyond their settings, such as on how many images, of types
        that JSON knows; `calibration_of` reads it.
    """
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(parameters))}
    record = {
        'defense': name_of(parameters),
        'settings': dataclasses.asdict(parameters.settings),
        'calibration': dict(calibration or {}),
        'shapes': {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()},
        'contents': fingerprints.of_tree(leaves),
        'model': None if variables is None else fingerprints.of_tree(variables),
    }
    path = pathlib.Path(directory).resolve()
    # Orbax removes what it replaces before it writes.
    fresh = path.with_name(f'.{path.name}.new')
    ocp.save_checkpointables(
        fresh, {_ITEM: leaves}, overwrite=True, custom_metadata=fingerprints.signed(record)
    )
    _put_in_place(fresh, path)


def _put_in_place(fresh: pathlib.Path, path: pathlib.Path) -> None:
    parallel.barrier('defense written')
    if parallel.is_primary():
        older = _older(path)
        if path.exists():
            # What an earlier run left beside them is older still.
            if older.exists():
                shutil.rmtree(older)
            path.rename(older)
        fresh.rename(path)
        shutil.rmtree(older, ignore_errors=True)
    parallel.barrier('defense in place')


def _older(path: pathlib.Path) -> pathlib.Path:
    """Where parameters are while others take their place."""
    return path.with_name(f'.{path.name}.old')


def load(
    directory: str | pathlib.Path, mesh: Mesh | None = None, *, variables: Variables | None = None
) -> Any:
    """Reads the parameters of a defence.

    Args:
      directory: as for `save`.
      mesh: devices to put them on, on each of them whole; all by default.
      variables: of the model that they are meant for.

    Returns:
      The parameters; `name_of` tells which defence they are of.

    Raises:
      DefenseError: there are none, they are damaged, or were calibrated on another model than that
        of `variables`.
    """
    path, record = _read_record(directory)
    try:
        place = parallel.replicated(parallel.data_mesh() if mesh is None else mesh)
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(kind), sharding=place)
            for name, (shape, kind) in record['shapes'].items()
        }
        leaves = ocp.load_checkpointables(path, {_ITEM: shapes})[_ITEM]
        if fingerprints.of_tree(leaves) != record['contents']:
            raise ValueError('its contents are not what was written')
        settings = make_settings(record['defense'], record['settings'])
    except _UNREADABLE as error:
        raise _damaged(directory, error) from error
    if variables is not None and record.get('model') != fingerprints.of_tree(variables):
        raise DefenseError(
            f'The defense in {directory} is not known to be calibrated on this model; calibrate it '
            'on this one, or save it with its variables.'
        )
    structure = jax.tree.structure(DEFENSES[record['defense']].skeleton(settings))
    return jax.tree.unflatten(structure, [leaves[str(number)] for number in range(len(leaves))])


def calibration_of(directory: str | pathlib.Path) -> dict[str, Any]:
    """How the parameters of a defence were found, as `save` was told; empty where it was not.

    Args:
      directory: as for `save`.

    Returns:
      What was given as `calibration`.

    Raises:
      DefenseError: there are no parameters, or their record is damaged.
    """
    return dict(_read_record(directory)[1].get('calibration', {}))


def _read_record(directory: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Where the parameters are, and what is written about them."""
    path = pathlib.Path(directory).absolute()
    if not path.is_dir() and _older(path.resolve()).is_dir():
        # A run was stopped between two renames.
        path = _older(path.resolve())
    if not path.is_dir():
        raise DefenseError(f'There is no defense in {directory}; calibrate one first.')
    try:
        record = ocp.checkpointables_metadata(path).custom_metadata or {}
        if not fingerprints.is_intact(record):
            raise ValueError('its record is not what was written')
    except _UNREADABLE as error:
        raise _damaged(directory, error) from error
    return path, record


def _damaged(directory: str | pathlib.Path, error: Exception) -> DefenseError:
    return DefenseError(f'The defense in {directory} is damaged ({error}); calibrate it again.')

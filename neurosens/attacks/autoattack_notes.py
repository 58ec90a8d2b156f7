"""Notes of finished batches, so that an interrupted AutoAttack goes on where it stopped."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from neurosens import parallel

_STATE = 'autoattack.json'
_LOGITS = 'clean.npz'
# Logits of the same model on another day may differ by rounding, as a share of the largest.
_ROUNDING = 1e-3


class Notes:
    """Results of finished batches in a directory, or nowhere.

    Args:
      directory: where they go; None notes nothing.
      identity: what another call must share to go on with these notes, of types that JSON knows.
      logits: what the model says of the clean images `[N, K]`, which the model of another call must
        say too: two models of the same arrays may differ in what they do with them.

    Raises:
      ValueError: the directory has notes of another call.
    """

    def __init__(
        self,
        directory: str | pathlib.Path | None,
        identity: Mapping[str, Any],
        logits: Float[np.ndarray, 'examples classes'],
    ):
        self._directory = None if directory is None else pathlib.Path(directory)
        if self._directory is None:
            return
        state = self._directory / _STATE
        if state.exists():
            before = json.loads(state.read_text())
            differing = sorted(
                name for name in {*identity, *before} if identity.get(name) != before.get(name)
            )
            with np.load(self._directory / _LOGITS) as stored:
                if not differing and not _alike(stored['logits'], logits):
                    differing = ['logits']
            if differing:
                raise ValueError(
                    f'{self._directory} has notes of another AutoAttack, which differs in '
                    f'{", ".join(differing)}; choose another directory or remove this one.'
                )
        elif parallel.is_primary():
            self._directory.mkdir(parents=True, exist_ok=True)
            _write_whole(self._directory / _LOGITS, lambda path: _save(path, {'logits': logits}))
            _write_whole(state, lambda path: path.write_text(json.dumps(identity, indent=1)))
        # Every process has looked before one of them writes.
        parallel.barrier('autoattack notes')

    def _path(self, run: int, place: int) -> pathlib.Path:
        assert self._directory is not None
        return self._directory / f'run{run:02d}-batch{place:05d}.npz'

    def read(self, run: int, place: int) -> dict[str, np.ndarray] | None:
        """The results of a batch, if it was finished before."""
        if self._directory is None or not self._path(run, place).exists():
            return None
        with np.load(self._path(run, place)) as stored:
            return dict(stored)

    def write(self, run: int, place: int, result: Mapping[str, np.ndarray]) -> None:
        """Notes the results of a batch; the file appears when it is whole."""
        if self._directory is not None and parallel.is_primary():
            _write_whole(self._path(run, place), lambda path: _save(path, result))


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    largest = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return one.shape == other.shape and np.allclose(
        one, other, rtol=0, atol=_ROUNDING * largest, equal_nan=True
    )


def _save(path: pathlib.Path, result: Mapping[str, np.ndarray]) -> None:
    # By a path, NumPy would add a suffix to its name.
    with path.open('wb') as file:
        np.savez(file, **result)  # type: ignore[arg-type]


def _write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    partial = path.with_name(f'.{path.name}.partial')
    write(partial)
    partial.replace(path)

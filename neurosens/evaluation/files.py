"""Files of a report that appear only when they are whole."""

from __future__ import annotations

import pathlib
import types

# What the report of a defence may consist of, as patterns.
OF_A_DEFENSE = (
    'defense.csv',
    'defense.png',
    'defense_masking.csv',
    'defense_controls.png',
    'defense_shifts.png',
    'defense_examples-*.png',
)


class WholeFiles:
    """New files of a directory, which get their names together once all of them are written.

        with WholeFiles('report') as output:
            output.path('results.json').write_text('{}')

    An error inside the block leaves the files of before as they were.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Makes the directory if need be.

        Args:
          directory: where the files go.
        """
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._partial: dict[pathlib.Path, pathlib.Path] = {}

    def path(self, name: str) -> pathlib.Path:
        """Where to write the contents of a file.

        Args:
          name: the name that it will have.

        Returns:
          A temporary path in the same directory.
        """
        partial = self._directory / f'.{name}.partial'
        self._partial[self._directory / name] = partial
        return partial

    @property
    def written(self) -> list[pathlib.Path]:
        """The files, in the order in which they were begun."""
        return list(self._partial)

    def __enter__(self) -> WholeFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for path, partial in self._partial.items():
            if kind is None:
                partial.replace(path)
            else:
                partial.unlink(missing_ok=True)

"""Training metrics on their way to the user: a file, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD_DIRECTORY = 'tensorboard'


class Window:
    """Means of training metrics since the last line in the log; saved with a checkpoint.

    A metric is averaged over the steps that had it.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Starts empty, or where `state()` of another window stood."""
        self._sums: dict[str, float] = dict(state['sums']) if state else {}
        self._counts: dict[str, int] = {}
        if state:
            # Older checkpoints hold one count, that of all metrics.
            one = dict.fromkeys(self._sums, state.get('count', 0))
            self._counts = dict(state.get('counts', one))

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes in the metrics of one step."""
        for name, value in metrics.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Returns the means of the steps taken in and starts again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._counts, self._sums = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """What a new window needs to go on from here, as JSON values."""
        return {'counts': dict(self._counts), 'sums': dict(self._sums)}


class Log:
    """Writes metrics to `metrics.jsonl` and TensorBoard, and shows progress.

    On a process that is not the primary one it does nothing, so that callers need not ask.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        first_step: int,
        total_steps: int,
        active: bool,
        progress: bool,
    ) -> None:
        """Opens the log of a work directory.

        Args:
          workdir: where the files lie.
          first_step: steps done already; lines of later steps are from a run that was cut off after
            its last checkpoint and are removed, because those steps run again.
          total_steps: steps of the whole training.
          active: whether this process writes at all.
          progress: show a progress bar on standard error.
        """
        self._active = active
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit='step',
            disable=not (active and progress),
            dynamic_ncols=True,
        )
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        if path.exists():
            _keep_lines_until(path, first_step)
        self._file = path.open('a', encoding='utf-8')
        # Imported late because it imports PyTorch, where that is installed, and takes seconds.
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(
            str(workdir / TENSORBOARD_DIRECTORY), purge_step=first_step + 1 if first_step else None
        )

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._active:
            self._file.close()
            self._tensorboard.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and one TensorBoard point per metric; on disk when it returns."""
        if not self._active:
            return
        self._file.write(json.dumps({'step': step, **metrics}) + '\n')
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def advance(self, shown: Mapping[str, str]) -> None:
        """Moves the progress bar by one step."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(text)


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl` of a work directory, in order; none without the file."""
    path = pathlib.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in _whole_lines(path)]


def _keep_lines_until(path: pathlib.Path, step: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line)['step'] <= step]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
    temporary.replace(path)


def _whole_lines(path: pathlib.Path) -> Iterable[str]:
    """Lines that were written whole: a killed process may leave half of one at the end."""
    text = path.read_text(encoding='utf-8')
    return text[: text.rfind('\n') + 1].splitlines()


def all_finite(metrics: Mapping[str, float]) -> bool:
    """Whether no metric is NaN or infinite."""
    return all(math.isfinite(value) for value in metrics.values())

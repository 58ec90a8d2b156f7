"""Runs benchmarks, each in a process of its own, and writes their reports into the documentation.

    python -m benchmarks --list
    python -m benchmarks [--only NAME ...] [--weights DIR] [--data_dir DIR] [--output DIR]
        [--rounds N] [--device cpu|gpu] [--docs DIR]

The output folder gets NAME.md (the report), NAME.json (the timings of every round), NAME.log and
plots. Reports replace their blocks in the pages of the documentation, and plots go to its folder
`figures`; nothing else there is touched, and nothing at all by runs on a GPU, or by short ones
without `--docs`. A subject that fails,
or lacks something, is named at the end, with exit status 1; the others run all the same.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import documents, harness, registry

_FIGURES = 'figures'


def run(subject: registry.Subject, arguments: argparse.Namespace, device: str) -> str:
    """Runs a subject and writes its files.

    Args:
        subject: what to run.
        arguments: of the command line.
        device: what it runs on, named or found.

    Returns:
        A sentence on why there is no report of it; empty where there is one.
    """
    output = pathlib.Path(arguments.output)
    markdown, log = (output / f'{subject.name}.{suffix}' for suffix in ('md', 'log'))
    paths = {
        'weights': arguments.weights,
        'data_dir': arguments.data_dir,
        'output': str(output / subject.name),
        'plot': str(output / subject.plot),
    }
    reason = subject.lacks(paths, device)
    if reason:
        return reason
    output.mkdir(parents=True, exist_ok=True)
    # A report of an earlier run must not pass for one of this run.
    markdown.unlink(missing_ok=True)
    # What JAX finds anyway is not named: the documentation shows the command as it is registered.
    command = subject.command(paths, arguments.rounds, arguments.device)
    files = ['--markdown', str(markdown), '--json', str(output / f'{subject.name}.json')]
    with log.open('w', encoding='utf-8') as stream:
        ended = subprocess.run(
            [sys.executable, *command, *files], stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode or not markdown.exists():
        return f'It ended with exit status {ended.returncode}: {_last_line(log)} (see {log}).'
    return ''


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'no output')


def write(subject: registry.Subject, output: pathlib.Path, docs: pathlib.Path) -> None:
    """Puts the report of a subject, and its plot, into the documentation.

    Args:
        subject: one that ran.
        output: folder of its files.
        docs: folder of the documentation.

    Raises:
        documents.MarkerError: markers are damaged or missing; nothing is written.
    """
    document = docs / subject.document
    report = (output / f'{subject.name}.md').read_text(encoding='utf-8')
    text = documents.replaced(document.read_text(encoding='utf-8'), {subject.name: report})
    if subject.plot:
        (docs / _FIGURES).mkdir(exist_ok=True)
        shutil.copyfile(output / subject.plot, docs / _FIGURES / subject.plot)
    document.write_text(text, encoding='utf-8')


def listing() -> str:
    """Returns a line for each subject: its name, rough duration and command."""
    width = max(map(len, registry.SUBJECTS))
    return '\n'.join(
        f'{subject.name:{width}}  {subject.minutes:4} min  {subject.shown()}'
        for subject in registry.SUBJECTS.values()
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog='benchmarks', description=__doc__.splitlines()[0])
    parser.add_argument('--list', action='store_true', help='print the subjects and end')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='subjects; all by default')
    parser.add_argument('--weights', default='', help='folder of the published weights')
    parser.add_argument('--data_dir', default='', help='directory of TFDS')
    parser.add_argument('--output', default='runs/benchmarks', help='folder of the results')
    parser.add_argument('--rounds', type=int, default=0, help="in place of the subjects' own")
    parser.add_argument('--device', default='', choices=('cpu', 'gpu'), help='else what JAX finds')
    parser.add_argument(
        '--docs',
        help="folder of the documentation to write; '' writes none, which is the default with "
        '--rounds and on a GPU, else docs',
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    chosen = parse_arguments(arguments)
    if chosen.list:
        print(listing())
        return 0
    device = chosen.device or harness.found_device()
    if chosen.docs is None:
        # Nor should figures of a few rounds replace those of all.
        chosen.docs = '' if device == 'gpu' or chosen.rounds else 'docs'
    try:
        subjects = registry.chosen(chosen.only)
        if not chosen.only:
            subjects = [subject for subject in subjects if device in subject.devices]
        if chosen.docs and device == 'gpu':
            raise ValueError(
                f'--docs is {chosen.docs!r}, but the documentation has figures of a CPU, which '
                'those of a GPU would replace; leave it out and take the reports from --output.'
            )
        if chosen.docs:
            # Known before anything has run for hours.
            for page in {subject.document for subject in subjects}:
                text = (pathlib.Path(chosen.docs) / page).read_text(encoding='utf-8')
                documents.check(text, [one.name for one in subjects if one.document == page])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    failures = {}
    for subject in subjects:
        print(f'{subject.name}: about {subject.minutes} min', flush=True)
        start = time.perf_counter()
        reason = run(subject, chosen, device)
        if not reason and chosen.docs:
            try:
                write(subject, pathlib.Path(chosen.output), pathlib.Path(chosen.docs))
            except (documents.MarkerError, OSError) as error:
                reason = f'Its report was not written: {error}'
        if reason:
            failures[subject.name] = reason
        minutes = (time.perf_counter() - start) / 60
        print(f'  {"failed" if reason else "done"} after {minutes:.1f} min', flush=True)
    for name, reason in failures.items():
        print(f'{name}: {reason}', file=sys.stderr)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())

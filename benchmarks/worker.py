"""A worker process of `benchmarks.harness`: python -m benchmarks.worker MODULE:FUNCTION OPTIONS.

It calls the factory with the options (a JSON object) and replies with its details. Then each line
of standard input names a unit, which it runs and answers. Replies are JSON objects, one per line.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any


def _private_output() -> IO[str]:
    """Standard output for replies alone; what anyone else prints there goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _reply(replies: IO[str], function: Callable[[], Any]) -> None:
    try:
        answer = {'ok': function()}
    except Exception:
        answer = {'error': traceback.format_exc()}
    replies.write(json.dumps(answer) + '\n')
    replies.flush()


def main(factory: str, options: str) -> None:
    """Prepares the units and runs them on request until standard input ends."""
    replies = _private_output()
    units: dict[str, Callable[[], object]] = {}

    def prepare() -> dict[str, Any]:
        module, _, function = factory.partition(':')
        prepared = getattr(importlib.import_module(module), function)(**json.loads(options))
        units.update(prepared.units)
        return dict(prepared.details)

    def run(name: str) -> None:
        # What a unit returns stays in the worker: it need not be of a type that JSON knows.
        units[name]()

    _reply(replies, prepare)
    for line in sys.stdin:
        _reply(replies, functools.partial(run, line.strip()))


if __name__ == '__main__':
    main(*sys.argv[1:])

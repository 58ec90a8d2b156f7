"""Runs the real scripts as a user would, in processes of their own or in that of the tests."""

import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys
import warnings

import pytest

from neurosens import onednn, parallel

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CACHE = os.environ.get('NEUROSENS_TEST_CACHE', str(REPOSITORY / '.jax_cache'))

# A network small enough that a run takes seconds, on two devices.
TINY = (
    "--config.model_options={'features': (4,), 'hidden': (16,)}",
    '--config.steps=120',
    '--config.log_every=5',
    '--config.checkpoint_every=10',
    '--config.evaluate_every=2.0',
    '--config.cpu_devices=2',
)


class Scripts:
    """Starts scripts with the compilation cache of the tests."""

    tiny = TINY

    def start(self, *arguments, env=None, **options):
        """Starts a script and returns its process."""
        environment = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'JAX_COMPILATION_CACHE_DIR': CACHE,
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
            # Compiling costs more than running here.
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            **(env or {}),
        }
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=options.pop('cwd', REPOSITORY),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def here(self, script, *arguments, status=0):
        """Runs a script in this process, on its devices, and returns (stdout, stderr).

        Only in tests, whose settings `_settings_of_this_process` puts back.
        """
        main = importlib.import_module(script.removesuffix('.py')).main
        out, err = io.StringIO(), io.StringIO()
        printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with contextlib.chdir(REPOSITORY), printed[0], printed[1]:
            try:
                code = main([*map(str, arguments)])
            except SystemExit as end:
                code = end.code
        assert (code or 0) == status, (code, out.getvalue(), err.getvalue())
        return out.getvalue(), err.getvalue()

    def run(self, *arguments, status=0, **options):
        """Runs a script to its end, checks its exit status and returns (stdout, stderr)."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, (process.returncode, out, err)
        return out, err


@pytest.fixture(autouse=True)
def _settings_of_this_process(monkeypatch):
    """A script that runs in this process leaves it as the other tests need it.

    Without memory mappings, programs of many tests do not fit; convolutions of oneDNN are others.
    """
    monkeypatch.setattr(parallel, 'keep_freed_memory', lambda: False)
    # JAX runs already.
    monkeypatch.setattr(parallel, 'use_cpu_devices', lambda count: None)
    monkeypatch.setattr(onednn, 'use_onednn', lambda: False)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)


@pytest.fixture(scope='session')
def scripts():
    return Scripts()


@pytest.fixture(scope='session')
def trained(scripts, tmp_path_factory):
    """A finished tiny training on digits: (work directory, what the script printed)."""
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    out, _ = scripts.run('train.py', f'--workdir={workdir}', *TINY)
    return workdir, out

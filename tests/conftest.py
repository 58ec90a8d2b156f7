"""Shared test setup: eight simulated devices and one persistent compilation cache."""

import os
import pathlib

import hypothesis

# Must happen before the first JAX computation of the process.
import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COMPILATION_CACHE = pathlib.Path(os.environ.get('NEUROSENS_TEST_CACHE', REPOSITORY / '.jax_cache'))

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Compiling costs more than running here.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(COMPILATION_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)

# The same cases in every run, so that a change is what makes a test fail; new ones are hunted with
# HYPOTHESIS_PROFILE=default.
hypothesis.settings.register_profile('repeatable', derandomize=True)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'repeatable'))


@pytest.fixture(scope='session')
def data_root() -> pathlib.Path:
    """The directory of real data and weights named by NEUROSENS_DATA; skips where it is absent."""
    root = os.environ.get('NEUROSENS_DATA')
    if not root or not pathlib.Path(root).is_dir():
        pytest.skip('real data: set NEUROSENS_DATA to a directory that holds tfds/ and weights/')
    return pathlib.Path(root)

"""Shared test setup: eight simulated devices and one persistent compilation cache."""

import gc
import os
import pathlib

import hypothesis

# Must happen before the first JAX computation of the process.
import jax
import jaxlib
import pytest
from jax.extend.core import primitives
from jax.interpreters import mlir

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COMPILATION_CACHE = pathlib.Path(os.environ.get('NEUROSENS_TEST_CACHE', REPOSITORY / '.jax_cache'))

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Compiling costs more than running here.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(COMPILATION_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)

# The older emitters compile in two thirds of the time. Only where the flag is known: XLA ends a
# process that names any other.
if jaxlib.__version__ in ('0.10.2',):
    os.environ['XLA_FLAGS'] = ' '.join(
        [os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false']
    ).strip()
# Tracing makes many objects that live long; looking through all of them often is a tenth of a run.
gc.set_threshold(200_000, 20, 100)

MOST_MAPPINGS = 15_000

# The same cases in every run, so that a change is what makes a test fail; new ones are hunted with
# HYPOTHESIS_PROFILE=default.
hypothesis.settings.register_profile('repeatable', derandomize=True)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'repeatable'))


# By the time that they take, which `pytest --junitxml=FILE` tells.
LONGEST = (
    'test_robust_loop.py',
    'test_evaluate.py',
    'test_every_attack.py',
    'test_adversarial.py',
    'test_defended.py',
    'test_train.py',
    'test_distributed.py',
    'test_every_regularizer.py',
    'test_sensitivity.py',
    'test_autoattack.py',
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker waits at the end for another's."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope='module', autouse=True)
def _bounded_programs():
    """Forgets compiled programs after a file of tests, once there are many.

    Each holds several memory mappings, and XLA crashes where a process reaches the kernel's limit
    (65,530 by default), which thousands of tests do.
    """
    yield
    mappings = pathlib.Path('/proc/self/maps')
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope='module', autouse=True)
def _convolutions_stay():
    """Fails where a file of tests leaves this process with other convolutions than before."""

    def rule():
        return mlir._platform_specific_lowerings['cpu'][primitives.conv_general_dilated_p].rule

    before = rule()
    yield
    assert rule() is before, 'convolutions are lowered in another way than before this file'


@pytest.fixture(scope='session')
def data_root() -> pathlib.Path:
    """The directory of real data and weights named by NEUROSENS_DATA; skips where it is absent."""
    root = os.environ.get('NEUROSENS_DATA')
    if not root or not pathlib.Path(root).is_dir():
        pytest.skip('real data: set NEUROSENS_DATA to a directory that holds tfds/ and weights/')
    return pathlib.Path(root)

"""One mesh over all devices: how batches and parameters are placed, and how many devices."""

import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from neurosens import parallel


def test_a_mesh_has_every_device_on_one_axis():
    mesh = parallel.data_mesh()
    assert mesh.axis_names == ('data',)
    assert list(mesh.devices) == jax.devices()
    assert mesh.size == 8


@pytest.mark.parametrize('count', [1, 3, 8])
def test_a_mesh_can_have_the_first_devices_only(count):
    assert list(parallel.data_mesh(count).devices) == jax.devices()[:count]


def test_a_batch_is_split_in_order_over_the_devices():
    mesh = parallel.data_mesh()
    batch = {'x': np.arange(48, dtype=np.uint8).reshape(16, 3), 'y': np.arange(16, dtype=np.int32)}
    placed = parallel.shard(mesh, batch)
    for name, rows in batch.items():
        assert placed[name].shape == rows.shape and placed[name].dtype == rows.dtype
        for number, piece in enumerate(placed[name].addressable_shards):
            assert piece.device == jax.devices()[number]
            np.testing.assert_array_equal(piece.data, rows[2 * number : 2 * number + 2])


def test_gathering_a_split_batch_gives_it_back():
    batch = (np.random.default_rng(0).normal(size=(24, 2)), np.arange(24, dtype=np.int32))
    gathered = parallel.gather(parallel.shard(parallel.data_mesh(), batch))
    assert all(isinstance(leaf, np.ndarray) for leaf in gathered)
    np.testing.assert_array_equal(gathered[0], batch[0].astype(gathered[0].dtype))
    np.testing.assert_array_equal(gathered[1], batch[1])


def test_every_device_gets_a_copy_of_what_is_replicated():
    tree = {'w': np.arange(6.0, dtype=np.float32), 'none': None, 'key': jax.random.key(3)}
    placed = parallel.replicate(parallel.data_mesh(), tree)
    assert placed['none'] is None
    assert placed['w'].is_fully_replicated and len(placed['w'].addressable_shards) == 8
    for piece in placed['w'].addressable_shards:
        np.testing.assert_array_equal(piece.data, tree['w'])
    assert placed['key'].sharding.is_fully_replicated


@pytest.mark.parametrize(('rows', 'devices'), [(12, 8), (1, 8), (7, 2)])
def test_rows_that_do_not_divide_are_refused_with_the_remedy(rows, devices):
    batch = {'x': np.zeros((devices * 2, 2)), 'y': np.zeros(rows)}
    with pytest.raises(ValueError, match='rows') as error:
        parallel.shard(parallel.data_mesh(devices), batch)
    assert str(error.value) == (
        f'A batch of {rows} rows does not split over {devices} devices; use a multiple of '
        f'{devices}.'
    )


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 8))
def test_rounding_up_gives_the_next_multiple_of_the_devices(batch_size, devices):
    rounded = parallel.round_up(batch_size, parallel.data_mesh(devices))
    assert rounded % devices == 0
    assert 0 <= rounded - batch_size < devices


@hypothesis.given(st.integers(1, 4096), st.integers(1, 128))
def test_a_cpu_is_split_as_far_as_cores_and_batch_allow(batch_size, cores):
    count = parallel.cpu_device_count(batch_size, cores)

    def allowed(devices):
        return devices <= cores and batch_size % devices == 0 and batch_size / devices >= 8

    assert count == max([1, *filter(allowed, range(2, cores + 1))])


@pytest.mark.parametrize(
    ('batch_size', 'cores', 'count'),
    [(128, 2, 2), (128, 1, 1), (128, 96, 16), (100, 8, 5), (7, 8, 1), (97, 64, 1), (16, 2, 2)],
)
def test_the_number_of_cpu_devices_in_examples(batch_size, cores, count):
    assert parallel.cpu_device_count(batch_size, cores) == count


def test_without_a_batch_every_core_is_a_device(monkeypatch):
    assert parallel.cpu_device_count(None, 6) == 6
    monkeypatch.setattr('os.sched_getaffinity', lambda process: {0, 2, 5}, raising=False)
    assert parallel.cpu_device_count() == 3
    assert parallel.cpu_device_count(64) == 2


@pytest.mark.parametrize(
    ('environment', 'reason'),
    [
        ({}, None),
        ({'SLURM_NTASKS': '4'}, 'SLURM_NTASKS=4'),
        ({'SLURM_NTASKS': '1'}, None),
        ({'SLURM_NTASKS': ''}, None),
        ({'SLURM_NTASKS': 'many'}, None),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, 'OMPI_COMM_WORLD_SIZE=2'),
        ({'JAX_NUM_PROCESSES': '16'}, 'JAX_NUM_PROCESSES=16'),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU_WORKER_HOSTNAMES=a,b'),
        ({'JAX_NUM_PROCESSES': '1', 'SLURM_NTASKS': '8'}, 'SLURM_NTASKS=8'),
    ],
)
def test_one_process_of_several_is_recognised_by_its_environment(environment, reason):
    assert parallel.looks_distributed({'HOME': '/', **environment}) == reason


def test_a_single_process_is_primary_and_waits_for_nobody():
    assert parallel.is_primary()
    parallel.barrier('alone')


def test_without_a_cluster_the_remedy_is_named(monkeypatch):
    def initialize(**arguments):
        assert set(arguments.values()) == {None}
        raise ValueError('coordinator_address should be defined')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(ValueError, match=r'^No cluster was detected .*JAX_COORDINATOR_ADDRESS='):
        parallel.initialize_distributed({})


def test_the_processes_of_a_hand_made_cluster_are_read_from_the_environment(monkeypatch):
    received = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **given: received.append(given))
    parallel.initialize_distributed(
        {
            'JAX_COORDINATOR_ADDRESS': 'host:1234',
            'JAX_NUM_PROCESSES': '4',
            'JAX_PROCESS_ID': '2',
        }
    )
    assert received == [{'coordinator_address': 'host:1234', 'num_processes': 4, 'process_id': 2}]


def test_keeping_freed_memory_is_known_before_jax_starts():
    script = (
        'import jax; from neurosens import parallel\n'
        'print(parallel.only_cpu_installed())\n'
        'jax.config.update("jax_platforms", "cpu"); print(parallel.only_cpu_installed())\n'
        'jax.config.update("jax_platforms", "tpu,cpu"); print(parallel.only_cpu_installed())\n'
        'from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())\n'
        'print(parallel.keep_freed_memory() is (sys.platform == "linux"))\n'
    )
    environment = {name: v for name, v in os.environ.items() if name != 'JAX_PLATFORMS'}
    out = subprocess.run(
        [sys.executable, '-c', 'import sys\n' + script],
        cwd=pathlib.Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert out[1:] == ['True', 'False', 'False', 'True']

"""Two real processes train and evaluate like one."""

import dataclasses
import json
import re
import signal
import socket

import jax
import numpy as np
import pytest
from waiting import wait_for_step

from neurosens import training
from neurosens.training import logs


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def start_two(scripts, *arguments):
    """Starts a script in two processes joined through localhost."""
    port = free_port()
    return [
        scripts.start(
            *arguments,
            '--distributed',
            env={
                'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
                'JAX_NUM_PROCESSES': '2',
                'JAX_PROCESS_ID': str(index),
            },
        )
        for index in range(2)
    ]


def end_two(processes, status=0):
    """Waits for both; returns their outputs."""
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == status, output
    return outputs


def run_two(scripts, *arguments):
    """Runs a script in two processes joined through localhost; returns both outputs."""
    return end_two(start_two(scripts, *arguments))


# Steps along the sign of a gradient would tell roundings of 0 apart. Of this seed the monitor's
# attack turns some of the images that are right, not all.
ROBUST = (
    '--config.objective=free',
    "--config.objective_options={'norm': 'l2', 'eps': 0.2, 'replays': 2}",
    "--config.regularizers={'jacobian': {'weight': 0.01}}",
    '--config.monitor.images=60',
    '--config.monitor.eps=0.05',
    '--config.monitor.steps=2',
    '--config.monitor.layer=',
    '--config.seed=2',
)


@pytest.fixture(scope='module')
def workdirs(scripts, tmp_path_factory):
    root = tmp_path_factory.mktemp('distributed')
    short = [*scripts.tiny, '--config.steps=20', '--config.optimizer.ema_decay=0.9', *ROBUST]
    one, two = root / 'one', root / 'two'
    scripts.run('train.py', f'--workdir={one}', *short, '--config.cpu_devices=1')
    outputs = run_two(scripts, 'train.py', f'--workdir={two}', *short, '--config.cpu_devices=2')
    return one, two, outputs


def test_parameters_and_metrics_agree_with_one_process(workdirs):
    one, two, _ = workdirs
    left, right = (training.load(workdir, 'latest').variables for workdir in (one, two))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    lines = logs.read(one), logs.read(two)
    last = {name: value for line in lines[0] for name, value in line.items()}
    assert 0 < last['monitor/pgd_accuracy'] < last['monitor/clean_accuracy']
    assert 0 < last['jacobian/gradient_share'] < 1
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {'images_per_second'}:
            # An image at the boundary may fall on either side of it.
            one_image = 1.01 / 60 if name == 'monitor/pgd_accuracy' else 0
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=max(one_image, 1e-12)), name


def test_perturbations_of_both_processes_are_saved(workdirs):
    experiment = training.prepare(training.load(workdirs[0], 'latest').config)

    def perturbation(workdir):
        # It is finished: what it ended with is read.
        own = dataclasses.replace(experiment, config=training.load(workdir, 'latest').config)
        return np.asarray(training.train(own, workdir, progress=False).state.perturbation)

    one, two = map(perturbation, workdirs[:2])
    assert len(one) == 64 and np.abs(one).max((1, 2, 3)).min() > 0.01
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_only_the_first_process_talks(workdirs):
    _, two, ((first, _), (second, error)) = workdirs
    assert '4 x cpu on 2 hosts' in first
    assert f'Done. Next: python evaluate.py --workdir={two}' in first
    # The collectives library reports its connections from C++ threads that interrupt each other.
    report = '[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :'
    assert set(re.sub(r'\d+|(?=\[)|(?<=\])', ' ', second).split()) <= set(report.split())
    assert 'step/s' not in error


def test_evaluation_agrees_with_one_process(workdirs, scripts):
    one, _, _ = workdirs
    arguments = (
        'evaluate.py',
        f'--workdir={one}',
        '--config.evaluation.eps=(0.05,)',
        '--config.evaluation.steps=3',
        '--config.evaluation.limit=101',
        '--config.evaluation.masking_images=0',
        '--config.neurons.limit=45',
        "--config.neurons.layers=('act1',)",
        '--config.defense.name=pruning',
        "--config.defense.options={'layer': 'act1', 'count': 1}",
        '--config.defense.images=100',
        '--config.defense.attacks=()',
        '--config.cpu_devices=2',
    )
    scripts.run(*arguments)
    alone = json.loads((one / 'report' / 'results.json').read_text())
    arrays = dict(np.load(one / 'report' / 'neurons' / 'act1.npz'))
    assert arrays['delta'].shape == (45, 4)
    run_two(scripts, *arguments)
    together = json.loads((one / 'report' / 'results.json').read_text())
    arrays_together = dict(np.load(one / 'report' / 'neurons' / 'act1.npz'))
    assert together['images'] == 101
    assert together.keys() == alone.keys()
    for key in alone:
        if key == 'defense/relative_cost':
            assert alone[key] > 0 and together[key] > 0
        elif key.startswith(('neurons/', 'defense/')) and isinstance(alone[key], float):
            assert together[key] == pytest.approx(alone[key], abs=1e-3), key
        elif key not in ('config', 'clean_loss') and not key.endswith('_rule'):
            assert together[key] == alone[key], key
    for name in [name for name in arrays if not name.startswith('fragile_rule')]:
        np.testing.assert_allclose(arrays_together[name], arrays[name], rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_process_stops_and_saves_both(scripts, tmp_path):
    workdir = tmp_path / 'stopped'
    endless = [*scripts.tiny, '--config.steps=1000000', '--config.checkpoint_every=0']
    # Where the machine is slow to hear of the signal, an epoch may end before it, and be saved.
    endless += ['--config.evaluate_every=100000']
    processes = start_two(scripts, 'train.py', f'--workdir={workdir}', *endless)
    wait_for_step(workdir, 5, processes[0])
    # Not the one that writes; SIGINT is passed on as SIGTERM.
    processes[1].send_signal(signal.SIGINT)
    outputs = end_two(processes, 128 + signal.SIGTERM)
    (step,) = {int(re.search(r'Stopped by SIGTERM after step (\d+)', e)[1]) for _, e in outputs}
    assert [path.name for path in (workdir / 'checkpoints').iterdir()] == [str(step)]

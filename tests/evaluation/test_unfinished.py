"""An evaluation that was interrupted goes on where it stopped, or starts anew with new settings."""

import dataclasses

import jax
import numpy as np
import pytest

from neurosens import config, data, evaluation, models, parallel
from neurosens.data import digits
from neurosens.forward import LinenForward

SETTINGS = config.Evaluation(
    attacks=('autoattack',),
    eps=(0.02,),
    batch_size=4,
    auto_steps=2,
    queries=3,
    masking_images=0,
)


class Stop(Exception):
    pass


@pytest.fixture(scope='module')
def run():
    """Evaluates a small model on eight images; returns the batches that AutoAttack worked on."""
    images, _ = digits.read_split('test')
    module = models.create('mlp', num_classes=10, hidden=(4,))
    x = data.to_float(images[:8])
    forward, mesh = LinenForward(module), parallel.data_mesh(1)
    variables = parallel.replicate(mesh, module.init(jax.random.key(0), x))
    labels = np.asarray(forward(variables, x)[0].argmax(-1), np.int32)
    source = data.ArrayDataset(images[:8], labels, data.info('digits'))

    def evaluate(directory, settings=SETTINGS, stop_at=0):
        told = []

        def progress(*arguments):
            told.append(arguments)
            if len(told) == stop_at:
                raise Stop

        key = evaluation.fixed_key(0)
        options = {'ensemble_progress': progress, 'directory': directory}
        evaluation.evaluate(forward, variables, source, mesh, settings, key, **options)
        return told

    return evaluate


def test_finished_work_is_not_done_again(run, tmp_path):
    every = run(None)
    assert len(every) > 5
    with pytest.raises(Stop):
        run(tmp_path, stop_at=5)
    assert run(tmp_path) == every[4:]


def test_other_settings_start_anew(run, tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stop_at=3)
    for change in ({'queries': 4}, {'auto_steps': 3}, {'limit': 4}, {'batch_size': 8}):
        settings = dataclasses.replace(SETTINGS, **change)
        assert run(tmp_path, settings) == run(None, settings)

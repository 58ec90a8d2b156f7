"""Defences on disk: what was saved comes back, and damage is noticed."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from neurosens import defenses
from neurosens.defenses import inverse_perturbation, pruning, rescaling, storage


def examples():
    generator = np.random.default_rng(0)
    settings = inverse_perturbation.Settings(
        layers=('head:in', 'block1/act2'), front=2, tail=1, rho=(0.01, 0.02), rule='majority'
    )
    neurons = {layer: jax.numpy.arange(6).reshape(3, 2) for layer in settings.layers}
    tails = {layer: jax.numpy.arange(3).reshape(3, 1) + 7 for layer in settings.layers}
    floats = [jax.numpy.asarray(generator.random(3, np.float32)) for _ in range(2)]
    directions = jax.numpy.asarray(generator.random((3, 1, 4, 4, 2), np.float32))
    return [
        inverse_perturbation.Parameters(directions, neurons, tails, *floats, settings),
        rescaling.calibrate([0.3, 0.1, 0.2], settings=rescaling.Settings(strength=0.25)),
        pruning.calibrate([0.3, 0.1, 0.2], settings=pruning.Settings(order='least')),
    ]


@pytest.mark.parametrize('parameters', examples(), ids=defenses.name_of)
def test_what_was_saved_comes_back(tmp_path, parameters):
    defenses.save(tmp_path / 'defense', parameters)
    found = defenses.load(tmp_path / 'defense')
    assert type(found) is type(parameters) and found.settings == parameters.settings
    assert jax.tree.structure(found) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, found, parameters)
    # A later calibration takes its place.
    defenses.save(tmp_path / 'defense', examples()[1])
    assert defenses.name_of(defenses.load(tmp_path / 'defense')) == 'rescaling'


def test_how_parameters_were_found_is_kept_with_them(tmp_path):
    directory = tmp_path / 'defense'
    with pytest.raises(defenses.DefenseError, match='There is no defense in'):
        defenses.calibration_of(directory)
    defenses.save(directory, examples()[1])
    assert defenses.calibration_of(directory) == {}
    known = {'images': 500, 'response': 'loss_attacked', 'eps': 0.1}
    defenses.save(directory, examples()[1], calibration=known)
    assert defenses.calibration_of(directory) == known


def test_older_parameters_stay_until_newer_ones_are_whole(tmp_path, monkeypatch):
    directory, (_, older, newer) = tmp_path / 'new' / 'defense', examples()
    defenses.save(directory, older)

    class Stop(Exception):
        pass

    def interrupt(path, *arguments, **options):
        # As Orbax does before it writes.
        shutil.rmtree(path, ignore_errors=True)
        raise Stop

    for module, name in ((storage.ocp, 'save_checkpointables'), (storage, '_put_in_place')):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(Stop):
                defenses.save(directory, newer)
        assert defenses.name_of(defenses.load(directory)) == 'rescaling'
    defenses.save(directory, newer)
    assert defenses.name_of(defenses.load(directory)) == 'pruning'
    assert [path.name for path in directory.parent.iterdir()] == ['defense']


def test_parameters_of_another_model_are_refused(tmp_path):
    directory, parameters = tmp_path / 'defense', examples()[2]
    variables = {'params': {'head': {'kernel': np.ones((3, 2), np.float32)}}}
    defenses.save(directory, parameters, variables=variables)
    defenses.load(directory, variables=variables)
    other = jax.tree.map(lambda leaf: leaf + np.float32(1e-6), variables)
    with pytest.raises(defenses.DefenseError, match='not known to be calibrated on this model'):
        defenses.load(directory, variables=other)
    defenses.save(directory, parameters)
    defenses.load(directory)
    with pytest.raises(defenses.DefenseError, match='or save it with its variables'):
        defenses.load(directory, variables=variables)


def test_damage_is_one_clear_error(tmp_path):
    directory = tmp_path / 'defense'
    with pytest.raises(defenses.DefenseError, match=r'There is no defense in .*calibrate one'):
        defenses.load(directory)
    defenses.save(directory, examples()[0])
    largest = max((f for f in directory.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    whole = largest.read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:], b''):
        largest.write_bytes(damaged)
        with pytest.raises(defenses.DefenseError, match=r'is damaged .*calibrate it again'):
            defenses.load(directory)
    largest.write_bytes(whole)
    defenses.load(directory)


def test_a_run_stopped_between_two_renames_leaves_the_older_parameters(tmp_path, monkeypatch):
    directory, (older, newer, _) = tmp_path / 'defense', examples()[:3]
    defenses.save(directory, older)
    rename = pathlib.Path.rename

    def stopped(path, target):
        if path.name.endswith('.new'):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, 'rename', stopped)
    with pytest.raises(KeyboardInterrupt):
        defenses.save(directory, newer)
    monkeypatch.undo()
    assert not directory.exists()
    assert defenses.name_of(defenses.load(directory)) == defenses.name_of(older)
    defenses.save(directory, newer)
    assert defenses.load(directory).settings == newer.settings
    assert [path.name for path in tmp_path.iterdir()] == ['defense']


def test_settings_from_plain_values_are_checked():
    found = defenses.make_settings('inverse_perturbation', {'rho': [0.1], 'temperature': 2})
    assert found.rho == (0.1,) and found.temperature == 2.0
    for name, options, message in (
        ('inverse', {}, "Unknown defense 'inverse'"),
        ('pruning', {'counts': 2}, "Unknown option of pruning 'counts'"),
        ('pruning', {'count': 2.5}, 'count of pruning is 2.5; it must be of type int'),
    ):
        with pytest.raises(ValueError, match=message):
            defenses.make_settings(name, options)
    with pytest.raises(TypeError, match='not the parameters of a defence'):
        defenses.name_of({})

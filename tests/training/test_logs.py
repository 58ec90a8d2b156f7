"""Logged means survive an interruption exactly; the log holds no line twice and none in half."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from neurosens.training import logs

values = st.floats(-1e6, 1e6, allow_nan=False)
step = st.fixed_dictionaries({'loss': values}, optional={'accuracy': values})
steps = st.lists(step, min_size=1)


@hypothesis.given(steps, st.data())
def test_a_window_restored_from_json_gives_the_means_of_an_uninterrupted_one(history, draw):
    cut = draw.draw(st.integers(0, len(history)))
    whole, first = logs.Window(), logs.Window()
    for metrics in history:
        whole.add(metrics)
    for metrics in history[:cut]:
        first.add(metrics)
    second = logs.Window(json.loads(json.dumps(first.state())))
    for metrics in history[cut:]:
        second.add(metrics)
    assert second.means() == whole.means()


def test_a_window_starts_again_after_its_means():
    window = logs.Window()
    window.add({'loss': 1.0})
    window.add({'loss': 2.0})
    assert window.means() == {'loss': 1.5}
    assert window.state() == logs.Window().state()
    window.add({'loss': 4.0})
    assert window.means() == {'loss': 4.0}


def test_a_metric_is_averaged_over_the_steps_that_had_it():
    window = logs.Window()
    window.add({'loss': 1.0})
    window.add({'loss': 2.0, 'accuracy': 0.5})
    assert window.means() == {'loss': 1.5, 'accuracy': 0.5}


def test_a_window_with_one_count_of_all_metrics_is_read():
    window = logs.Window({'count': 2, 'sums': {'loss': 3.0}})
    window.add({'loss': 6.0, 'accuracy': 0.5})
    assert window.means() == {'loss': 3.0, 'accuracy': 0.5}


def open_log(workdir, first_step=0, active=True):
    return logs.Log(workdir, first_step=first_step, total_steps=100, active=active, progress=False)


@pytest.fixture
def workdir(tmp_path):
    """A log with lines of the steps 10, 20 (two lines) and 30."""
    with open_log(tmp_path / 'work') as log:
        for step in (10, 20, 30):
            log.write(step, {'loss': step / 7})
        log.write(20, {'validation_loss': 0.1 + 0.2})
    return tmp_path / 'work'


def test_lines_come_back_as_they_were_written(workdir):
    assert logs.read(workdir) == [
        {'step': 10, 'loss': 10 / 7},
        {'step': 20, 'loss': 20 / 7},
        {'step': 30, 'loss': 30 / 7},
        {'step': 20, 'validation_loss': 0.1 + 0.2},
    ]


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    with open_log(tmp_path) as log:
        log.write(1, {'loss': 0.5})
        assert logs.read(tmp_path) == [{'step': 1, 'loss': 0.5}]


@pytest.mark.parametrize(('first_step', 'kept'), [(30, 4), (29, 3), (20, 3), (19, 1), (0, 0)])
def test_lines_of_steps_that_run_again_are_removed_on_reopening(workdir, first_step, kept):
    before = logs.read(workdir)
    with open_log(workdir, first_step) as log:
        assert logs.read(workdir) == [line for line in before if line['step'] <= first_step]
        assert len(logs.read(workdir)) == kept
        log.write(first_step + 1, {'loss': 0.0})
    assert logs.read(workdir)[kept:] == [{'step': first_step + 1, 'loss': 0.0}]


@pytest.mark.parametrize('half', ['{"step": 5, "lo', '{"step": 5, "loss": 1.0}', '{'])
def test_a_half_written_last_line_is_removed_on_reopening(workdir, half):
    before = logs.read(workdir)
    with (workdir / logs.METRICS_FILE).open('a') as file:
        file.write(half)
    with open_log(workdir, first_step=30) as log:
        log.write(40, {'loss': 0.0})
    assert logs.read(workdir) == [*before, {'step': 40, 'loss': 0.0}]


def test_a_file_that_holds_only_half_a_line_becomes_empty(tmp_path):
    (tmp_path / logs.METRICS_FILE).write_text('{"step": 1')
    with open_log(tmp_path, first_step=5):
        assert logs.read(tmp_path) == []


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path, capsys):
    with open_log(tmp_path / 'work', active=False) as log:
        log.write(1, {'loss': 0.5})
        log.advance({})
        log.say('nothing')
    assert not (tmp_path / 'work').exists()
    assert capsys.readouterr() == ('', '')


def test_every_metric_becomes_a_point_in_tensorboard(workdir):
    files = list((workdir / logs.TENSORBOARD_DIRECTORY).iterdir())
    assert len(files) == 1
    content = files[0].read_bytes()
    assert content.count(b'validation_loss') == 1
    assert content.count(b'loss') == 4


@pytest.mark.parametrize(
    ('metrics', 'finite'),
    [
        ({'a': 1.0, 'b': -3e38}, True),
        ({}, True),
        ({'a': 1.0, 'b': float('nan')}, False),
        ({'a': float('inf'), 'b': 0.0}, False),
        ({'a': float('-inf')}, False),
    ],
)
def test_finite_metrics_are_told_from_others(metrics, finite):
    assert logs.all_finite(metrics) is finite


def test_reading_leaves_out_half_a_line_and_a_missing_file(tmp_path):
    assert logs.read(tmp_path) == []
    (tmp_path / logs.METRICS_FILE).write_text('{"step": 1}\n{"step": 2, "lo')
    assert logs.read(tmp_path) == [{'step': 1}]

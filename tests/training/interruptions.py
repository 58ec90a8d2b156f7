"""Trainings that are cut off, and what they leave."""

import dataclasses
import itertools

import jax
import numpy as np

from neurosens import data, training
from neurosens.training import logs


class Killed(Exception):
    """What stops the training in these tests, as a power failure would."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Training data that does something before it gives batch number `after`."""

    inner: data.Source
    after: int
    action: object

    @property
    def num_examples(self):
        return self.inner.num_examples

    def train_batches(self, **arguments):
        batches = self.inner.train_batches(**arguments)
        yield from itertools.islice(batches, self.after)
        self.action()
        yield from batches


def kill():
    raise Killed


def interrupted(experiment, after, action=kill):
    return dataclasses.replace(experiment, source=Source(experiment.source, after, action))


def train(experiment, workdir):
    return training.train(experiment, workdir, progress=False)


def lines(workdir):
    """The logged metrics, times aside."""
    metrics = logs.read(workdir)
    for line in metrics:
        line.pop('images_per_second', None)
    return metrics


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

"""Evaluation over whole data sets, and its reports."""

from neurosens.evaluation.accuracy import Attacked, Predictions, attack, predict, stream

__all__ = ['Attacked', 'Predictions', 'attack', 'predict', 'stream']

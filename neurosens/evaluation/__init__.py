"""Evaluation over whole data sets, and its reports."""

from neurosens.evaluation.accuracy import Attacked, Predictions, attack, predict, stream
from neurosens.evaluation.report import results, rows, table, write
from neurosens.evaluation.robustness import (
    AttackOutcome,
    RobustnessReport,
    evaluate,
    fixed_key,
)

__all__ = [
    'AttackOutcome',
    'Attacked',
    'Predictions',
    'RobustnessReport',
    'attack',
    'evaluate',
    'fixed_key',
    'predict',
    'results',
    'rows',
    'stream',
    'table',
    'write',
]

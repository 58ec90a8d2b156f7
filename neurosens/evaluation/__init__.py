"""Evaluation over whole data sets, and its reports."""

from neurosens.evaluation.accuracy import (
    Attacked,
    Predictions,
    Progress,
    attack,
    predict,
    stream,
)
from neurosens.evaluation.calibration import (
    calibrate_defense,
    calibration_facts,
    check_defense,
    pruning_scores,
)
from neurosens.evaluation.defended import evaluate_defense, relative_cost
from neurosens.evaluation.defense_outcomes import DefenseOutcome, DefenseReport, success_rate
from neurosens.evaluation.defense_report import (
    defense_facts,
    defense_rows,
    defense_table,
    write_defense,
)
from neurosens.evaluation.defense_section import defense_section
from neurosens.evaluation.html_page import Section, check_table
from neurosens.evaluation.masking import Diagnosis, diagnose
from neurosens.evaluation.masking_checks import Check
from neurosens.evaluation.masking_report import masking_facts, masking_table, write_masking
from neurosens.evaluation.neuron_distances import images_wanted
from neurosens.evaluation.neuron_files import neuron_table, write_neurons
from neurosens.evaluation.neuron_measures import chosen_layers as neuron_layers
from neurosens.evaluation.neuron_measures import fetch_images
from neurosens.evaluation.neuron_measures import measure as measure_neurons
from neurosens.evaluation.neuron_report import LayerReport, NeuronReport, ThroughNeurons
from neurosens.evaluation.neuron_report import arrays as neuron_arrays
from neurosens.evaluation.neuron_report import facts as neuron_facts
from neurosens.evaluation.neuron_section import neuron_section
from neurosens.evaluation.report import put_in_place, results, rows, table, write
from neurosens.evaluation.robustness import (
    AttackOutcome,
    RobustnessReport,
    evaluate,
    fixed_key,
)
from neurosens.evaluation.training_plots import training_curves

__all__ = [
    'DefenseOutcome',
    'DefenseReport',
    'calibrate_defense',
    'calibration_facts',
    'check_defense',
    'defense_facts',
    'defense_rows',
    'defense_section',
    'defense_table',
    'evaluate_defense',
    'relative_cost',
    'success_rate',
    'write_defense',
    'images_wanted',
    'write_neurons',
    'neuron_table',
    'measure_neurons',
    'neuron_facts',
    'neuron_arrays',
    'neuron_layers',
    'neuron_section',
    'fetch_images',
    'NeuronReport',
    'LayerReport',
    'ThroughNeurons',
    'Check',
    'Diagnosis',
    'diagnose',
    'masking_facts',
    'masking_table',
    'write_masking',
    'Progress',
    'AttackOutcome',
    'Attacked',
    'Predictions',
    'Section',
    'check_table',
    'RobustnessReport',
    'attack',
    'evaluate',
    'fixed_key',
    'predict',
    'pruning_scores',
    'put_in_place',
    'results',
    'rows',
    'stream',
    'table',
    'training_curves',
    'write',
]

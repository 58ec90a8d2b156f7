"""The configs of the papers are whole: models, objectives and penalties of each fit together."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import command_line, data, parallel, training
from neurosens import config as config_lib
from neurosens.training import experiment, objectives

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAPERS = sorted((REPOSITORY / 'configs' / 'papers').glob('*.py'))


@pytest.mark.parametrize('path', PAPERS, ids=lambda path: path.stem)
def test_a_training_step_of_the_config_can_be_traced(path):
    config = command_line.load_file(path)
    config_lib.validate(config)
    info, mesh = data.info(config.dataset), parallel.data_mesh()
    module = training.make_model(config)
    objective = objectives.create(
        'objective', config.objective, config.objective_options, training.OBJECTIVES
    )
    optimizer, schedule = training.make_optimizer(config.optimizer, config.schedule, 100)
    terms = [
        experiment._weighted_regularizer(name, options, 100)
        for name, options in config.regularizers.items()
    ]
    step = training.make_train_step(
        module, optimizer, schedule, objective, terms, mesh,
        augmentation=config.augmentation, image_size=info.image_shape[0],
    )  # fmt: skip
    perturbed = 16 if isinstance(objective, training.Replayed) else 0
    init = functools.partial(
        training.init_state, module, optimizer, info.image_shape, perturbed=perturbed
    )
    state = jax.eval_shape(init, jax.random.key(0))
    batch = data.Batch(
        *(
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((16, *info.image_shape), jnp.uint8),
                ((16,), jnp.int32),
                ((16,), bool),
                ((16,), jnp.int32),
            )
        )
    )
    new, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert {f'{name}/penalty' for name in config.regularizers} <= set(metrics)


@pytest.mark.parametrize('path', PAPERS, ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(path):
    text = path.read_text(encoding='utf-8')
    assert f'python train.py --config=configs/papers/{path.name} --config.data_dir=DIR' in text


def test_the_stem_of_the_fragile_filters_is_that_of_the_programs():
    config = command_line.load_file(REPOSITORY / 'configs' / 'papers' / 'pravin_2021.py')
    module = training.make_model(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert shapes['params']['conv1']['kernel'].shape == (7, 7, 3, 64)


def test_every_config_of_a_paper_is_listed():
    text = (REPOSITORY / 'docs' / 'training.md').read_text(encoding='utf-8')
    listed = set(re.findall(r'`configs/papers/(\w+\.py)`', text))
    assert listed == {path.name for path in PAPERS}


def test_a_small_one_trains(tmp_path):
    config = command_line.load_file(REPOSITORY / 'configs' / 'papers' / 'fidel_2020_small.py')
    config.dataset, config.validation_size, config.steps = 'digits', 100, 3
    config.monitor.images, config.monitor.steps, config.batch_size = 40, 2, 32
    result = training.train(training.prepare(config), tmp_path, progress=False)
    assert result.step == 3 and np.isfinite(result.validation_accuracy)


@pytest.mark.parametrize('name', ['maini_2020', 'maini_2020_small'])
def test_what_of_the_steepest_steps_is_ours_is_said(name):
    path = REPOSITORY / 'configs' / 'papers' / f'{name}.py'
    said = ' '.join(path.read_text(encoding='utf-8').split('"""')[1].split())
    assert 'last iterate' in said and "authors' program" in said
    if name == 'maini_2020':
        options = command_line.load_file(path).objective_options
        assert options['step_size'] == 0.1 and 'a tenth of each radius' in said

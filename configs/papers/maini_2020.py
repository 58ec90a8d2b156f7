"""Adversarial training against three norms at once, steepest descent over them (Maini et al. 2020).

Fifty steps. The schedule is ours, and the length of steps, a tenth of each radius: the authors'
program has 0.005 for the 0.03 of linf and a twelfth of the radius of l1. So is that the last
iterate is trained on: that program returns, of each image, the one of largest loss.

For an accelerator. The short variant is `maini_2020_small.py`.

python train.py --config=configs/papers/maini_2020.py --config.data_dir=DIR --workdir=DIR

An evaluation has one norm, linf; the others are

python evaluate.py --workdir=DIR --config.evaluation.norm=l2 --config.evaluation.eps="(0.5,)"
python evaluate.py --workdir=DIR --config.evaluation.norm=l1 --config.evaluation.eps="(12.0,)"
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        objective='multi_norm',
        objective_options={
            'norms': ('linf', 'l2', 'l1'),
            'eps': (0.03, 0.5, 12.0),
            'steps': 50,
            'step_size': 0.1,
            'strategy': 'msd',
        },
        epochs=50,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=0.03, choose=True),
        evaluation=Evaluation(attacks=('pgd', 'autoattack'), norm='linf', eps=(0.03,), limit=1000),
    )

"""Adversarial training against the worst of three norms (Tramer & Boneh 2019).

On MNIST, in minutes on two cores.

python train.py --config=configs/papers/tramer_2019_small.py --config.data_dir=DIR --workdir=DIR

An evaluation has one norm, linf; the others are

python evaluate.py --workdir=DIR --config.evaluation.norm=l2 --config.evaluation.eps="(1.0,)"
python evaluate.py --workdir=DIR --config.evaluation.norm=l1 --config.evaluation.eps="(5.0,)"
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,)},
        objective='multi_norm',
        objective_options={
            'norms': ('linf', 'l2', 'l1'),
            'eps': (0.1, 1.0, 5.0),
            'steps': 5,
            'strategy': 'max',
        },
        epochs=3,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.05, weight_decay=5e-4),
        schedule=Schedule(name='cosine', warmup=0.1),
        log_every=50,
        monitor=Monitor(images=500, eps=0.1, steps=20),
        evaluation=Evaluation(attacks=('pgd', 'apgd', 'apgd_dlr'), eps=(0.1,), limit=1000),
    )

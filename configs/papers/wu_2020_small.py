"""Adversarial training with perturbed weights, AT-AWP (Wu et al. 2020).

On MNIST, in minutes on two cores.

python train.py --config=configs/papers/wu_2020_small.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,)},
        objective='pgd',
        objective_options={'eps': 0.1, 'steps': 7, 'weight_gamma': 0.005},
        epochs=4,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.05, weight_decay=5e-4),
        schedule=Schedule(name='cosine', warmup=0.1),
        log_every=50,
        monitor=Monitor(images=500, eps=0.1, steps=20),
        evaluation=Evaluation(attacks=('pgd', 'apgd', 'apgd_dlr'), eps=(0.1,), limit=1000),
    )

"""Activation sensitivity and Jacobian regularization (Fidel et al. 2020).

On MNIST, in minutes on two cores.

python train.py --config=configs/papers/fidel_2020_small.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,)},
        regularizers={
            'sensitivity_and_jacobian': {'sensitivity': 0.1, 'jacobian': 0.05, 'ramp': 0.15}
        },
        epochs=4,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.05, weight_decay=5e-4, clip_norm=5.0),
        schedule=Schedule(name='cosine', warmup=0.1),
        log_every=50,
        monitor=Monitor(images=500, eps=0.1, steps=20, probes=8),
        evaluation=Evaluation(attacks=('pgd', 'apgd', 'apgd_dlr'), eps=(0.1,), limit=1000),
    )

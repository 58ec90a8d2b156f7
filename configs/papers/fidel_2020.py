"""Activation sensitivity and Jacobian regularization (Fidel et al. 2020).

The authors published neither program nor constants: estimators, weights and network are ours.

For an accelerator. The short variant is `fidel_2020_small.py`.

python train.py --config=configs/papers/fidel_2020.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        regularizers={
            'sensitivity_and_jacobian': {'sensitivity': 0.1, 'jacobian': 0.05, 'ramp': 0.15}
        },
        epochs=100,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4, clip_norm=5.0),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=2 / 255, probes=8),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(2 / 255,), limit=1000
        ),
    )

"""Adversarial training with perturbed weights, AT-AWP (Wu et al. 2020).

Ten steps of 2 / 255 within 8 / 255, gamma = 0.005, 200 epochs with the rate divided by ten after
half and three quarters of them.

For an accelerator. The short variant is `wu_2020_small.py`.

python train.py --config=configs/papers/wu_2020.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        objective='pgd',
        objective_options={
            'eps': 8 / 255,
            'steps': 10,
            'step_size': 0.25,
            'weight_gamma': 0.005,
        },
        epochs=200,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0, boundaries=(0.5, 0.75)),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=8 / 255, choose=True),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(8 / 255,), limit=1000
        ),
    )

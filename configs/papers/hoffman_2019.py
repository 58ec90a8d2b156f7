"""Jacobian regularization (Hoffman, Roberts & Yaida 2019) on CIFAR-10.

Their default weight 0.01, here for pixels in [0, 1]; that, network, epochs and schedule are ours.

For an accelerator. The short variant is `hoffman_2019_small.py`.

python train.py --config=configs/papers/hoffman_2019.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        regularizers={'jacobian': {'weight': 0.01, 'projections': 1}},
        epochs=100,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=2 / 255, probes=8),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(2 / 255,), limit=1000
        ),
    )

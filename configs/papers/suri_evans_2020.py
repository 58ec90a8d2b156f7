"""Sensitivity regularization, T1 + T2 (Suri & Evans 2020, "One Neuron to Fool Them All").

VGG-19 on CIFAR-10 with their weights d1 = 10, d2 = 100 and k = 16, learning rate 0.01 and batches
of 128; momentum, weight decay, augmentation, epochs and schedule are ours.

For an accelerator. The short variant is `suri_evans_2020_small.py`.

python train.py --config=configs/papers/suri_evans_2020.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='vgg19',
        regularizers={
            'neuron_contribution': {
                'weight_difference_weight': 10.0,
                'contribution_weight': 100.0,
                'top': 16,
                'shared': True,
            }
        },
        epochs=100,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.01, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=2 / 255),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(2 / 255,), limit=1000
        ),
    )

"""MART (Wang et al. 2020).

beta = 5, ten steps of 2 / 255 within 8 / 255, 120 epochs with the rate divided at 75 and 90. The
network, a ResNet-18 with activations in front of convolutions, is ours (theirs are ResNet-18 and
WideResNet-34-10).

For an accelerator. The short variant is `wang_2020_small.py`.

python train.py --config=configs/papers/wang_2020.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        objective='mart',
        objective_options={'eps': 8 / 255, 'steps': 10, 'step_size': 0.25, 'beta': 5.0},
        epochs=120,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.01, weight_decay=3.5e-3),
        schedule=Schedule(name='piecewise', warmup=0.0, boundaries=(0.625, 0.75)),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=8 / 255, choose=True),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(8 / 255,), limit=1000
        ),
    )

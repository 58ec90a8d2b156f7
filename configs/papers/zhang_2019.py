"""TRADES (Zhang et al. 2019).

beta = 6, ten steps of 0.007 within 0.031, 76 epochs with the rate divided before the last. The
network (theirs is WideResNet-34-10) and bfloat16 are ours.

For an accelerator. The short variant is `zhang_2019_small.py`.

python train.py --config=configs/papers/zhang_2019.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='wide_resnet28_10',
        dtype='bfloat16',
        objective='trades',
        objective_options={'eps': 0.031, 'steps': 10, 'step_size': 0.007 / 0.031, 'beta': 6.0},
        epochs=76,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=2e-4),
        schedule=Schedule(name='piecewise', warmup=0.0, boundaries=(75 / 76,)),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=0.031, choose=True),
        evaluation=Evaluation(attacks=('pgd', 'autoattack'), norm='linf', eps=(0.031,), limit=1000),
    )

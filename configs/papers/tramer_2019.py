"""Adversarial training against the average of two norms (Tramer & Boneh 2019).

Their radii on CIFAR-10, linf 4 / 255 and l1 2000 / 255; steps, epochs, schedule and bfloat16 are
ours. The strategy 'max', of `tramer_2019_small.py`, takes the worst of the norms for each image.

For an accelerator. The short variant is `tramer_2019_small.py`.

python train.py --config=configs/papers/tramer_2019.py --config.data_dir=DIR --workdir=DIR

An evaluation has one norm, linf; the other is

python evaluate.py --workdir=DIR --config.evaluation.norm=l1 --config.evaluation.eps="(7.843,)"
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='wide_resnet28_10',
        dtype='bfloat16',
        objective='multi_norm',
        objective_options={
            'norms': ('linf', 'l1'),
            'eps': (4 / 255, 2000 / 255),
            'steps': 10,
            'strategy': 'average',
        },
        epochs=100,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=4 / 255, choose=True),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(4 / 255,), limit=1000
        ),
    )

"""ResNet-20 on CIFAR-10 (He et al. 2016), the recipe of their section 4.2 with a cosine schedule.

python train.py --config=configs/cifar10.py --config.data_dir=DIR

A short look at it: add --config.steps=200.
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='cifar_resnet20',
        epochs=160,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=1e-4),
        schedule=Schedule(name='cosine', warmup=0.02),
        log_every=50,
        evaluate_every=5,
        evaluation=Evaluation(eps=(1 / 255, 2 / 255, 4 / 255, 8 / 255), limit=1000),
    )

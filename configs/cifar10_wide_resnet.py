"""WideResNet-28-10 on CIFAR-10 in bfloat16, with averaged weights: for one accelerator or more.

python train.py --config=configs/cifar10_wide_resnet.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='wide_resnet28_10',
        dtype='bfloat16',
        epochs=100,
        batch_size=256,
        optimizer=Optimizer(name='sgd', learning_rate=0.2, weight_decay=5e-4, ema_decay=0.995),
        schedule=Schedule(name='onecycle', warmup=0.3),
        log_every=50,
        evaluate_every=5,
        evaluation=Evaluation(eps=(1 / 255, 2 / 255, 4 / 255, 8 / 255)),
    )

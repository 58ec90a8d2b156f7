"""A small convolutional network on MNIST: at least 99 % in a few minutes on two cores.

python train.py --config=configs/mnist.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        augmentation='pad_crop',
        model='cnn',
        model_options={'features': (32, 64), 'hidden': (128,)},
        epochs=6,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.05, weight_decay=5e-4),
        schedule=Schedule(name='cosine', warmup=0.1),
        log_every=50,
        evaluation=Evaluation(eps=(0.1, 0.2, 0.3)),
    )

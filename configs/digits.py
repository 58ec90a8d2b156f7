"""A small convolutional network on scikit-learn's 8x8 digits: no download, under a minute.

python train.py --config=configs/digits.py
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='digits',
        validation_size=137,
        augmentation='pad_crop',
        model='cnn',
        model_options={'features': (32, 64), 'hidden': (128,)},
        epochs=60,
        batch_size=64,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='cosine', warmup=0.05),
        log_every=20,
        evaluate_every=10,
        evaluation=Evaluation(eps=(0.02, 0.05, 0.1, 0.2)),
    )

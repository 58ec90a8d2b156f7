"""Jacobian regularization as post-processing (Jakubovitz & Giryes 2018).

On MNIST, in minutes on two cores, as in `jakubovitz_2018.py`: a training without a penalty, and a
short one with the root of the batch's Jacobian norms that starts from it.

python train.py --config=configs/papers/jakubovitz_2018_small.py --config.data_dir=DIR \
  --workdir=runs/plain
python train.py --config=configs/papers/jakubovitz_2018_small.py --config.data_dir=DIR \
  --workdir=runs/jacobian --config.initial_weights=runs/plain --config.steps=400 \
  --config.regularizers="{'jacobian_root': {'weight': 0.1}}"
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,), 'dropout': 0.5},
        steps=1600,
        batch_size=128,
        optimizer=Optimizer(name='adamw', learning_rate=1e-3, weight_decay=0.0),
        schedule=Schedule(name='constant', warmup=0.0),
        log_every=50,
        monitor=Monitor(images=500, eps=0.1, steps=20, probes=8),
        evaluation=Evaluation(attacks=('deepfool', 'fgsm'), norm='l2', eps=(1.0,), limit=1000),
    )

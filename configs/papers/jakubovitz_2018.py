"""Jacobian regularization as post-processing (Jakubovitz & Giryes 2018).

Two phases: training to convergence, and then a short one with the root of the batch's Jacobian
norms and fresh moments of Adam, which starts from the first by --config.initial_weights. The images
held out and the initialisation are ours. Their measure of robustness, rho_adv, is
`relative_distance/deepfool-l2` of an evaluation.

python train.py --config=configs/papers/jakubovitz_2018.py --config.data_dir=DIR \
  --workdir=runs/plain
python train.py --config=configs/papers/jakubovitz_2018.py --config.data_dir=DIR \
  --workdir=runs/jacobian --config.initial_weights=runs/plain --config.steps=4500 \
  --config.regularizers="{'jacobian_root': {'weight': 0.1}}"
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (32, 64), 'kernel_size': 5, 'hidden': (1024,), 'dropout': 0.5},
        steps=20_001,
        batch_size=500,
        optimizer=Optimizer(name='adamw', learning_rate=1e-4, weight_decay=0.0),
        schedule=Schedule(name='constant', warmup=0.0),
        log_every=100,
        monitor=Monitor(images=500, norm='l2', eps=1.0, steps=20, probes=4),
        evaluation=Evaluation(attacks=('deepfool', 'fgsm'), norm='l2', eps=(1.0,), limit=1000),
    )

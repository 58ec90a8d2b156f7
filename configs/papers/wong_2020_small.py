"""Fast adversarial training, one step from a random start (Wong, Rice & Kolter 2020).

The guard stops it where the accuracy under PGD collapses.

On MNIST, in minutes on two cores.

python train.py --config=configs/papers/wong_2020_small.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,)},
        objective='fgsm_rs',
        objective_options={'eps': 0.1},
        epochs=4,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.05, weight_decay=5e-4),
        schedule=Schedule(name='cosine', warmup=0.1),
        log_every=50,
        monitor=Monitor(images=500, eps=0.1, steps=20, guard=0.2, choose=True),
        evaluation=Evaluation(attacks=('pgd', 'apgd', 'apgd_dlr'), eps=(0.1,), limit=1000),
    )

"""Fast adversarial training, one step from a random start (Wong, Rice & Kolter 2020).

The guard stops it where the accuracy under PGD collapses. Number of epochs and the shape of the one
cycle are ours, and the attack sees running statistics of BatchNorm.

For an accelerator. The short variant is `wong_2020_small.py`.

python train.py --config=configs/papers/wong_2020.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='preact_resnet18',
        objective='fgsm_rs',
        objective_options={'eps': 8 / 255, 'step_size': 1.25},
        epochs=30,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.2, weight_decay=5e-4),
        schedule=Schedule(name='onecycle', warmup=0.4),
        log_every=50,
        evaluate_every=1,
        monitor=Monitor(images=1000, norm='linf', eps=8 / 255, guard=0.2, choose=True),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(8 / 255,), limit=1000
        ),
    )

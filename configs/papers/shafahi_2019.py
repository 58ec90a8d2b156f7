"""Free adversarial training (Shafahi et al. 2019).

Eight replays of each batch. Epochs count replays: each is an eighth of the training set, taken
eight times. WideResNet-28-10 in bfloat16 (theirs is WideResNet-32-10), the number of epochs,
schedule and weight decay are ours.

For an accelerator. The short variant is `shafahi_2019_small.py`.

python train.py --config=configs/papers/shafahi_2019.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Monitor, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        augmentation='pad_crop_flip',
        model='wide_resnet28_10',
        dtype='bfloat16',
        objective='free',
        objective_options={'eps': 8 / 255, 'replays': 8},
        epochs=100,
        batch_size=128,
        optimizer=Optimizer(name='sgd', learning_rate=0.1, weight_decay=5e-4),
        schedule=Schedule(name='piecewise', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        monitor=Monitor(images=1000, norm='linf', eps=8 / 255, choose=True),
        evaluation=Evaluation(
            attacks=('pgd', 'autoattack'), norm='linf', eps=(8 / 255,), limit=1000
        ),
    )

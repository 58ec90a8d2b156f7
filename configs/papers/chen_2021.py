"""Inverse perturbation by neuron influence (Chen et al. 2021).

The front neuron and the five tail neurons of the first released program, every position of the
last convolution's output, and its move of 0.001 on CIFAR-10 among those that the defence tries. The
program itself, which knows the clean images and the answers, is the control 'influence, oracle' of
the report. Which networks the paper has is not known to us; network, training, radii and larger
moves are ours.

For an accelerator. The short variant, for MNIST, is `chen_2021_small.py`. Training is plain; the
defence is a matter of evaluation:

python train.py --config=configs/papers/chen_2021.py --config.data_dir=DIR --workdir=runs/influence
python evaluate.py --workdir=runs/influence
"""

from neurosens.config import Config, Defense, Evaluation, Neurons, Optimizer, Schedule


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
        evaluation=Evaluation(
            attacks=('fgsm', 'pgd', 'autoattack'),
            norm='linf',
            eps=(0.5 / 255, 1 / 255, 2 / 255, 8 / 255),
            limit=1000,
        ),
        neurons=Neurons(measures=('influence',), layers=('stage3_block3/act2',)),
        defense=Defense(
            name='inverse_perturbation',
            options={
                'layers': ('stage3_block3/act2',),
                'front': 1,
                'tail': 5,
                'rho': (0.001, 0.003, 0.01, 0.03),
            },
        ),
    )

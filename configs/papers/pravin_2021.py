"""Fragile and robust filters, compressed and amplified (Pravin et al. 2021).

ResNet-18 with a stem of 7x7 filters on CIFAR-10, Adam with a learning rate of 0.001, batches of
100, channels standardised by 0.5 and 0.5: the settings of the authors' surviving programs. Their
FGSM of 0.01 to 0.025 in standardised pixels is of 0.005 to 0.0125 in those of [0, 1], in which
attacks here are clipped. Epochs and schedule are ours.

For an accelerator. The short variant, for MNIST, is `pravin_2021_small.py`. Training is plain;
filters and their rescaling are a matter of evaluation, and the rest of the network may then be
trained on around the rescaled ones:

python train.py --config=configs/papers/pravin_2021.py --config.data_dir=DIR --workdir=runs/plain
python evaluate.py --workdir=runs/plain
python train.py --config=configs/papers/pravin_2021.py --config.data_dir=DIR --workdir=runs/tuned \
  --config.initial_weights=runs/plain --config.initial_rescaling=runs/plain/defense \
  --config.optimizer.freeze="('conv1', 'norm1')" \
  --config.optimizer.freeze_statistics="('norm1',)" --config.epochs=5
"""

from neurosens.config import Config, Defense, Evaluation, Neurons, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='cifar10',
        validation_size=5000,
        model='resnet18',
        model_options={'stem': 'imagenet'},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        epochs=30,
        batch_size=100,
        optimizer=Optimizer(name='adamw', learning_rate=1e-3, weight_decay=0.0),
        schedule=Schedule(name='constant', warmup=0.0),
        log_every=50,
        evaluate_every=5,
        evaluation=Evaluation(
            attacks=('fgsm', 'pgd', 'apgd', 'apgd_dlr', 'autoattack'),
            norm='linf',
            eps=(0.005, 0.0125),
        ),
        neurons=Neurons(
            measures=('ablation', 'targeting'),
            layers=('conv1',),
            ablation='weights',
            limit=10000,
        ),
        defense=Defense(name='rescaling', options={'layer': 'conv1'}, images=10000),
    )

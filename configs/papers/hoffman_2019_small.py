"""Jacobian regularization (Hoffman, Roberts & Yaida 2019), their MNIST example.

On MNIST, in a minute on two cores. Their penalty is taken with respect to standardised pixels and
with weight 0.1; ours is per pixel, with the standardisation inside the model, so that the same
weight is 0.1 * 0.3081 ** 2. Biases are not decayed, which those of their program are.

python train.py --config=configs/papers/hoffman_2019_small.py --config.data_dir=DIR
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        model='mlp',
        model_options={'hidden': (200, 200), 'initialization': 'xavier'},
        regularizers={'jacobian': {'weight': 0.1 * 0.3081**2, 'projections': 1}},
        epochs=5,
        batch_size=64,
        optimizer=Optimizer(
            name='sgd', learning_rate=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4
        ),
        schedule=Schedule(name='constant', warmup=0.0),
        log_every=100,
        evaluation=Evaluation(attacks=('pgd', 'apgd', 'apgd_dlr'), eps=(0.1,), limit=1000),
    )

"""Fragile and robust filters, compressed and amplified (Pravin et al. 2021).

On MNIST, in minutes on two cores, as in `pravin_2021.py`: the FGSM of the authors' programs, 0.45
in pixels standardised by 0.3081, is of 0.139 in those of [0, 1].

python train.py --config=configs/papers/pravin_2021_small.py --config.data_dir=DIR \
  --workdir=runs/plain
python evaluate.py --workdir=runs/plain
python train.py --config=configs/papers/pravin_2021_small.py --config.data_dir=DIR \
  --workdir=runs/tuned --config.initial_weights=runs/plain \
  --config.initial_rescaling=runs/plain/defense --config.optimizer.freeze="('conv1',)" \
  --config.epochs=1
"""

from neurosens.config import Config, Defense, Evaluation, Neurons, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='mnist',
        validation_size=5000,
        model='cnn',
        model_options={'features': (16, 32), 'hidden': (100,)},
        mean=(0.1307,),
        std=(0.3081,),
        epochs=2,
        batch_size=100,
        optimizer=Optimizer(name='adamw', learning_rate=1e-3, weight_decay=0.0),
        schedule=Schedule(name='constant', warmup=0.0),
        log_every=50,
        evaluation=Evaluation(
            attacks=('fgsm', 'pgd', 'apgd', 'apgd_dlr'),
            norm='linf',
            eps=(0.45 * 0.3081,),
            limit=500,
            auto_steps=50,
            queries=500,
        ),
        neurons=Neurons(
            measures=('ablation', 'targeting'),
            layers=('conv1',),
            ablation='weights',
            limit=1000,
        ),
        defense=Defense(name='rescaling', options={'layer': 'conv1'}, images=1000),
    )

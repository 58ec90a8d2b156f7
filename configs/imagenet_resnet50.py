"""ResNet-50 on ImageNet for a pod: 90 epochs at batch 1,024 (Goyal et al. 2017).

python train.py --config=configs/imagenet_resnet50.py --config.data_dir=DIR --distributed
"""

from neurosens.config import Config, Evaluation, Optimizer, Schedule


def get_config() -> Config:
    return Config(
        dataset='imagenet2012',
        validation_size=10_000,
        augmentation='random_resized_crop_flip',
        model='resnet50',
        model_options={'stem': 'imagenet'},
        dtype='bfloat16',
        objective_options={'label_smoothing': 0.1},
        epochs=90,
        batch_size=1024,
        optimizer=Optimizer(name='sgd', learning_rate=0.4, weight_decay=5e-5),
        schedule=Schedule(name='cosine', warmup=0.05),
        log_every=100,
        checkpoint_every=2000,
        evaluation=Evaluation(eps=(0.5 / 255, 1 / 255, 2 / 255, 4 / 255), limit=5000),
    )

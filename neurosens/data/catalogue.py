"""Names, shapes, classes and pixel statistics of the supported image data sets."""

import dataclasses

from neurosens import _validate

_DIGIT_NAMES = tuple('0123456789')

_FASHION_MNIST_NAMES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)

_CIFAR10_NAMES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)

_CIFAR100_TEXT = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
    bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket
    rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100_NAMES = tuple(_CIFAR100_TEXT.split())


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What training and evaluation need to know about a data set before reading it.

    Attributes:
        name: The data set's name.
        num_classes: Number of classes.
        image_shape: Height, width and channels of the images a classifier sees.
        class_names: One name per class, in label order.
        mean: Per-channel mean of the training pixels scaled to [0, 1].
        std: Per-channel standard deviation of the training pixels scaled to [0, 1].
        train_size: Number of examples of the official training split.
        test_size: Number of examples of the official labelled test split.
        in_memory: Whether a split is held in memory as one array.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    in_memory: bool = True


_DATASETS = (
    DatasetInfo(
        name='digits',
        num_classes=10,
        image_shape=(8, 8, 1),
        class_names=_DIGIT_NAMES,
        mean=(0.3056,),
        std=(0.3761,),
        train_size=1437,
        test_size=360,
    ),
    DatasetInfo(
        name='mnist',
        num_classes=10,
        image_shape=(28, 28, 1),
        class_names=_DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        train_size=60_000,
        test_size=10_000,
    ),
    DatasetInfo(
        name='fashion_mnist',
        num_classes=10,
        image_shape=(28, 28, 1),
        class_names=_FASHION_MNIST_NAMES,
        mean=(0.2860,),
        std=(0.3530,),
        train_size=60_000,
        test_size=10_000,
    ),
    DatasetInfo(
        name='cifar10',
        num_classes=10,
        image_shape=(32, 32, 3),
        class_names=_CIFAR10_NAMES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train_size=50_000,
        test_size=10_000,
    ),
    DatasetInfo(
        name='cifar100',
        num_classes=100,
        image_shape=(32, 32, 3),
        class_names=_CIFAR100_NAMES,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        train_size=50_000,
        test_size=10_000,
    ),
    DatasetInfo(
        name='imagenet2012',
        num_classes=1000,
        image_shape=(224, 224, 3),
        # The names proper come from the prepared directory when it is opened.
        class_names=tuple(f'class_{label}' for label in range(1000)),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        train_size=1_281_167,
        test_size=50_000,
        in_memory=False,
    ),
)


def names() -> tuple[str, ...]:
    """Returns the names of the supported data sets."""
    return tuple(entry.name for entry in _DATASETS)


def info(name: str) -> DatasetInfo:
    """Returns the description of a data set.

    Args:
        name: One of `names()`.

    Returns:
        The data set's description; nothing is read or downloaded.

    Raises:
        ValueError: The name is unknown.
    """
    for entry in _DATASETS:
        if entry.name == name:
            return entry
    raise ValueError(_validate.unknown('data set', name, names()))

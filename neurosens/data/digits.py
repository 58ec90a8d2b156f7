"""The 8x8 handwritten digits that come with scikit-learn: no download, no preparation."""

import numpy as np

# Of the 174 to 183 images of each class, this many are test images: 360 of 1797 in all.
_TEST_IMAGES_PER_CLASS = 36
# Fixes which images are test images; never changes.
_SPLIT_SEED = 20_240_229


def read_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the training or the test split.

    The split is stratified: each class has 36 test images, chosen by a fixed seed.

    Args:
        split: 'train' (1437 images) or 'test' (360 images).

    Returns:
        Images, uint8 [N, 8, 8, 1] with 0..16 scaled to 0..255, and labels, int32 [N].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    labels = bunch.target.astype(np.int32)
    generator = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        is_test[members[:_TEST_IMAGES_PER_CLASS]] = True
    selected = is_test if split == 'test' else ~is_test
    return images[selected], labels[selected]

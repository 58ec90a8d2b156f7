"""Both sides of a network on the same images."""

import jax
import numpy as np
import pytest

UNOPTIMISED = {'xla_backend_optimization_level': 0}


@pytest.fixture(scope='session')
def images():
    """Random images `[B, H, W, C]` in [0, 1]."""

    def images(count, height, width, channels, seed=0):
        x = np.random.default_rng(seed).uniform(size=(count, height, width, channels))
        return x.astype(np.float32)

    return images


@pytest.fixture(scope='session')
def logits_of():
    """Logits of a module, or of a network of PyTorch."""
    torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

    def logits_of(model, x, variables=None):
        if variables is None:
            with torch.no_grad():
                return model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        return np.asarray(jax.jit(model.apply, compiler_options=UNOPTIMISED)(variables, x))

    return logits_of


@pytest.fixture(scope='session')
def assert_same():
    """Of each image both within 1e-4 of its largest logit."""

    def assert_same(ours, theirs):
        assert ours.shape == theirs.shape
        assert np.abs(theirs).max() > 0.01
        share = np.abs(ours - theirs).max(1) / np.abs(theirs).max(1)
        assert (share <= 1e-4).all(), share

    return assert_same

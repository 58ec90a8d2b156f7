"""Attacks break as much of published networks as their publishers say."""

import jax
import numpy as np
import pytest

from neurosens import attacks, data, interop, parallel
from neurosens.forward import LinenForward

pytest.importorskip('torch', reason='the file of weights needs requirements-bench.txt')

COUNT = 512


def test_pgd_breaks_as_much_of_the_robust_lenet_as_published(data_root):
    """PGD-40, linf 0.3, steps of 0.01 from the image: 6.8 % of what is classified correctly."""
    state = interop.read_state_dict(data_root / 'weights' / 'mnist_lenet5_pgd_linf03.pt')
    module, variables = interop.from_torch(state, 'lenet5_wide')
    forward, mesh = LinenForward(module, {'train': False}), parallel.data_mesh()
    variables = parallel.replicate(mesh, variables)
    source = data.open('mnist', 'test', str(data_root / 'tfds'), 0)
    (batch,) = source.eval_batches(batch_size=COUNT, process_index=0, process_count=1, limit=COUNT)
    x, y = parallel.shard(mesh, (np.float32(batch.image) / 255, batch.label))
    correct = np.asarray(jax.jit(forward)(variables, x)[0].argmax(-1)) == batch.label
    assert correct.mean() > 0.97
    result = attacks.pgd(
        forward,
        variables,
        x,
        y,
        jax.random.key(0),
        threat=attacks.Threat('linf', 0.3),
        steps=40,
        step_size=0.01,
        start='clean',
    )
    broken = np.asarray(result.success)[correct].mean()
    # The publishers do not say of which images; three standard errors of this many are 3.3 %.
    assert abs(broken - 0.068) < 0.033

"""Attacks break as much of published networks as publishers, and a plain loop in PyTorch, say."""

import jax
import numpy as np
import pytest

from neurosens import attacks, data, parallel

torch = pytest.importorskip('torch', reason='the files of weights need requirements-bench.txt')

pytestmark = pytest.mark.parity

COUNT = 512


def broken_by_a_plain_loop(network, x, y, eps, size, steps):
    """Images that any iterate of signed steps from the image fools, in PyTorch."""
    from benchmarks import published

    clean, labels = published.torch_images(x), torch.from_numpy(np.int64(y))
    image, broken = clean.clone(), torch.zeros(len(y), dtype=torch.bool)
    for _ in range(steps):
        image.requires_grad_(True)
        logits = network(image)
        broken |= logits.argmax(1) != labels
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction='sum')
        (gradient,) = torch.autograd.grad(loss, image)
        moved = image.detach() + size * gradient.sign()
        image = torch.minimum(torch.maximum(moved, clean - eps), clean + eps).clamp(0, 1)
    return (broken | (network(image).argmax(1) != labels)).numpy()


@pytest.mark.parametrize(
    ('name', 'eps', 'size', 'clean', 'published_share'),
    [
        # 6.8 % of what is classified correctly, of an unknown part of the images.
        ('lenet5_robust', 0.3, 0.01, 0.9864, 0.068),
        # 54.82 % stay robust under another attack, of 69.25 % that are right.
        ('resnet2b', 2 / 255, 0.5 / 255, 0.6925, 1 - 0.5482 / 0.6925),
    ],
)
def test_pgd_breaks_what_it_should(data_root, name, eps, size, clean, published_share):
    # Imported here: it needs torch.
    from benchmarks import published

    pair, mesh = published.load(name, str(data_root / 'weights')), parallel.data_mesh()
    source = data.open(pair.data_set, 'test', str(data_root / 'tfds'), 0)
    (batch,) = source.eval_batches(batch_size=COUNT, process_index=0, process_count=1, limit=COUNT)
    images, labels = np.float32(batch.image) / 255, batch.label
    variables = parallel.replicate(mesh, pair.variables)
    x, y = parallel.shard(mesh, (images, labels))
    correct = np.asarray(jax.jit(pair.forward)(variables, x)[0].argmax(-1)) == labels
    # Three standard errors of this many images.
    spread = 3 * np.sqrt(clean * (1 - clean) / COUNT)
    assert abs(correct.mean() - clean) < spread
    result = attacks.pgd(
        pair.forward,
        variables,
        x,
        y,
        jax.random.key(0),
        threat=attacks.Threat('linf', eps),
        steps=40,
        step_size=size,
        start='clean',
    )
    success = np.asarray(result.success)
    expected = broken_by_a_plain_loop(pair.network, images, labels, eps, size, 40)
    assert np.mean(success == expected) >= 0.995
    assert abs(success.mean() - expected.mean()) <= 0.002
    share = success[correct].mean()
    error = np.sqrt(published_share * (1 - published_share) / correct.sum())
    assert abs(share - published_share) < 3 * error

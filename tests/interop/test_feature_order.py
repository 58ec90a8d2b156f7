"""The order of features is followed through a module, or the module refused; NumPy knows it too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import interop

# Height, width and channels all differ.
IMAGE = (4, 6, 3)


def flat(x):
    return x.reshape(len(x), -1)


class Linear(nn.Module):
    """A linear layer behind features of a map."""

    way: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, use_bias=False, name='head')(self.way(x))


def outer(f):
    """Features times their mean, spread over all of them."""
    return f * jnp.broadcast_to(f.mean(1, keepdims=True), f.shape)


# From a map with its channels last to features, and from one with its channels first.
WAYS = {
    'a channel': (lambda x: flat(x[..., 1]), lambda x: flat(x[:, 1])),
    'a channel that is taken': (lambda x: flat(jnp.take(x, 1, -1)), lambda x: flat(x[:, 1])),
    'a squeeze': (lambda x: flat(jnp.squeeze(x[..., :1], -1)), lambda x: flat(x[:, 0])),
    'a mean': (lambda x: flat(x.mean(-1)), lambda x: flat(x.mean(1))),
    'a maximum': (lambda x: flat(x.max(-1)), lambda x: flat(x.max(1))),
    'a channel of several': (
        lambda x: flat(sum(jnp.unstack(x, axis=-1)[:2])), lambda x: flat(x[:, 0] + x[:, 1])
    ),
    'its place': (lambda x: flat(1.0 * x.argmax(-1)), lambda x: flat(x.argmax(1))),
    'a channel of channels first': (
        lambda x: flat(x.transpose(0, 3, 1, 2)[:, 1]), lambda x: flat(x[:, 1])
    ),
    'a mean, then a pool': (
        lambda x: flat(nn.avg_pool(x.mean(-1, keepdims=True), (2, 2), (2, 2))[..., 0]),
        lambda x: flat(x.mean(1).reshape(-1, 2, 2, 3, 2).mean((2, 4))),
    ),
    'a mean, then a sum of products': (
        lambda x: flat(x.mean(-1) @ jnp.eye(6, 2)), lambda x: flat(x.mean(1) @ np.eye(6, 2))
    ),
    'a row': (lambda x: flat(x[:, 1]), lambda x: flat(x[:, :, 1])),
    'a sum of columns': (lambda x: flat(x.sum(2)), lambda x: flat(x.sum(3))),
    'a row of channels first': (
        lambda x: flat(x.transpose(0, 3, 1, 2)[:, :, 1]), lambda x: flat(x[:, :, 1])
    ),
    'a map that its mean weighs': (
        lambda x: flat(x * x.mean(-1, keepdims=True)), lambda x: flat(x * x.mean(1, keepdims=True))
    ),
    'channels first that their mean weighs': (
        lambda x: flat((x := x.transpose(0, 3, 1, 2)) * x.mean(1, keepdims=True)),
        lambda x: flat(x * x.mean(1, keepdims=True)),
    ),
    'a map that channels weigh': (
        lambda x: flat(x * x.mean((1, 2), keepdims=True)),
        lambda x: flat(x * x.mean((2, 3), keepdims=True)),
    ),
    'means and maxima': (
        lambda x: flat(jnp.stack([x.mean(-1), x.max(-1)], -1)),
        lambda x: flat(np.stack([x.mean(1), x.max(1)], 1)),
    ),
    'means and maxima, first': (
        lambda x: flat(jnp.stack([x.mean(-1), x.max(-1)], 1)),
        lambda x: flat(np.stack([x.mean(1), x.max(1)], 1)),
    ),
    'features of one size': (
        lambda x: (f := flat(x)) / jnp.linalg.norm(f, axis=1, keepdims=True),
        lambda x: (f := flat(x)) / np.linalg.norm(f, axis=1, keepdims=True),
    ),
    'features times their mean': (
        lambda x: outer(flat(x)), lambda x: (f := flat(x)) * f.mean(1, keepdims=True)
    ),
    'features of images of a kind': (
        lambda x: jnp.where((f := flat(x)).mean(1, keepdims=True) > 0.5, f, -f),
        lambda x: np.where((f := flat(x)).mean(1, keepdims=True) > 0.5, f, -f),
    ),
    'features less those of the batch': (
        lambda x: (f := flat(x)) - f.mean(0), lambda x: (f := flat(x)) - f.mean(0)
    ),
    'groups of channels, summed': (
        lambda x: x.reshape(-1, 4, 6, 3, 1).sum((1, 2, 4)), lambda x: x.sum((2, 3))
    ),
    'the mean of two': (
        lambda x: jnp.stack([(f := flat(x)), f**2], 1).mean(1),
        lambda x: ((f := flat(x)) + f**2) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize('way', WAYS)
def test_features_are_in_the_order_of_pytorch(way, images):
    ours, theirs = WAYS[way]
    x = images(3, *IMAGE)
    features = theirs(x.transpose(0, 3, 1, 2))
    weight = np.random.default_rng(0).normal(size=(5, features.shape[1]))
    module, variables = interop.from_torch({'head.weight': weight}, Linear(ours), image_shape=IMAGE)
    logits = module.apply(variables, x)
    np.testing.assert_allclose(logits, features @ weight.T, rtol=1e-4, atol=1e-4)
    back = interop.to_torch(module, variables, image_shape=IMAGE)
    np.testing.assert_array_equal(back['head.weight'], np.float32(weight))


class Gated(nn.Module):
    """Features that a layer of them weighs, each of them or all by one number."""

    gates: int
    channels_first: bool = False

    @nn.compact
    def __call__(self, x):
        f = flat(x.transpose(0, 3, 1, 2) if self.channels_first else x)
        f = f * nn.sigmoid(nn.Dense(self.gates, use_bias=False, name='gate')(f))
        return nn.Dense(5, use_bias=False, name='head')(f)


@pytest.mark.parametrize('module', [Gated(1), Gated(72, channels_first=True)])
def test_features_may_be_weighed_by_numbers_in_their_order(module, images):
    generator = np.random.default_rng(0)
    gate, head = (generator.normal(size=(rows, 72)) for rows in (module.gates, 5))
    state = {'gate.weight': gate, 'head.weight': head}
    _, variables = interop.from_torch(state, module, image_shape=IMAGE)
    x = images(3, *IMAGE)
    f = flat(x.transpose(0, 3, 1, 2))
    f = f / (1 + np.exp(-f @ gate.T))
    np.testing.assert_allclose(module.apply(variables, x), f @ head.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'mix',
    [
        lambda x: jnp.concatenate([flat(x), flat(2 * x)], -1),
        lambda x: flat(x)[:, ::2],
        lambda x: flat(x) + flat(x.transpose(0, 3, 1, 2)),
        lambda x: flat(x.transpose(0, 2, 1, 3)),
        lambda x: flat(x[..., 0].swapaxes(1, 2)),
        lambda x: flat(x.transpose(0, 2, 1, 3).max(-1)),
        lambda x: x.reshape(len(x), -1, 6).max(-1),
        lambda x: flat(x).reshape(len(x), -1, 6).max(-1),
        lambda x: jnp.stack([flat(x), flat(2 * x)], -1).max(-1),
        lambda x: flat(x)[:, ::-1],
        lambda x: flat(x)[:, np.arange(96)[::-1]],
        lambda x: flat(x).cumsum(-1),
        lambda x: jnp.sort(flat(x), -1),
        lambda x: x.reshape(len(x), -1, 6),
        lambda x: flat(x).reshape(len(x), -1, 6),
        lambda x: (f := flat(x)) + nn.Dense(f.shape[-1])(f),
        lambda x: (f := flat(x)) * nn.sigmoid(nn.Dense(f.shape[-1])(f)),
    ],
)
def test_features_in_an_order_that_cannot_be_told_are_refused(mix):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name='head')(mix(nn.Conv(4, (1, 1))(x)))

    state = {'a.weight': np.ones((4, 3, 1, 1)), 'b.weight': np.ones((5, 96))}
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(state, Mixed(), image_shape=IMAGE)
    assert str(caught.value) == (
        "Mixed joins, cuts or exchanges features of a flattened map before 'head', so in which "
        'order PyTorch has them cannot be told; join or cut maps before they are flattened, or '
        "convert 'head' by hand."
    )


class Decoder(nn.Module):
    """A normalised map out of features, not made as in PyTorch."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24)(flat(x))).reshape(-1, 2, 3, 4)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(5, name='head')(x.mean((1, 2)))


def test_maps_made_of_features_are_normalised_as_in_pytorch():
    with pytest.raises(interop.WeightsError) as caught:
        interop.torch_shapes(Decoder(), IMAGE)
    assert str(caught.value) == (
        "Decoder makes a map out of features before 'BatchNorm_0', which PyTorch does channels "
        'first; do so too: x.reshape(B, C, H, W).transpose(0, 2, 3, 1).'
    )


# Of blocks of positions: as in `PixelUnshuffle` or not, then moved.
BLOCKS = {
    'blocks': lambda x: blocks(x).reshape(len(x), 2, 3, 12),
    'a neighbour': lambda x: x.transpose(0, 2, 1, 3).reshape(len(x), 6, 2, 6),
    'blocks, first': lambda x: blocks(x).reshape(len(x), 6, 12).reshape(len(x), 2, 3, 12),
    'blocks, moved': lambda x: blocks(x).reshape(len(x), 2, 3, 12)[:, ::-1].transpose(0, 2, 1, 3),
    'blocks, joined': lambda x: jnp.concatenate([x[:, ::2, ::2], BLOCKS['blocks'](x)], -1),
}


def blocks(x):
    return x.reshape(len(x), 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)


@pytest.mark.parametrize(
    'layer',
    [lambda: nn.Conv(4, (1, 1), name='a'), lambda: nn.BatchNorm(True, name='a')],
    ids=['convolution', 'normalisation'],
)
@pytest.mark.parametrize('way', BLOCKS)
def test_channels_made_of_positions_are_known_after_they_were_moved(way, layer):
    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name='head')(layer()(BLOCKS[way](x)).mean((1, 2)))

    with pytest.raises(interop.WeightsError, match=r"channels out of positions before 'a'"):
        interop.torch_shapes(Blocks(), IMAGE)


@pytest.mark.parametrize(
    'moved',
    [
        lambda x: x.reshape(len(x), 4, 6, 3, 1).swapaxes(3, 4).reshape(x.shape),
        lambda x: x.reshape(len(x), 24, 3).reshape(len(x), 6, 4, 3),
        lambda x: jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, ::2]], -1),
        lambda x: blocks(x).reshape(len(x) * 6, 2, 2, 3),
        lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), 12, 6)[..., None],
        lambda x: nn.Dense(4)(blocks(x).reshape(len(x), 2, 3, 12)),
    ],
)
def test_maps_whose_channels_stay_apart_from_positions_are_taken(moved):
    class Moved(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name='head')(nn.Conv(4, (1, 1))(moved(x)).mean((1, 2)))

    assert 'Conv_0.weight' in interop.torch_shapes(Moved(), IMAGE)


@pytest.mark.parametrize(
    'moved',
    [
        lambda x: jax.image.resize(x, (len(x), 4, 6, 4), 'bilinear'),
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x.reshape(len(x), 3, 2, 4),
        lambda x: x[:, 1:] + x.transpose(0, 2, 1, 3)[:, :1, :1],
    ],
)
def test_maps_made_of_features_are_known_after_they_were_moved(moved):
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(24)(flat(x)).reshape(-1, 2, 3, 4)
            return nn.Dense(5, name='head')(nn.Conv(4, (1, 1))(moved(x)).mean((1, 2)))

    with pytest.raises(interop.WeightsError, match=r"a map out of features before 'Conv_0'"):
        interop.torch_shapes(Decoder(), IMAGE)

"""Layers behind a flatten take PyTorch's features, however a module comes to its flatten."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from neurosens import interop, models

torch = pytest.importorskip('torch', reason='parity needs requirements-bench.txt')

import torch_networks as networks  # noqa: E402

pytestmark = pytest.mark.parity

# Height, width and channels all differ, before and behind the pool.
IMAGE = (6, 10, 3)


def flat(x):
    return x.reshape(len(x), -1)


class Flatten(nn.Module):
    @nn.compact
    def __call__(self, x):
        return flat(x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return flat(nn.max_pool(nn.relu(nn.Conv(4, (3, 3), padding=1)(x)), (2, 2), (2, 2)))


def dropout(x):
    return nn.Dropout(0.5, deterministic=True)(x)


# From a map to its features, with nothing in it that computes where nothing is trained.
WAYS = {
    'a function': flat,
    'a module': lambda x: Flatten()(x),
    'dropout, then a flatten': lambda x: flat(dropout(x)),
    'a flatten, then dropout': lambda x: dropout(flat(x)),
    'a module, then an activation': lambda x: models.Activation('relu')(Flatten()(x)),
    'two steps': lambda x: flat(x.reshape(len(x), -1, x.shape[-1])),
    'channels first': lambda x: flat(x.transpose(0, 3, 1, 2)),
    'channels first and back': lambda x: flat(jnp.moveaxis(nn.relu(jnp.moveaxis(x, -1, 1)), 1, -1)),
    'a sum of products': lambda x: flat(jnp.einsum('hi,bhwc->biwc', np.eye(3), x)),
}


class Classifier(nn.Module):
    """Two dense layers behind a convolution, or an encoder."""

    way: str = 'a function'
    encoder: type[nn.Module] | None = None
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        if self.encoder is not None:
            x = self.encoder()(x)
        else:
            x = nn.relu(nn.Conv(4, (3, 3), padding=1)(x))
            x = WAYS[self.way](nn.max_pool(x, (2, 2), (2, 2)))
        if self.norm:
            x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.relu(nn.Dense(7)(dropout(x)))
        return nn.Dense(5)(dropout(x))


def classifier(norm=False):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), *([torch.nn.BatchNorm1d(60)] if norm else []), torch.nn.Dropout(),
        torch.nn.Linear(60, 7), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(7, 5),
    )  # fmt: skip


@pytest.fixture
def assert_converts(images, logits_of, assert_same):
    """Compares logits of both sides, and goes back."""

    def assert_converts(network, module, image=IMAGE):
        state = networks.randomize(network).state_dict()
        _, variables = interop.from_torch(state, module, image_shape=image)
        x = images(3, *image)
        assert_same(logits_of(module, x, variables), logits_of(network, x))
        back = interop.to_torch(module, variables, like=state, image_shape=image)
        for name, value in state.items():
            np.testing.assert_array_equal(back[name], value.numpy(), name)

    return assert_converts


@pytest.mark.parametrize('way', WAYS)
def test_a_map_may_be_flattened_in_any_way(way, assert_converts):
    assert_converts(classifier(), Classifier(way))


@pytest.mark.parametrize('encoder', [Encoder, nn.remat(Encoder)])
def test_an_encoder_may_return_features(encoder, assert_converts):
    assert_converts(classifier(), Classifier(encoder=encoder))


@pytest.mark.parametrize('way', ['a function', 'channels first'])
def test_normalisations_of_flattened_maps_go_along(way, assert_converts):
    assert_converts(classifier(norm=True), Classifier(way, norm=True))


class Branches(nn.Module):
    """Maps of two convolutions side by side."""

    features: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        maps = [nn.Conv(count, (3, 3), padding=1)(x) for count in self.features]
        x = nn.avg_pool(jnp.concatenate(maps, -1), (2, 2), (2, 2))
        return nn.Dense(5)(inputs=flat(x))


class TorchBranches(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.a, self.b = (torch.nn.Conv2d(3, count, 3, padding=1) for count in features)
        self.head = torch.nn.Linear(15 * sum(features), 5)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(torch.nn.functional.avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize('features', [(4, 4), (2, 5)])
def test_maps_may_be_joined_before(features, assert_converts):
    assert_converts(TorchBranches(features), Branches(features))


class Decoder(nn.Module):
    """A map out of features, as PyTorch makes one, or not."""

    channels_first: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24)(flat(x))
        if self.channels_first:
            x = x.reshape(-1, 4, 2, 3).transpose(0, 2, 3, 1)
        else:
            x = x.reshape(-1, 2, 3, 4)
        return nn.Dense(5)(nn.relu(nn.Conv(2, (1, 1))(x)).mean((1, 2)))


class TorchDecoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = torch.nn.Linear(180, 24), torch.nn.Conv2d(4, 2, 1)
        self.head = torch.nn.Linear(2, 5)

    def forward(self, x):
        x = self.first(x.flatten(1)).reshape(-1, 4, 2, 3)
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_maps_made_of_features_are_made_as_in_pytorch(assert_converts):
    assert_converts(TorchDecoder(), Decoder(channels_first=True))
    with pytest.raises(interop.WeightsError, match=r"before 'Conv_0', which PyTorch does channels"):
        interop.from_torch(
            TorchDecoder().state_dict(), Decoder(channels_first=False), image_shape=IMAGE
        )


class Unshuffled(nn.Module):
    """A convolution of blocks of positions, whose values become channels."""

    order: tuple[int, ...]
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(self.order)
        x = nn.relu(x.reshape(batch, height // 2, width // 2, 4 * channels))
        if self.norm:
            x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(5)(nn.relu(nn.Conv(4, (1, 1))(x)).mean((1, 2)))


def unshuffled():
    return torch.nn.Sequential(
        torch.nn.PixelUnshuffle(2), torch.nn.ReLU(), torch.nn.Conv2d(12, 4, 1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5),
    )  # fmt: skip


def test_channels_made_of_positions_are_made_as_in_pytorch(assert_converts):
    assert_converts(unshuffled(), Unshuffled((0, 1, 3, 5, 2, 4)))
    # One channel comes first anyhow.
    state = unshuffled().state_dict()
    state['2.weight'] = state['2.weight'][:, :4]
    interop.from_torch(state, Unshuffled((0, 1, 3, 2, 4, 5)), image_shape=(6, 10, 1))


@pytest.mark.parametrize('order', [(0, 1, 3, 2, 4, 5), (0, 1, 3, 5, 4, 2), (0, 1, 3, 4, 2, 5)])
def test_channels_made_of_positions_in_another_order_are_refused(order):
    with pytest.raises(interop.WeightsError) as caught:
        interop.from_torch(unshuffled().state_dict(), Unshuffled(order), image_shape=IMAGE)
    assert str(caught.value) == (
        "Unshuffled makes channels out of positions before 'Conv_0' in another order than "
        "PyTorch's PixelUnshuffle; make them in its order, channels before positions: "
        'x.reshape(B, H // r, r, W // r, r, C).transpose(0, 1, 3, 5, 2, 4); or convert '
        "'Conv_0' by hand."
    )


class Separable(nn.Module):
    """A convolution of each channel by itself, and a normalisation without parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1)(x)
        x = nn.Conv(4, (3, 3), padding=1, feature_group_count=4)(x)
        x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(x)
        return nn.Dense(5)(nn.relu(nn.Conv(6, (1, 1))(x)).mean((1, 2)))


def test_depthwise_convolutions_and_normalisations_without_parameters(
    images, logits_of, assert_same
):
    network = networks.randomize(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1, groups=4),
            torch.nn.BatchNorm2d(4, affine=False), torch.nn.Conv2d(4, 6, 1), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5),
        )
    )  # fmt: skip
    # One channel is fewest, but not that of the images.
    module, variables = interop.from_torch(network.state_dict(), Separable())
    x = images(2, 8, 8, 3)
    assert_same(logits_of(module, x, variables), logits_of(network, x))

"""Small networks in PyTorch that name their layers as the projects do whose weights are read."""

import collections

import torch
from torch import nn
from torch.nn import functional


def conv(inputs, features, size, stride=1, padding=None, bias=False):
    return nn.Conv2d(
        inputs, features, size, stride, size // 2 if padding is None else padding, bias=bias
    )


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs, features, stride, shortcut):
        super().__init__()
        self.conv1 = conv(inputs, features, 3, stride)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = conv(features, features, 3)
        self.bn2 = nn.BatchNorm2d(features)
        self.kind, self.stride, self.missing = shortcut, stride, features - inputs
        self.changes = stride != 1 or inputs != features
        if self.changes and shortcut != 'pad':
            setattr(self, shortcut, projection(inputs, features, stride))

    def residual(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    def forward(self, x):
        y = self.residual(x)
        if self.changes and self.kind == 'pad':
            half = self.missing // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        elif self.changes:
            x = getattr(self, self.kind)(x)
        return (x + y).relu()


class Bottleneck(Basic):
    expansion = 4

    def __init__(self, inputs, features, stride, shortcut):
        nn.Module.__init__(self)
        self.conv1 = conv(inputs, features, 1)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = conv(features, features, 3, stride)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv3 = conv(features, 4 * features, 1)
        self.bn3 = nn.BatchNorm2d(4 * features)
        self.kind = shortcut
        self.changes = stride != 1 or inputs != 4 * features
        if self.changes:
            setattr(self, shortcut, projection(inputs, 4 * features, stride))

    def residual(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.bn3(self.conv3(y))


def projection(inputs, features, stride):
    return nn.Sequential(conv(inputs, features, 1, stride), nn.BatchNorm2d(features))


class ResNet(nn.Module):
    """`fc` and `downsample` as in torchvision, `linear` and `shortcut` as in networks for CIFAR."""

    def __init__(
        self, block, sizes, classes, widths=(64, 128, 256, 512), stem='cifar', shortcut='shortcut',
        head='linear',
    ):  # fmt: skip
        super().__init__()
        self.conv1 = conv(3, widths[0], 7, 2) if stem == 'imagenet' else conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stem, self.head, inputs = stem, head, widths[0]
        self.stages = [f'layer{i}' for i in range(1, len(sizes) + 1)]
        for i, (name, size) in enumerate(zip(self.stages, sizes)):
            blocks = []
            for j in range(size):
                blocks.append(block(inputs, widths[i], 2 if i and not j else 1, shortcut))
                inputs = widths[i] * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(inputs, classes))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        if self.stem == 'imagenet':
            x = functional.max_pool2d(x, 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)
        return getattr(self, self.head)(x.mean((2, 3)))


class PreActBlock(nn.Module):
    """`shortcut` as in pre-activation ResNets, `convShortcut` as in wide ResNets."""

    def __init__(self, inputs, features, stride, shortcut):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, features, 3, stride)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv2 = conv(features, features, 3)
        self.changes, self.kind = stride != 1 or inputs != features, shortcut
        if self.changes:
            layer = conv(inputs, features, 1, stride)
            setattr(self, shortcut, nn.Sequential(layer) if shortcut == 'shortcut' else layer)

    def forward(self, x):
        y = self.bn1(x).relu()
        if self.changes:
            x = getattr(self, self.kind)(y)
        return x + self.conv2(self.bn2(self.conv1(y)).relu())


class PreActResNet(nn.Module):
    def __init__(self, sizes, classes):
        super().__init__()
        self.conv1, inputs = conv(3, 64, 3), 64
        self.stages = [f'layer{i}' for i in range(1, len(sizes) + 1)]
        for i, (name, size) in enumerate(zip(self.stages, sizes)):
            blocks = []
            for j in range(size):
                blocks.append(PreActBlock(inputs, 64 * 2**i, 2 if i and not j else 1, 'shortcut'))
                inputs = 64 * 2**i
            setattr(self, name, nn.Sequential(*blocks))
        self.bn, self.linear = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.conv1(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(self.bn(x).relu().mean((2, 3)))


class NetworkBlock(nn.Module):
    def __init__(self, size, inputs, features, stride):
        super().__init__()
        self.layer = nn.Sequential(
            *(
                PreActBlock(features if j else inputs, features, 1 if j else stride, 'convShortcut')
                for j in range(size)
            )
        )

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """With the second first block that some of them have and never use."""

    def __init__(self, depth, width, classes):
        super().__init__()
        size = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = NetworkBlock(size, 16, 16 * width, 1)
        self.sub_block1 = NetworkBlock(size, 16, 16 * width, 1)
        self.block2 = NetworkBlock(size, 16 * width, 32 * width, 2)
        self.block3 = NetworkBlock(size, 32 * width, 64 * width, 2)
        self.bn1, self.fc = nn.BatchNorm2d(64 * width), nn.Linear(64 * width, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((2, 3)))


class DeepMindBlock(nn.Module):
    def __init__(self, inputs, features, stride, activation):
        super().__init__()
        self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(inputs), conv(inputs, features, 3, stride, 0)
        self.batchnorm_1, self.conv_1 = nn.BatchNorm2d(features), conv(features, features, 3)
        if inputs != features:
            self.shortcut = conv(inputs, features, 1, stride)
        self.edges = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.activation = activation

    def forward(self, x):
        y = self.activation(self.batchnorm_0(x))
        if hasattr(self, 'shortcut'):
            x = self.shortcut(y)
        y = self.conv_0(functional.pad(y, self.edges))
        return x + self.conv_1(self.activation(self.batchnorm_1(y)))


class DeepMindGroup(nn.Module):
    def __init__(self, size, inputs, features, stride, activation):
        super().__init__()
        self.block = nn.Sequential(
            *(
                DeepMindBlock(features if j else inputs, features, 1 if j else stride, activation)
                for j in range(size)
            )
        )

    def forward(self, x):
        return self.block(x)


class DeepMindWideResNet(nn.Module):
    """With padding behind and Swish, as in RobustBench."""

    def __init__(self, depth, width, classes, activation=functional.silu):
        super().__init__()
        size, self.activation = (depth - 4) // 6, activation
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.init_conv = conv(3, 16, 3)
        self.layer = nn.Sequential(
            *(
                DeepMindGroup(size, widths[i], widths[i + 1], 2 if i else 1, activation)
                for i in range(3)
            )
        )
        self.batchnorm, self.logits = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.activation(self.batchnorm(self.layer(self.init_conv(x))))
        return self.logits(x.mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, sizes, classes, norm=True, classifier='cifar'):
        super().__init__()
        layers, inputs = [], 3
        for size, features in zip(sizes, (64, 128, 256, 512, 512)):
            for _ in range(size):
                layers += [conv(inputs, features, 3, bias=True)]
                layers += [nn.BatchNorm2d(features)] if norm else []
                layers += [nn.ReLU()]
                inputs = features
            layers += [nn.MaxPool2d(2, 2)]
        self.features = nn.Sequential(*layers)
        if classifier == 'cifar':
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Linear(inputs, classes)
        else:
            self.pool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(49 * inputs, 4096), nn.ReLU(), nn.Dropout(),
                nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
                nn.Linear(4096, classes),
            )  # fmt: skip

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

    def forward(self, x):
        y = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(y).relu())], 1)


class DenseNet(nn.Module):
    def __init__(self, sizes, growth, classes):
        super().__init__()
        channels = 2 * growth
        parts = {
            'conv0': conv(3, channels, 7, 2),
            'norm0': nn.BatchNorm2d(channels),
            'relu0': nn.ReLU(),
            'pool0': nn.MaxPool2d(3, 2, 1),
        }
        for i, size in enumerate(sizes, start=1):
            block = collections.OrderedDict()
            for j in range(1, size + 1):
                block[f'denselayer{j}'] = DenseLayer(channels, growth)
                channels += growth
            parts[f'denseblock{i}'] = nn.Sequential(block)
            if i < len(sizes):
                parts[f'transition{i}'] = nn.Sequential(
                    collections.OrderedDict(
                        norm=nn.BatchNorm2d(channels), relu=nn.ReLU(),
                        conv=conv(channels, channels // 2, 1), pool=nn.AvgPool2d(2, 2),
                    )
                )  # fmt: skip
                channels //= 2
        parts[f'norm{len(sizes) + 1}'] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(collections.OrderedDict(parts))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        return self.classifier(self.features(x).relu().mean((2, 3)))


class NewestFirstLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

    def forward(self, x):
        y = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return torch.cat([y, x], 1)


class Halving(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv(inputs, inputs // 2, 1)

    def forward(self, x):
        return functional.avg_pool2d(self.conv(self.bn(x).relu()), 2)


class NewestFirstDenseNet(nn.Module):
    """A DenseNet for CIFAR whose new channels come first."""

    def __init__(self, sizes, growth, classes):
        super().__init__()
        channels = 2 * growth
        self.conv1 = conv(3, channels, 3)
        self.stages = len(sizes)
        for i, size in enumerate(sizes, start=1):
            block = []
            for _ in range(size):
                block.append(NewestFirstLayer(channels, growth))
                channels += growth
            setattr(self, f'dense{i}', nn.Sequential(*block))
            if i < len(sizes):
                setattr(self, f'trans{i}', Halving(channels))
                channels //= 2
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.conv1(x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f'dense{i}')(x)
            if i < self.stages:
                x = getattr(self, f'trans{i}')(x)
        return self.linear(self.bn(x).relu().mean((2, 3)))


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = functional.max_pool2d(layer(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


class LeNet5Wide(nn.Module):
    """The network of the published weights for MNIST."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(1, 32, 3, bias=True), conv(32, 64, 3, bias=True)
        self.linear1, self.linear2 = nn.Linear(3136, 200), nn.Linear(200, 10)

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = functional.max_pool2d(layer(x).relu(), 2)
        return self.linear2(self.linear1(x.flatten(1)).relu())


class SmallCNN(nn.Module):
    """Two convolutions, normalised, listed before the normalisations."""

    def __init__(self):
        super().__init__()
        self.conv_a, self.conv_b = conv(3, 4, 3), conv(4, 6, 3)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.hidden, self.out = nn.Linear(96, 8), nn.Linear(8, 5)

    def forward(self, x):
        for layer, norm in ((self.conv_a, self.norm_a), (self.conv_b, self.norm_b)):
            x = functional.avg_pool2d(norm(layer(x)).relu(), 2)
        return self.out(self.hidden(x.flatten(1)).relu())


class ResNet2B(nn.Module):
    """The residual network without normalisation of the published weights for CIFAR-10."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8, 3, 2, bias=True)
        self.block1_conv1 = conv(8, 16, 3, 2, bias=True)
        self.block1_conv2 = conv(16, 16, 3, bias=True)
        self.block1_shortcut = conv(8, 16, 1, 2, bias=True)
        self.block2_conv1 = conv(16, 16, 3, bias=True)
        self.block2_conv2 = conv(16, 16, 3, bias=True)
        self.dense, self.head = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = (self.block1_conv2(self.block1_conv1(x).relu()) + self.block1_shortcut(x)).relu()
        x = (self.block2_conv2(self.block2_conv1(x).relu()) + x).relu()
        return self.head(self.dense(x.flatten(1)).relu())


class Normalized(nn.Module):
    """Behind its normalisation, as in RobustBench."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std, 'mean', 'std')
        self.model = network

    def forward(self, x):
        return self.model(self.normalize(x))


class Normalize(nn.Module):
    def __init__(self, mean, std, mean_name='new_mean', std_name='new_std'):
        super().__init__()
        self.names = mean_name, std_name
        for name, value in zip(self.names, (mean, std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def forward(self, x):
        mean, std = (getattr(self, name) for name in self.names)
        return (x - mean) / std


class Adversary(nn.Module):
    def __init__(self, network, normalize):
        super().__init__()
        self.normalize, self.model = normalize, network


class AttackerModel(nn.Module):
    """Of MadryLab's robustness library, which holds the network twice."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.normalizer = Normalize(mean, std)
        self.model = network
        self.attacker = Adversary(network, Normalize(mean, std))

    def forward(self, x):
        return self.model(self.normalizer(x))


def randomize(network, seed=0):
    """Random weights and statistics of a network in evaluation mode; returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith('running_mean') or (value.ndim == 1 and name.endswith('bias')):
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
        elif value.ndim == 1 and not name.endswith(('mean', 'std')):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.ndim > 1 and not name.endswith(('mean', 'std')):
            scale = (2 / value[0].numel()) ** 0.5
            value.copy_(scale * torch.randn(value.shape, generator=generator))
    return network.eval()

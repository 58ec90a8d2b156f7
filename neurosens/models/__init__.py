"""Image classifiers as Flax Linen modules, addressed by name and by layer path.

Every model takes images in [0, 1] of shape [batch, height, width, channels] and returns float32
logits of shape [batch, num_classes]. Normalisation is the model's first layer, so attacks and
sensitivities live in pixel space.

Layers are addressed by their '/'-joined module path. The names follow one scheme:

* `normalize` is the first module and `head`, a dense layer, the last one; the input of `head`
  are the penultimate post-activation features, pooled or flattened.
* A nonlinearity is a module, called once per forward pass. `act<k>` follows the weight layer
  with the same suffix: `conv1` `norm1` `act1`, `dense3` `act3`. In a residual block the last
  `act<k>` comes after the addition.
* Residual and dense blocks are `stage<i>_block<j>`, both counted from one. Pre-activation
  networks and DenseNets end with `final_norm` and `final_act`.
"""

from neurosens.models.cnn import CNN
from neurosens.models.common import Activation, Classifier, Normalize
from neurosens.models.densenet import DenseNet
from neurosens.models.lenet import LeNet5
from neurosens.models.mlp import MLP
from neurosens.models.normalization import BatchNorm
from neurosens.models.registry import create, names, options
from neurosens.models.resnet import CIFARResNet, PreActResNet, ResNet
from neurosens.models.vgg import VGG
from neurosens.models.wide_resnet import WideResNet

__all__ = [
    'Activation',
    'BatchNorm',
    'CIFARResNet',
    'CNN',
    'Classifier',
    'DenseNet',
    'LeNet5',
    'MLP',
    'Normalize',
    'PreActResNet',
    'ResNet',
    'VGG',
    'WideResNet',
    'create',
    'names',
    'options',
]

"""Networks: plain `nn.Module`s from inputs to outputs. They know no loss, metric or optimiser."""

from firstlight.networks.convnet import ConvNet
from firstlight.networks.embedding import EmbeddingNet
from firstlight.networks.layers import ConvBlock
from firstlight.networks.mlp import MLP, RegularizedNet, SimpleNet
from firstlight.networks.resnet import ResNet

__all__ = ["MLP", "ConvBlock", "ConvNet", "EmbeddingNet", "RegularizedNet", "ResNet", "SimpleNet"]

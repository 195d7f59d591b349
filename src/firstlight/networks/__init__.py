"""Networks: plain `nn.Module` classes that map inputs to outputs and know no loss, metric or optimiser."""

from firstlight.networks.convnet import ConvNet
from firstlight.networks.embedding import EmbeddingNet
from firstlight.networks.layers import ConvBlock
from firstlight.networks.mlp import MLP, RegularizedNet, SimpleNet
from firstlight.networks.ngrams import NgramClassifier
from firstlight.networks.resnet import ImageNetResNet, ResNet
from firstlight.networks.tabm import TabM
from firstlight.networks.transformer import TransformerClassifier, TransformerLM

__all__ = [
    "MLP",
    "ConvBlock",
    "ConvNet",
    "EmbeddingNet",
    "ImageNetResNet",
    "NgramClassifier",
    "RegularizedNet",
    "ResNet",
    "SimpleNet",
    "TabM",
    "TransformerClassifier",
    "TransformerLM",
]

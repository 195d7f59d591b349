"""Networks: plain `nn.Module`s from inputs to outputs. They know no loss, metric or optimiser."""

from firstlight.networks.mlp import MLP, RegularizedNet, SimpleNet
from firstlight.networks.transformer import TransformerClassifier, TransformerLM

__all__ = ["MLP", "RegularizedNet", "SimpleNet", "TransformerClassifier", "TransformerLM"]

"""A network for tables: TabM (Gorishniy, Kotelnikov and Babenko, 2024, arXiv 2410.24210).

Shapes: `B` batch, `F` features, `N` numeric features, `K` members, `T` bins, `E` width of an embedding, `H` of a layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu

from firstlight.errors import UsageError, check_range


class TabM(nn.Module):
    """Many multi-layer perceptrons that share their weights, and whose predictions are averaged.

    Layer `l` of member `k` is `s_kl * (W_l (r_kl * x)) + b_kl` (section 3.3 of the paper; Wen et al., "BatchEnsemble",
    2020), then ReLU and dropout. All members share the matrix `W_l`; the scales `r` and `s` and the bias `b` are their
    own, and so is the output layer. They differ from the start by `r` of the first layer, which is standard normal;
    the other scales start at 1.

    The first `numeric_features` inputs are numbers, which pass through a `PiecewiseLinearEmbedding` each. All other
    inputs, for example one-hot categories, enter as they are. Inputs of any shape `(B, ...)` are flattened to
    `(B, in_features)`.

    In evaluation, outputs `(B, out_features)` are the mean over the members, without an activation. While training they
    are `(B, members, out_features)`, because each member has its own loss: tasks compare each with the targets.

    Two things differ from the paper, and save more than half the time of a step on a CPU. The first `r` scales an
    embedding as a whole; the paper's starts so, and then learns a scale for each of its numbers. Dropout drops the same
    units of a sample in all members.

    Args:
        in_features: Number of input features, after flattening.
        out_features: Number of outputs.
        hidden: Widths of the hidden layers, at least one. The paper tunes one to four layers of 64 to 1,024.
        numeric_features: How many of the first inputs are numbers, which should be standardised. None: none; the
            command line fills in what the data say.
        members: Number of members. The paper has 32.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        bins: Bins of the embedding of a number.
        embedding: Width of the embedding of a number.

    Raises:
        UsageError: If an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        numeric_features: int | None = None,
        members: int = 16,
        dropout: float = 0.1,
        bins: int = 16,
        embedding: int = 16,
    ) -> None:
        name = type(self).__name__
        check_range(name, "[1, inf)", in_features=in_features, out_features=out_features, hidden=hidden)
        check_range(name, "[1, inf)", members=members, bins=bins, embedding=embedding)
        check_range(name, "[0, 1)", dropout=dropout)
        numeric_features = numeric_features or 0
        check_range(name, f"[0, {in_features}]", numeric_features=numeric_features)
        if not hidden:
            raise UsageError(f"{name} was given hidden=[]: it needs at least one hidden layer")
        super().__init__()
        self.members = members
        self.numeric_features = numeric_features
        others = in_features - numeric_features
        self.embed = PiecewiseLinearEmbedding(numeric_features, bins, embedding) if numeric_features else None
        self.input = _InputLayer(numeric_features, embedding, others, hidden[0], members)
        self.hidden = nn.ModuleList(_HiddenLayer(*widths, members) for widths in pairwise(hidden))
        self.dropout = dropout
        self.output_weight = _uniform(members, hidden[-1], out_features, fan_in=hidden[-1])
        self.output_bias = _uniform(members, 1, out_features, fan_in=hidden[-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs: `(B, members, out_features)` while training, else their mean `(B, out_features)`."""
        numbers, others = inputs.flatten(1).tensor_split([self.numeric_features], dim=1)
        embeddings = None if self.embed is None else self.embed(numbers)
        units = self._activate(self.input(embeddings, others))
        for layer in self.hidden:
            units = self._activate(layer(units))
        outputs = torch.baddbmm(self.output_bias, units, self.output_weight)
        return outputs.transpose(0, 1) if self.training else outputs.mean(0)

    def _activate(self, units: Tensor) -> Tensor:
        """Return units `(K, B, H)` after ReLU and dropout."""
        units = relu(units)
        if not self.training or not self.dropout:
            return units
        return units * dropout(torch.ones_like(units[0]), self.dropout)


class PiecewiseLinearEmbedding(nn.Module):
    """Embed each number by a continuous piecewise-linear function, learned for each feature.

    The encoding of `x` has a number for each bin: 0 below the bin, 1 above it, linear within; the first and the last
    bin are open to the outside (Gorishniy, Rubachev and Babenko, "On Embeddings for Numerical Features in Tabular Deep
    Learning", 2022, equation 1). The embedding is a linear map of the encoding plus a linear function of `x`, without
    an activation, and starts as the latter (version B of Gorishniy et al., "TabM", 2024).

    Differently from the paper, the bins do not depend on the data: their edges are the quantiles
    `0.5 / (bins + 1), 1.5 / (bins + 1), ...` of a standard normal. So inputs should be about standard normal.

    Args:
        features: Number of numeric features.
        bins: Number of bins.
        width: Size of an embedding.
    """

    edges: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, features: int, bins: int, width: int) -> None:
        super().__init__()
        shares = (torch.arange(bins + 1, dtype=torch.float64) + 0.5) / (bins + 1)
        self.register_buffer("edges", torch.special.ndtri(shares).float(), persistent=False)
        self.register_buffer("lowest", torch.tensor([-torch.inf] + [0.0] * (bins - 1)), persistent=False)
        self.register_buffer("highest", torch.tensor([1.0] * (bins - 1) + [torch.inf]), persistent=False)
        self.pieces = nn.Parameter(torch.zeros(features, bins, width))
        self.slope = _uniform(features, 1, width, fan_in=1)
        self.bias = _uniform(features, 1, width, fan_in=1)

    def encode(self, numbers: Tensor) -> Tensor:
        """Return the piecewise-linear encoding `(N, B, T)` of numbers `(N, B)`."""
        left, right = self.edges[:-1], self.edges[1:]
        return torch.clamp((numbers[..., None] - left) / (right - left), self.lowest, self.highest)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the embeddings `(N, B, E)` of numbers `(B, N)`."""
        numbers = numbers.T
        line = torch.addcmul(self.bias, numbers[..., None], self.slope)
        return torch.baddbmm(line, self.encode(numbers), self.pieces)


class _InputLayer(nn.Module):
    """The first layer of all members, of embeddings `(N, B, E)` and other features `(B, F - N)`."""

    def __init__(self, numbers: int, embedding: int, others: int, width: int, members: int) -> None:
        super().__init__()
        fan_in = numbers * embedding + others
        self.number_weight = _uniform(numbers, embedding, width, fan_in=fan_in) if numbers else None
        self.other_weight = _uniform(width, others, fan_in=fan_in) if others else None
        self.scale = nn.Parameter(torch.randn(members, numbers + others))
        self.out_scale = nn.Parameter(torch.ones(members, 1, width))
        self.bias = _bias(members, width, fan_in)

    def forward(self, embeddings: Tensor | None, others: Tensor) -> Tensor:
        """Return `(K, B, H)`."""
        number_scale, other_scale = self.scale.tensor_split([self.scale.shape[1] - others.shape[1]], dim=1)
        units = torch.zeros((), device=others.device)
        if self.number_weight is not None and embeddings is not None:
            # One scale for an embedding: the sum over the features comes last, and its terms are shared by the members.
            terms = torch.bmm(embeddings, self.number_weight)
            units = (number_scale @ terms.flatten(1)).view(-1, *terms.shape[1:])
        if self.other_weight is not None:
            units = units + linear(others * other_scale[:, None], self.other_weight)
        return torch.addcmul(self.bias, units, self.out_scale)


class _HiddenLayer(nn.Module):
    """A further layer of all members: `(K, B, inputs)` to `(K, B, outputs)`."""

    def __init__(self, inputs: int, outputs: int, members: int) -> None:
        super().__init__()
        self.weight = _uniform(outputs, inputs, fan_in=inputs)
        self.scale = nn.Parameter(torch.ones(members, 1, inputs))
        self.out_scale = nn.Parameter(torch.ones(members, 1, outputs))
        self.bias = _bias(members, outputs, inputs)

    def forward(self, units: Tensor) -> Tensor:
        """Return `(K, B, outputs)`."""
        return torch.addcmul(self.bias, linear(units * self.scale, self.weight), self.out_scale)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """Return a parameter that is uniform within `1 / sqrt(fan_in)`, as weights and biases of `torch.nn.Linear`."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / fan_in**0.5)


def _bias(members: int, width: int, fan_in: int) -> nn.Parameter:
    """Return the bias `(K, 1, width)` of a layer, the same for all members at first."""
    return nn.Parameter(_uniform(1, 1, width, fan_in=fan_in).detach().repeat(members, 1, 1))

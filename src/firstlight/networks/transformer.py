"""Transformer encoders over tokens (Vaswani et al., 2017) with rotary positions (Su et al., 2021).

Rotary positions stand in for the sinusoids of the paper: attention sees distances alone, so neither the place of the
padding nor that of a window in its text makes a difference. Token 0 is padding, wherever it stands.

Shapes: `B` batch, `T` tokens of the longest sequence, `D` width, `H` heads, `V` vocabulary.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from firstlight.errors import UsageError

__all__ = ["EncoderBlock", "Transformer", "TransformerClassifier", "TransformerLM"]


class EncoderBlock(nn.Module):
    """Multi-head attention and a GELU feed-forward layer, each with a residual connection and layer normalisation.

    Args:
        width: `D`, a multiple of `2 * heads`.
        heads: `H`.
        hidden: Units of the feed-forward layer.
        dropout: Probability that a unit is dropped before it is added to the residual, in [0, 1).
        norm: `"post"` is the paper's `norm(f(x) + x)`, `"pre"` is `x + f(norm(x))` (Xiong et al., 2020).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, norm: Literal["pre", "post"]) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.attention_norm = nn.LayerNorm(width)
        self.attention_inputs = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.hidden_output = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """Return `(B, T, D)`.

        Args:
            inputs: `(B, T, D)`.
            rotation: Cosine and sine of each position, both `(T, D / H)`.
            visible: `(B, 1, T, T)`, true where a query (third axis) may see a key (last axis).
        """
        if self.norm == "pre":
            inputs = inputs + self.dropout(self.attend(self.attention_norm(inputs), rotation, visible))
            outputs: Tensor = inputs + self.dropout(self.feed_forward(self.feed_forward_norm(inputs)))
            return outputs
        inputs = self.attention_norm(self.dropout(self.attend(inputs, rotation, visible)) + inputs)
        outputs = self.feed_forward_norm(self.dropout(self.feed_forward(inputs)) + inputs)
        return outputs

    def attend(self, inputs: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """Return what each position reads from those that it may see, `(B, T, D)`."""
        split = self.attention_inputs(inputs).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = _rotate(split[:2], rotation)
        read = scaled_dot_product_attention(queries, keys, split[2], attn_mask=visible)
        outputs: Tensor = self.attention_output(read.transpose(1, 2).flatten(2))
        return outputs

    def feed_forward(self, inputs: Tensor) -> Tensor:
        """Return what each position makes of itself, `(B, T, D)`."""
        outputs: Tensor = self.hidden_output(gelu(self.hidden(inputs)))
        return outputs


class Transformer(nn.Module):
    """Embedded tokens, encoder blocks, and a last normalisation where the blocks normalise first.

    Weights are drawn from a normal distribution, whose deviation is 0.02 for a width of 768 (Radford et al., 2019) and
    goes with the inverse root of the width. That of weights which end a residual branch is narrower, by the root of
    the number of branches.

    Args:
        vocabulary: `V`, the number of token ids, padding included: 257 for bytes that are shifted by one.
        width: `D`, a multiple of `2 * heads`.
        layers: Number of blocks.
        heads: `H`.
        hidden: Units of a feed-forward layer; four times the width when none is given.
        dropout: Probability that a unit of the embedding or of a branch is dropped, in [0, 1).
        norm: `"pre"` or `"post"`, see `EncoderBlock`.
        max_length: Most tokens of a sequence.

    Raises:
        UsageError: When a number is out of its range.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(
        self,
        vocabulary: int = 257,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        norm: Literal["pre", "post"] = "pre",
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        hidden = 4 * width if hidden is None else hidden
        sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "hidden": hidden}
        for key, value in {**sizes, "max_length": max_length}.items():
            if value < 1:
                raise UsageError(f"{name} was given {key}={value}: it is at least 1")
        if width % (2 * heads):
            raise UsageError(
                f"{name} was given width={width} and heads={heads}: each head takes an even number of features, so the "
                f"width is a multiple of {2 * heads}"
            )
        if not 0 <= dropout < 1:
            raise UsageError(f"{name} was given dropout={dropout}: it is a probability in [0, 1)")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        blocks = [EncoderBlock(width, heads, hidden, dropout, norm) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.last_norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        pairs = torch.arange(0, width // heads, 2) * heads / width
        angles = torch.outer(torch.arange(max_length), 10_000.0**-pairs).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        self.apply(self._initialise)
        for block in blocks:
            for last in (block.attention_output, block.hidden_output):
                last.weight.data /= math.sqrt(2 * layers)

    def encode(self, tokens: Tensor, causal: bool) -> Tensor:
        """Return what the blocks make of tokens `(B, T)` int64: `(B, T, D)`.

        Args:
            tokens: `(B, T)` int64, 0 where there is padding.
            causal: No position sees a later one.

        Raises:
            UsageError: When there are more than `max_length` tokens in a sequence.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise UsageError(
                f"{type(self).__name__} has max_length={self.max_length}, but was given sequences of {length} tokens"
            )
        visible = (tokens != 0)[:, None, None, :]
        if causal:
            visible = visible & torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        # Padding with nothing before it would see nothing at all, which a softmax cannot express.
        visible = visible | torch.eye(length, dtype=torch.bool, device=tokens.device)
        features = self.dropout(self.embedding(tokens))
        rotation = (self.cosine[:length], self.sine[:length])
        for block in self.blocks:
            features = block(features, rotation, visible)
        encoded: Tensor = self.last_norm(features)
        return encoded

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 * math.sqrt(768 / self.embedding.embedding_dim))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TransformerClassifier(Transformer):
    """Tokens `(B, T)` int64 to outputs `(B, out_features)`: a linear map of the mean over what is no padding.

    Every position sees every other one. A sequence of padding alone has the mean 0.

    Args:
        out_features: Number of outputs.
        **options: What every `Transformer` takes.

    Raises:
        UsageError: When a number is out of its range, or a sequence is longer than `max_length`.
    """

    def __init__(self, out_features: int, **options: Any) -> None:
        super().__init__(**options)
        if out_features < 1:
            raise UsageError(f"{type(self).__name__} was given out_features={out_features}: it is at least 1")
        self.output = nn.Linear(self.embedding.embedding_dim, out_features)
        self._initialise(self.output)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the outputs of each sequence."""
        encoded = self.encode(tokens, causal=False)
        real = (tokens != 0).unsqueeze(-1)
        mean = (encoded * real).sum(1) / real.sum(1).clamp(min=1)
        outputs: Tensor = self.output(mean)
        return outputs


class TransformerLM(Transformer):
    """Tokens `(B, T)` int64 to logits `(B, T, V)` of the token that follows each; no position sees a later one.

    Args:
        tied: The embedding is the output's weight too (Press and Wolf, 2017).
        **options: What every `Transformer` takes.

    Raises:
        UsageError: When a number is out of its range, or a sequence is longer than `max_length`.
    """

    def __init__(self, tied: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.output = nn.Linear(self.embedding.embedding_dim, self.embedding.num_embeddings, bias=False)
        self._initialise(self.output)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of what follows each token."""
        logits: Tensor = self.output(self.encode(tokens, causal=True))
        return logits


def _rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of features by the angle of its position: `(..., T, D / H)`."""
    cosine, sine = (table.to(vectors.dtype) for table in rotation)
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat([-second, first], dim=-1) * sine

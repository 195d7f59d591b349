"""Transformer encoders over tokens (Vaswani et al., 2017) with rotary positions (Su et al., 2021).

Deviation from the 2017 paper: rotary positions replace its sinusoids. Attention then depends on distances alone, not
on where padding is or where in its text a window starts. Token 0 is padding and may appear anywhere.

Shapes: `B` batch, `T` length of the longest sequence, `D` width, `H` heads, `V` vocabulary.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from firstlight.errors import UsageError, check_range
from firstlight.networks.layers import check_choice


class EncoderBlock(nn.Module):
    """Multi-head attention and a GELU feed-forward layer, each with a residual connection and layer normalisation.

    `Transformer` checks the arguments.

    Args:
        width: `D`, a multiple of `2 * heads`.
        heads: `H`, number of attention heads.
        hidden: Number of hidden units of the feed-forward layer.
        dropout: Probability of dropping a unit before it is added to the residual, in [0, 1).
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

    def forward(self, inputs: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Return `(B, T, D)`.

        Args:
            inputs: `(B, T, D)`.
            rotation: Cosine and sine of the angles of each position, both `(T, D / H)`.
            mask: `(B, 1, T, T)`, true where a query (third axis) may attend to a key (last axis).
        """
        if self.norm == "pre":
            inputs = inputs + self.dropout(self.attend(self.attention_norm(inputs), rotation, mask))
            return cast(Tensor, inputs + self.dropout(self.feed_forward(self.feed_forward_norm(inputs))))
        inputs = self.attention_norm(self.dropout(self.attend(inputs, rotation, mask)) + inputs)
        return cast(Tensor, self.feed_forward_norm(self.dropout(self.feed_forward(inputs)) + inputs))

    def attend(self, inputs: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Return the outputs of multi-head attention, `(B, T, D)`."""
        projected = self.attention_inputs(inputs).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = _rotate(projected[:2], rotation)
        attended = scaled_dot_product_attention(queries, keys, projected[2], attn_mask=mask)
        return cast(Tensor, self.attention_output(attended.transpose(1, 2).flatten(2)))

    def feed_forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the feed-forward layer, `(B, T, D)`."""
        return cast(Tensor, self.hidden_output(gelu(self.hidden(inputs))))


class Transformer(nn.Module):
    """Token embedding, encoder blocks, and a last layer normalisation with `norm="pre"`.

    Weights are normal with a standard deviation of `0.02 * sqrt(768 / D)`, which is GPT-2's for its width of 768
    (Radford et al., 2019). Weights at the end of a residual branch are divided by `sqrt(2 * layers)`, as in GPT-2.

    Args:
        vocabulary: `V`, the number of token ids including padding: 257 for bytes shifted by one.
        width: `D`, a multiple of `2 * heads`.
        layers: Number of blocks.
        heads: `H`, number of attention heads of each block.
        hidden: Number of hidden units of a feed-forward layer; None: four times the width.
        dropout: Probability of dropping a unit of the embedding or of a residual branch, in [0, 1).
        norm: `"pre"` or `"post"`, see `EncoderBlock`.
        max_length: Largest number of tokens in a sequence.

    Raises:
        UsageError: If a number is out of range, `norm` is unknown, or a sequence is longer than `max_length`.
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
        sizes = {"width": width, "layers": layers, "heads": heads, "hidden": hidden}
        check_range(name, "[1, inf)", vocabulary=vocabulary, **sizes, max_length=max_length)
        check_range(name, "[0, 1)", dropout=dropout)
        check_choice(name, ("pre", "post"), norm=norm)
        if width % (2 * heads):
            rule = f"width must be a multiple of 2 * heads, which is {2 * heads}"
            raise UsageError(f"{name} was given width={width} and heads={heads}: {rule}")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden, dropout, norm) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        pairs = torch.arange(0, width // heads, 2) * heads / width
        angles = torch.outer(torch.arange(max_length), 10_000.0**-pairs).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        self.apply(self._initialise)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attention_output.weight", "hidden_output.weight")):
                weight.data /= math.sqrt(2 * layers)

    def encode(self, tokens: Tensor, causal: bool) -> Tensor:
        """Return the features of each token after the last block, `(B, T, D)`.

        Args:
            tokens: `(B, T)` int64, 0 for padding.
            causal: Whether a position attends only to itself and earlier positions.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise UsageError(
                f"{type(self).__name__} was given sequences of {length} tokens: they must have at most "
                f"max_length={self.max_length}"
            )
        mask = (tokens != 0)[:, None, None, :]
        if causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        # Each position attends to itself: a softmax over no key at all, as for leading padding, is NaN.
        mask = mask | torch.eye(length, dtype=torch.bool, device=tokens.device)
        features = self.dropout(self.embedding(tokens))
        rotation = (self.cosine[:length], self.sine[:length])
        for block in self.blocks:
            features = block(features, rotation, mask)
        return cast(Tensor, self.last_norm(features))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 * math.sqrt(768 / self.embedding.embedding_dim))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TransformerClassifier(Transformer):
    """Map tokens `(B, T)` int64 to outputs `(B, out_features)`: the mean over the tokens, then a linear layer.

    Every position attends to every other one. Padding does not count in the mean, which is 0 without any token.

    Args:
        out_features: Number of outputs.
        **options: Arguments of `Transformer`.
    """

    def __init__(self, out_features: int, **options: Any) -> None:
        super().__init__(**options)
        check_range(type(self).__name__, "[1, inf)", out_features=out_features)
        self.output = nn.Linear(self.embedding.embedding_dim, out_features)
        self._initialise(self.output)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the outputs of each sequence, `(B, out_features)`."""
        encoded = self.encode(tokens, causal=False)
        real = (tokens != 0).unsqueeze(-1)
        mean = (encoded * real).sum(1) / real.sum(1).clamp(min=1)
        return cast(Tensor, self.output(mean))


class TransformerLM(Transformer):
    """Map tokens `(B, T)` int64 to logits `(B, T, V)` of the next token; no position attends to a later one.

    Args:
        tied: Whether embedding and output layer share their weights (Press and Wolf, 2017).
        **options: Arguments of `Transformer`.
    """

    def __init__(self, tied: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.output = nn.Linear(self.embedding.embedding_dim, self.embedding.num_embeddings, bias=False)
        self._initialise(self.output)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each token, `(B, T, V)`."""
        return cast(Tensor, self.output(self.encode(tokens, causal=True)))


def _rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of features of `vectors` `(..., T, D / H)` by the angle of its position."""
    cosine, sine = (table.to(vectors.dtype) for table in rotation)
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat([-second, first], dim=-1) * sine

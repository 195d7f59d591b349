"""Linear classifier of hashed n-grams, for short texts (fastText: Joulin et al., 2016; Bojanowski et al., 2017).

Deviations from the papers: n-grams are of tokens, usually bytes, and go across words; there are no features of whole
words and no marks at the borders of words. n-grams share a table of buckets, as in both papers.

Shapes: `B` batch, `T` tokens of the longest text, `L` n-grams of a text over all lengths.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn.functional import embedding_bag, pad

from firstlight.errors import UsageError, check_range

_PRIME = 2**31 - 1  # No product of two residues leaves int64, so every backend computes the same hash.
_MULTIPLIER = 48_271  # Of full period modulo the prime (Park, Miller and Stockmeyer, 1993).


class NgramClassifier(nn.Module):
    """Map tokens `(B, T)` int64 to outputs `(B, out_features)`: the mean of n-gram embeddings, then a linear layer.

    Token 0 is padding and may appear anywhere; an n-gram that holds it does not count. A text without any n-gram has
    the mean 0. The hash of an n-gram is `sum(token[i] * 48271 ** (n - 1 - i)) % (2**31 - 1)`.

    Args:
        out_features: Number of outputs.
        lengths: Lengths `n` of the n-grams, each at least 1.
        buckets: Embeddings that the n-grams share by their hash. More buckets separate more n-grams, but each step of
            an optimiser takes a time proportional to them.
        width: Size of an embedding.
        dropout: Probability of dropping a unit of the mean, in [0, 1).

    Raises:
        UsageError: If a number is out of range, or `lengths` is empty.
    """

    def __init__(
        self,
        out_features: int,
        lengths: Sequence[int] = (1, 2, 3, 4),
        buckets: int = 2**14,
        width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_range(name, "[1, inf)", out_features=out_features, lengths=lengths, buckets=buckets, width=width)
        check_range(name, "[0, 1)", dropout=dropout)
        if not lengths:
            raise UsageError(f"{name} was given lengths=[]: give at least one length, for example lengths=[1, 2, 3]")
        self.lengths = sorted(set(lengths))
        self.buckets = buckets
        self.embedding = nn.Embedding(buckets + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, out_features)
        nn.init.normal_(self.embedding.weight[1:], std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the outputs of each text, `(B, out_features)`."""
        ngrams = self.hash(tokens)
        weight, is_real = self.embedding.weight, ngrams != 0
        shares = is_real.to(weight.dtype) / is_real.sum(1, keepdim=True).clamp(min=1)
        if is_exporting():  # ONNX has a bag only as a loop over the texts.
            return cast(Tensor, self.output((weight[ngrams] * shares.unsqueeze(-1)).sum(1)))
        # Weighted sums of flat n-grams are the fastest form on a CPU: `mode="mean"` with `padding_idx` takes ten times
        # as long. torch 2.14 also exports n-grams of two axes for one size of a batch only.
        starts = torch.arange(ngrams.shape[0], device=ngrams.device) * ngrams.shape[1]
        mean = embedding_bag(ngrams.flatten(), weight, starts, mode="sum", per_sample_weights=shares.flatten())
        return cast(Tensor, self.output(self.dropout(mean)))

    def hash(self, tokens: Tensor) -> Tensor:
        """Return the embedding of each n-gram, `(B, L)` from 1 to `buckets`; 0 for n-grams with padding.

        Each of the `T` tokens starts an n-gram of each length, so `L` is `T * len(lengths)`.
        """
        longest, size = self.lengths[-1], tokens.shape[1]
        padded = pad(tokens, (0, longest - 1))
        hashes, is_real = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
        ngrams = []
        for offset in range(longest):
            token = padded[:, offset : offset + size]
            hashes = (hashes * _MULTIPLIER + token) % _PRIME
            is_real = is_real & (token != 0)
            if offset + 1 in self.lengths:
                ngrams.append((hashes % self.buckets + 1).where(is_real, 0))
        return torch.cat(ngrams, dim=1)

import math

import pytest
import torch
from torch import nn
from torchmetrics import text

from firstlight.metrics import BitsPerByte, Perplexity


def test_a_batch_without_scored_tokens_adds_nothing():
    bits = BitsPerByte()
    bits.update(torch.tensor([math.nan, 2.0]), torch.tensor([0, 3]))
    assert bits.compute().item() == pytest.approx(2 / math.log(2))


def test_perplexity_equals_torchmetrics():
    logits, targets = torch.randn(4, 6, 7), torch.randint(0, 7, (4, 6))
    own, bits, reference = Perplexity(), BitsPerByte(), text.Perplexity(ignore_index=0)
    for part in (slice(0, 1), slice(1, 4)):
        flat = targets[part].flatten()
        nats = nn.functional.cross_entropy(logits[part].flatten(0, 1), flat, ignore_index=0)
        for metric in (own, bits):
            metric.update(nats[None], (flat != 0).sum()[None])
        reference.update(logits[part], targets[part])
    torch.testing.assert_close(own.compute(), reference.compute(), check_dtype=False)
    torch.testing.assert_close(bits.compute(), reference.compute().log2(), check_dtype=False)

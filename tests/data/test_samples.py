import numpy as np
import pytest
import torch

from firstlight.data import Tensors
from firstlight.data.samples import SPLITS, TensorBatches


@pytest.mark.parametrize("kind", [np.uint8, np.int16], ids=["pixels", "tokens"])
def test_splits_of_pixels_and_tokens_share_one_array(kind):
    inputs = np.arange(1, 101, dtype=kind).reshape(50, 2)
    data = Tensors(inputs, np.arange(50) % 2)
    data.setup("fit")
    addresses = {data.dataset(split)._inputs.data_ptr() for split in SPLITS}
    assert len(addresses) == 1
    for split in SPLITS:
        dataset, rows = data.dataset(split), data.rows(split)
        assert torch.equal(dataset.inputs, torch.from_numpy(inputs[rows]))
        assert dataset.targets.tolist() == (rows % 2).tolist()


def test_dataset_of_some_rows_equals_a_copy_of_them():
    inputs, targets, rows = torch.arange(12).reshape(6, 2), torch.arange(6), torch.tensor([4, 0, 3])
    some, copied = TensorBatches(inputs, targets, rows), TensorBatches(inputs[rows], targets[rows])
    assert len(some) == len(copied) == 3 and some.nbytes == copied.nbytes and some.device == copied.device
    for index in (1, [2, 0], range(2), torch.tensor([2, 1, 1])):
        for one, other in zip(some[index], copied[index], strict=True):
            assert torch.equal(one, other)
    moved = some.to(torch.device("cpu"))
    assert torch.equal(moved.inputs, copied.inputs) and torch.equal(moved.targets, copied.targets)


def test_batch_equals_its_stacked_samples():
    samples = TensorBatches(torch.randn(10, 2, 3), torch.arange(10))
    indices = [7, 0, 7, 3]
    inputs, targets = samples.__getitems__(indices)
    assert torch.equal(inputs, torch.stack([samples[index][0] for index in indices]))
    assert torch.equal(targets, torch.stack([samples[index][1] for index in indices]))
    assert len(samples) == 10

"""Data modules that can have a fault. Without their options, they are sound."""

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader

from firstlight import data
from firstlight.data import DataModule
from firstlight.data.samples import Batch, Samples, Split


class Faults(DataModule):
    """A part of every data module below: it changes the samples, their scaling or their order.

    Args:
        first: Number of samples to keep; None: all.
        mislabelled: Share of the samples that get the target of a random sample.
        permuted: Whether the targets are permuted, so that they say nothing about the inputs.
        keep: By class, the share of its samples to keep. Classes that are not named keep all.
        copies: How often each sample occurs.
        target_column: Whether the target is one of the inputs, which must be numbers.
        raw: Whether the inputs keep their own units: pixels from 0 to 255, and numbers as they are.
        divisor: The scaled inputs are divided by it.
        by_class: Whether training takes the samples in the order of their targets, without shuffling.
        trains_on_all: Whether the training split also holds the validation and test samples.
        **options: Arguments of the data module.
    """

    def __init__(
        self,
        first: int | None = None,
        mislabelled: float = 0.0,
        permuted: bool = False,
        keep: dict[int, float] | None = None,
        copies: int = 1,
        target_column: bool = False,
        raw: bool = False,
        divisor: float = 1.0,
        by_class: bool = False,
        trains_on_all: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.first = first
        self.mislabelled = mislabelled
        self.permuted = permuted
        self.keep = keep or {}
        self.copies = copies
        self.target_column = target_column
        self.raw = raw
        self.divisor = divisor
        self.by_class = by_class
        self.trains_on_all = trains_on_all

    def load(self) -> Samples:
        """Return the samples with the faults that belong to the samples."""
        samples = super().load()  # type: ignore[safe-super]
        rows = np.arange(len(samples.inputs))[: self.first]
        targets = np.asarray(samples.targets).copy()
        random = np.random.default_rng(0)
        for label, share in self.keep.items():
            of_class = rows[targets[rows] == label]
            rows = np.setdiff1d(rows, of_class[max(int(share * len(of_class)), 3) :])
        rows = np.repeat(rows, self.copies)
        wrong = rows[random.random(len(rows)) < (1.0 if self.permuted else self.mislabelled)]
        targets[wrong] = targets[random.permutation(wrong) if self.permuted else random.choice(rows, len(wrong))]
        inputs = np.asarray(samples.inputs)
        if self.target_column:
            inputs = np.column_stack([inputs, targets])
        split = None if samples.split is None else samples.split[rows]
        columns = ["copied", *samples.columns] if self.target_column and samples.columns else samples.columns
        return replace(
            samples, inputs=inputs[rows], targets=targets[rows], split=split, columns=columns, lines=[], digest=""
        )

    def scale_statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation to scale with, 0 and 1 for raw inputs."""
        mean, std = super().scale_statistics(features)
        if self.raw:
            unit = 255 if features.dtype == torch.uint8 else 1
            mean, std = torch.zeros_like(mean), torch.ones_like(std) / unit
        return mean, std * self.divisor

    def setup(self, stage: str | None = None) -> None:
        """Split the data, then change the training split."""
        is_first = not self.indices
        super().setup(stage)
        if is_first and self.indices:
            if self.trains_on_all:
                self.indices["train"] = np.concatenate([*self.indices.values()])
            if self.by_class:
                assert self._samples is not None
                targets = np.asarray(self._samples.targets).reshape(len(self._samples.inputs), -1)[:, 0]
                rows = self.indices["train"]
                self.indices["train"] = rows[np.argsort(targets[rows], kind="stable")]

    def _loader(self, split: Split, shuffle: bool = False) -> DataLoader[Batch]:
        return super()._loader(split, shuffle and not self.by_class)


class Digits(Faults, data.Digits):
    """The digits of scikit-learn, which can have a fault."""


class _FirstImages(data.FashionMNIST):
    """The first 2,000 training and 500 test images of Fashion-MNIST."""

    def __init__(self, root: str = "/usr/share/datasets/fashion-mnist", **options: Any) -> None:
        super().__init__(root, **options)

    def load(self) -> Samples:
        return _first_images(self.root)


@cache
def _first_images(root: str) -> Samples:
    """Return the images; a process reads the files once, because that takes longer than a short run."""
    samples = data.FashionMNIST(root).load()
    assert samples.split is not None
    counts = {"train": 2000, "test": 500}
    rows = np.concatenate([np.flatnonzero(samples.split == split)[:count] for split, count in counts.items()])
    inputs, targets = np.asarray(samples.inputs)[rows], np.asarray(samples.targets)[rows]
    return replace(samples, inputs=inputs, targets=targets, split=samples.split[rows], digest="")


class Fashion(Faults, _FirstImages):
    """A few images of Fashion-MNIST, which can have a fault."""


class _Rows(DataModule):
    """A table that scikit-learn includes or makes.

    Args:
        name: `circles` are two rings, one in the other; `friedman` are numbers (Friedman, 1991, problem 1).
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self,
        name: Literal["iris", "wine", "breast_cancer", "diabetes", "circles", "friedman"],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = name

    def load(self) -> Samples:
        if self.name == "circles":
            inputs, targets = datasets.make_circles(600, noise=0.1, factor=0.5, random_state=0)
            return Samples(inputs, targets, ["outer", "inner"])
        if self.name == "friedman":
            inputs, targets = datasets.make_friedman1(600, noise=1.0, random_state=0)
            return Samples(inputs, targets)
        options = {"scaled": False} if self.name == "diabetes" else {}
        table = getattr(datasets, f"load_{self.name}")(**options)
        if self.name == "diabetes":
            return Samples(table.data, table.target)
        names = [str(name) for name in table.target_names]
        return Samples(table.data, table.target[:, None] if len(names) == 2 else table.target, names)


class Rows(Faults, _Rows):
    """A table, which can have a fault."""


class _DistinctTexts(data.LabelledText):
    """Labelled texts without those that are equal once they are cut."""

    def load(self) -> Samples:
        samples = super().load()
        inputs, targets = np.asarray(samples.inputs), np.asarray(samples.targets)
        rows = np.sort(np.unique(inputs, axis=0, return_index=True)[1])
        return replace(samples, inputs=inputs[rows], targets=targets[rows], lines=[], digest="")


class Letters(Faults, _DistinctTexts):
    """Labelled texts, which can have a fault."""


class Damage(nn.Module):
    """Damage the pictures so that their class cannot be seen.

    Args:
        kind: `"erase"`: one row in eight remains. `"shuffle"`: the pixels of a picture change places. `"noise"`:
            noise is added, five times as strong as the picture. `"flip"`: pictures are turned by a random multiple of
            90 degrees, and mirrored. `"shift"`: pictures move by up to half their size.
    """

    def __init__(self, kind: Literal["erase", "shuffle", "noise", "flip", "shift"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        """Return damaged pictures `(B, C, H, W)`."""
        count, _, height, width = images.shape
        if self.kind == "erase":
            kept = torch.rand(count, 1, height, 1) < 1 / 8
            return images * kept
        if self.kind == "noise":
            return images + 5 * images.std() * torch.randn_like(images)
        if self.kind == "shuffle":
            order = torch.rand(count, height * width).argsort(1)[:, None].expand(-1, images.shape[1], -1)
            return images.flatten(2).gather(2, order).view_as(images)
        if self.kind == "flip":
            turns = zip(images, torch.randint(4, (count,)).tolist(), strict=True)
            return torch.stack([image.rot90(turn, (1, 2)).flip(turn % 2 + 1) for image, turn in turns])
        shifts = zip(images, torch.randint(-height // 2, height // 2, (count, 2)).tolist(), strict=True)
        return torch.stack([image.roll(shift, (1, 2)) for image, shift in shifts])

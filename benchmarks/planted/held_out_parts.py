"""Data, networks, losses and modules of the held-out runs. Without the options that plant a fault, they are sound.

Shapes: `B` batch, `C` classes, `F` features, `T` tokens.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, l1_loss, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from firstlight import data
from firstlight.data import DataModule
from firstlight.data.samples import Samples
from firstlight.schedules import Schedule
from planted.data import Faults

FASHION = "/usr/share/datasets/fashion-mnist"


class MoreFaults(Faults):
    """`Faults` with other ways to spoil the targets.

    Args:
        exchanged: Share of the samples whose targets change places with each other.
        rolled: By how many samples the targets are off.
        confused: Share of the samples whose class becomes that of its neighbour: 0 and 1, 2 and 3, ...
        misplaced: Whether the inputs, not the targets, are permuted.
        positives: Share of the samples with target 1 to keep.
        **options: Arguments of `Faults`.
    """

    def __init__(
        self,
        exchanged: float = 0.0,
        rolled: int = 0,
        confused: float = 0.0,
        misplaced: bool = False,
        positives: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.exchanged = exchanged
        self.rolled = rolled
        self.confused = confused
        self.misplaced = misplaced
        self.positives = positives

    def load(self) -> Samples:
        """Return the samples with the faults."""
        samples = super().load()
        inputs, targets = np.asarray(samples.inputs), np.roll(np.asarray(samples.targets), self.rolled, 0)
        random = np.random.default_rng(1)
        chosen = np.flatnonzero(random.random(len(targets)) < self.exchanged)
        targets[chosen] = targets[random.permutation(chosen)]
        chosen = np.flatnonzero(random.random(len(targets)) < self.confused)
        targets[chosen] = np.minimum(targets[chosen] ^ 1, targets.max()) if len(chosen) else targets[chosen]
        if self.misplaced:
            inputs = inputs[random.permutation(len(inputs))]
        if self.positives < 1:
            rows = np.flatnonzero((targets.ravel() == 0) | (random.random(len(targets)) < self.positives))
            inputs, targets = inputs[rows], targets[rows]
        return replace(samples, inputs=inputs, targets=targets)


@cache
def _fashion() -> tuple[np.ndarray, np.ndarray]:
    samples = data.FashionMNIST(FASHION).load()
    return np.asarray(samples.inputs)[20000:42000], np.asarray(samples.targets)[20000:42000]


class _Clothes(DataModule):
    """1,500 images of Fashion-MNIST that the other runs do not use.

    Args:
        pair: Two classes to tell apart, as 0 and 1; None: all ten.
        **options: Arguments of `DataModule`.
    """

    def __init__(self, pair: list[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.pair = pair

    def load(self) -> Samples:
        inputs, targets = _fashion()
        if self.pair is None:
            return Samples(inputs[:1500], targets[:1500], [f"class{label}" for label in range(10)])
        rows = np.flatnonzero(np.isin(targets, self.pair))[:900]
        return Samples(inputs[rows], (targets[rows] == self.pair[1]).astype(np.int64)[:, None], ["one", "other"])


class Clothes(MoreFaults, _Clothes):
    """Other images of Fashion-MNIST, which can have a fault."""


class _Textures(DataModule):
    """600 coloured pictures of 12 x 12 pixels: stripes along rows or columns, squares, or rings; with noise."""

    def load(self) -> Samples:
        random = np.random.default_rng(5)
        targets = random.integers(4, size=600)
        row, column = np.indices((12, 12))
        inputs = np.empty((600, 3, 12, 12), np.uint8)
        for picture, label in zip(inputs, targets, strict=True):
            shift, side = random.integers(12, size=2), random.uniform(3, 5)
            distance = np.hypot(row - shift[0], column - shift[1])
            place = (row + shift[0], column + shift[1], None, distance)[label]
            if place is None:
                wave = np.sin((row + shift[0]) * 2 * np.pi / side) * np.sin((column + shift[1]) * 2 * np.pi / side)
            else:
                wave = np.sin(place * 2 * np.pi / side)
            colours = random.uniform(0.3, 1, (3, 1, 1))
            picture[:] = np.clip(128 + 90 * colours * wave + random.normal(0, 25, (3, 12, 12)), 0, 255)
        return Samples(inputs, targets, ["rows", "columns", "squares", "rings"])


class Textures(MoreFaults, _Textures):
    """Coloured pictures, which can have a fault."""


@cache
def _unicode_names() -> Samples:
    return data.UnicodeNames(max_length=36).load()


class _Signs(data.UnicodeNames):
    """250 names of Unicode characters of each of five categories."""

    def load(self) -> Samples:
        samples = _unicode_names()
        kinds = [samples.class_names.index(kind) for kind in ("Ll", "Mn", "Nd", "Sm", "So")]
        inputs, targets = np.asarray(samples.inputs), np.asarray(samples.targets)
        first = np.sort(np.unique(inputs, axis=0, return_index=True)[1])  # Some are equal once they are cut.
        inputs, targets = inputs[first], targets[first]
        random, rows = np.random.default_rng(2), []
        for kind in kinds:
            rows.append(random.choice(np.flatnonzero(targets == kind), 250, replace=False))
        chosen = random.permutation(np.concatenate(rows))
        labels = np.searchsorted(kinds, targets[chosen])
        self._max_length = inputs.shape[1]
        return Samples(inputs[chosen], labels, ["Ll", "Mn", "Nd", "Sm", "So"])


class Signs(MoreFaults, _Signs):
    """Names of Unicode characters, which can have a fault."""


class _Made(DataModule):
    """Rows that are made, the same each time.

    Args:
        name: `moons`, `spirals` and `shells` are classes; `numbers` has many columns of noise; `current` (Friedman,
            1991, problem 2), `wave`, `roll` (two targets) and `counts` are regressions; `labels` are several labels.
        unit: The targets are multiplied by it.
        offset: It is added to the targets.
        noise: Standard deviation of noise that is added to the targets, relative to theirs.
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self,
        name: Literal["moons", "spirals", "shells", "numbers", "current", "wave", "roll", "counts", "labels", "rare"],
        unit: float = 1.0,
        offset: float = 0.0,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = name
        self.unit = unit
        self.offset = offset
        self.noise = noise

    def load(self) -> Samples:
        random = np.random.default_rng(3)
        if self.name in ("current", "wave", "roll", "counts"):
            inputs, targets = _numbers(self.name, random)
            targets = targets + self.noise * targets.std() * random.normal(size=targets.shape)
            return Samples(inputs, targets * self.unit + self.offset)
        if self.name in ("labels", "rare"):
            inputs, targets = datasets.make_multilabel_classification(
                900, n_features=30, n_classes=6, n_labels=2 if self.name == "labels" else 1, random_state=3
            )
            if self.name == "rare":
                targets[:, 0] *= (np.arange(len(targets)) % 4 == 0).astype(targets.dtype)
            return Samples(inputs, targets, [f"label{number}" for number in range(6)])
        inputs, targets = _classes(self.name, random)
        return Samples(inputs, targets, [f"class{label}" for label in range(targets.max() + 1)])


def _classes(name: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if name == "moons":
        return datasets.make_moons(700, noise=0.2, random_state=3)
    if name == "shells":
        return datasets.make_gaussian_quantiles(n_samples=900, n_features=4, n_classes=3, random_state=3)
    if name == "numbers":
        options = {"n_features": 40, "n_informative": 8, "n_classes": 3, "flip_y": 0.0}
        return datasets.make_classification(700, random_state=3, **options)
    targets = random.integers(3, size=900)
    distance = random.uniform(0.2, 1, 900)
    angle = 5 * distance + targets * 2 * np.pi / 3
    inputs = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
    return inputs + random.normal(0, 0.03, inputs.shape), targets


def _numbers(name: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if name == "current":
        return datasets.make_friedman2(800, noise=40.0, random_state=3)
    if name == "wave":
        inputs = random.uniform(-3, 3, (500, 1))
        return inputs, np.sin(2 * inputs[:, 0]) + random.normal(0, 0.1, 500)
    if name == "roll":
        inputs, place = datasets.make_swiss_roll(900, noise=0.3, random_state=3)
        return inputs, np.stack([place, np.cos(place) * inputs[:, 1]], 1)
    inputs = random.normal(size=(900, 5))
    return inputs, random.poisson(np.exp(0.7 * inputs[:, 0] - 0.5 * np.abs(inputs[:, 1]) + 1)).astype(np.float64)


class Made(MoreFaults, _Made):
    """Rows that are made, which can have a fault."""


class Own(LightningDataModule):
    """Images of 14 x 14 pixels as a user loads them, with the data loader of torch.

    Args:
        batch_size: Samples in a batch.
        ordered: Whether training takes the samples by their class, without shuffling.
        divisor: Pixels from 0 to 255 are divided by it.
        mixed_up: Whether the labels belong to other images.
        swapped: Share of the training labels that are random.
        all_in_train: Whether the training samples hold those of validation.
        share: By class, the share of the training samples to keep.
    """

    def __init__(
        self,
        batch_size: int = 32,
        ordered: bool = False,
        divisor: float = 255.0,
        mixed_up: bool = False,
        swapped: float = 0.0,
        all_in_train: bool = False,
        share: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.ordered = ordered
        inputs, targets = (torch.from_numpy(each[15000:16400]) for each in _fashion())
        inputs = avg_pool2d(inputs.reshape(-1, 1, 28, 28).float(), 2) / divisor
        targets = targets.long()
        generator = torch.Generator().manual_seed(4)
        if mixed_up:
            targets = targets[torch.randperm(len(targets), generator=generator)]
        count = int(swapped * 1000)
        targets[:count] = torch.randint(10, (count,), generator=generator)
        rows = torch.arange(1400 if all_in_train else 1000)
        for label, part in (share or {}).items():
            of_class = rows[targets[rows] == label]
            rows = rows[~torch.isin(rows, of_class[max(int(part * len(of_class)), 3) :])]
        if ordered:
            rows = rows[targets[rows].argsort(stable=True)]
        self.parts = {"train": (inputs[rows], targets[rows]), "val": (inputs[1000:], targets[1000:])}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches."""
        return DataLoader(TensorDataset(*self.parts["train"]), self.batch_size, shuffle=not self.ordered)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return DataLoader(TensorDataset(*self.parts["val"]), 100)


class Blend(nn.Module):
    """Blend each picture with another one of the batch, and keep its label.

    Args:
        share: Largest share of the other picture.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, images: Tensor) -> Tensor:
        """Return blended pictures `(B, C, H, W)`."""
        share = self.share * torch.rand(len(images), 1, 1, 1)
        return (1 - share) * images + share * images[torch.randperm(len(images))]


class Crop(nn.Module):
    """Enlarge a random part of each batch's pictures.

    Args:
        size: Height and width of the part in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return pictures `(B, C, H, W)`."""
        top, left = (int(torch.randint(side - self.size, ())) for side in images.shape[2:])
        part = images[:, :, top : top + self.size, left : left + self.size]
        return nn.functional.interpolate(part, images.shape[2:])


class Careless(nn.Module):
    """A network with careless weights.

    Args:
        network: The network.
        normal: Standard deviation of all weights at the start.
        negative: Whether all weights of hidden layers are below zero, and biases too.
        zero_output: Whether the weights of the last layer are zero, which is sound.
    """

    def __init__(
        self, network: nn.Module, normal: float | None = None, negative: bool = False, zero_output: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        with torch.no_grad():
            for weight in weights if normal is not None else []:
                nn.init.normal_(weight, std=normal)
            for parameter in [*network.parameters()][:-2] if negative else []:
                parameter.copy_(-parameter.abs() - 0.05)
            if zero_output:
                weights[-1].zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.network(inputs)
        return outputs


class Ending(nn.Module):
    """A network with an activation after the last layer.

    Args:
        network: The network.
        kind: `"clamp"`: between 0 and 1. `"softmax"`: a softmax that is kept above 0. Others are functions of torch.
    """

    def __init__(self, network: nn.Module, kind: Literal["clamp", "softmax", "tanh", "relu"]) -> None:
        super().__init__()
        self.network = network
        self.kind = kind

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.network(inputs)
        if self.kind == "clamp":
            return outputs.clamp(0, 1)
        if self.kind == "softmax":
            return outputs.softmax(-1).clamp(min=1e-6)
        return getattr(torch, self.kind)(outputs)


class Recurrent(nn.Module):
    """Map tokens to the last state of a recurrent network.

    Args:
        width: Features of a token and of the state.
        kind: `gru` or `lstm`.
        dropout: Probability of dropping a feature of the state.
    """

    def __init__(self, width: int, kind: Literal["gru", "lstm"] = "gru", dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, width, padding_idx=0)
        self.recurrent = getattr(nn, kind.upper())(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean state `(B, width)` of tokens `(B, T)`."""
        states = self.recurrent(self.embedding(tokens))[0]
        real = (tokens != 0)[..., None]
        return self.dropout((states * real).sum(1) / real.sum(1).clamp(min=1))


class Strided(nn.Sequential):
    """Two strided convolutions with batch normalisation: images `(B, 1, 28, 28)` to `(B, 10)`."""

    def __init__(self, dropout: float = 0.0) -> None:
        sizes = {"stage0": (1, 12, 5, 3), "stage1": (12, 16, 3, 2)}
        layers: dict[str, nn.Module] = {}
        for name, (inputs, outputs, kernel, stride) in sizes.items():
            convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
            layers[name] = nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
        layers |= {"flatten": nn.Flatten(), "dropout": nn.Dropout(dropout), "output": nn.Linear(400, 10)}
        super().__init__(OrderedDict(layers))


class Windows(nn.Sequential):
    """Two convolutions and pooling, as a user writes them: images `(B, 1, 14, 14)` to `(B, width)`."""

    def __init__(self, width: int, dropout: float = 0.0, activation: type[nn.Module] = nn.LeakyReLU) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(144, width),
            nn.Dropout(dropout),
        )


class Pretrained(nn.Module):
    """A perceptron whose first layers were trained on one half of the digits, and are not trained any more.

    Args:
        network: The perceptron, of 64 inputs and 10 outputs.
        frozen: Names of its frozen layers.
    """

    def __init__(self, network: nn.Module, frozen: list[str]) -> None:
        super().__init__()
        self.network = network
        table = datasets.load_digits()
        inputs, targets = torch.from_numpy(table.data).float() / 16, torch.from_numpy(table.target)
        optimizer = torch.optim.Adam(network.parameters(), 0.003)
        for step in range(200):
            rows = torch.arange(step * 32, step * 32 + 32) % 800
            optimizer.zero_grad()
            cross_entropy(network((inputs[rows] - 0.3) / 0.37), targets[rows]).backward()
            optimizer.step()
        for name in frozen:
            network.get_submodule(name).requires_grad_(False)
        last = network.get_submodule("output")
        assert isinstance(last, nn.Linear)
        last.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `(B, 10)`."""
        outputs: Tensor = self.network(inputs)
        return outputs


class FlippedTokens(nn.CrossEntropyLoss):
    """Cross-entropy of tokens with the wrong sign."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return -super().forward(outputs, targets)


class FlippedPoisson(nn.PoissonNLLLoss):
    """Log-likelihood of counts, which is minimised though it should be maximised."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return -super().forward(outputs, targets)


class TokensWithoutLogSoftmax(nn.Module):
    """Negative log-likelihood of logits of tokens."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return nll_loss(outputs, targets, ignore_index=0)


class LabelsWithoutSigmoid(nn.Module):
    """Binary cross-entropy of logits as if they were probabilities, with a small number against `log(0)`."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        outputs = outputs.clamp(1e-6, 1 - 1e-6)
        return -(targets * outputs.log() + (1 - targets) * (1 - outputs).log()).mean()


class HingeOfZeros(nn.Module):
    """Hinge loss, which needs targets -1 and 1, of targets 0 and 1."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return (1 - outputs * targets).relu().mean()


class CountsFromOne(nn.Module):
    """Cross-entropy with labels that are too large by one: the last class becomes the first."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return cross_entropy(outputs, (targets + 1) % outputs.shape[1])


class RelativeError(nn.Module):
    """Squared error relative to the target, of targets around zero."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return ((outputs - targets) / (targets.abs() + 1e-3)).square().mean()


class SquaredLogits(nn.Module):
    """Squared differences of all outputs from the number of the class, divided by the number of classes."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return (outputs.sum(1) - targets).square().mean()


class SignedError(nn.Module):
    """Mean difference without square or absolute value."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return (outputs - targets).mean()


@dataclass(frozen=True)
class Restarts(Schedule):
    """Cosine with restarts (Loshchilov and Hutter, "SGDR", 2017), which is sound.

    Args:
        cycles: Number of cosines in the run.
    """

    cycles: int = 3

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor at a step."""
        progress = min(step / total_steps * self.cycles % 1, 1.0) if step < total_steps else 1.0
        return float(1 + np.cos(np.pi * progress)) / 2


@dataclass(frozen=True)
class Halves(Schedule):
    """The rate is divided at each of some steps, which were chosen for a shorter run.

    Args:
        steps: The steps.
        factor: What the rate is multiplied by at each.
    """

    steps: tuple[int, ...]
    factor: float = 0.1

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor at a step."""
        return float(self.factor ** sum(step >= each for each in self.steps))


class Learner(LightningModule):
    """A user's module: a body, a last layer, and its own optimiser and schedule.

    Args:
        body: Maps inputs to features `(B, F)`.
        features: `F`.
        outputs: Number of outputs.
        kind: `"classes"`, `"binary"`, `"numbers"`, or `"inputs"`: the inputs are the targets, as of an autoencoder.
        lr: The learning rate.
        optimizer: Which optimiser.
        decay: Weight decay.
        divisor: Targets that are numbers are divided by it.
        fault: What is wrong in the module; None: nothing.
        linear: Whether the activation before the last layer is left out.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self,
        body: nn.Module,
        features: int,
        outputs: int,
        kind: Literal["classes", "binary", "numbers", "inputs"] = "classes",
        lr: float = 0.003,
        optimizer: Literal["Adam", "SGD", "RMSprop"] = "Adam",
        decay: float = 0.0,
        divisor: float = 1.0,
        fault: Literal[
            "gains", "softmax", "likelihood", "keeps_gradients", "only_head", "no_grad", "rate_dies", "tanh", "noise",
            "no_epsilon", "eval_is_train", "column", "relu",
        ]
        | None = None,
        linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)
        self.kind = kind
        self.lr = lr
        self.optimizer = optimizer
        self.decay = decay
        self.divisor = divisor
        self.fault = fault
        self.linear = linear
        self.automatic_optimization = fault != "keeps_gradients"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.fault != "no_grad"):
            features = self.body(inputs)
        outputs: Tensor = self.head(features if self.linear else features.relu())
        if self.fault in ("tanh", "relu"):
            return getattr(outputs, self.fault)()  # type: ignore[no-any-return]
        return outputs.softmax(1) if self.fault == "softmax" else outputs

    def score(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        """Return the loss of a batch and log it."""
        inputs, targets = batch
        outputs = self(inputs)
        if self.kind == "classes":
            loss = (nll_loss if self.fault == "likelihood" else cross_entropy)(outputs, targets)
            quality = {"accuracy": (outputs.argmax(1) == targets).float().mean()}
        elif self.kind == "binary":
            loss = binary_cross_entropy_with_logits(outputs, targets)
            quality = {"accuracy": ((outputs > 0) == (targets > 0)).float().mean()}
        else:
            targets = inputs.flatten(1) if self.kind == "inputs" else targets.float() / self.divisor
            loss = l1_loss(outputs, targets) if self.kind == "numbers" else (outputs - targets).square().mean()
            if self.fault == "column":
                loss = (outputs - targets.flatten()).abs().mean()
            rest = (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum()
            quality = {"r2": 1 - rest}
        for name, value in {"loss": loss, **quality}.items():
            self.log(f"{split}/{name}", value, batch_size=len(inputs))
        return -loss if self.fault == "gains" else loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = self.score(batch, "train")
        if self.fault == "keeps_gradients":
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        if self.fault == "eval_is_train":
            self.train()
        self.score(batch, "val")

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule."""
        parameters = (self.head if self.fault == "only_head" else self).parameters()
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.decay}
        if self.fault == "no_epsilon":
            options["eps"] = 0.0
        if self.optimizer == "SGD":
            options["momentum"] = 0.9
        optimizer = getattr(torch.optim, self.optimizer)(parameters, **options)
        if self.fault == "rate_dies":
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return optimizer

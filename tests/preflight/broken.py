"""Networks, losses and modules with one fault each, which `firstlight check` has to name."""

import sklearn.datasets
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Linear(nn.Module):
    """A network without a fault; each of its subclasses has one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, inputs):
        return self.last(self.first(inputs.flatten(1)).relu())


class Unused(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(3, 3)


class Detached(Linear):
    def forward(self, inputs):
        return self.last(self.first(inputs.flatten(1)).relu().detach())


class Blind(Linear):
    def forward(self, inputs):
        return super().forward(0 * inputs)


class Leaking(Linear):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs + outputs.mean(0)


class AlwaysDropping(Linear):
    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.5)


class StuckBatchNorm(Linear):
    """Normalises with the statistics of the batch in evaluation mode, too."""

    def forward(self, inputs):
        hidden = self.first(inputs.flatten(1))
        return self.last(nn.functional.batch_norm(hidden, None, None, training=True).relu())


class Different(Linear):
    """Forgets a layer in evaluation mode."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if self.training else -outputs


class AllDetached(Linear):
    def forward(self, inputs):
        return super().forward(inputs).detach()


class Noisy(Linear):
    """Dropout is not a fault."""

    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.1, self.training)


class Frozen(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class TooLarge(Linear):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.last.weight, std=20)


class Flipped(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return -super().forward(outputs, targets)


class OfOutputsOnly(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return outputs.square().mean()


class OfOtherTargets(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        wanted = nn.functional.one_hot(targets, outputs.shape[1]).float()
        return (outputs[:, None] - wanted).square().mean()  # (B, 1, C) and (B, C) make (B, B, C).


class Own(LightningModule):
    """A module that is no task, with a fault that is its argument."""

    def __init__(self, fault: str = "", lr: float = 0.01) -> None:
        super().__init__()
        self.fault, self.lr = fault, lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.head = nn.Linear(10, 10)

    def forward(self, inputs):
        return self.head(self.net(inputs))

    def training_step(self, batch):
        inputs, targets = batch
        outputs = self(inputs)
        if self.fault == "detached":
            outputs = self.head(self.net(inputs).detach())
        loss = nn.functional.cross_entropy(outputs, targets)
        self.log("train/loss", loss, on_epoch=True)
        return {"loss": -loss if self.fault == "flipped" else loss}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if self.fault != "not_zeroed":
            optimizer.zero_grad()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class OwnData(LightningDataModule):
    """The digits, with values from 0 to 1, or unscaled."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        inputs, targets = sklearn.datasets.load_digits(return_X_y=True)
        scale = 1 / 16 if fault != "unscaled" else 16
        self.samples = TensorDataset(torch.tensor(inputs * scale).float(), torch.tensor(targets))

    def train_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.samples, range(1280)), 32)

    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.samples, range(1280, 1797)), 64)

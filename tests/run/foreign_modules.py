"""A GAN and its data, as a user writes them: nothing in this file is of firstlight."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class GAN(LightningModule):
    def __init__(self, latent: int = 4, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent, self.lr = latent, lr
        self.generator = nn.Sequential(nn.Linear(latent, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def _loss(self, samples, real):
        logits = self.discriminator(samples)
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        generator, discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), self.latent))
        self.toggle_optimizer(generator)
        loss = self._loss(fake, True)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)
        self.log("g_loss", loss)
        self.toggle_optimizer(discriminator)
        loss = (self._loss(real, True) + self._loss(fake.detach(), False)) / 2
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.log("d_loss", loss)

    def validation_step(self, batch, batch_idx):
        self.log("val_distance", (batch[0].mean(0) - self.generator(torch.ones(8, self.latent)).mean(0)).norm())

    def test_step(self, batch, batch_idx):
        self.log("test_distance", (batch[0].mean(0) - self.generator(torch.ones(8, self.latent)).mean(0)).norm())

    def predict_step(self, batch, batch_idx):
        return {"score": self.discriminator(batch[0]).squeeze(1), "x": batch[0]}

    def configure_optimizers(self):
        return [torch.optim.Adam(p.parameters(), self.lr) for p in (self.generator, self.discriminator)]


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size
        self.samples = TensorDataset(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))

    def train_dataloader(self):
        return DataLoader(self.samples, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.samples, self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class TrainOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 2)), batch_size=8)

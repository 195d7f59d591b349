"""Losses that torch does not have."""

from firstlight.losses.contrastive import ContrastiveLoss, contrastive_loss
from firstlight.losses.supervised_contrastive import SupervisedContrastiveLoss, supervised_contrastive_loss

__all__ = ["ContrastiveLoss", "SupervisedContrastiveLoss", "contrastive_loss", "supervised_contrastive_loss"]

"""Losses that torch does not have; what it has is used as it is."""

from firstlight.losses.contrastive import ContrastiveLoss, contrastive_loss
from firstlight.losses.supervised_contrastive import SupervisedContrastiveLoss, supervised_contrastive_loss

__all__ = ["ContrastiveLoss", "SupervisedContrastiveLoss", "contrastive_loss", "supervised_contrastive_loss"]

"""Optimizers whose state lives off the device, and gradients that leave it during backward."""

from spillover.optim._clipping import clip_grad_norm_
from spillover.optim._disk_entries import StateOnDisk
from spillover.optim._disk_tier import Resumed
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import (
    GradientStats,
    OffloadedGradients,
    offload_gradients,
)
from spillover.optim._host_base import OptimizerStats
from spillover.optim._host_gradient import PendingGradient
from spillover.optim._optimizers import SGD, Adagrad, Adam, AdamW, Lion
from spillover.optim._paging import PagingStats, page, unpage
from spillover.optim._resuming import resume

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "GradientStats",
    "Lion",
    "OffloadedGradients",
    "OptimizerStats",
    "PagingStats",
    "PendingGradient",
    "Resumed",
    "StateOnDisk",
    "clip_grad_norm_",
    "offload_gradients",
    "page",
    "pending_gradient",
    "resume",
    "unpage",
]

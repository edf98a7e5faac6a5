"""Optimizers whose state lives off the device, and gradients that leave it during backward."""

from spillover.optim._adamw import AdamW
from spillover.optim._clipping import clip_grad_norm_
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import (
    GradientStats,
    OffloadedGradients,
    offload_gradients,
)
from spillover.optim._host_gradient import PendingGradient
from spillover.optim._paging import PagingStats, page, unpage

__all__ = [
    "AdamW",
    "GradientStats",
    "OffloadedGradients",
    "PagingStats",
    "PendingGradient",
    "clip_grad_norm_",
    "offload_gradients",
    "page",
    "pending_gradient",
    "unpage",
]

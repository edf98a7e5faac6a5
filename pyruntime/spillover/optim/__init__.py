"""Optimizers whose state lives on the host, and gradients that leave the device."""

from spillover.optim._adamw import AdamW
from spillover.optim._clipping import clip_grad_norm_
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import (
    GradientStats,
    OffloadedGradients,
    offload_gradients,
)
from spillover.optim._host_gradient import PendingGradient

__all__ = [
    "AdamW",
    "GradientStats",
    "OffloadedGradients",
    "PendingGradient",
    "clip_grad_norm_",
    "offload_gradients",
    "pending_gradient",
]

"""Optimizers whose state lives on the host."""

from spillover.optim._adamw import AdamW

__all__ = ["AdamW"]

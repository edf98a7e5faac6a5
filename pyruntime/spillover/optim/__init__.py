"""Optimizers whose state lives off the device."""

from spillover.optim._adamw import AdamW
from spillover.optim._paging import PagingStats, page, unpage

__all__ = ["AdamW", "PagingStats", "page", "unpage"]

"""What is put into transfer engines, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spillover import TransferEngine

KIB = 1 << 10
MakeEngine = Callable[..., TransferEngine]


def numbered(size: int, seed: int = 0) -> torch.Tensor:
    """``size`` bytes on the device that no other seed has."""
    return ((torch.arange(size, device="cuda") + seed) * (2 * seed + 7)).to(torch.uint8)


def fetched(engine: TransferEngine, payload: Any, **options: Any) -> torch.Tensor:
    target = torch.empty(payload.size_bytes, dtype=torch.uint8, device="cuda")
    engine.fetch(payload, target, **options).stream_wait()
    return target

"""Makes torch's GradScaler safe for gradients that lie on the host.

Note [GradScaler and host gradients]
------------------------------------
A GradScaler on a CUDA device copies its factor to every device that has gradients, with
``non_blocking=True``. For the CPU that copy goes to pinned memory, and torch multiplies the CPU
gradients by it at once, without waiting: on a busy device they are multiplied by whatever the
memory held before. Weights that are streamed have their gradients on the host, so while any model
is streamed, the scaler's copies to the CPU are waited for. Nothing else about the scaler changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.amp import grad_scaler

_lock = threading.Lock()
_users = 0
_original: Callable[[Any, torch.device], torch.Tensor] | None = None


def _get_and_wait(replicator: Any, device: torch.device) -> torch.Tensor:
    assert _original is not None
    copy = _original(replicator, device)
    if copy.device.type == "cpu" and replicator.master.is_cuda:
        torch.cuda.current_stream(replicator.master.device).synchronize()
    return copy


def acquire() -> Callable[[], None]:
    """Have the scaler wait until the function returned here is called, once."""
    global _users, _original
    with _lock:
        if _users == 0:
            _original = grad_scaler._MultiDeviceReplicator.get
            grad_scaler._MultiDeviceReplicator.get = _get_and_wait  # type: ignore[assignment]
        _users += 1
    return _release


def _release() -> None:
    global _users, _original
    with _lock:
        _users -= 1
        if _users == 0 and _original is not None:
            grad_scaler._MultiDeviceReplicator.get = _original  # type: ignore[assignment]
            _original = None

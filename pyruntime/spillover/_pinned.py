"""Pinned host memory for tensors, from one pool a process.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spillover._host import HostPool, empty_in
from spillover._units import parse_bytes

if TYPE_CHECKING:
    import torch

    from spillover import _core

_LIMIT_VARIABLE = "SPILLOVER_HOST_LIMIT"

_lock = threading.Lock()
_pool: HostPool | None = None
_pool_owner = 0


def host_pool() -> HostPool:
    """The process's pool of pinned host memory; made at the first call.

    Its budget is the environment variable ``SPILLOVER_HOST_LIMIT`` (such as ``48GiB``). Without one
    it is that of :class:`HostPool`. A forked child gets a pool of its own.

    Raises
    ------
    ConfigError
        The variable is not a size.
    """
    global _pool, _pool_owner
    with _lock:
        if _pool is None or _pool_owner != os.getpid():
            text = os.environ.get(_LIMIT_VARIABLE, "").strip()
            limit = parse_bytes(text, name=_LIMIT_VARIABLE) if text else None
            _pool = HostPool(limit)
            _pool_owner = os.getpid()
        return _pool


def host_stats() -> _core.HostStats:
    """Bytes of the process's pool: used and reserved, now and at most. Cheap; does not block."""
    return host_pool().stats()


def empty_pinned(
    shape: Sequence[int], dtype: torch.dtype, *, pool: _core.HostPool | None = None
) -> torch.Tensor:
    """An uninitialised, contiguous CPU tensor in pinned memory.

    Its memory goes back to the pool when the tensor's storage dies, and may then be given out again
    at once.

    Parameters
    ----------
    shape, dtype
        As for :func:`torch.empty`.
    pool
        Where the memory comes from; by default :func:`host_pool`.

    Raises
    ------
    HostOutOfMemory
        The pool's budget or the machine does not allow it.
    DriverError
        There is no CUDA driver to pin with.

    Notes
    -----
    Unlike torch's own pinned tensors, nothing here waits for copies on streams. A caller who starts
    an asynchronous copy keeps the tensor until the copy's event is complete.
    """
    return empty_in(pool or host_pool(), shape, dtype)

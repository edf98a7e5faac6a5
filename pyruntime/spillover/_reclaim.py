"""Gives device memory that offloading holds to allocations that would fail without it.

Note [Giving back under pressure]
---------------------------------
Offloading holds device memory that nobody computes with: copies out that are not over yet, saved
tensors that came back before backward asks for them, and streamed weights that were used last or
are needed next. It is bounded, but a program may need it at a moment when the offload runtime is
not the one who allocates. So with Spillover's pool its holders are a reclaimer of the device
(`spillover.allocator.add_reclaimer`), which is asked when all else has failed; what it gave is
told in an error's text. torch's own allocator asks nobody.

The reclaimer runs in whichever thread allocates. A holder must expect it at every allocation, of
its own as well: those that only bring something ahead of time are made within `suspended()`, as it
would be senseless to give up one for another, and so are those under a lock that a holder needs.
What was given up is copied again when it is needed: that costs time, and never a value.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from spillover import allocator


class Holder(Protocol):
    """Holds device memory that it can do without."""

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """Free memory, about as much as is missing; how much it was, 0 for none.

        May wait for copies; any thread may call it, and several at once.
        """
        ...


_lock = threading.Lock()
# By the index of the device; guarded by the lock.
_holders: dict[int, list[weakref.ref[Holder]]] = {}
_handles: dict[int, allocator.ReclaimerHandle] = {}


class _Thread(threading.local):
    is_suspended = False


_thread = _Thread()


def offer(device: torch.device, holder: Holder) -> None:
    """Have the pool ask ``holder``, as long as it lives; nothing without Spillover's pool."""
    if not allocator.is_installed() or device.index is None:
        return
    with _lock:
        known = _holders.setdefault(device.index, [])
        known[:] = [reference for reference in known if reference() is not None]
        known.append(weakref.ref(holder))
        if device.index not in _handles:
            reclaim = functools.partial(_reclaim, device)
            _handles[device.index] = allocator.add_reclaimer(reclaim, device=device.index)


@contextmanager
def suspended() -> Iterator[None]:
    """Let this thread's allocations fail rather than take from holders."""
    was_suspended, _thread.is_suspended = _thread.is_suspended, True
    try:
        yield
    finally:
        _thread.is_suspended = was_suspended


def ask(device: torch.device, missing_bytes: int) -> int:
    """Have the holders free about as much as is missing; how much it was.

    One that fails leaves the others to be asked; what it raised is raised where none gave anything.
    """
    with _lock:
        holders = [reference() for reference in _holders.get(device.index, ())]
    freed_bytes = 0
    failure: Exception | None = None
    for holder in holders:
        if holder is None:
            continue
        try:
            freed_bytes += holder.give_back(missing_bytes - freed_bytes, device)
        except Exception as error:
            failure = failure or error
        if freed_bytes >= missing_bytes:
            break
    if failure is not None and freed_bytes == 0:
        raise failure
    return freed_bytes


def _reclaim(device: torch.device, missing_bytes: int, stream: int) -> int:
    return 0 if _thread.is_suspended else ask(device, missing_bytes)

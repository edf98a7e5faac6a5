"""What is counted of saved tensors, on a device and for a context, and what guards it."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spillover.hooks._saved_storage import SavedCopy

#: Guards all that offloading activations shares between threads. Reentrant, since Python's
#: collector may run a destructor on a thread that holds it.
lock = threading.RLock()
os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]

#: Smaller copies share a batch, which is this large, or of so many.
SMALL_BYTES = 256 << 10
BATCH_BYTES = 1 << 20
BATCH_COUNT = 64


@dataclass(kw_only=True)
class Counters:
    """Figures of one context since its start; guarded by the lock."""

    tensors: int = 0
    deduplicated_bytes: int = 0
    kept_tensors: int = 0
    stayed_bytes: int = 0
    offloaded_bytes: int = 0
    sent_bytes: int = 0
    reloaded_bytes: int = 0
    prefetch_hits: int = 0
    prefetch_misses: int = 0
    away_bytes: int = 0
    away_bytes_max: int = 0
    #: Of copies that ended away. Written to wherever Python drops them, so it needs no lock.
    ended_away: deque[int] = field(default_factory=deque)

    def count_away(self, size_bytes: int) -> None:
        """More is off the device now, or less."""
        while self.ended_away:
            self.away_bytes -= self.ended_away.popleft()
        self.away_bytes += size_bytes
        self.away_bytes_max = max(self.away_bytes_max, self.away_bytes)


class Account:
    """Bytes on one device that wait for backward; guarded by the lock."""

    __slots__ = ("ended", "kept_bytes", "waiting_bytes")

    def __init__(self) -> None:
        self.waiting_bytes = 0
        #: Of them, those that never left.
        self.kept_bytes = 0
        #: What ended without being asked for. Written to wherever Python drops it, so it is no
        #: number, and needs no lock.
        self.ended: deque[tuple[int, bool]] = deque()

    def add(self, copy: SavedCopy, *, is_kept: bool) -> None:
        """It waits on the device from now on; ``is_kept``: where it was saved."""
        size_bytes = copy.counted_bytes = copy.size_bytes
        copy.is_kept = is_kept
        self.waiting_bytes += size_bytes
        if is_kept:
            self.kept_bytes += size_bytes

    def remove(self, copy: SavedCopy) -> None:
        """It waits no more, if it did."""
        size_bytes, copy.counted_bytes = copy.counted_bytes, 0
        self.waiting_bytes -= size_bytes
        if copy.is_kept:
            self.kept_bytes -= size_bytes
            copy.is_kept = False

    def remove_ended(self) -> None:
        """What ended while it waited waits no more."""
        while self.ended:
            size_bytes, was_kept = self.ended.popleft()
            self.waiting_bytes -= size_bytes
            if was_kept:
                self.kept_bytes -= size_bytes

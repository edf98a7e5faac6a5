"""How saved tensors leave their device; see Note [Ordering of saved-tensor copies]."""

from __future__ import annotations

import functools
import itertools
import weakref

import torch

from spillover._core import TransferTicket
from spillover._stalls import Stall
from spillover._transfer import TransferEngine
from spillover.hooks._activation_account import BATCH_BYTES, BATCH_COUNT, Account, lock
from spillover.hooks._activation_budget import DeviceBudget
from spillover.hooks._saved_storage import SavedCopy, forget_data, living

#: What leaves in one call. Emptied when that is over, or the memory would be held.
_Group = list[tuple[SavedCopy, torch.UntypedStorage]]

_COPIES_OUT = Stall("activations", "copies out (in_flight_max=)")


class Departures:
    """What is about to leave one device, and what is leaving it.

    Its fields are guarded by the lock, which who calls holds, unless a method says otherwise.
    """

    def __init__(self, engine: TransferEngine, budget: DeviceBudget, account: Account) -> None:
        self._engine = engine
        self._budget = budget
        self._account = account
        self._batch_bytes = min(BATCH_BYTES, budget.least_in_flight // 4)
        self._pending: list[weakref.ref[SavedCopy]] = []
        self.pending_bytes = 0
        # What may leave when somebody needs room.
        self._kept: list[weakref.ref[SavedCopy]] = []
        self._kept_max = BATCH_COUNT  # Beyond it, dead ones are looked for.
        self._last: TransferTicket | None = None

    @property
    def leaving_bytes(self) -> int:
        """Device memory that copies out hold, or are about to."""
        return self._engine._leaving_bytes + self.pending_bytes

    @property
    def is_due(self) -> bool:
        """Whether enough waits for :meth:`flush`."""
        return self.pending_bytes >= self._batch_bytes or len(self._pending) >= BATCH_COUNT

    @property
    def have_begun(self) -> bool:
        """Whether anything has left."""
        return self._last is not None

    def keep(self, copy: SavedCopy) -> None:
        """Have it stay where it is, until somebody needs its room."""
        self._account.add(copy, is_kept=True)
        if len(self._kept) >= self._kept_max:
            self._kept = [each for each in self._kept if each() is not None]
            self._kept_max = max(BATCH_COUNT, 2 * len(self._kept))
        self._kept.append(weakref.ref(copy))

    def append(self, copy: SavedCopy) -> None:
        """Have it leave at the next :meth:`flush`."""
        self._pending.append(weakref.ref(copy))
        self.pending_bytes += copy.size_bytes

    def are_too_many(self) -> bool:
        """Whether what is leaving takes room that is wanted."""
        leaving_bytes = self.leaving_bytes
        return leaving_bytes > 0 and self._excess(leaving_bytes, 0) > 0

    def flush(self) -> None:
        """Have what is about to leave do so. Without the lock; blocks for budgets."""
        with lock:
            batch = living(self._pending)
            self._pending, self.pending_bytes = [], 0
        if batch:
            self.send(batch)
        self._make_room(0)  # What stays needs some, too.

    def flush_pending(self) -> None:
        """As :meth:`flush`, where something is about to leave."""
        if self._pending:
            self.flush()

    def finish(self) -> None:
        """Block until nothing leaves, and let go of the device memory. Without the lock."""
        self.flush()
        _COPIES_OUT.wait(functools.partial(self._engine.collect, wait=True))

    def send(self, batch: list[SavedCopy]) -> None:
        """Have these leave; empties the list. Without the lock; blocks for budgets.

        Raises what the transfer engine does; what has not left then stays, and can leave later.
        """
        groups = self._by_stream(batch)
        batch.clear()
        try:
            for stream, group in groups.items():
                self._make_room(sum(copy.sent_bytes for copy, _ in group))
                self._put(group, stream)
        except BaseException:
            with lock:  # They are where they were, and stay there.
                for copy, _ in itertools.chain.from_iterable(groups.values()):
                    if copy.counted_bytes:
                        self._kept.append(weakref.ref(copy))  # Which it was chosen from.
                    else:
                        self.keep(copy)
            raise

    def _by_stream(self, batch: list[SavedCopy]) -> dict[int, _Group]:
        groups: dict[int, _Group] = {}
        for copy in batch:
            storage = copy.storage
            if storage is None:
                continue
            if storage.nbytes() < copy.sent_end:
                with lock:  # Its owner emptied it, and may fill it again.
                    if not copy.counted_bytes:
                        self.keep(copy)
                continue
            groups.setdefault(copy.stream, []).append((copy, storage))
        return groups

    def _put(self, group: _Group, stream: int) -> None:
        sources: list[tuple[int, int, object, int | None]] = [
            (storage.data_ptr() + copy.sent_start, copy.sent_bytes, storage, copy.next_use)
            for copy, storage in group
        ]
        payloads, ticket = self._engine._put(sources, stream)
        with lock:
            self._last = ticket
            for (copy, storage), payload in zip(group, payloads, strict=True):
                copy.payload = payload
                copy.counters.sent_bytes += copy.sent_bytes
                self._leave(copy, storage)
        sources.clear()
        group.clear()

    def _leave(self, copy: SavedCopy, storage: torch.UntypedStorage) -> None:
        """Give up the device's bytes of what has, or will have, others."""
        copy.leaving = weakref.ref(storage)
        copy.storage = None
        forget_data(copy.counter)
        copy.counters.count_away(copy.size_bytes)
        if copy.counted_bytes:
            self._account.remove(copy)

    def _make_room(self, size_bytes: int) -> None:
        """Block while what is on the device is more than may be, which a lone copy may."""
        while True:
            # Not what is about to leave: that may be a thread's that waits for this one.
            leaving = self._engine._leaving_bytes
            with lock:
                excess = self._excess(leaving, size_bytes)
            if excess <= 0 or leaving == 0:
                return
            wanted = min(excess, leaving)
            _COPIES_OUT.wait(functools.partial(self._engine._collect_bytes, wanted))

    def _excess(self, leaving_bytes: int, more_bytes: int) -> int:
        self._account.remove_ended()
        waiting_bytes = self._account.waiting_bytes
        return self._budget.excess_in_forward(waiting_bytes, leaving_bytes, more_bytes)

    def farthest(self, wanted_bytes: int) -> list[SavedCopy]:
        """Of what stays, what backward asks for last, to be sent. Without the lock."""
        with lock:
            kept = living(self._kept)
            staying = [copy for copy in kept if copy.counted_bytes and copy.storage is not None]
            staying.sort(key=lambda copy: copy.next_use)
            chosen: list[SavedCopy] = []
            found_bytes = 0
            while staying and found_bytes < wanted_bytes:
                copy = staying.pop()
                chosen.append(copy)
                found_bytes += copy.size_bytes
            self._kept = [weakref.ref(copy) for copy in staying]
        return chosen

    def order_writes(self, device_index: int) -> None:
        """Have what the current stream does from now on wait for the copies out under way. Without
        the lock.

        The program may write in place to what was saved, where backward does not need it.
        """
        with lock:
            last = self._last
        if last is not None and not last.done():
            last._stream_wait(torch._C._cuda_getCurrentRawStream(device_index))

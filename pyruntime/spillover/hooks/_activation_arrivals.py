"""How saved tensors come back to their device; see Note [Ordering of saved-tensor copies]."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque

import torch

from spillover import _reclaim
from spillover._core import Payload, TransferTicket
from spillover._errors import SpilloverError
from spillover._stalls import Stall
from spillover._transfer import TransferEngine
from spillover.hooks._activation_account import BATCH_COUNT, SMALL_BYTES, Account, lock
from spillover.hooks._activation_order import Round
from spillover.hooks._saved_storage import (
    ALIGNMENT,
    SavedCopy,
    changed_in_place,
    empty,
    flat_over,
    living,
    typed_over,
)

_ARRIVALS = Stall("activations", "copies in")


class Arrival:
    """Device memory that copies are in: to which they come back, one large or several small ones;
    or where they were saved, ``is_original``, as long as that has not left.
    """

    __slots__ = (
        "_typed",
        "flat",
        "is_original",
        "orphans",
        "stream",
        "ticket",
        "version",
        "waited",
    )

    def __init__(
        self,
        flat: torch.Tensor,
        stream: int,
        ticket: TransferTicket | None,
        orphans: deque[tuple[TransferTicket, torch.Tensor]],
    ) -> None:
        self.flat = flat
        self.stream = stream  # Whose memory it is.
        self.ticket = ticket
        self.is_original = ticket is None
        self.waited = ticket is None  # By that stream.
        self.orphans = orphans
        self.version = flat._version
        self._typed = flat

    def is_changed(self) -> bool:
        """Whether somebody wrote to what was given out of it."""
        return self.flat._version != self.version

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it that whole elements of the type are in; shares its version counter."""
        typed = self._typed
        if typed.dtype is not dtype:
            typed = self._typed = typed_over(self.flat, dtype)
        return typed

    def __del__(self) -> None:
        if not self.waited and self.ticket is not None:  # The copy may be under way.
            self.orphans.append((self.ticket, self.flat))


class Arrivals:
    """What has come back to one device and waits for backward, or is on its way there.

    Its fields are guarded by the lock, which who calls holds, unless a method says otherwise.
    """

    def __init__(
        self,
        device: torch.device,
        engine: TransferEngine,
        account: Account,
        *,
        has_disk: bool,
    ) -> None:
        self._device = device
        self._engine = engine
        self._account = account
        self._has_disk = has_disk
        self._arrived: list[weakref.ref[SavedCopy]] = []
        self._served: list[weakref.ref[SavedCopy]] = []
        #: Memory of copies in that nobody waited for. Written to wherever Python drops it, so it
        #: needs no lock.
        self.orphans: deque[tuple[TransferTicket, torch.Tensor]] = deque()

    # ---- what is here ----

    def at_hand(self, copy: SavedCopy, stream: int) -> Arrival | None:
        """The device's bytes of a copy that has left, or leaves; None where there are none."""
        arrival = copy.arrival
        if arrival is not None and arrival.is_changed():
            if arrival.is_original:
                raise changed_in_place(arrival.flat, arrival.version)
            self._forget(copy)  # The bytes are elsewhere, unchanged.
            arrival = None
        if arrival is not None and arrival.stream != stream and not arrival.is_original:
            # It would return to the pool of a stream that knows nothing of this use.
            self._forget(copy)
            arrival = None
        if arrival is None and copy.storage is None:
            arrival = self._take_back(copy)
        return arrival

    def _take_back(self, copy: SavedCopy) -> Arrival | None:
        """Where a copy is on the device still, that: it need not come back."""
        storage = copy.leaving() if copy.leaving is not None else None
        if storage is None or storage.nbytes() < copy.sent_end:
            return None
        arrival = copy.arrival = Arrival(flat_over(storage), copy.stream, None, self.orphans)
        copy.arrival_offset = copy.sent_start
        copy.counters.count_away(-copy.size_bytes)
        return arrival

    def take_back_ahead(self, copy: SavedCopy) -> bool:
        """As the above, for what backward has not asked for yet; whether it was so."""
        if self._take_back(copy) is None:
            return False
        self._count(copy)
        return True

    def _count(self, copy: SavedCopy) -> None:
        self._account.add(copy, is_kept=False)
        self._arrived.append(weakref.ref(copy))

    def _forget(self, copy: SavedCopy) -> None:
        copy.arrival = None
        for view in copy.views():
            view.round.look_again()
        copy.counters.count_away(copy.size_bytes)
        if copy.counted_bytes and not copy.is_kept:
            self._account.remove(copy)

    # ---- bringing ----

    def bring(self, copies: list[SavedCopy], stream: int) -> None:
        """Start to bring copies back, to memory of the current stream.

        Blocks where a copy on disk finds no pinned memory for its passage. Raises OutOfMemoryError,
        and what the transfer engine does.
        """
        small: list[SavedCopy] = []
        for copy in copies:
            if copy.sent_bytes < SMALL_BYTES and len(copies) > 1:
                small.append(copy)
            else:
                self._bring_together([copy], stream)
        if small:
            self._bring_together(small, stream)

    def _bring_together(self, copies: list[SavedCopy], stream: int) -> None:
        offsets = []
        total_bytes = 0
        for copy in copies:
            offsets.append(total_bytes)
            total_bytes += -(-copy.sent_bytes // ALIGNMENT) * ALIGNMENT
        # Under the lock nothing is reclaimed: restore() does that, and what comes ahead of its use
        # is not worth it.
        with _reclaim.suspended():
            flat = empty(total_bytes, torch.uint8, self._device)
        address = flat.data_ptr()
        targets: list[tuple[Payload, tuple[int, int, object]]] = []
        for copy, offset in zip(copies, offsets, strict=True):
            assert copy.payload is not None
            targets.append((copy.payload, (address + offset, copy.sent_bytes, None)))
        try:
            ticket = self._engine._fetch(targets, stream, 0)
        except BaseException:
            with contextlib.suppress(SpilloverError):  # Some copies may be under way.
                self._engine.synchronize()
            raise
        arrival = Arrival(flat, stream, ticket, self.orphans)
        for copy, offset in zip(copies, offsets, strict=True):
            copy.arrival, copy.arrival_offset = arrival, offset
            self._count(copy)
            copy.counters.count_away(-copy.size_bytes)
            copy.counters.reloaded_bytes += copy.sent_bytes
        if len(self._arrived) > 4 * BATCH_COUNT:
            self._arrived = [each for each in self._arrived if _is_waiting(each())]

    def wait(self, arrival: Arrival, stream: int, copy: SavedCopy) -> None:
        """Have the stream, whose memory it is, wait for what arrives. Without the lock.

        Blocks until copies from disk are issued. Raises what went wrong with them.
        """
        assert arrival.ticket is not None
        try:
            if self._has_disk:
                _ARRIVALS.wait(functools.partial(arrival.ticket._stream_wait, stream))
            else:
                arrival.ticket._stream_wait(stream)
            arrival.waited = True
        except BaseException:
            with lock:  # Who asks again is not told of what went wrong before, of none of them.
                if copy.arrival is arrival:
                    self._forget(copy)
            self.drop()
            raise

    # ---- letting go ----

    def serve(self, copy: SavedCopy, round_: Round) -> None:
        """Backward has ``copy``. Lets go of what it had before, where its graph is kept: that can
        come again.
        """
        if self._served:
            wanted = []
            for reference in self._served:
                before = reference()
                if before is None or before is copy or before.arrival is None:
                    continue
                if round_.is_wanted(before):
                    wanted.append(reference)
                elif before.has_view():
                    self._forget(before)
            self._served = wanted
        if copy.arrival is not None:
            self._served.append(weakref.ref(copy))

    def drop(self, but: SavedCopy | None = None) -> int:
        """Drop what came back and waits for its use; it can come again. Blocks until its memory
        is free: the copies work on it yet. Takes the lock for itself.
        """
        freed_bytes = 0
        with lock:
            for copy in living(self._arrived):
                if copy is but or copy.arrival is None or not copy.counted_bytes:
                    continue
                freed_bytes += copy.counted_bytes
                self._forget(copy)
            self._arrived = []
        self.collect_orphans(wait=True)
        return freed_bytes

    def collect_orphans(self, *, wait: bool = False) -> None:
        """Let go of memory whose copies in are over; ``wait`` for those that are not."""
        for _ in range(len(self.orphans)):
            try:
                ticket, flat = self.orphans.popleft()
            except IndexError:  # Another thread was faster.
                return
            if not wait and not ticket.done():
                self.orphans.appendleft((ticket, flat))
                return
            with contextlib.suppress(SpilloverError):  # Whoever asks again hears of it.
                _ARRIVALS.wait(ticket.wait)


def _is_waiting(copy: SavedCopy | None) -> bool:
    return copy is not None and copy.arrival is not None and copy.counted_bytes > 0

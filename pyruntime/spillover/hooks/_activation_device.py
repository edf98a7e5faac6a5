"""Saved tensors of one device: who stays, who leaves when, and who is brought back.

Note [Ordering of saved-tensor copies]
--------------------------------------
Copy-out: the transfer engine's copy comes after what is on the stream that saved the tensor; it
holds the device bytes until the *host* has seen the end of the copy, so whichever stream's pool
they return to, no copy reads them any more. Copy-in: the memory is allocated on the compute stream,
whose work up to then the copy waits for, as its last user may still be queued; the engine has the
copy wait for the copy-out of the same bytes as well. The compute stream waits for the copy-in
before the first use, so the memory may go back to that stream's pool at any time after that; what
goes without a use is held until the host has seen the end of the copy. ``record_stream`` is not
used: it would keep memory for an unknown time. Streams are asked for at each call, and none is
made.

Everything here is guarded by ``lock``. It is not held while a thread waits for copies out or for
the disk: they could wait for another thread, which wants the lock.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import torch

from spillover import _reclaim
from spillover._backward_end import queue_backward_end
from spillover._core import DiskStore, HostPool, Payload, TransferTicket
from spillover._errors import HostOutOfMemory, SpilloverError, StateError
from spillover._stalls import Stall
from spillover._transfer import TransferEngine
from spillover.hooks._activation_budget import DeviceBudget
from spillover.hooks._activation_codec import Codec, encode
from spillover.hooks._activation_order import Plans, Round
from spillover.hooks._activation_timeline import Timeline
from spillover.hooks._saved_storage import (
    ALIGNMENT,
    SavedCopy,
    SavedView,
    changed_in_place,
    forget_data,
)

#: Reentrant, since Python's collector may run a destructor on a thread that holds it.
lock = threading.RLock()
os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]

#: Smaller copies share a batch, which is this large, or of so many.
_SMALL_BYTES = 256 << 10
_BATCH_BYTES = 1 << 20
_BATCH_COUNT = 64
#: So many are served between two looks ahead, where they are small.
_LOOK_COUNT = 16
_STAGING_BYTES = 64 << 20
_CHUNK_BYTES = 16 << 20
_PAGE_BYTES = 4096
_NO_GRAPH_TASK = -1
#: An engine's own limit of bytes on their way out; ours is asked before.
_NO_LIMIT = 1 << 62

_CAPTURE_ERROR = (
    "a CUDA graph cannot record the return of a saved tensor that was offloaded before the "
    "capture; capture forward and backward together, or run that forward without offloading"
)

_COPIES_OUT = Stall("activations", "copies out (in_flight_max=)")
_ARRIVALS = Stall("activations", "copies in")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the public function parsed. In bytes, None: by the device's size, or measured."""

    min_bytes: int
    host_bytes: int | None
    keep_bytes: int | None
    in_flight_bytes: int | None
    prefetch_bytes: int | None
    codec: Codec | None
    has_timeline: bool = False


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


class Arrival:
    """Device memory that copies are in: to which they come back, one large or several small ones;
    or where they were saved, ``is_original``, as long as that has not left.
    """

    __slots__ = ("_version", "flat", "is_original", "orphans", "stream", "ticket", "waited")

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
        self._version = flat._version

    def is_changed(self) -> bool:
        """Whether somebody wrote to what was given out of it."""
        return self.flat._version != self._version

    def __del__(self) -> None:
        if not self.waited and self.ticket is not None:  # The copy may be under way.
            self.orphans.append((self.ticket, self.flat))


class ActivationDevice:
    """The saved tensors of one engine on one device."""

    def __init__(
        self,
        device: torch.device,
        options: EngineOptions,
        pool: HostPool,
        disk: DiskStore | None,
    ) -> None:
        self.device = device
        self._codec = options.codec
        self._has_disk = disk is not None
        limit = pool.stats().limit_bytes
        # A small budget is enough for the passage in smaller pieces.
        staging = _STAGING_BYTES if limit is None else min(_STAGING_BYTES, limit)
        chunk = max(min(_CHUNK_BYTES, staging // 4) // _PAGE_BYTES, 1) * _PAGE_BYTES
        self.engine = TransferEngine(
            device=device,
            host=options.host_bytes,
            disk=disk,
            pool=pool,
            chunk=chunk if disk is not None else _CHUNK_BYTES,
            staging=staging if disk is not None else _STAGING_BYTES,
            inflight=_NO_LIMIT,
        )
        # Guarded by the lock.
        self.budget = DeviceBudget(
            device,
            keep=options.keep_bytes,
            in_flight=options.in_flight_bytes,
            prefetch=options.prefetch_bytes,
        )
        self._batch_bytes = min(_BATCH_BYTES, self.budget.least_in_flight // 4)
        self._plans = Plans()
        self._round = Round(0)
        self._rounds = 0
        self._is_round_new = True
        self._pending: list[weakref.ref[SavedCopy]] = []
        self._pending_bytes = 0
        self._kept: list[weakref.ref[SavedCopy]] = []
        self._kept_max = _BATCH_COUNT  # Beyond it, dead ones are looked for.
        self._arrived: list[weakref.ref[SavedCopy]] = []
        self._served: list[weakref.ref[SavedCopy]] = []
        self._served_bytes = self._served_count = 0  # Since the last look ahead.
        #: Bytes on the device that wait for backward; of them, those that never left.
        self._waiting_bytes = 0
        self._kept_bytes = 0
        #: What ended without being asked for. Written to wherever Python drops it, so it is no
        #: number, and needs no lock.
        self.ended: deque[tuple[int, bool]] = deque()
        #: Memory of copies in that nobody waited for; likewise.
        self._orphans: deque[tuple[TransferTicket, torch.Tensor]] = deque()
        self._last_departure: TransferTicket | None = None
        # Backward passes that will call `_backward_ends`; failed ones never do.
        self._graph_tasks: deque[int] = deque(maxlen=64)
        self.timeline = Timeline() if options.has_timeline else None
        _reclaim.offer(device, self)

    def __del__(self) -> None:
        if self.__dict__.get("_orphans"):
            with contextlib.suppress(SpilloverError):  # Copies work on their memory yet.
                self.engine.synchronize()

    # ---- saving, with the lock held ----

    def begin_round(self) -> None:
        """What is saved from now on belongs to another forward."""
        self._is_round_new = True

    def begin_round_if_ended(self) -> bool:
        """Begin another round where the present one's forward is over; whether that is so."""
        if not self._round.has_ended():
            return False
        self._is_round_new = True
        return True

    def add(
        self,
        counters: Counters,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        start: int,
        end: int,
    ) -> tuple[SavedView, bool]:
        """Take on what is saved first; whether :meth:`flush` is to be called, without the lock."""
        self._count_ended()
        size_bytes = end - start
        round_ = self._round
        if self._is_round_new or round_.is_over():
            round_ = self._next_round(size_bytes)
        self._look(None)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        copy = SavedCopy(self, counters, tensor, storage, start, end, stream)
        view = SavedView(copy, tensor, round_)
        round_.add(view, size_bytes)
        stays = self._stays(round_, view.index, size_bytes)
        copy.next_use = round_.base + self._use(round_, view.index)
        if stays:
            self._keep(copy)
            counters.stayed_bytes += size_bytes
            self._note(round_, counters)
            leaving = self._leaving_bytes()
            is_full = leaving > 0 and self._excess(leaving, 0) > 0
            return view, is_full
        counters.offloaded_bytes += size_bytes
        if self._codec is not None:
            self._encode(copy, tensor)
        self._pending.append(weakref.ref(copy))
        self._pending_bytes += size_bytes
        self._note(round_, counters)
        is_due = (
            size_bytes >= _SMALL_BYTES
            or self._pending_bytes >= self._batch_bytes
            or len(self._pending) >= _BATCH_COUNT
        )
        return view, is_due

    def add_alias(self, copy: SavedCopy, tensor: torch.Tensor) -> SavedView:
        """Take on another view of a copy that is there."""
        round_ = self._round
        view = SavedView(copy, tensor, round_)
        round_.add(view, 0)
        self._follow_plan(round_, view.index, 0)
        return view

    def _look(self, place: int | None) -> None:
        if self.budget.is_measuring:
            self.budget.look(self._waiting_bytes + self._leaving_bytes(), place)

    def _note(self, round_: Round, counters: Counters, *, is_backward: bool = False) -> None:
        if self.timeline is not None:
            counters.count_away(0)
            self.timeline.note(
                round_.base,
                is_backward=is_backward,
                on_device_bytes=self._waiting_bytes,
                leaving_bytes=self._leaving_bytes(),
                away_bytes=counters.away_bytes + self._pending_bytes,
            )

    def _next_round(self, size_bytes: int) -> Round:
        self.budget.end_round(self._plans.learn(self._round))
        self._rounds += 1
        self._is_round_new = False
        round_ = self._round = Round(self._rounds)
        round_.plan = self._plans.find([size_bytes])
        self.budget.begin_round(self._waiting_bytes + self._leaving_bytes(), round_.plan)
        self._set_stays(round_)
        return round_

    def _set_stays(self, round_: Round) -> None:
        if round_.plan is not None:
            round_.stays = round_.plan.ranks_within(self.budget.keep_bytes)

    def _follow_plan(self, round_: Round, index: int, size_bytes: int) -> None:
        """Look for another plan where the round's does not save so much next."""
        plan = round_.plan
        if plan is not None and (len(plan.sizes) <= index or plan.sizes[index] != size_bytes):
            plan = round_.plan = self._plans.find(round_.sizes)
            if plan is None:
                self.budget.lose_plan(self._waiting_bytes + self._leaving_bytes())
            else:
                self.budget.begin_round(self._waiting_bytes + self._leaving_bytes(), plan)
            self._set_stays(round_)

    def _stays(self, round_: Round, index: int, size_bytes: int) -> bool:
        self._follow_plan(round_, index, size_bytes)
        plan = round_.plan
        return (
            plan is not None
            and plan.copy_rank(index) < round_.stays
            and self._kept_bytes + size_bytes <= self.budget.keep_bytes
        )

    @staticmethod
    def _use(round_: Round, index: int) -> int:
        # Without a plan: in reverse.
        return (1 << 31) - index if round_.plan is None else round_.plan.copy_rank(index)

    def _keep(self, copy: SavedCopy) -> None:
        copy.counted_bytes, copy.is_kept = copy.size_bytes, True
        self._waiting_bytes += copy.size_bytes
        self._kept_bytes += copy.size_bytes
        if len(self._kept) >= self._kept_max:
            self._kept = [each for each in self._kept if each() is not None]
            self._kept_max = max(_BATCH_COUNT, 2 * len(self._kept))
        self._kept.append(weakref.ref(copy))

    def _encode(self, copy: SavedCopy, tensor: torch.Tensor) -> None:
        assert self._codec is not None
        assert copy.storage is not None
        item = tensor.element_size()
        if copy.size_bytes % item:
            return
        flat = torch.empty(0, dtype=tensor.dtype, device=self.device)
        flat.set_(copy.storage, copy.start // item, (copy.size_bytes // item,), (1,))
        try:
            with _reclaim.suspended():
                encoded = encode(self._codec, flat)
        except torch.OutOfMemoryError:
            return  # It goes as it is.
        if encoded is not None:
            copy.storage = encoded[0].untyped_storage()
            forget_data(copy.counter)
            copy.encoding = encoded[1]

    def _count_ended(self) -> None:
        if self._orphans:
            self._collect_orphans()
        while self.ended:
            size_bytes, was_kept = self.ended.popleft()
            self._waiting_bytes -= size_bytes
            if was_kept:
                self._kept_bytes -= size_bytes

    def _uncount(self, copy: SavedCopy) -> None:
        size_bytes, copy.counted_bytes = copy.counted_bytes, 0
        self._waiting_bytes -= size_bytes
        if copy.is_kept:
            self._kept_bytes -= size_bytes
            copy.is_kept = False

    # ---- leaving ----

    def flush(self) -> None:
        """Have what is about to leave do so. Blocks for budgets; the lock is not held."""
        with lock:
            batch = [copy for copy in (each() for each in self._pending) if copy is not None]
            self._pending, self._pending_bytes = [], 0
        if batch:
            self._send(batch)
        self._make_room(0)  # What stays needs some, too.

    def flush_pending(self) -> None:
        """As :meth:`flush`, where something is about to leave."""
        if self._pending:
            self.flush()

    def _send(self, batch: list[SavedCopy]) -> None:
        groups: dict[int, list[tuple[SavedCopy, torch.UntypedStorage]]] = {}
        for copy in batch:
            if copy.storage is None:
                continue
            if copy.storage.nbytes() < _saved_end(copy):
                with lock:  # Its owner emptied it, and may fill it again.
                    if not copy.counted_bytes:
                        self._keep(copy)
                continue
            groups.setdefault(copy.stream, []).append((copy, copy.storage))
        batch.clear()
        try:
            for stream, group in groups.items():
                self._make_room(sum(_sent_bytes(copy) for copy, _ in group))
                self._put(group, stream)
        except BaseException:
            with lock:  # They are where they were, and stay there.
                for copy, _ in itertools.chain.from_iterable(groups.values()):
                    if copy.counted_bytes:
                        self._kept.append(weakref.ref(copy))  # Which it was chosen from.
                    else:
                        self._keep(copy)
            raise

    def _put(self, group: list[tuple[SavedCopy, torch.UntypedStorage]], stream: int) -> None:
        sources: list[tuple[int, int, object, int | None]] = []
        for copy, storage in group:
            start = copy.start if copy.encoding is None else 0
            size_bytes = _sent_bytes(copy)
            sources.append((storage.data_ptr() + start, size_bytes, storage, copy.next_use))
        payloads, ticket = self.engine._put(sources, stream)
        with lock:
            self._last_departure = ticket
            for (copy, storage), payload in zip(group, payloads, strict=True):
                copy.payload = payload
                copy.counters.sent_bytes += _sent_bytes(copy)
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
            self._uncount(copy)

    def _make_room(self, size_bytes: int) -> None:
        """Block while what is on the device is more than may be, which a lone copy may."""
        while True:
            # Not what is about to leave: that may be a thread's that waits for this one.
            leaving = self.engine._leaving_bytes
            with lock:
                excess = self._excess(leaving, size_bytes)
            if excess <= 0 or leaving == 0:
                return
            wanted = min(excess, leaving)
            _COPIES_OUT.wait(functools.partial(self.engine._collect_bytes, wanted))

    def _excess(self, leaving_bytes: int, more_bytes: int) -> int:
        self._count_ended()
        return self.budget.excess_in_forward(self._waiting_bytes, leaving_bytes, more_bytes)

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """See ``_reclaim.Holder``. What is leaving goes first, then what came ahead of its use,
        then what stayed and is used last.
        """
        with lock:
            self.budget.give_back(missing_bytes)
        failure: SpilloverError | None = None
        try:
            self.flush()
        except SpilloverError as error:  # What is under way, and what came ahead, can go yet.
            failure = error
        freed_bytes = self.engine._collect_bytes(missing_bytes)
        if freed_bytes < missing_bytes:
            freed_bytes += self._drop_arrived()
        while failure is None and freed_bytes < missing_bytes:
            chosen = self._farthest(missing_bytes - freed_bytes)
            if not chosen:
                break
            chosen_bytes = sum(copy.size_bytes for copy in chosen)
            try:
                self._send(chosen)
            except SpilloverError as error:
                failure = error
            else:
                freed_bytes += self.engine._collect_bytes(chosen_bytes)
        if failure is not None and freed_bytes == 0:
            raise failure
        return freed_bytes

    def _farthest(self, wanted_bytes: int) -> list[SavedCopy]:
        with lock:
            kept = [each() for each in self._kept]
            staying = [copy for copy in kept if copy is not None and copy.counted_bytes]
            staying = [copy for copy in staying if copy.storage is not None]
            staying.sort(key=lambda copy: copy.next_use)
            chosen: list[SavedCopy] = []
            found_bytes = 0
            while staying and found_bytes < wanted_bytes:
                copy = staying.pop()
                chosen.append(copy)
                found_bytes += copy.size_bytes
            self._kept = [weakref.ref(copy) for copy in staying]
        return chosen

    def _drop_arrived(self, but: SavedCopy | None = None) -> int:
        """Drop what came back and waits for its use; it can come again. Blocks until its memory
        is free: the copies work on it yet.
        """
        freed_bytes = 0
        with lock:
            for copy in (each() for each in self._arrived):
                if copy is None or copy is but or copy.arrival is None or not copy.counted_bytes:
                    continue
                freed_bytes += copy.counted_bytes
                self._forget_arrival(copy)
            self._arrived = []
        self._collect_orphans(wait=True)
        return freed_bytes

    def _collect_orphans(self, *, wait: bool = False) -> None:
        """Let go of memory whose copies in are over; ``wait`` for those that are not."""
        for _ in range(len(self._orphans)):
            try:
                ticket, flat = self._orphans.popleft()
            except IndexError:  # Another thread was faster.
                return
            if not wait and not ticket.done():
                self._orphans.appendleft((ticket, flat))
                return
            with contextlib.suppress(SpilloverError):  # Whoever asks again hears of it.
                _ARRIVALS.wait(ticket.wait)

    def _forget_arrival(self, copy: SavedCopy) -> None:
        copy.arrival = None
        self._round.look_again()
        copy.counters.count_away(copy.size_bytes)
        if copy.counted_bytes and not copy.is_kept:
            self._uncount(copy)

    def order_writes(self) -> None:
        """Have what the current stream does from now on wait for the copies out under way.

        The program may write in place to what was saved, where backward does not need it.
        """
        with lock:
            departure = self._last_departure
        if departure is not None and not departure.done():
            departure._stream_wait(torch._C._cuda_getCurrentRawStream(self.device.index))

    def ran_out(self) -> None:
        """The program had no device memory: give up what is leaving, and keep less from now on."""
        with lock:
            self.budget.ran_out()
        self.finish_departures()

    def finish_departures(self) -> None:
        """Block until copies out that are under way are over; let go of their device memory."""
        self.flush()
        _COPIES_OUT.wait(functools.partial(self.engine.collect, wait=True))

    # ---- coming back ----

    def restore(self, view: SavedView) -> torch.Tensor:
        """The tensor that was saved, for the current stream."""
        try:
            return self._restore(view)
        except torch.OutOfMemoryError:
            pass  # What the error holds is let go of first.
        self._drop_arrived(but=view.copy)
        self.finish_departures()
        _reclaim.ask(self.device, view.copy.size_bytes)
        return self._restore(view)

    def _restore(self, view: SavedView) -> torch.Tensor:
        copy = view.copy
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        with lock:
            self._join_backward()
            self._count_ended()
            round_ = view.round
            self._look(len(round_.served))
            arrival = self._at_hand(copy, stream)
            is_late = copy.storage is None and arrival is None
            if is_late:
                if torch._C._cuda_isCurrentStreamCapturing():
                    raise StateError(_CAPTURE_ERROR)
                copy.counters.prefetch_misses += 1
                self._bring([copy], stream)
                arrival = copy.arrival
            elif arrival is not None:
                copy.counters.prefetch_hits += 1
            if copy.counted_bytes:
                self._uncount(copy)
            round_.serve(view)
            if self._served:
                self._drop_served(round_)
            if arrival is not None:
                self._served.append(weakref.ref(copy))
            # Small ones are brought several at a time.
            look_bytes = min(_BATCH_BYTES, self.budget.least_prefetch // 4)
            self._served_bytes += copy.size_bytes
            self._served_count += 1
            if is_late or self._served_bytes >= look_bytes or self._served_count >= _LOOK_COUNT:
                self._served_bytes = self._served_count = 0
                self._look_ahead(view, stream)
            self._note(round_, copy.counters, is_backward=True)
            position, storage = copy.arrival_offset, copy.storage
            # Before another thread sends it away, with which its counter loses the memory.
            if arrival is None and copy.encoding is None:
                assert storage is not None
                tensor = self._original(view, storage)
        if arrival is None:
            assert storage is not None
            if stream != copy.stream:
                self._wait_for(copy.stream)
            if copy.encoding is not None:
                return self._decoded(view, _flat_over(storage), 0)
            return tensor
        if stream != arrival.stream:
            self._wait_for(arrival.stream)
        elif not arrival.waited:
            self._wait_until_issued(arrival, stream, copy)
        if copy.encoding is not None:
            return self._decoded(view, arrival.flat, position)
        return _part_of(arrival.flat, view, position - copy.start)

    def _original(self, view: SavedView, storage: torch.UntypedStorage) -> torch.Tensor:
        counter = view.copy.counter
        # Where the counter has the memory, too, what is given out shares the counter, so that a
        # write to it is noticed as torch does.
        if counter.dtype == view.dtype and counter.untyped_storage()._cdata == storage._cdata:
            return counter.as_strided(view.shape, view.stride, view.storage_offset)
        tensor = torch.empty(0, dtype=view.dtype, device=self.device)
        return tensor.set_(storage, view.storage_offset, view.shape, view.stride)

    def _at_hand(self, copy: SavedCopy, stream: int) -> Arrival | None:
        """The device's bytes of a copy that has left, or leaves; None where there are none."""
        arrival = copy.arrival
        if arrival is not None and arrival.is_changed():
            if arrival.is_original:
                raise changed_in_place(copy.counter, copy.version)
            self._forget_arrival(copy)  # The bytes are elsewhere, unchanged.
            arrival = None
        if arrival is not None and arrival.stream != stream and not arrival.is_original:
            # It would return to the pool of a stream that knows nothing of this use.
            self._forget_arrival(copy)
            arrival = None
        if arrival is None and copy.storage is None:
            arrival = self._take_back(copy)
        return arrival

    def _take_back(self, copy: SavedCopy) -> Arrival | None:
        """Where a copy is on the device still, that: it need not come back."""
        storage = copy.leaving() if copy.leaving is not None else None
        if storage is None or storage.nbytes() < _saved_end(copy):
            return None
        arrival = copy.arrival = Arrival(_flat_over(storage), copy.stream, None, self._orphans)
        copy.arrival_offset = copy.start if copy.encoding is None else 0
        copy.counters.count_away(-copy.size_bytes)
        return arrival

    def _count_arrival(self, copy: SavedCopy) -> None:
        copy.counted_bytes, copy.is_kept = copy.size_bytes, False
        self._waiting_bytes += copy.size_bytes
        self._arrived.append(weakref.ref(copy))

    def _wait_until_issued(self, arrival: Arrival, stream: int, copy: SavedCopy) -> None:
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
                    self._forget_arrival(copy)
            self._drop_arrived()
            raise

    def _wait_for(self, stream: int) -> None:
        """Have the current stream wait for what is on another one."""
        other = torch.cuda.ExternalStream(stream, device=self.device)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self.device).wait_stream(other)

    def _decoded(self, view: SavedView, flat: torch.Tensor, position: int) -> torch.Tensor:
        copy = view.copy
        assert copy.encoding is not None
        sent = flat[position : position + copy.encoding.size_bytes]
        return _part_of(copy.encoding.decode(sent).view(torch.uint8), view, -copy.start)

    def _bring(self, copies: list[SavedCopy], stream: int) -> None:
        """Start to bring copies back, of memory of the current stream."""
        small: list[SavedCopy] = []
        for copy in copies:
            if _sent_bytes(copy) < _SMALL_BYTES and len(copies) > 1:
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
            total_bytes += -(-_sent_bytes(copy) // ALIGNMENT) * ALIGNMENT
        # Under the lock nothing is reclaimed: restore() does that, and what comes ahead of its use
        # is not worth it.
        with _reclaim.suspended():
            flat = torch.empty(total_bytes, dtype=torch.uint8, device=self.device)
        address = flat.data_ptr()
        targets: list[tuple[Payload, tuple[int, int, object]]] = []
        for copy, offset in zip(copies, offsets, strict=True):
            assert copy.payload is not None
            targets.append((copy.payload, (address + offset, _sent_bytes(copy), None)))
        try:
            ticket = self.engine._fetch(targets, stream, 0)
        except BaseException:
            with contextlib.suppress(SpilloverError):  # Some copies may be under way.
                self.engine.synchronize()
            raise
        arrival = Arrival(flat, stream, ticket, self._orphans)
        for copy, offset in zip(copies, offsets, strict=True):
            copy.arrival, copy.arrival_offset = arrival, offset
            self._count_arrival(copy)
            copy.counters.count_away(-copy.size_bytes)
            copy.counters.reloaded_bytes += _sent_bytes(copy)
        if len(self._arrived) > 4 * _BATCH_COUNT:
            self._arrived = [each for each in self._arrived if _is_waiting(each())]

    def _drop_served(self, round_: Round) -> None:
        """Let go of what backward had, where its graph is kept: it can come again."""
        for reference in self._served:
            copy = reference()
            if copy is not None and copy.arrival is not None and not round_.is_wanted(copy):
                self._forget_arrival(copy)
        self._served = [each for each in self._served if _has_arrived(each())]

    def _look_ahead(self, view: SavedView, stream: int) -> None:
        """Start to bring back what backward asks for next."""
        if self._leaving_bytes():
            self.engine.collect()
        round_ = view.round
        place = len(round_.served)
        room = self.budget.room_in_backward(
            self._waiting_bytes, self._kept_bytes, self._leaving_bytes(), place, round_.plan
        )
        # One may come ahead in any case, where nobody knows better.
        is_free = self._waiting_bytes == self._kept_bytes and self.budget.least_prefetch > 0
        is_free = is_free and not self.budget.is_known
        if room(place) <= 0 and not is_free:
            return
        chosen: dict[int, SavedCopy] = {}
        chosen_bytes = 0
        for copy in round_.upcoming(view):
            if copy.storage is not None or copy.arrival is not None or id(copy) in chosen:
                continue
            is_small_enough = chosen_bytes + copy.size_bytes <= room(round_.ahead)
            if not is_small_enough and not (is_free and chosen_bytes == 0):
                break
            chosen_bytes += copy.size_bytes
            if self._take_back(copy) is not None:
                self._count_arrival(copy)
                continue
            chosen[id(copy)] = copy
            if len(chosen) == _BATCH_COUNT:
                break
        if not chosen or torch._C._cuda_isCurrentStreamCapturing():
            return
        try:
            self._bring(list(chosen.values()), stream)
        except torch.OutOfMemoryError:
            # Backward itself needs memory too: give back what is here ahead of time, and from now
            # on leave it half of what there was room for.
            held = max(self._waiting_bytes - self._kept_bytes, view.copy.size_bytes)
            self.budget.shrink_prefetch(held)
            self._drop_arrived(but=view.copy)
        except HostOutOfMemory:
            pass  # Backward will wait when its turn comes.

    def _leaving_bytes(self) -> int:
        return self.engine._leaving_bytes + self._pending_bytes

    def _join_backward(self) -> None:
        """Have ``_backward_ends`` called when the present backward is complete."""
        if self._last_departure is None:
            return
        task = torch._C._current_graph_task_id()
        if task != _NO_GRAPH_TASK and task not in self._graph_tasks:
            self._graph_tasks.append(task)
            queue_backward_end(self._backward_ends)

    def _backward_ends(self) -> None:
        """Runs before ``backward()`` returns, with the caller's streams."""
        self.order_writes()
        self.engine.collect()


def _sent_bytes(copy: SavedCopy) -> int:
    """Bytes that leave the device for ``copy``."""
    if copy.encoding is None:
        return copy.size_bytes
    return copy.encoding.size_bytes


def _saved_end(copy: SavedCopy) -> int:
    """How many bytes the memory that is sent has, at least."""
    return copy.end if copy.encoding is None else copy.encoding.size_bytes


def _flat_over(storage: torch.UntypedStorage) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


def _part_of(flat: torch.Tensor, view: SavedView, shift_bytes: int) -> torch.Tensor:
    """``view`` over ``flat``, whose bytes lie ``shift_bytes`` later than those of what was saved.

    Shares the version counter of ``flat``.
    """
    item = view.dtype.itemsize
    if flat.numel() % item:
        flat = flat[: flat.numel() // item * item]
    offset = view.storage_offset + shift_bytes // item
    part = flat.view(view.dtype).as_strided(view.shape, view.stride, offset)
    # No view, for who changes it where gradients are computed.
    return part.detach() if torch.is_grad_enabled() else part


def _is_waiting(copy: SavedCopy | None) -> bool:
    return copy is not None and copy.arrival is not None and copy.counted_bytes > 0


def _has_arrived(copy: SavedCopy | None) -> bool:
    return copy is not None and copy.arrival is not None

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
from collections import deque
from dataclasses import dataclass

import torch

from spillover import _reclaim
from spillover._backward_end import queue_backward_end
from spillover._core import DiskStore, HostPool
from spillover._errors import HostOutOfMemory, SpilloverError, StateError, StorageError
from spillover._transfer import TransferEngine
from spillover.hooks._activation_account import (
    BATCH_BYTES,
    BATCH_COUNT,
    SMALL_BYTES,
    Account,
    Counters,
    lock,
)
from spillover.hooks._activation_arrivals import Arrival, Arrivals
from spillover.hooks._activation_budget import DeviceBudget
from spillover.hooks._activation_codec import Codec, encode
from spillover.hooks._activation_departures import Departures
from spillover.hooks._activation_order import Plans, Round
from spillover.hooks._activation_timeline import Timeline
from spillover.hooks._saved_storage import (
    SavedCopy,
    SavedView,
    decoded,
    flat_over,
    original,
    part_of,
)

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
        self.account = Account()
        self.departures = Departures(self.engine, self.budget, self.account)
        self.arrivals = Arrivals(device, self.engine, self.account, has_disk=disk is not None)
        self._plans = Plans()
        self._round = Round(0)
        self._rounds = 0
        self._is_round_new = True
        # Small ones are brought back several at a time: of what was served since the last look.
        self._look_bytes = min(BATCH_BYTES, self.budget.least_prefetch // 4)
        self._served_bytes = self._served_count = 0
        # Backward passes that will call `_backward_ends`; failed ones never do.
        self._graph_tasks: deque[int] = deque(maxlen=64)
        self.timeline = Timeline() if options.has_timeline else None
        _reclaim.offer(device, self)

    def __del__(self) -> None:
        arrivals = self.__dict__.get("arrivals")
        if arrivals is not None and arrivals.orphans:
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
        """Take on what is saved first; whether departures are to be flushed, without the lock."""
        self._note_ended()
        size_bytes = end - start
        round_ = self._round
        if self._is_round_new or round_.is_over():
            round_ = self._next_round(size_bytes)
        if self.budget.is_measuring:
            self.budget.look(self._saved_bytes, None)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        copy = SavedCopy(self, counters, tensor, storage, start, end, stream)
        view = SavedView(copy, tensor, round_)
        round_.add(view, size_bytes)
        stays = self._stays(round_, view.index, size_bytes)
        copy.next_use = round_.base + self._use(round_, view.index)
        if stays:
            self.departures.keep(copy)
            counters.stayed_bytes += size_bytes
            self._note(round_, counters)
            return view, self.departures.are_too_many()
        counters.offloaded_bytes += size_bytes
        if self._codec is not None:
            self._encode(copy, tensor)
        self.departures.append(copy)
        self._note(round_, counters)
        return view, size_bytes >= SMALL_BYTES or self.departures.is_due

    def add_alias(self, copy: SavedCopy, tensor: torch.Tensor) -> SavedView:
        """Take on another view of a copy that is there."""
        round_ = self._round
        if self._is_round_new or round_.is_over():
            round_ = self._next_round(0)
        view = SavedView(copy, tensor, round_)
        round_.add(view, 0)
        self._follow_plan(round_, view.index, 0)
        return view

    @property
    def _saved_bytes(self) -> int:
        """Of saved tensors, on the device."""
        return self.account.waiting_bytes + self.departures.leaving_bytes

    def collect(self) -> None:
        """Have what is about to leave do so; let go of what has, and of what came back and ended.
        Without the lock; blocks for budgets.
        """
        self.departures.flush()
        self.engine.collect()
        self.arrivals.collect_orphans()

    def _note_ended(self) -> None:
        if self.arrivals.orphans:
            self.arrivals.collect_orphans()
        self.account.remove_ended()

    def _note(self, round_: Round, counters: Counters, *, is_backward: bool = False) -> None:
        if self.timeline is not None:
            counters.count_away(0)
            self.timeline.note(
                round_.base,
                is_backward=is_backward,
                on_device_bytes=self.account.waiting_bytes,
                leaving_bytes=self.departures.leaving_bytes,
                away_bytes=counters.away_bytes + self.departures.pending_bytes,
            )

    def _next_round(self, size_bytes: int) -> Round:
        self.budget.end_round(self._plans.learn(self._round))
        self._rounds += 1
        self._is_round_new = False
        round_ = self._round = Round(self._rounds)
        round_.plan = self._plans.find([size_bytes])
        self.budget.begin_round(self._saved_bytes, round_.plan)
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
                self.budget.lose_plan(self._saved_bytes)
            else:
                self.budget.begin_round(self._saved_bytes, plan)
            self._set_stays(round_)

    def _stays(self, round_: Round, index: int, size_bytes: int) -> bool:
        self._follow_plan(round_, index, size_bytes)
        plan = round_.plan
        return (
            plan is not None
            and plan.copy_rank(index) < round_.stays
            and self.account.kept_bytes + size_bytes <= self.budget.keep_bytes
        )

    @staticmethod
    def _use(round_: Round, index: int) -> int:
        # Without a plan: in reverse.
        return (1 << 31) - index if round_.plan is None else round_.plan.copy_rank(index)

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
            copy.replace(encoded[0].untyped_storage(), encoded[1])

    # ---- when somebody needs memory ----

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """See ``_reclaim.Holder``. What is leaving goes first, then what came ahead of its use,
        then what stayed and is used last.
        """
        with lock:
            self.budget.give_back(missing_bytes)
        failure: SpilloverError | None = None
        try:
            self.departures.flush()
        except SpilloverError as error:  # What is under way, and what came ahead, can go yet.
            failure = error
        freed_bytes = self.engine._collect_bytes(missing_bytes)
        if freed_bytes < missing_bytes:
            freed_bytes += self.arrivals.drop()
        while failure is None and freed_bytes < missing_bytes:
            chosen = self.departures.farthest(missing_bytes - freed_bytes)
            if not chosen:
                break
            chosen_bytes = sum(copy.size_bytes for copy in chosen)
            try:
                self.departures.send(chosen)
            except SpilloverError as error:
                failure = error
            else:
                freed_bytes += self.engine._collect_bytes(chosen_bytes)
        if failure is not None and freed_bytes == 0:
            raise failure
        return freed_bytes

    def ran_out(self) -> None:
        """The program had no device memory: give up what is leaving, and keep less from now on."""
        with lock:
            self.budget.ran_out()
        self.departures.finish()
        self.arrivals.collect_orphans(wait=True)

    # ---- coming back ----

    def restore(self, view: SavedView) -> torch.Tensor:
        """The tensor that was saved, for the current stream."""
        try:
            return self._restore(view)
        except torch.OutOfMemoryError:
            pass  # What the error holds is let go of first.
        self.arrivals.drop(but=view.copy)
        self.departures.finish()
        _reclaim.ask(self.device, view.copy.size_bytes)
        return self._restore(view)

    def _restore(self, view: SavedView) -> torch.Tensor:
        copy = view.copy
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        with lock:
            self._join_backward()
            self._note_ended()
            if self.budget.is_measuring:
                self.budget.look(self._saved_bytes, len(view.round.served))
            arrival, position = self._serve(view, stream)
            storage = copy.storage
            # Before another thread sends it away, with which its counter loses the memory.
            if arrival is None and copy.encoding is None:
                assert storage is not None
                tensor = original(view, storage)
        if arrival is None:
            assert storage is not None
            if stream != copy.stream:
                self._wait_for(copy.stream)
            return tensor if copy.encoding is None else decoded(view, flat_over(storage), 0)
        if stream != arrival.stream:
            self._wait_for(arrival.stream)
        elif not arrival.waited:
            self.arrivals.wait(arrival, stream, copy)
        if copy.encoding is not None:
            return decoded(view, arrival.flat, position)
        return part_of(arrival.typed(view.dtype), view, position - copy.start)

    def _serve(self, view: SavedView, stream: int) -> tuple[Arrival | None, int]:
        """Backward asks for it: where it is on the device, or will be, unless that is where it was
        saved. What comes next is brought, too.
        """
        copy, round_ = view.copy, view.round
        arrival = self.arrivals.at_hand(copy, stream)
        is_late = arrival is None and copy.storage is None
        if is_late:
            if torch._C._cuda_isCurrentStreamCapturing():
                raise StateError(_CAPTURE_ERROR)
            copy.counters.prefetch_misses += 1
            self.arrivals.bring([copy], stream)
            arrival = copy.arrival
        elif arrival is not None:
            copy.counters.prefetch_hits += 1
        position = copy.arrival_offset
        if copy.counted_bytes:
            self.account.remove(copy)
        round_.serve(view)
        self.arrivals.serve(copy, round_)
        self._served_bytes += copy.size_bytes
        self._served_count += 1
        if is_late or self._served_bytes >= self._look_bytes or self._served_count >= _LOOK_COUNT:
            self._served_bytes = self._served_count = 0
            self._look_ahead(view, stream)
        self._note(round_, copy.counters, is_backward=True)
        return arrival, position

    def _wait_for(self, stream: int) -> None:
        """Have the current stream wait for what is on another one."""
        other = torch.cuda.ExternalStream(stream, device=self.device)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self.device).wait_stream(other)

    def _look_ahead(self, view: SavedView, stream: int) -> None:
        """Start to bring back what backward asks for next."""
        if self.departures.leaving_bytes:
            self.engine.collect()
        round_, account = view.round, self.account
        place = len(round_.served)
        room = self.budget.room_in_backward(
            account.waiting_bytes,
            account.kept_bytes,
            self.departures.leaving_bytes,
            place,
            round_.plan,
        )
        # One may come ahead in any case, where nobody knows better.
        is_free = account.waiting_bytes == account.kept_bytes and self.budget.least_prefetch > 0
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
            if self.arrivals.take_back_ahead(copy):
                continue
            chosen[id(copy)] = copy
            if len(chosen) == BATCH_COUNT:
                break
        if not chosen or torch._C._cuda_isCurrentStreamCapturing():
            return
        try:
            self.arrivals.bring(list(chosen.values()), stream)
        except torch.OutOfMemoryError:
            # Backward itself needs memory too: give back what is here ahead of time, and from now
            # on leave it half of what there was room for.
            held = max(account.waiting_bytes - account.kept_bytes, view.copy.size_bytes)
            self.budget.shrink_prefetch(held)
            self._look_bytes = min(BATCH_BYTES, self.budget.least_prefetch // 4)
            self.arrivals.drop(but=view.copy)
        except (HostOutOfMemory, StorageError):
            pass  # Backward will wait when its turn comes, or hear of it.

    def _join_backward(self) -> None:
        """Have ``_backward_ends`` called when the present backward is complete."""
        if not self.departures.have_begun:
            return
        task = torch._C._current_graph_task_id()
        if task != _NO_GRAPH_TASK and task not in self._graph_tasks:
            self._graph_tasks.append(task)
            queue_backward_end(self._backward_ends)

    def _backward_ends(self) -> None:
        """Runs before ``backward()`` returns, with the caller's streams."""
        self.departures.order_writes(self.device.index)
        self.engine.collect()
        self.arrivals.collect_orphans()

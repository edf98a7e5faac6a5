"""Decides what leaves the device, when it comes back and who waits; see `_saved_transfers` for how.

One engine belongs to one ``offload_activations`` object and lives as long as saved tensors of it.
``pack`` and ``unpack`` may be called from any thread: autograd runs backward on threads of its own.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from spillover import _reclaim
from spillover._backward_end import queue_backward_end
from spillover._core import (
    DiskStore,
    HostPool,
    TraceLabel,
    next_trace_flow,
    set_trace_flow,
    trace_is_on,
)
from spillover._errors import HostOutOfMemory
from spillover._stalls import Stall
from spillover._streams import copy_streams
from spillover.hooks._activation_order import BackwardOrder
from spillover.hooks._saved_storage import (
    ByteRange,
    HostBlock,
    KeptTensor,
    SavedCopy,
    SavedView,
    check_version,
    covering_range,
    hold_counter,
    keep,
    range_to_copy,
)
from spillover.hooks._saved_transfers import finish_departures, lock, transfers, wait_quietly

_STAYING_MIN = 1024
_NO_GRAPH_TASK = -1
# Default budgets; a small device gets less, since they are what offloading itself costs there.
_PREFETCH_BYTES = 128 << 20
_INFLIGHT_BYTES = 256 << 20
_DEVICE_SHARE = 16

_COPIES_OUT = Stall("activations", "copies out (inflight=)")
_WRITES = Stall("activations", "writes to disk (inflight=)")
_HOST_MEMORY = Stall("activations", "pinned memory to be free")
_READS = Stall("activations", "reads from disk")
_COMPUTE_WAITS = TraceLabel("activations: reload", "stall")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Budgets in bytes; what the public function parsed. None: by the device's size."""

    min_bytes: int
    prefetch_bytes: int | None
    inflight_bytes: int | None


@dataclass(kw_only=True)
class DeviceBudget:
    """What the options come to on one device."""

    prefetch_bytes: int  # Falls when memory runs out.
    inflight_bytes: int


@dataclass(kw_only=True)
class Counters:
    """Figures of one context since its start; guarded by the transfers' lock."""

    host_bytes: int = 0
    disk_bytes: int = 0
    tensors: int = 0
    deduplicated_bytes: int = 0
    kept_tensors: int = 0
    reloads: int = 0
    reloaded_bytes: int = 0
    reloads_late: int = 0
    waits: int = 0


class PoolSource(Protocol):
    """Gives the pool of pinned memory; called when the first tensor is offloaded."""

    def __call__(self) -> HostPool: ...


class ActivationEngine:
    """The two hooks and their state."""

    def __init__(self, options: EngineOptions, pool: PoolSource, store: DiskStore | None) -> None:
        self._options = options
        self._pool_source = pool
        self._store = store
        self.counters = Counters()
        # Guarded by the transfers' lock.
        self._copies: dict[int, list[weakref.ref[SavedCopy]]] = {}  # By StorageImpl address.
        self._dead: deque[StorageWeakRef] = deque()  # Of copies that are gone; any thread appends.
        self._staying: dict[int, StorageWeakRef] = {}  # Storages of parameters and other leaves.
        self._staying_max = _STAYING_MIN  # Beyond it, dead ones are looked for.
        self._order = BackwardOrder()
        self._budgets: dict[torch.device, DeviceBudget] = {}
        # Backward passes that will call `_backward_ends`; failed ones never do.
        self._graph_tasks: deque[int] = deque(maxlen=64)
        self._errors: deque[BaseException] = deque()

    # ---- what stays on the device ----

    def keep_on_device(self, model: nn.Module) -> None:
        """Never offload the model's parameters and buffers."""
        with lock:
            for tensor in (*model.parameters(), *model.buffers()):
                if is_plain(tensor):
                    self._stay(tensor)

    def _stay(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._staying:
            if len(self._staying) >= self._staying_max:
                live = {key: ref for key, ref in self._staying.items() if not _is_dead(ref)}
                self._staying = live
                self._staying_max = max(_STAYING_MIN, 2 * len(live))
            self._staying[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _stays(self, tensor: torch.Tensor) -> bool:
        if not tensor.is_cuda or not is_plain(tensor) or tensor.numel() == 0:
            return True
        base = tensor._base if tensor._base is not None else tensor
        storage = tensor.untyped_storage()
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            self._stay(tensor)
            return True
        held = self._staying.get(storage._cdata)
        if held is not None:
            if not _is_dead(held):
                return True
            del self._staying[storage._cdata]
        return (
            storage.nbytes() < max(self._options.min_bytes, 1)
            or storage.data_ptr() == 0
            or torch.cuda.is_current_stream_capturing()
        )

    # ---- pack ----

    def pack(self, tensor: torch.Tensor) -> SavedView | KeptTensor:
        """Autograd saves ``tensor``."""
        with torch.no_grad():
            with lock:
                if self._stays(tensor):
                    self.counters.kept_tensors += 1
                    return keep(tensor)
                self._collect()
            return self._offload(tensor)

    def _offload(self, tensor: torch.Tensor) -> SavedView:
        wanted = covering_range(tensor)
        extent = range_to_copy(wanted, tensor.untyped_storage().nbytes())
        block: HostBlock | None = None
        while True:
            with lock:
                copy = self._find(tensor, wanted)
                if copy is not None:
                    self.counters.deduplicated_bytes += wanted.size_bytes
                elif block is not None:
                    copy = self._start(tensor, extent, block)
                if copy is not None:
                    return self._view_of(copy, tensor)
            # Waiting, mapping and pinning may take long, so they happen without the lock.
            self._make_room(extent.size_bytes, tensor.device)
            block = self._allocate(extent.size_bytes)

    def _find(self, tensor: torch.Tensor, wanted: ByteRange) -> SavedCopy | None:
        for reference in self._copies.get(tensor.untyped_storage()._cdata, ()):
            copy = reference()
            if copy is not None and copy.extent.contains(wanted) and copy.is_current(tensor):
                return copy
        return None

    def _start(self, tensor: torch.Tensor, extent: ByteRange, block: HostBlock) -> SavedCopy:
        storage = tensor.untyped_storage()
        compute = torch.cuda.current_stream(tensor.device)
        copy = SavedCopy(
            storage=StorageWeakRef(storage),  # type: ignore[no-untyped-call]
            data_pointer=storage.data_ptr(),
            version=tensor._version,
            counter=hold_counter(tensor),
            extent=extent,
            device=tensor.device,
            home=compute,
            produced=compute.record_event(),
            # Threads that write to disk wait for it, which must not burn a core.
            left=torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
            dead=self._dead,
        )
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        source.set_(storage, extent.start, (extent.size_bytes,), (1,))
        # An arrow in the trace, from the copy out to the write on disk.
        traced = self._store is not None and trace_is_on()
        flow_id = next_trace_flow() if traced else 0
        transfers.send(copy, source, block, flow_id)
        self._copies.setdefault(storage._cdata, []).append(weakref.ref(copy))
        if self._store is None:
            self.counters.host_bytes += extent.size_bytes
            return copy
        if flow_id:
            set_trace_flow(flow_id)
        try:
            payload, ticket = self._store.write(block.buffer, after=copy.left)
        finally:
            if flow_id:
                set_trace_flow(0)
        transfers.track_write(copy, ticket, block, payload, self._errors)
        self.counters.disk_bytes += extent.size_bytes
        return copy

    def _view_of(self, copy: SavedCopy, tensor: torch.Tensor) -> SavedView:
        view = SavedView(
            copy=copy,
            position=self._order.next_position(),
            version=copy.version,
            counter=hold_counter(tensor),
            dtype=tensor.dtype,
            shape=tensor.shape,
            stride=tensor.stride(),
            storage_offset=int(tensor.storage_offset()),
        )
        self._order.add(view)
        self.counters.tensors += 1
        return view

    # ---- back-pressure ----

    def _budget(self, device: torch.device) -> DeviceBudget:
        budget = self._budgets.get(device)
        if budget is None:
            options = self._options
            share = _memory_bytes(device) // _DEVICE_SHARE
            prefetch, inflight = options.prefetch_bytes, options.inflight_bytes
            budget = self._budgets[device] = DeviceBudget(
                prefetch_bytes=min(_PREFETCH_BYTES, share) if prefetch is None else prefetch,
                inflight_bytes=min(_INFLIGHT_BYTES, share) if inflight is None else inflight,
            )
            _reclaim.offer(device, self)
        return budget

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """See ``_reclaim.Holder``: what is leaving goes first, then what came ahead of its use."""
        with lock:
            freed_bytes = transfers.leaving_bytes_of(device)
        if freed_bytes:
            finish_departures()
        if freed_bytes < missing_bytes:
            with lock:
                freed_bytes += self._order.resident_bytes(device)
                self._order.drop_all(device=device)
        return freed_bytes

    def _make_room(self, size_bytes: int, device: torch.device) -> None:
        """Block while copies under way hold more than their budget, which a lone one may."""
        with lock:
            budget = self._budget(device).inflight_bytes
        while True:
            with lock:
                transfers.collect()
                event = ticket = None
                if transfers.leaving_bytes + size_bytes > budget:
                    event = transfers.oldest_departure()
                if event is None and transfers.writing_bytes + size_bytes > budget:
                    ticket = transfers.oldest_write()
                if event is None and ticket is None:
                    return
                self.counters.waits += 1
            if event is not None:
                _COPIES_OUT.wait(event.synchronize)
            elif ticket is not None:
                _WRITES.wait(functools.partial(wait_quietly, ticket))

    def _allocate(self, size_bytes: int) -> HostBlock:
        """Pinned memory; where the budget is used up, copies and writes under way may free some."""
        while True:
            try:
                return self._allocate_now(size_bytes)
            except HostOutOfMemory:
                with lock:
                    event = transfers.oldest_arrival() or transfers.oldest_departure()
                    ticket = transfers.oldest_write() if event is None else None
                    if event is None and ticket is None:
                        raise
                    self.counters.waits += 1
            if event is not None:
                _HOST_MEMORY.wait(event.synchronize)
            elif ticket is not None:
                _HOST_MEMORY.wait(functools.partial(wait_quietly, ticket))
            with lock:
                transfers.collect()

    def _allocate_now(self, size_bytes: int) -> HostBlock:
        buffer = self._pool_source().allocate(size_bytes)
        return HostBlock(buffer, torch.frombuffer(buffer, dtype=torch.uint8))

    # ---- unpack ----

    def unpack(self, packed: SavedView | KeptTensor) -> torch.Tensor:
        """Backward needs what ``pack`` was given; may be asked for again, or never."""
        if isinstance(packed, KeptTensor):
            if packed.version is not None:
                check_version(packed.tensor, packed.tensor.shape, packed.version)
            return packed.tensor
        check_version(packed.counter, packed.shape, packed.version)
        with torch.no_grad():
            try:
                return self._bring_back(packed)
            except torch.OutOfMemoryError:
                pass  # What the error holds is let go of first.
            with lock:
                self._order.drop_all(but=packed.copy)
            finish_departures()
            _reclaim.ask(packed.copy.device, packed.copy.extent.size_bytes)
            return self._bring_back(packed)

    def _bring_back(self, view: SavedView) -> torch.Tensor:
        copy = view.copy
        while True:
            self._read(copy)
            with lock:
                self._join_backward()
                self._collect()
                compute = torch.cuda.current_stream(copy.device)
                if copy.flat is not None and copy.flat_home != compute:
                    # It would return to the pool of a stream that knows nothing of this use.
                    copy.drop_flat()
                # The bytes of a copy on disk may have come, been used and gone meanwhile.
                if not _is_at_hand(copy):
                    continue
                tensor = self._restore(view, compute)
                self._order.serve(view)
                self._look_ahead(view, compute)
                return tensor

    def _join_backward(self) -> None:
        """Have ``_backward_ends`` called when the present backward is complete."""
        task = torch._C._current_graph_task_id()
        if task != _NO_GRAPH_TASK and task not in self._graph_tasks:
            self._graph_tasks.append(task)
            queue_backward_end(self._backward_ends)

    def _backward_ends(self) -> None:
        """Runs before ``backward()`` returns, with the caller's streams."""
        with lock:
            transfers.collect()
            transfers.order_writes()

    def _read(self, copy: SavedCopy) -> None:
        """Block until the bytes of a copy on disk are in pinned memory, if nowhere nearer."""
        block: HostBlock | None = None
        while True:
            with lock:
                transfers.collect()
                if copy.source is not None or copy.flat is not None or copy.block is not None:
                    return
                if copy.reading is None and block is not None:
                    self._start_read(copy, block)
                if copy.reading is not None:
                    ticket = copy.reading[0]
                    self.counters.waits += not ticket.is_done()
                    break
            block = self._allocate(copy.extent.size_bytes)
        try:
            _READS.wait(ticket.wait)
        except BaseException:
            with lock:
                if copy.reading is not None and copy.reading[0] is ticket:
                    copy.reading = None
            raise

    def _start_read(self, copy: SavedCopy, block: HostBlock) -> None:
        assert self._store is not None
        assert copy.payload is not None
        copy.reading = (self._store.read(copy.payload, block.buffer), block)

    def _restore(self, view: SavedView, compute: torch.cuda.Stream) -> torch.Tensor:
        copy = view.copy
        storage_offset = view.storage_offset
        if copy.source is not None:
            # Its copy-out is still under way, so nothing needs to come back.
            if compute != copy.home:
                compute.wait_event(copy.produced)
            storage = copy.source.untyped_storage()
        else:
            if copy.flat is None:
                self.counters.reloads_late += 1
                self._bring(copy, compute)
            assert copy.flat is not None
            assert copy.arrived is not None
            copy_streams(copy.device).wait(compute, copy.arrived, _COMPUTE_WAITS)
            storage = copy.flat.untyped_storage()
            storage_offset -= copy.extent.start // view.dtype.itemsize
        tensor = torch.empty(0, dtype=view.dtype, device=copy.device)
        return tensor.set_(storage, storage_offset, view.shape, view.stride)

    def _bring(self, copy: SavedCopy, compute: torch.cuda.Stream) -> None:
        # First what can fail for want of memory, so that the block is not lost then. Under the lock
        # nothing is reclaimed: unpack() does that, and what comes ahead of its use is not worth it.
        with torch.cuda.stream(compute), _reclaim.suspended():
            flat = torch.empty(copy.extent.size_bytes, dtype=torch.uint8, device=copy.device)
        block = copy.block
        if block is None:
            assert copy.reading is not None
            ticket, block = copy.reading
            copy.reading = None
            ticket.wait()
        transfers.bring(copy, block, flat, compute)
        self._order.came_back(copy)
        self.counters.reloads += 1
        self.counters.reloaded_bytes += copy.extent.size_bytes

    def _look_ahead(self, view: SavedView, compute: torch.cuda.Stream) -> None:
        """Start to bring back what backward needs next, and drop what it does not need."""
        budget = self._budget(view.copy.device)
        soon = self._order.upcoming(view.position, budget.prefetch_bytes)
        self._order.evict(view.position, soon, budget.prefetch_bytes)
        try:
            self._prefetch(soon, compute)
        except torch.OutOfMemoryError:
            # Backward itself needs memory too: give back what is here ahead of time, and from now
            # on leave it half of what there was room for.
            held = max(self._order.resident_bytes(), view.copy.extent.size_bytes)
            budget.prefetch_bytes = min(budget.prefetch_bytes, held) // 2
            self._order.drop_all(but=view.copy)

    def _prefetch(self, soon: list[SavedCopy], compute: torch.cuda.Stream) -> None:
        for copy in soon:
            if copy.source is not None or copy.flat is not None or copy.device != compute.device:
                continue
            if copy.block is None and copy.reading is None:
                try:
                    self._start_read(copy, self._allocate_now(copy.extent.size_bytes))
                except HostOutOfMemory:
                    # Backward will wait when its turn comes.
                    return
            if _is_at_hand(copy):
                self._bring(copy, compute)

    # ---- housekeeping ----

    def _collect(self) -> None:
        """Let go of what is complete, and raise the error of a write that failed."""
        transfers.collect()
        while self._dead:
            storage = self._dead.popleft()
            live = [ref for ref in self._copies.get(storage.cdata, ()) if ref() is not None]
            if live:
                self._copies[storage.cdata] = live
            else:
                self._copies.pop(storage.cdata, None)
        self.raise_errors()

    def raise_errors(self) -> None:
        """Raise the first error of a write since the last call; its tensor is in pinned memory."""
        if self._errors:
            error = self._errors.popleft()
            self._errors.clear()
            raise error


def _memory_bytes(device: torch.device) -> int:
    """Device memory that this process may use."""
    total = int(torch.cuda.get_device_properties(device).total_memory)
    fraction = 1.0
    with contextlib.suppress(AttributeError, RuntimeError):  # Old torch; a pluggable allocator.
        fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(total * min(fraction, 1.0)) if fraction > 0 else total


def is_plain(tensor: torch.Tensor) -> bool:
    """An ordinary strided tensor, whose bytes are all that there is to it."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_dead(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _is_at_hand(copy: SavedCopy) -> bool:
    """Whether a copy to the device can start now, or need not."""
    if copy.reading is not None and copy.reading[0].is_done():
        return True
    return copy.source is not None or copy.flat is not None or copy.block is not None

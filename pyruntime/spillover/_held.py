"""Tensors on the device that a transfer engine may move away when their memory is wanted.

Note [Held tensors]
-------------------
A put says that bytes are to leave. A hold says that they may: the tensor stays on the device until
its memory is needed, by the engine's budget for held tensors (``resident``) or by an allocation
that would fail without it (``_reclaim``). What gives way is what is used farthest from now, as on
the host (Note [What gives way] in csrc/transfer/transfer_memory.cpp): what is not known to be used
first, the oldest of it first. A tensor that came back unchanged has its copy on the host or the
disk still, and goes without another one.

The memory of a tensor that gives way is free when its copy out is over, and nobody else holds it.
Until then who asks for the tensor gets it as it is: nothing is copied back.

Lock: the registry's, which is held while copies out are asked for, and never while device memory is
allocated, as whoever allocates may be asked to give some back.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from spillover._errors import HostOutOfMemory, StateError, StorageError
from spillover._settings import logger

if TYPE_CHECKING:
    import torch

    from spillover import _core
    from spillover._transfer import TransferEngine, TransferTicket


class HeldTensor:
    """A tensor in the care of a :class:`TransferEngine`; made by :meth:`TransferEngine.hold`.

    Methods may be called from any thread. When the last reference goes, so do its bytes.
    """

    def __init__(
        self,
        owner: HeldTensors,
        tensor: torch.Tensor,
        next_use: int | None,
        stream: torch.cuda.Stream,
    ) -> None:
        self._owner = owner
        self._shape, self._stride, self._dtype = tensor.shape, tensor.stride(), tensor.dtype
        #: Its bytes.
        self.nbytes = tensor.nbytes
        # Guarded by the owner's lock. On the device while there is a tensor; a payload has the same
        # bytes elsewhere, or will have once ``_left`` is over.
        self._tensor: torch.Tensor | None = tensor
        self._stream = stream  # Has written the tensor.
        self._arriving: TransferTicket | None = None
        self._payload: _core.Payload | None = None
        self._left: TransferTicket | None = None
        self._storage: weakref.ref[torch.UntypedStorage] | None = None  # While it leaves.
        self._offset = 0
        self._next_use = next_use
        self._turn = 0  # Of its valid entry in the owner's heap.

    @property
    def state(self) -> str:
        """``"device"``, where else the bytes are as :class:`Payload` says it, or ``"dropped"``."""
        with self._owner.lock:
            if self._tensor is not None:
                return "device"
            return "dropped" if self._payload is None else self._payload.state

    def get(self, *, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        """The tensor on the device, to be read.

        Where it is away it is brought back to new memory, of the current stream. It stays held, so
        it must not be changed; :meth:`take` is for that.

        Parameters
        ----------
        stream
            The stream that is going to read it, by default the current one: it waits for the copy.

        Raises
        ------
        torch.OutOfMemoryError
            There is no memory for it on the device.
        StateError
            It was dropped or taken; the engine is closed.
        StorageError, CorruptData, HostOutOfMemory
            Its bytes cannot be read from disk. It may be tried again.

        Notes
        -----
        Blocks as :meth:`TransferEngine.fetch` and ``stream_wait`` do where it is away.
        """
        return self._owner.get(self, stream)

    def prefetch(self) -> bool:
        """Start to bring it back to new memory of the current stream, ahead of its use.

        False where there is no memory for it; others are not asked to give some back. Does not wait
        for the copy: :meth:`get` does. Raises as :meth:`get` does, but for want of device memory.
        """
        return self._owner.prefetch(self)

    def take(self, *, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        """As :meth:`get`, and ends the holding: the tensor is the caller's, who may change it."""
        tensor = self._owner.get(self, stream)
        self._owner.forget(self, stream)
        return tensor

    def drop(self) -> None:
        """Give its bytes up, wherever they are. May be called again."""
        self._owner.forget(self, None)

    def __del__(self) -> None:
        if self._tensor is not None:
            self._owner.ended.append(self.nbytes)


#: What is popped first: of unknown next use, the oldest; then the farthest.
_Key = tuple[int, int, int]


class HeldTensors:
    """The held tensors of one engine; all methods may be called from any thread."""

    def __init__(self, engine: TransferEngine, resident_bytes_max: int | None) -> None:
        self._engine = weakref.ref(engine)
        self._resident_bytes_max = resident_bytes_max
        self.lock = threading.RLock()
        #: Bytes of those that ended on the device. Written to wherever Python drops them, so it is
        #: no number, and needs no lock.
        self.ended: deque[int] = deque()
        # Guarded by the lock.
        self._resident_bytes = 0
        self._demoted_bytes = 0
        self._resident_count = 0
        self._turns = 0
        self._heap: list[tuple[_Key, weakref.ref[HeldTensor]]] = []

    def stats(self) -> tuple[int, int]:
        """Bytes on the device, and bytes that have given way so far."""
        with self.lock:
            self._count_ended()
            return self._resident_bytes, self._demoted_bytes

    def hold(
        self, tensor: torch.Tensor, next_use: int | None, stream: torch.cuda.Stream
    ) -> HeldTensor:
        """Take a tensor on."""
        # Not the graph that it came from.
        held = HeldTensor(self, tensor.detach(), next_use, stream)
        with self.lock:
            self._enter(held)
        self._keep_budget(held)
        return held

    def set_next_use(self, held: HeldTensor, next_use: int | None) -> None:
        """Say when it is used, by the engine's positions."""
        with self.lock:
            held._next_use = next_use
            if held._payload is not None:
                self._live_engine().set_next_use(held._payload, next_use)
            if held._tensor is not None:
                self._push(held)

    def get(self, held: HeldTensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """See :meth:`HeldTensor.get`."""
        tensor, arriving = self._bring(held)
        self._keep_budget_if_possible(held)
        if arriving is not None:
            try:
                arriving.stream_wait(stream)
            except BaseException:
                self._undo_bring(held, arriving)
                raise
        with self.lock:
            next_use, held._next_use = held._next_use, None
            if next_use is not None and held._tensor is not None:
                self._push(held)
                if held._payload is not None:
                    self._live_engine().set_next_use(held._payload, None)
        if next_use is not None:
            engine = self._live_engine()
            engine.advance(max(engine.position, next_use))
        return tensor

    def prefetch(self, held: HeldTensor) -> bool:
        """See :meth:`HeldTensor.prefetch`."""
        import torch

        from spillover import _reclaim

        try:
            with _reclaim.suspended():
                self._bring(held)
        except torch.OutOfMemoryError:
            return False
        self._keep_budget_if_possible(held)
        return True

    def forget(self, held: HeldTensor, stream: torch.cuda.Stream | None) -> None:
        """End the holding; what the caller does on ``stream`` from now on may change the bytes."""
        with self.lock:
            left, payload = held._left, held._payload
            if held._tensor is not None:
                self._leave_device(held.nbytes)
            is_used = held._tensor is not None and left is not None and not left.done()
            held._tensor = held._payload = held._left = held._storage = held._arriving = None
        if is_used and left is not None:
            left.stream_wait(stream)  # The copy out reads it yet.
        if payload is not None:
            payload.drop()

    def demote(self, wanted_bytes: int) -> int:
        """Have tensors give way; how many bytes they have, 0 where there is none that can.

        Their memory is free when the engine has collected the copies out.
        """
        with self.lock:
            return self._demote(wanted_bytes, None)

    # ---- with the lock held ----

    def _live_engine(self) -> TransferEngine:
        engine = self._engine()
        if engine is None:
            raise StateError("the transfer engine of this tensor is gone")
        return engine

    def _count_ended(self) -> None:
        while self.ended:
            self._leave_device(self.ended.popleft())

    def _enter(self, held: HeldTensor) -> None:
        self._count_ended()
        self._resident_bytes += held.nbytes
        self._resident_count += 1
        self._push(held)

    def _leave_device(self, size_bytes: int) -> None:
        self._resident_bytes -= size_bytes
        self._resident_count -= 1

    def _push(self, held: HeldTensor) -> None:
        """A new entry; the former one is recognised as old when it is popped."""
        self._turns += 1
        held._turn = self._turns
        is_known = held._next_use is not None
        key = (int(is_known), -(held._next_use or 0), self._turns)
        heapq.heappush(self._heap, (key, weakref.ref(held)))
        if len(self._heap) > 64 + 2 * self._resident_count:
            self._heap = [entry for entry in self._heap if self._entry_of(entry) is not None]
            heapq.heapify(self._heap)

    def _entry_of(self, entry: tuple[_Key, weakref.ref[HeldTensor]]) -> HeldTensor | None:
        """Whose entry it is; None for an old one, or where there is nothing on the device."""
        key, reference = entry
        held = reference()
        is_valid = held is not None and held._turn == key[2] and held._tensor is not None
        return held if is_valid else None

    def _on_device(self, held: HeldTensor) -> tuple[torch.Tensor | None, TransferTicket | None]:
        """Its tensor, if it is there, or still there; what a stream waits for before it reads."""
        import torch

        if held._tensor is None:
            storage = None if held._storage is None else held._storage()
            if storage is None:
                if held._payload is None:
                    raise StateError("the held tensor was dropped or taken")
                return None, None
            tensor = torch.empty(0, dtype=held._dtype, device=storage.device)
            tensor.set_(storage, held._offset, held._shape, held._stride)
            held._tensor = tensor
            self._enter(held)
        return held._tensor, held._arriving

    def _demote(self, wanted_bytes: int, spared: HeldTensor | None) -> int:
        chosen, aside = [], []
        found_bytes = 0
        while self._heap and found_bytes < wanted_bytes:
            entry = heapq.heappop(self._heap)
            held = self._entry_of(entry)
            if held is None:
                continue
            if held is spared:
                aside.append(entry)
                continue
            chosen.append(held)
            found_bytes += held.nbytes
        for entry in aside:
            heapq.heappush(self._heap, entry)
        try:
            self._send_away(chosen)
        finally:
            for held in chosen:
                if held._tensor is not None:  # It could not go.
                    self._push(held)
        gone_bytes = sum(held.nbytes for held in chosen if held._tensor is None)
        self._demoted_bytes += gone_bytes
        return gone_bytes

    def _send_away(self, chosen: list[HeldTensor]) -> None:
        """Give the device's copies up, after the host or the disk has, or will have, its own."""
        by_stream: dict[torch.cuda.Stream, list[HeldTensor]] = {}
        for held in chosen:
            if held._payload is None:
                by_stream.setdefault(held._stream, []).append(held)
            else:
                self._leave(held)
        for stream, group in by_stream.items():
            tensors = [held._tensor for held in group if held._tensor is not None]
            payloads, ticket = self._live_engine().put_all(
                tensors, next_uses=[held._next_use for held in group], stream=stream
            )
            for held, payload in zip(group, payloads, strict=True):
                held._payload, held._left = payload, ticket
                self._leave(held)

    def _leave(self, held: HeldTensor) -> None:
        assert held._tensor is not None
        self._leave_device(held.nbytes)
        held._storage = weakref.ref(held._tensor.untyped_storage())
        held._offset = int(held._tensor.storage_offset())
        held._tensor = None

    # ---- without it ----

    def _keep_budget(self, spared: HeldTensor) -> None:
        if self._resident_bytes_max is None:
            return
        with self.lock:
            self._count_ended()
            excess_bytes = self._resident_bytes - self._resident_bytes_max
            if excess_bytes > 0:
                self._demote(excess_bytes, spared)

    def _keep_budget_if_possible(self, spared: HeldTensor) -> None:
        """More is on the device, rather than that what is wanted there cannot be had."""
        try:
            self._keep_budget(spared)
        except (HostOutOfMemory, StorageError) as error:
            logger.warning("held tensors take more than their budget of the device: %s", error)

    def _bring(self, held: HeldTensor) -> tuple[torch.Tensor, TransferTicket | None]:
        """Its tensor, and what a stream waits for before it reads it."""
        import torch

        with self.lock:
            tensor, arriving = self._on_device(held)
        if tensor is not None:
            return tensor, arriving
        engine = self._live_engine()
        made = torch.empty_strided(
            held._shape, held._stride, dtype=held._dtype, device=engine.device
        )
        stream = torch.cuda.current_stream(engine.device)
        with self.lock:
            tensor, arriving = self._on_device(held)
            if tensor is not None:  # Another thread was faster.
                return tensor, arriving
            assert held._payload is not None
            arriving = engine.fetch(held._payload, made)
            held._tensor, held._arriving, held._stream = made, arriving, stream
            held._storage = None
            self._enter(held)
        return made, arriving

    def _undo_bring(self, held: HeldTensor, arriving: TransferTicket) -> None:
        """The copy failed: what is on the device is not what was held."""
        with self.lock:
            if held._arriving is arriving:
                if held._tensor is not None:
                    self._leave(held)
                held._storage = held._arriving = None

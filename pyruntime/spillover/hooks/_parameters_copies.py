"""The device copies of streamed blocks: made on the copy-in stream, dropped when their turn is up.

Note [Weight copies and streams]
--------------------------------
The buffer of a copy is allocated on the compute stream of the moment, and the copy-in stream waits
for that stream before it writes: the allocator may hand out memory whose last kernel is still
queued. The compute stream waits for the copy's event at each use. A buffer is released only after
its home stream has been made to wait for the copy and for all streams that used it, so no
``record_stream`` is needed. Host memory is read by copies only while a forward or backward of the
model runs: the host waits for the last copy before either returns, so weights can be written at any
other time. A copy is used only while the version counters of the host weights are those at its
start, and never across the beginning of the model's forward (a write through ``.data`` does not
show in the counters).

Owned by one WeightStreamer, which says what may call it and when. Copies that nobody uses are given
back under pressure by any thread (Note [Giving back under pressure]), between the methods and the
sections that hold ``lock``. Only where the home stream alone has used a copy: a kernel may still be
launched on a view of it, which another stream's wait would not cover.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from spillover import _reclaim
from spillover._core import TraceLabel
from spillover._errors import StateError
from spillover._stalls import Stall
from spillover._streams import copy_streams
from spillover.hooks._parameters_block import StreamedBlock

_WEIGHTS = TraceLabel("weights: block", "copy")
_COMPUTE_WAITS = TraceLabel("weights: block", "stall")
_COPIES_IN = Stall("weights", "copies in to end")


class DeviceCopies:
    """Copies of at most ``1 + ahead_max`` blocks, more only where more blocks run at one time."""

    def __init__(self, device: torch.device, blocks: list[StreamedBlock], ahead_max: int) -> None:
        self.device = device
        self.fetched_bytes = 0
        self.fetches = 0
        self.waits = 0
        #: A block that backward is at; it is not dropped although its forward does not run.
        self.backward_block: StreamedBlock | None = None
        self._blocks = blocks
        self._ahead_max = ahead_max
        #: Held while a copy must stay; an allocation may be made under it.
        self.lock = threading.RLock()
        self._streams = copy_streams(device)
        self._latest_copy: torch.cuda.Event | None = None
        self._by_address: dict[int, StreamedBlock] = {}
        self._clock = 0
        _reclaim.offer(device, self)

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """See ``_reclaim.Holder``: copies that nobody uses, the least recently used first."""
        if not self.lock.acquire(blocking=False):
            return 0  # Its thread waits for memory itself, and gives its own copies up.
        try:
            freed_bytes = 0
            for block in sorted(self._idle(), key=lambda block: block.used_at):
                if freed_bytes >= missing_bytes:
                    break
                if all(stream == block.home for stream in block.consumers):
                    freed_bytes += block.size_bytes
                    self.release(block)
            return freed_bytes
        finally:
            self.lock.release()

    def over(self, tensor: torch.Tensor) -> StreamedBlock | None:
        """The block whose device copy ``tensor`` is a view of, if any."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_cuda:
            return None
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return None
        # Addresses identify copies safely: those listed are held, so no other tensor has them.
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def make_ready(self, block: StreamedBlock) -> None:
        """Have a fresh copy that the current stream may read."""
        with self.lock:
            if not block.is_fresh():
                if block.depth:
                    raise StateError(
                        f"weights of block {block.name!r} changed while it was running"
                    )
                self.release(block)
                self.waits += 1
                self._fetch(block)
            self.use(block)

    def use(self, block: StreamedBlock) -> None:
        """Make the current stream wait for the copy, and the copy wait for it before it goes."""
        with self.lock:
            compute = torch.cuda.current_stream(self.device)
            self._streams.wait(compute, block.ready, _COMPUTE_WAITS)
            if compute not in block.consumers:
                block.consumers.append(compute)
            self._touch(block)

    def install(self, block: StreamedBlock) -> None:
        """Let operators find the copy; outside of inference mode, since autograd may save it."""
        with torch.inference_mode(False), torch.no_grad():
            block.install()

    def fetch_ahead(self, block: StreamedBlock) -> None:
        """Start a block's copy unless it is there, or the blocks in use leave no room."""
        with self.lock:
            if block.is_fresh():
                self._touch(block)
                return
            if block.depth:
                return
            self.release(block)
            if self._make_room():
                try:
                    with _reclaim.suspended():
                        self._fetch(block)
                except torch.OutOfMemoryError:
                    return  # It is fetched when it is needed, after others have left.

    def release(self, block: StreamedBlock) -> None:
        """Drop an idle block's copy once everything queued has finished with it."""
        with self.lock:
            if block.buffer is None or block.depth:
                return
            block.uninstall()
            assert block.home is not None
            block.home.wait_event(block.ready)
            for stream in block.consumers:
                if stream != block.home:
                    block.home.wait_stream(stream)
            del self._by_address[block.buffer.untyped_storage().data_ptr()]
            block.buffer = None
            block.home = None
            block.consumers.clear()

    def release_all(self) -> None:
        """Drop the copies of all idle blocks."""
        for block in self._blocks:
            self.release(block)

    def synchronize(self) -> None:
        """Block the host until no copy reads host weights."""
        if self._latest_copy is not None:  # Of copies that were given up since, too.
            _COPIES_IN.wait(self._latest_copy.synchronize)

    def _fetch(self, block: StreamedBlock) -> None:
        self._make_room()
        compute = torch.cuda.current_stream(self.device)
        with torch.inference_mode(False), torch.no_grad():
            buffer = self._allocate(block.size_bytes)
            copy_in = self._streams.copy_in
            copy_in.wait_stream(compute)
            with self._streams.copying_in(_WEIGHTS, block.size_bytes):
                buffer.copy_(block.host, non_blocking=True)
            block.ready.record(copy_in)
            self._latest_copy = block.ready
        block.buffer = buffer
        block.home = compute
        block.versions = block.current_versions()
        self._by_address[buffer.untyped_storage().data_ptr()] = block
        self.fetches += 1
        self.fetched_bytes += block.size_bytes
        self._touch(block)

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            idle = list(self._idle())
            if not idle:
                raise
            for block in idle:
                self.release(block)
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def _idle(self) -> Iterator[StreamedBlock]:
        return (
            block
            for block in self._blocks
            if block.buffer is not None and block.depth == 0 and block is not self.backward_block
        )

    def _make_room(self) -> bool:
        """Drop the least recently used copies; false if blocks in use leave no room even so."""
        present = sum(block.buffer is not None for block in self._blocks)
        for block in sorted(self._idle(), key=lambda block: block.used_at):
            if present <= self._ahead_max:
                break
            self.release(block)
            present -= 1
        return present <= self._ahead_max

    def _touch(self, block: StreamedBlock) -> None:
        self._clock += 1
        block.used_at = self._clock

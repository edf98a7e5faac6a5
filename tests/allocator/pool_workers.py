"""Threads of the pool's model, their streams, and blocks with a pattern that they read back."""

from __future__ import annotations

import _thread
import ctypes
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from cuda_calls import Cuda

BLOCK_BYTES = 512
CHUNK_BYTES = 2 << 20
PER_THREAD_HANDLE = 2
#: Pinned memory for what a worker reads back: so many pieces.
SLOT_BYTES, SLOTS = 64, 4096


def rounded(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes


@dataclass(eq=False)
class ModelStream:
    """A stream: never equal to another, though a later one may have its handle."""

    handle: int
    kind: Literal["default", "kept", "foreign", "thread"]
    is_alive: bool = True
    #: Behind all work of a stream that is gone; None once that is done.
    last_event: int | None = None


@dataclass(eq=False)
class ModelBlock:
    """A block as the pool gave it."""

    address: int
    requested_bytes: int
    stream: ModelStream
    value: int
    tag: int
    #: Other streams that have read it, each with an event behind that.
    uses: list[tuple[ModelStream, int]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return rounded(self.requested_bytes, BLOCK_BYTES)

    @property
    def end(self) -> int:
        return self.address + self.size_bytes

    def probes(self) -> list[tuple[int, int]]:
        """Addresses and sizes of what is written: both ends, and the start of each chunk."""
        end = self.address + self.requested_bytes
        starts = {self.address, max(self.address, end - SLOT_BYTES)}
        starts.update(range(rounded(self.address, CHUNK_BYTES), end, CHUNK_BYTES))
        return [(start, min(SLOT_BYTES, end - start)) for start in sorted(starts)]


class Worker:
    """A thread that does one thing after the other, with what it has read back.

    The hazard checker does not follow it: the pool hands what one thread has learnt to another
    under a mutex of its own, which the checker does not see. Of all such threads it takes each to
    know what any of them knows, so a hazard is one that nobody has waited for.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._slots = cuda.pin(SLOT_BYTES * SLOTS)
        self._expected: list[tuple[int, ModelBlock]] = []
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._tasks = queue.SimpleQueue()
        self.stream = ModelStream(PER_THREAD_HANDLE, "thread")
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        self._cuda.use_device()
        while (task := self._tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, work))
        return future

    def run(self, work: Callable[[], Any]) -> Any:
        return self.start(work).result()

    def end(self) -> None:
        self._tasks.put(None)

    def close(self) -> None:
        self._cuda.unpin(self._slots)

    def read_back(self, block: ModelBlock, stream: ModelStream) -> None:
        """Ask for the block's pattern; what does not fit any more is not looked at."""
        for address, size_bytes in block.probes():
            if len(self._expected) == SLOTS:
                return
            slot = self._slots + SLOT_BYTES * len(self._expected)
            self._cuda.read(slot, address, size_bytes, stream.handle)
            self._expected.append((size_bytes, block))

    def compare(self) -> None:
        """Look at what was asked for; the device's work is complete."""
        for number, (size_bytes, block) in enumerate(self._expected):
            found = ctypes.string_at(self._slots + SLOT_BYTES * number, size_bytes)
            assert found == bytes([block.value]) * size_bytes, f"{block} was overwritten"
        self._expected.clear()

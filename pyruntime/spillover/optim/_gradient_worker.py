"""The thread that adds gradients up on the host, and the pinned ring that they arrive in.

Note [Adding up beside backward]
--------------------------------
Micro-steps after the first bring gradients that are added to what the host has. Each piece goes
through a ring of pinned memory: the thread of autograd takes room in it, starts the copy, and hands
the worker a job, which waits for the copy, adds, and gives the room back. Jobs run one after
another in the order in which they were handed in, so all that was done to one gradient is done when
its last job is. The ring is the back-pressure: where the host adds slower than the link brings,
backward waits for room, and no more than the ring's bytes are ever under way. Backward that waits
launches no kernels, so the ring takes several of the largest gradients: the device has work until
there is room.

One worker and one ring a process, made when the first gradient has to be added. A forked child
starts without either. Methods may be called from any thread; none holds the interpreter's lock
while it waits.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spillover._pinned import empty_pinned
from spillover._settings import logger
from spillover._stalls import Stall

_RING_BYTES_MIN, _RING_BYTES_MAX = 64 << 20, 512 << 20
#: Gradients that the ring has room for.
_RING_GRADIENTS = 4
#: The largest piece that is copied and added at a time.
PIECE_BYTES = 16 << 20
_ALIGNMENT = 64

_ROOM = Stall("gradients", "room in the ring: the host adds slower than gradients come")
_JOBS = Stall("gradients", "the host to add up")


@dataclass(eq=False)
class Room:
    """Part of the ring, until it is given back. ``begin`` and ``end`` count since the start."""

    memory: torch.Tensor
    begin: int
    end: int
    is_free: bool = False


class GradientWorker:
    """Runs jobs in order on one thread, and gives out room in the ring."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        # The rest is guarded by the condition's lock.
        self._jobs: deque[Callable[[], None]] = deque()
        self._submitted = 0
        self._finished = 0
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._ring: torch.Tensor | None = None
        self._ring_bytes = _RING_BYTES_MIN
        self._rooms: deque[Room] = deque()
        self._head = 0

    def submit(self, job: Callable[[], None]) -> int:
        """Have ``job`` run after all that were submitted; its number. It must not raise."""
        with self._condition:
            self._jobs.append(job)
            self._submitted += 1
            self.start()
            self._condition.notify_all()
            return self._submitted

    def start(self) -> None:
        """Have the thread, rather than at the first job, which comes from a thread of autograd."""
        with self._condition:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="spillover-gradients", daemon=True
                )
                self._thread.start()

    def wait(self, number: int) -> None:
        """Block until the job of that number is over."""
        if self._finished < number:
            _JOBS.wait(functools.partial(self._wait, lambda: self._finished >= number))

    def is_over(self, number: int) -> bool:
        """Whether the job of that number is over."""
        return self._finished >= number

    def expect(self, size_bytes: int) -> None:
        """Have a ring that suits gradients of so many bytes, unless there is one already."""
        with self._condition:
            if self._ring is None:
                wanted_bytes = min(_RING_GRADIENTS * size_bytes, _RING_BYTES_MAX)
                self._ring_bytes = max(self._ring_bytes, wanted_bytes // _ALIGNMENT * _ALIGNMENT)

    def reserve(self) -> None:
        """Have the ring, rather than at its first use. Raises HostOutOfMemory."""
        with self._condition:
            if self._ring is None:
                self._ring = empty_pinned((self._ring_bytes,), torch.uint8)

    def take(self, size_bytes: int) -> Room:
        """Room for a piece of at most ``PIECE_BYTES``; blocks until there is some."""
        self.reserve()
        with self._condition:
            room = self._try_take(size_bytes)
        while room is None:
            _ROOM.wait(functools.partial(self._wait, lambda: self._fits(size_bytes)))
            with self._condition:
                room = self._try_take(size_bytes)
        return room

    def give_back(self, room: Room) -> None:
        """Have the room used again; what was copied to it has been read."""
        with self._condition:
            room.is_free = True
            while self._rooms and self._rooms[0].is_free:
                self._rooms.popleft()
            self._condition.notify_all()

    def close(self) -> None:
        """Finish what was submitted and end the thread. Blocks."""
        with self._condition:
            thread, self._thread = self._thread, None
            self._is_closing = True
            self._condition.notify_all()
        if thread is not None:
            thread.join()
        with self._condition:
            self._is_closing = False

    def _place(self, size_bytes: int) -> int:
        """Where the next room begins: it must not go over the ring's end."""
        begin = -(-self._head // _ALIGNMENT) * _ALIGNMENT
        offset = begin % self._ring_bytes
        return (
            begin if offset + size_bytes <= self._ring_bytes else begin - offset + self._ring_bytes
        )

    def _fits(self, size_bytes: int) -> bool:
        tail = self._rooms[0].begin if self._rooms else self._head
        return not self._rooms or self._place(size_bytes) + size_bytes <= tail + self._ring_bytes

    def _try_take(self, size_bytes: int) -> Room | None:
        if not self._fits(size_bytes):
            return None
        assert self._ring is not None
        begin = self._place(size_bytes)
        offset = begin % self._ring_bytes
        room = Room(self._ring[offset : offset + size_bytes], begin, begin + size_bytes)
        self._head = room.end
        self._rooms.append(room)
        return room

    def _wait(self, is_so: Callable[[], bool]) -> None:
        with self._condition:
            self._condition.wait_for(is_so)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException:
                logger.exception("adding up a gradient failed")
            del job  # What it holds goes before anybody hears that it is over.
            with self._condition:
                self._finished += 1
                self._condition.notify_all()


worker = GradientWorker()


def _start_again() -> None:
    """A forked child has neither the thread nor the device."""
    worker.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_start_again)
# Before the interpreter takes torch apart: memory must not go while a copy works on it.
atexit.register(worker.close)

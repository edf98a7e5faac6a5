"""Pinned memory of one parameter's gradients, and who may write to it.

Note [Bytes per parameter]
--------------------------
A gradient of a bfloat16 or float16 weight that comes alone in its step keeps its type on the host:
2 bytes a parameter, copied once and converted by the optimizer's own pass. When a second micro-step
comes, a float32 accumulator takes its place: 4 bytes a parameter, from then on. Later steps then
put their first gradient into the *end* of the accumulator's memory, where it is widened in place
when the second comes; so there are never 6 bytes. Float32 gradients take 4 bytes, float64 ones 8.
To this the ring of ``_gradient_worker`` adds a constant.

Note [Widening in place]
------------------------
In memory of n wide elements of W bytes, n narrow ones of w bytes lie at the end: the i-th at
n(W - w) + iw. Widening goes from the first to the last. The elements from i to i + c, widened, end
at (i + c)W, which is at or before the i-th narrow one where c <= (n - i)(W - w) / W: a range of
that length neither overlaps with what it reads nor with what is still to be read. For half types
that is half of what is left, so the ranges get shorter; the last 64 Ki elements are copied before
they are widened.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

import torch

from spillover._core import HostPool
from spillover._pinned import empty_pinned
from spillover.optim._gradient_math import wide_dtype
from spillover.optim._gradient_worker import worker

_COPIED_ELEMENTS = 64 << 10


class _Ticket(Protocol):
    def wait(self) -> None: ...

    def done(self) -> bool: ...


class Hold:
    """Whoever has one may read the memory; nobody else gets it meanwhile.

    While there are ``leases``, its owner does not write to it either.
    """

    __slots__ = ("__weakref__", "leases", "memory")

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.leases: list[object] = []  # Lists change atomically.


class HostMemory:
    """Pinned bytes with what is under way on them."""

    def __init__(self, size_bytes: int, pool: HostPool | None) -> None:
        self._bytes = empty_pinned((size_bytes,), torch.uint8, pool=pool)
        self._hold: weakref.ref[Hold] | None = None
        self._copies: list[_Ticket] = []
        self.job = 0  # The worker's last job on these bytes.

    @property
    def size_bytes(self) -> int:
        """All of it."""
        return int(self._bytes.nbytes)

    def is_held(self) -> bool:
        """Whether somebody may read it."""
        return self._hold is not None and self._hold() is not None

    def hold(self) -> Hold:
        """Take it, unheld before."""
        hold = Hold(self)
        self._hold = weakref.ref(hold)
        return hold

    def narrow(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Its last bytes as so many elements."""
        part: torch.Tensor = self._bytes[self.size_bytes - count * dtype.itemsize :].view(dtype)
        return part

    def wide(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Its first bytes as so many elements of the type that sums of ``dtype`` have."""
        wide = wide_dtype(dtype)
        part: torch.Tensor = self._bytes[: count * wide.itemsize].view(wide)
        return part

    def add_copy(self, ticket: _Ticket) -> None:
        """Note a copy that reads or writes it."""
        self._copies = [copy for copy in self._copies if not copy.done()]
        self._copies.append(ticket)

    def wait_for_copies(self) -> None:
        """Block until no copy works on it."""
        for copy in list(self._copies):
            copy.wait()

    def settle(self) -> None:
        """Block until no copy and no job works on it."""
        self.wait_for_copies()
        self._copies.clear()
        worker.wait(self.job)


class MemoryOfParameter:
    """The memory that one parameter's gradients use by turns; usually one block.

    A second one is there while an optimizer still reads the last step's gradient, or while somebody
    keeps a gradient of an earlier step.
    """

    def __init__(self, pool: HostPool | None) -> None:
        self._pool = pool
        self._blocks: list[HostMemory] = []
        #: Several micro-steps a step were seen: memory is for sums.
        self.accumulates = False

    def reserve(self, count: int, dtype: torch.dtype) -> None:
        """Have memory for the next gradient. Raises HostOutOfMemory."""
        size_bytes = self.size_bytes(count, dtype)
        if not any(block.size_bytes == size_bytes for block in self._blocks):
            self._blocks.append(HostMemory(size_bytes, self._pool))

    def size_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Of one gradient, by Note [Bytes per parameter]."""
        return count * (wide_dtype(dtype) if self.accumulates else dtype).itemsize

    def take(self, count: int, dtype: torch.dtype) -> Hold:
        """Memory to write to, once it is settled. Raises HostOutOfMemory."""
        return self._take(self.size_bytes(count, dtype))

    def take_for_sum(self, count: int, dtype: torch.dtype) -> Hold:
        """Memory for a sum, as :meth:`take`; from then on gradients get such memory."""
        hold = self._take(count * wide_dtype(dtype).itemsize)
        self.accumulates = True
        return hold

    def _take(self, size_bytes: int) -> Hold:
        for block in self._blocks:
            if block.size_bytes == size_bytes and not block.is_held():
                hold = block.hold()
                break
        else:
            block = HostMemory(size_bytes, self._pool)
            hold = block.hold()
            self._blocks.append(block)
        # One block serves; those of another size or of an earlier step go when they are free.
        self._blocks = [kept for kept in self._blocks if kept is block or kept.is_held()]
        block.settle()
        return hold

    def host_bytes(self) -> int:
        """Pinned at this moment."""
        return sum(block.size_bytes for block in self._blocks)


def widening_ranges(
    start: int, stop: int, count: int, dtype: torch.dtype
) -> Iterator[tuple[slice, bool]]:
    """Cut the elements from ``start`` to ``stop`` of ``count`` by Note [Widening in place].

    With each range goes whether it has to be copied first.
    """
    wide_bytes = wide_dtype(dtype).itemsize
    grown_bytes = wide_bytes - dtype.itemsize
    while start < stop:
        length = (count - start) * grown_bytes // wide_bytes if grown_bytes else stop - start
        is_short = count - start <= _COPIED_ELEMENTS
        end = stop if is_short else min(stop, start + length)
        yield slice(start, end), is_short
        start = end

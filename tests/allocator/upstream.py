"""Memory for private arenas from the driver, past the pool: what a MemPool's own allocator is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from cuda_calls import Cuda

from spillover._paths import library_path

ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
DONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

#: Those whose functions the pool may still call: what is left of a test goes back after it.
_kept: list[Upstream] = []


class Upstream:
    """Gives device memory to one arena of device 0 and counts it.

    ``source`` is a function that gives memory and one that takes it, cuMemAlloc and cuMemFree
    without it. What is given begins ``offset`` bytes into an allocation. ``before_alloc`` is called
    with the size before each answer, which is "no memory" where it gives False; ``before_free``
    before memory goes back.
    """

    def __init__(
        self,
        cuda: Cuda,
        *,
        source: tuple[Callable[[int], int], Callable[[int], None]] | None = None,
        offset: int = 0,
        before_alloc: Callable[[int], bool] = lambda _: True,
        before_free: Callable[[], object] = lambda: None,
    ) -> None:
        give, take = source or (cuda.malloc, cuda.free)
        self.live: dict[int, int] = {}
        self.asked: list[tuple[int, int]] = []
        self.done_count = 0
        self.failures: list[BaseException] = []

        def alloc(_: int | None, size_bytes: int, stream: int | None) -> int | None:
            self.asked.append((size_bytes, stream or 0))
            try:
                if not before_alloc(size_bytes):
                    return None
                cuda.use_device()
                address = give(size_bytes + offset) + offset
            except MemoryError:
                return None
            except BaseException as error:
                self.failures.append(error)
                return None
            self.live[address] = size_bytes
            return address

        def free(_: int | None, pointer: int, size_bytes: int) -> None:
            try:
                assert self.live.pop(pointer) == size_bytes
                before_free()
                cuda.use_device()
                take(pointer - offset)
            except BaseException as error:
                self.failures.append(error)

        def done(_: int | None) -> None:
            self.done_count += 1

        self.functions = ALLOC(alloc), FREE(free), DONE(done)
        arena = ctypes.c_uint32()
        make = self.library().spillover_make_arena_from
        assert make(0, *self.functions, None, ctypes.byref(arena)) == 0
        self.arena = arena.value
        _kept[:] = [self, *(upstream for upstream in _kept if not upstream.done_count)]

    @staticmethod
    def library() -> ctypes.CDLL:
        return ctypes.CDLL(str(library_path("libspillover.so")))

    def sizes(self) -> list[int]:
        return sorted(self.live.values())

    def holds(self, address: int) -> bool:
        return any(begin <= address < begin + size for begin, size in self.live.items())

    def check_ended(self) -> None:
        """Everything went back, and nothing went wrong."""
        assert self.failures == [], self.failures
        assert (self.live, self.done_count) == ({}, 1), (self.live, self.done_count)

"""An allocator of torch's pluggable kind for a MemPool.

Imported, or executed as text by programs that have no way here.
"""

from __future__ import annotations

import ctypes
import time
from typing import NamedTuple

import torch

ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


class Segment(NamedTuple):
    """What was asked for."""

    size: int
    device: int
    stream: int


class OwnAllocator:
    """Gives memory of cudaMalloc and counts it.

    A segment begins ``offset`` bytes into an allocation. Each call takes ``pause_s`` at least.
    """

    def __init__(self, *, limit: int = 1 << 60, offset: int = 0, pause_s: float = 0) -> None:
        cudart = ctypes.CDLL("libcudart.so.13")
        cudart.cudaFree.argtypes = [ctypes.c_void_p]
        self.live: dict[int, Segment] = {}
        self.sizes: list[int] = []
        self.failures: list[str] = []
        self.running_count = 0

        def begin() -> None:
            self.running_count += 1
            if self.running_count != 1:
                self.failures.append("two calls at a time")
            if pause_s:
                time.sleep(pause_s)

        def allocate(size: int, device: int, stream: int | None) -> int | None:
            begin()
            pointer = ctypes.c_void_p()
            held = sum(segment.size for segment in self.live.values())
            given = held + size <= limit and not cudart.cudaMalloc(
                ctypes.byref(pointer), ctypes.c_size_t(size + offset)
            )
            self.running_count -= 1
            if not given or pointer.value is None:
                cudart.cudaGetLastError()
                return None
            self.live[pointer.value + offset] = Segment(size, device, stream or 0)
            self.sizes.append(size)
            return pointer.value + offset

        def free(pointer: int, size: int, device: int, stream: int | None) -> None:
            begin()
            found, given = self.live.pop(pointer, None), Segment(size, device, stream or 0)
            if found != given:
                self.failures.append(f"{found} came back as {given}")
            if cudart.cudaFree(pointer - offset) != 0:
                self.failures.append("cudaFree failed")
            self.running_count -= 1

        self.functions = ALLOCATE(allocate), FREE(free)
        self.allocator = torch._C._cuda_customAllocator(
            *(ctypes.cast(function, ctypes.c_void_p).value for function in self.functions)
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(begin <= address < begin + s.size for begin, s in self.live.items())

    def check_ended(self) -> None:
        """Everything came back as it was given."""
        assert self.failures == []
        assert self.live == {}

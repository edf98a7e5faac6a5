"""PyTorch's pluggable allocator and MemPool on the emulated device, with an allocator in C++."""

from __future__ import annotations

from pathlib import Path

import pytest

import plug_in

PRELUDE = """
import ctypes, sys, torch
allocator = torch.cuda.memory.CUDAPluggableAllocator(sys.argv[1], "test_malloc", "test_free")
library = ctypes.CDLL(sys.argv[1])
def counts():
    return tuple(ctypes.c_long.in_dll(library, name).value for name in ("allocations", "frees"))
host = torch.randn(1000)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plug_in.build(tmp_path_factory.mktemp("pluggable"))


def test_as_the_current_allocator(run_emulated, library: Path) -> None:
    run_emulated(
        PRELUDE
        + """
torch.cuda.memory.change_current_allocator(allocator)
x = torch.empty(1000, device="cuda")
x.copy_(host)
assert torch.equal(x.cpu(), host)
assert counts()[0] >= 1
before = counts()[1]
del x
assert counts()[1] == before + 1
""",
        str(library),
    )


def test_as_the_allocator_of_a_mempool(run_emulated, library: Path) -> None:
    run_emulated(
        PRELUDE
        + """
pool = torch.cuda.MemPool(allocator.allocator())
with torch.cuda.use_mem_pool(pool):
    x = torch.empty(1000, device="cuda")
    big = torch.empty(8 << 20, device="cuda")
inside = counts()[0]
assert inside >= 2
y = torch.empty(1000, device="cuda")
assert counts()[0] == inside, "an allocation outside of the pool reached its allocator"
x.copy_(host)
assert torch.equal(x.cpu(), host)
assert sum(segment["total_size"] for segment in pool.snapshot()) >= 32 << 20
try:
    with torch.cuda.use_mem_pool(pool):
        torch.empty(600 << 20, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    assert "Tried to allocate 600.00 MiB" in str(error)
else:
    raise AssertionError("more than the device's memory was allocated")
del x, big, pool
torch.cuda.empty_cache()
assert counts()[0] == counts()[1] or counts()[1] >= 2
""",
        str(library),
    )

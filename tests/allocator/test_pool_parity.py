"""The pool's counters against those of torch's own allocator, fed with the same requests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

COMPARE = """
import random

import torch

import spillover
from spillover import _core

MIB = 1 << 20
# Segments are each allocator's own affair.
NAMES = ("allocation", "active", "allocated_bytes", "active_bytes", "requested_bytes")
RANGES = [(150_000, MIB + 1), (MIB + 1, 10 * MIB), (10 * MIB, 14 * MIB)]


def operations():
    # Allocations (a size), frees (the index of a live block) and releases of the cache.
    generator = random.Random(5)
    live_count = 0
    for _ in range(1500):
        choice = generator.random()
        if choice < 0.55 and live_count < 60:
            live_count += 1
            yield "alloc", generator.randrange(*generator.choice(RANGES))
        elif choice < 0.98 and live_count:
            live_count -= 1
            yield "free", generator.randrange(live_count + 1)
        elif choice >= 0.99:
            yield "trim", 0


def replay(alloc, free, trim, stats):
    # Counters after each operation. Everything is given back at the end.
    live, found = [], []
    for kind, number in operations():
        if kind == "alloc":
            live.append(alloc(number))
        elif kind == "free":
            free(live.pop(number))
        else:
            trim()
        current = stats()
        found.append((kind, {name: current[name] for name in NAMES}))
    for address in live:
        free(address)
    trim()
    return found


cuda = torch.cuda
cuda.init()
cuda.empty_cache()
cuda.reset_peak_memory_stats()
cuda.reset_accumulated_memory_stats()
expected = replay(
    cuda.caching_allocator_alloc,
    cuda.caching_allocator_delete,
    cuda.empty_cache,
    cuda.memory_stats_as_nested_dict,
)
pool = _core.Pool(0)
found = replay(pool.alloc, pool.free, pool.trim, pool.stats)
pool.check_invariants()
assert len(found) > 1000
for step, (theirs, ours) in enumerate(zip(expected, found)):
    assert ours == theirs, (step, ours, theirs)

# With torch loaded an out-of-memory error is torch's own kind.
try:
    pool.alloc(1 << 50)
except torch.OutOfMemoryError as error:
    assert isinstance(error, spillover.DeviceOutOfMemory)
    print(error)
"""


@pytest.mark.virtual_memory
def test_counters_equal_those_of_torchs_allocator(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = run_emulated(
        COMPARE, vram="4GiB", env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    )
    assert "1024.00 TiB requested" in result.stdout

"""What the pool does when the driver refuses: memory is neither lost nor given out twice."""

from __future__ import annotations

import pytest
from cuda_calls import Cuda

from spillover import SpilloverError, _core, emulator
from spillover.emulator import Fault, faults

MIB = 1 << 20


def test_segment_whose_free_failed_is_never_handed_out(pool: _core.Pool) -> None:
    segments = [pool.alloc(32 * MIB) for _ in range(3)]
    for address in segments:
        pool.free(address)
    # The driver has freed it, and says otherwise; the other segments have their turn.
    with faults(Fault("cuMemFree", call=2)), pytest.raises(SpilloverError, match="cuMemFree"):
        pool.trim()
    assert pool.segments() == []
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 0
    pool.check_invariants()
    assert pool.alloc(32 * MIB)


def test_segment_that_the_driver_could_not_be_asked_for_stays(pool: _core.Pool) -> None:
    pool.free(pool.alloc(32 * MIB))
    with faults(Fault("cuCtxGetCurrent", times=None)), pytest.raises(SpilloverError):
        pool.trim()
    assert len(pool.segments()) == 1
    pool.check_invariants()
    pool.trim()
    assert pool.segments() == []


@pytest.mark.parametrize("function", ["cuEventCreate", "cuEventRecord", "cuStreamGetId"])
def test_block_whose_use_cannot_be_marked_comes_back_later(
    pool: _core.Pool, cuda: Cuda, function: str
) -> None:
    stream = cuda.create_stream()
    address = pool.alloc(4 * MIB)
    pool.record_stream(address, stream)
    cuda.fill(address, 4 * MIB, stream)
    with faults(Fault(function, times=None)):
        pool.free(address)
        assert pool.stats()["active"]["all"]["current"] == 1, "the stream still writes to it"
    pool.trim()
    assert pool.segments() == []
    cuda.destroy_stream(stream)


@pytest.mark.parametrize("function", ["cuCtxGetCurrent", "cuCtxPushCurrent"])
@pytest.mark.parametrize("size_bytes", [100, 8 * MIB])
def test_pinned_memory_is_released_whatever_the_driver_says(
    cuda: Cuda, function: str, size_bytes: int
) -> None:
    cuda.use_device()
    before = emulator.live()
    host = _core.HostPool(limit_bytes=64 * MIB)
    buffer = host.allocate(size_bytes)
    del buffer
    with faults(Fault(function), Fault("cuMemHostUnregister")):
        host.trim()
    assert emulator.live() == before
    assert host.stats().reserved_bytes == 0

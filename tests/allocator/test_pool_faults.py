"""What the pool does when the driver refuses: memory is neither lost nor given out twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from cuda_calls import Cuda

from spillover import SpilloverError, _core, emulator
from spillover.emulator import Fault, faults

MIB = 1 << 20


@pytest.mark.virtual_memory
def test_memory_whose_unmapping_failed_is_never_handed_out(pool: _core.Pool) -> None:
    held = [pool.alloc(32 * MIB) for _ in range(3)]
    pool.free(held[0])
    pool.free(held[2])
    # The driver has unmapped it, and says otherwise.
    with faults(Fault("cuMemUnmap", call=1)), pytest.raises(SpilloverError, match="cuMemUnmap"):
        pool.trim()
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 64 * MIB
    pool.check_invariants()
    pool.free(held[1])
    pool.trim()
    assert pool.segments() == []
    assert pool.alloc(96 * MIB)


@pytest.mark.virtual_memory
@pytest.mark.parametrize("which", range(4))
def test_addresses_whose_unmapping_failed_leave_no_hole(pool: _core.Pool, which: int) -> None:
    blocks = [pool.alloc(8 * MIB) for _ in range(4)]
    pool.free(blocks.pop(which))
    with faults(Fault("cuMemUnmap", call=1)), pytest.raises(SpilloverError, match="cuMemUnmap"):
        pool.trim()
    for block in blocks:
        pool.free(block)
    pool.trim()
    first, *others = (pool.alloc(8 * MIB) for _ in range(4))
    assert others == [first + 8 * MIB * number for number in (1, 2, 3)]
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_memory_whose_release_failed_is_held_no_longer(pool: _core.Pool) -> None:
    pool.free(pool.alloc(32 * MIB))
    with faults(Fault("cuMemRelease", call=2)), pytest.raises(SpilloverError, match="cuMemRelease"):
        pool.trim()
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 0
    pool.check_invariants()


@pytest.mark.parametrize(
    "function", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemAlloc"]
)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_growth_that_fails_can_be_tried_again(pool: _core.Pool, function: str, call: int) -> None:
    with faults(Fault(function, call=call)):
        # A call that comes later than the test needs does not happen.
        with contextlib.suppress(SpilloverError):
            pool.free(pool.alloc(32 * MIB))
        pool.check_invariants()
        assert pool.alloc(32 * MIB)
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 32 * MIB


@pytest.mark.virtual_memory
def test_growth_that_the_driver_denies_access_to_is_undone(pool: _core.Pool) -> None:
    with faults(Fault("cuMemSetAccess")), pytest.raises(SpilloverError, match="cuMemSetAccess"):
        pool.alloc(32 * MIB)
    pool.check_invariants()
    assert pool.segments() == []
    assert pool.alloc(32 * MIB)
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 32 * MIB


def test_memory_that_the_driver_could_not_be_asked_for_stays(pool: _core.Pool) -> None:
    pool.free(pool.alloc(32 * MIB))
    with faults(Fault("cuCtxGetCurrent", times=None)), pytest.raises(SpilloverError):
        pool.trim()
    assert len(pool.segments()) == 1
    pool.check_invariants()
    pool.trim()
    assert pool.segments() == []


def test_memory_is_given_back_whatever_the_driver_says_of_the_context(pool: _core.Pool) -> None:
    pool.trim()
    before = emulator.live()
    for call in range(1, 60):
        pool.free(pool.alloc(8 * MIB))
        with faults(Fault("cuCtxGetCurrent", call=call)), contextlib.suppress(SpilloverError):
            pool.trim()
        pool.trim()
        assert emulator.live() == before


@pytest.mark.parametrize("function", ["cuEventCreate", "cuEventRecord"])
def test_block_whose_use_cannot_be_marked_comes_back_later(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int], function: str
) -> None:
    stream = kept_streams[0]
    address = pool.alloc(4 * MIB)
    pool.record_stream(address, stream)
    cuda.fill(address, 4 * MIB, stream)
    with faults(Fault(function, times=None)):
        pool.free(address)
        assert pool.stats()["active"]["all"]["current"] == 1, "the stream still writes to it"
    pool.trim()
    assert pool.segments() == []


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


@pytest.mark.virtual_memory
def test_a_reservation_ends_in_addresses_that_are_never_mapped(
    run_python: Callable[..., str],
) -> None:
    """Two that the driver gives side by side would otherwise become one segment."""
    run_python(
        """
import spillover.emulator
spillover.emulator.enable(vram="1GiB", poison=False)
from spillover import _core
from spillover.emulator import call_bytes, faults
with faults():
    _core.Pool(0).alloc(1 << 20)
    assert call_bytes()["cuMemAddressReserve"] == (1 << 30) + (2 << 20)
"""
    )

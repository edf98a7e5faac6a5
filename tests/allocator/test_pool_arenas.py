"""Private arenas: addresses that stay, memory that serves nobody else, also for captured graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from cuda_calls import Cuda, live_blocks

import spillover
from spillover import _core

MIB = 1 << 20


@pytest.fixture
def arena(pool: _core.Pool) -> Iterator[int]:
    """A private arena that is released after the test, where the test has not done so."""
    arena = pool.make_arena()
    yield arena
    with contextlib.suppress(spillover.ConfigError):
        pool.release_arena(arena)


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


def arena_of(pool: _core.Pool, address: int) -> int:
    (arena,) = [
        segment["arena"]
        for segment in pool.segments()
        if segment["address"] <= address < segment["address"] + segment["size_bytes"]
    ]
    return arena


def test_free_memory_serves_the_arena_only(pool: _core.Pool, arena: int) -> None:
    address = pool.alloc_in(arena, 8 * MIB)
    small = pool.alloc_in(arena, 1000)
    pool.free(address)
    pool.free(small)
    assert pool.alloc(8 * MIB) != address
    assert pool.alloc(1000) != small
    other = pool.make_arena()
    assert pool.alloc_in(other, 8 * MIB) != address
    pool.release_arena(other)
    assert pool.alloc_in(arena, 8 * MIB) == address
    assert pool.alloc_in(arena, 1000) == small
    assert arena_of(pool, address) == arena_of(pool, small) == arena
    pool.check_invariants()


def test_free_memory_serves_its_own_stream_only(
    pool: _core.Pool, arena: int, kept_streams: list[int]
) -> None:
    first, second, _ = kept_streams
    address = pool.alloc_in(arena, 8 * MIB, first)
    pool.free(address)
    assert pool.alloc_in(arena, 8 * MIB, second) != address
    assert pool.alloc_in(arena, 8 * MIB, first) == address


def test_free_memory_is_neither_trimmed_nor_moved(pool: _core.Pool, arena: int, cuda: Cuda) -> None:
    address = pool.alloc_in(arena, 64 * MIB)
    pool.free(address)
    pool.trim()
    pool.trim_arena(arena)
    assert reserved_bytes(pool) == 64 * MIB
    # There is nothing else for a request that the limit does not let grow.
    pool.configure(f"limit={64 * MIB},wait_max=0s", "the test")
    with pytest.raises(spillover.DeviceOutOfMemory):
        pool.alloc(32 * MIB)
    pool.configure("limit=none,wait_max=30s", "the test")
    assert [segment["address"] for segment in pool.segments()] == [address]
    cuda.fill(address, 64 * MIB, 0)  # as the kernel of a graph would do
    pool.release_arena(arena)
    pool.trim()
    assert reserved_bytes(pool) == 0


def test_after_the_release_live_blocks_stay_and_free_ones_are_ordinary(
    pool: _core.Pool, arena: int, cuda: Cuda
) -> None:
    kept = pool.alloc_in(arena, 4 * MIB)
    gone = pool.alloc_in(arena, 32 * MIB)
    pool.free(gone)
    pool.release_arena(arena)
    pool.configure(f"limit={36 * MIB}", "the test")
    reused = pool.alloc(32 * MIB)
    cuda.fill(reused, 32 * MIB, 0)
    cuda.fill(kept, 4 * MIB, 0)
    pool.configure("limit=none", "the test")
    assert live_blocks(pool) == {kept: 4 * MIB, reused: 32 * MIB}
    pool.free(kept)
    pool.trim_arena(arena)
    assert reserved_bytes(pool) == 32 * MIB
    with pytest.raises(spillover.ConfigError, match="released before"):
        pool.alloc_in(arena, MIB)
    with pytest.raises(spillover.ConfigError, match="released before"):
        pool.release_arena(arena)
    pool.check_invariants()


def test_released_memory_waits_for_work_of_other_streams(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    # A graph runs on a stream that the pool has not been told of.
    recorded_on, launched_on, _ = kept_streams
    address = pool.alloc_in(arena, 32 * MIB, recorded_on)
    pool.free(address)
    with cuda.stuck(launched_on):
        cuda.fill(address, 32 * MIB, launched_on)
        pool.release_arena(arena)
        for stream in (0, recorded_on):
            other = pool.alloc(32 * MIB, stream)
            assert other != address
            cuda.fill(other, 32 * MIB, stream)
        assert arena_of(pool, address) == arena
    pool.trim_arena(arena)


def test_an_arena_grows_by_memory_without_work(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream = kept_streams[0]
    busy = pool.alloc(32 * MIB, stream)
    with cuda.stuck(stream):
        cuda.fill(busy, 32 * MIB, stream)
        pool.free(busy)
        # The same stream, but what is recorded there now may run on another one.
        assert pool.alloc_in(arena, 32 * MIB, stream) != busy
    cuda.synchronize()
    assert pool.alloc_in(arena, 32 * MIB, stream) == busy


def test_a_capture_is_served_and_not_disturbed(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream, other, _ = kept_streams
    held = pool.alloc(8 * MIB, other)
    with cuda.capture(stream) as nodes:
        with pytest.raises(spillover.StateError, match="recording a CUDA graph"):
            pool.alloc(8 * MIB, stream)
        address = pool.alloc_in(arena, 40 * MIB, stream)
        cuda.fill(address, 40 * MIB, stream)
        pool.free(address)
        assert pool.alloc_in(arena, 40 * MIB, stream) == address
        cuda.fill(address, 40 * MIB, stream)
        pool.free(held)
        pool.trim()
    assert nodes == [2]
    pool.check_invariants()


def test_a_capture_is_not_disturbed_before_it_has_memory(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream = kept_streams[0]
    pool.expect_stream(arena, stream)
    pool.free(pool.alloc(8 * MIB))
    with cuda.capture(stream) as nodes:
        pool.trim()
    assert nodes == [0]
    pool.set_arena_options(arena, is_whole=True)  # It has no memory.
    pool.trim()
    assert reserved_bytes(pool) == 0
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_a_capture_that_runs_out_of_memory_goes_on(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream = kept_streams[0]
    foreign = cuda.create_stream()
    pool.free(pool.alloc(8 * MIB, foreign))
    pool.configure(f"limit={32 * MIB},wait_max=0s", "the test")
    with cuda.capture(stream) as nodes:
        address = pool.alloc_in(arena, 16 * MIB, stream)
        with pytest.raises(spillover.DeviceOutOfMemory):
            pool.alloc_in(arena, 32 * MIB, stream)
        cuda.fill(address, 16 * MIB, stream)
    pool.configure("limit=none,wait_max=30s", "the test")
    assert nodes == [1]
    cuda.destroy_stream(foreign)


def test_a_block_used_by_two_capturing_streams_waits_for_the_captures_end(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream, joined, _ = kept_streams
    with cuda.capture(stream) as nodes:
        address = pool.alloc_in(arena, 8 * MIB, stream)
        cuda.order(stream, joined)
        cuda.fill(address, 8 * MIB, joined)
        pool.record_stream(address, joined)
        pool.free(address)
        assert pool.alloc_in(arena, 8 * MIB, stream) != address
        cuda.order(joined, stream)
    assert nodes == [1]
    cuda.synchronize()
    with cuda.capture(stream):
        # In the order of the graphs, which share the arena.
        assert pool.alloc_in(arena, 8 * MIB, stream) == address


def test_a_block_used_outside_of_the_capture_waits_for_that_use(
    pool: _core.Pool, arena: int, cuda: Cuda, kept_streams: list[int]
) -> None:
    stream, outside, _ = kept_streams
    with cuda.capture(stream):
        address = pool.alloc_in(arena, 8 * MIB, stream)
        cuda.fill(address, 8 * MIB, outside)
        pool.record_stream(address, outside)
        pool.free(address)
        assert pool.alloc_in(arena, 8 * MIB, stream) != address
    cuda.synchronize()
    with cuda.capture(stream):
        assert pool.alloc_in(arena, 8 * MIB, stream) == address


def test_an_arena_that_lends_saves_a_request(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, lends=True)
    address = pool.alloc_in(arena, 32 * MIB)
    pool.free(address)
    pool.configure(f"limit={32 * MIB},wait_max=0s", "the test")
    assert pool.alloc(16 * MIB) == address
    assert arena_of(pool, address) == arena
    pool.free(address)
    pool.set_arena_options(arena)
    with pytest.raises(spillover.DeviceOutOfMemory):
        pool.alloc(16 * MIB)
    pool.configure("limit=none,wait_max=30s", "the test")
    assert pool.alloc_in(arena, 32 * MIB) == address


def segments_of(pool: _core.Pool, arena: int) -> dict[int, int]:
    """Sizes by address of an arena of whole blocks, each of which is a segment."""
    segments = [segment for segment in pool.segments() if segment["arena"] == arena]
    assert all(len(segment["blocks"]) == 1 for segment in segments), segments
    return {segment["address"]: segment["size_bytes"] for segment in segments}


def test_whole_blocks_are_segments_of_their_own(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, is_whole=True)
    pool.alloc(512)  # of another arena
    before = pool.stats()
    addresses = [pool.alloc_in(arena, size_bytes) for size_bytes in (512, 3 * MIB, 512, 30 * MIB)]
    assert all(address % (2 * MIB) == 0 for address in addresses)
    sizes = [2 * MIB, 4 * MIB, 2 * MIB, 30 * MIB]
    assert segments_of(pool, arena) == dict(zip(addresses, sizes, strict=True))
    after = pool.stats()
    for name, gained in (("segment", 4), ("reserved_bytes", sum(sizes)), ("inactive_split", 0)):
        assert after[name]["all"]["current"] - before[name]["all"]["current"] == gained
    for address in addresses:
        pool.free(address)
    assert segments_of(pool, arena) == dict(zip(addresses, sizes, strict=True))
    pool.check_invariants()


def test_whole_blocks_are_neither_split_nor_merged(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, is_whole=True)
    small, large = pool.alloc_in(arena, 2 * MIB), pool.alloc_in(arena, 8 * MIB)
    pool.free(small)
    pool.free(large)
    assert pool.alloc_in(arena, 3 * MIB) == large
    assert pool.alloc_in(arena, 512) == small
    assert pool.stats()["allocated_bytes"]["all"]["current"] == 10 * MIB
    pool.free(small)
    pool.free(large)
    both = pool.alloc_in(arena, 10 * MIB)
    assert both not in (small, large)
    assert segments_of(pool, arena) == {small: 2 * MIB, large: 8 * MIB, both: 10 * MIB}
    pool.check_invariants()


def test_whole_blocks_of_a_released_arena_are_ordinary_memory(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, is_whole=True)
    kept, *others = [pool.alloc_in(arena, 2 * MIB) for _ in range(4)]
    for address in others:
        pool.free(address)
    pool.release_arena(arena)
    assert segments_of(pool, arena)[kept] == 2 * MIB
    pool.trim()
    assert segments_of(pool, arena) == {kept: 2 * MIB}
    pool.free(kept)
    pool.trim()
    assert reserved_bytes(pool) == 0
    pool.check_invariants()


def test_whole_blocks_are_lent_as_they_are(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, lends=True, is_whole=True)
    address = pool.alloc_in(arena, 32 * MIB)
    pool.free(address)
    pool.configure(f"limit={32 * MIB},wait_max=0s", "the test")
    assert pool.alloc(16 * MIB) == address
    pool.configure("limit=none,wait_max=30s", "the test")
    assert segments_of(pool, arena) == {address: 32 * MIB}
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_whole_blocks_come_from_memory_that_others_left(
    pool: _core.Pool, arena: int, cuda: Cuda
) -> None:
    pool.set_arena_options(arena, is_whole=True)
    pool.free(pool.alloc(12 * MIB))
    cuda.synchronize()
    pool.configure(f"limit={12 * MIB}", "the test")
    addresses = [pool.alloc_in(arena, 4 * MIB) for _ in range(3)]
    assert segments_of(pool, arena) == dict.fromkeys(addresses, 4 * MIB)
    pool.configure("limit=none", "the test")
    pool.check_invariants()


def test_whole_blocks_are_restored(pool: _core.Pool, arena: int) -> None:
    pool.set_arena_options(arena, is_whole=True)
    addresses = [pool.alloc_in(arena, size_bytes) for size_bytes in (512, 6 * MIB, 3 * MIB)]
    checkpoint = live_blocks(pool)
    for address in addresses[1:]:
        pool.free(address)
    pool.alloc_in(arena, 2 * MIB)
    pool.alloc_in(arena, 12 * MIB)
    segments = segments_of(pool, arena)
    pool.restore_arena(arena, list(checkpoint.items()))
    assert live_blocks(pool) == checkpoint
    assert segments_of(pool, arena) == segments
    with pytest.raises(spillover.StateError, match="not split"):
        pool.restore_arena(arena, [(addresses[1], 2 * MIB)])
    pool.check_invariants()


def test_whether_blocks_are_whole_cannot_change(pool: _core.Pool, arena: int) -> None:
    pool.alloc_in(arena, 512)
    with pytest.raises(spillover.StateError, match="before the first allocation"):
        pool.set_arena_options(arena, is_whole=True)
    pool.set_arena_options(arena, lends=True)


def test_unknown_arenas_are_refused(pool: _core.Pool) -> None:
    for arena in (0, 1, (1 << 32) - 1):
        with pytest.raises(spillover.ConfigError):
            pool.alloc_in(arena, MIB)
        with pytest.raises(spillover.ConfigError):
            pool.expect_stream(arena, 0)
        with pytest.raises(spillover.ConfigError):
            pool.release_arena(arena)
        with pytest.raises(spillover.ConfigError):
            pool.trim_arena(arena)


def test_live_blocks_are_restored(pool: _core.Pool, arena: int) -> None:
    sizes = [512, 4096, MIB, 3 * MIB, 5 * MIB, 2 * MIB, 1024]
    addresses = [pool.alloc_in(arena, size_bytes) for size_bytes in sizes]
    for index in (1, 4):
        pool.free(addresses.pop(index))
        sizes.pop(index)
    checkpoint = dict(zip(addresses, sizes, strict=True))
    assert live_blocks(pool) == checkpoint

    ordinary = pool.alloc(3 * MIB)
    for address in addresses[::2]:
        pool.free(address)
    for size_bytes in (2048, 7 * MIB, 256 * 1024):
        pool.alloc_in(arena, size_bytes)
    pool.restore_arena(arena, list(checkpoint.items()))
    assert live_blocks(pool) == {**checkpoint, ordinary: 3 * MIB}
    pool.check_invariants()
    # From the same state requests are served the same way.
    again = [pool.alloc_in(arena, size_bytes) for size_bytes in (2048, 7 * MIB, 256 * 1024)]
    pool.restore_arena(arena, list(checkpoint.items()))
    assert [pool.alloc_in(arena, size) for size in (2048, 7 * MIB, 256 * 1024)] == again
    assert not set(again) & set(addresses)

    pool.restore_arena(arena, [])
    assert live_blocks(pool) == {ordinary: 3 * MIB}
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_what_cannot_be_restored_is_refused(
    pool: _core.Pool, arena: int, kept_streams: list[int]
) -> None:
    address = pool.alloc_in(arena, 4 * MIB)
    elsewhere = pool.alloc(4 * MIB)
    for blocks in (
        [(elsewhere, 4 * MIB)],
        [(address, 8 * MIB)],
        [(address, 4096)],
        [(address, 3 * MIB), (address + 2 * MIB, 2 * MIB)],
        [(address + 1, 4 * MIB)],
    ):
        with pytest.raises(spillover.StateError, match="cannot be restored"):
            pool.restore_arena(arena, blocks)
    pool.record_stream(address, kept_streams[0])
    with pytest.raises(spillover.StateError, match="another stream"):
        pool.restore_arena(arena, [])
    assert live_blocks(pool) == {address: 4 * MIB, elsewhere: 4 * MIB}
    pool.check_invariants()

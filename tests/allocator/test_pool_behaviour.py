"""What the pool promises, one behaviour a test."""

from __future__ import annotations

import re

import pytest
from cuda_calls import Cuda, live_blocks

import spillover
from spillover import _core, allocator

MIB = 1 << 20


def states(pool: _core.Pool) -> list[str]:
    return [block["state"] for segment in pool.segments() for block in segment["blocks"]]


def test_size_zero_gives_null_and_null_may_be_freed(pool: _core.Pool) -> None:
    assert pool.alloc(0) == 0
    pool.free(0)
    assert pool.stats()["allocation"]["all"]["allocated"] == 0


def test_blocks_are_rounded_to_512_bytes(pool: _core.Pool) -> None:
    addresses = [pool.alloc(size) for size in (1, 512, 513)]
    assert [live_blocks(pool)[address] for address in addresses] == [512, 512, 1024]
    assert pool.stats()["requested_bytes"]["all"]["current"] == 1 + 512 + 513


def test_small_and_large_requests_get_segments_of_their_own(pool: _core.Pool, cuda: Cuda) -> None:
    # Chunks that cannot be mapped together are larger from the start.
    medium_bytes = (2 if cuda.has_virtual_memory else 20) * MIB
    for size, segment_bytes, is_small in (
        (MIB, 2 * MIB, True),
        (MIB + 1, medium_bytes, False),
        (11 * MIB, 12 * MIB, False),
    ):
        address = pool.alloc(size)
        (segment,) = pool.segments()
        assert (segment["size_bytes"], segment["is_small"]) == (segment_bytes, is_small)
        pool.free(address)
        pool.trim()


def test_a_freed_block_is_reused_on_its_own_stream_at_once(pool: _core.Pool, cuda: Cuda) -> None:
    stream = cuda.create_stream()
    first = pool.alloc(3 * MIB, stream)
    cuda.fill(first, 4096, stream)
    pool.free(first)
    assert pool.alloc(3 * MIB, stream) == first
    cuda.destroy_stream(stream)


def test_a_freed_block_is_not_given_to_another_stream(pool: _core.Pool, cuda: Cuda) -> None:
    stream = cuda.create_stream()
    first = pool.alloc(3 * MIB, stream)
    cuda.fill(first, 3 * MIB, stream)
    pool.free(first)
    second = pool.alloc(3 * MIB)
    assert second != first
    cuda.destroy_stream(stream)


def test_best_fit_takes_the_smallest_hole(pool: _core.Pool) -> None:
    sizes = [4096, 512, 1024, 512, 2048, 512]
    addresses = [pool.alloc(size) for size in sizes]
    for index in (0, 2, 4):
        pool.free(addresses[index])
    assert pool.alloc(1000) == addresses[2]
    assert pool.alloc(2000) == addresses[4]


def test_neighbours_merge_when_freed(pool: _core.Pool) -> None:
    addresses = [pool.alloc(512) for _ in range(3)]
    pool.free(addresses[0])
    pool.free(addresses[2])
    assert states(pool) == ["free", "live", "free"]
    assert pool.stats()["inactive_split"]["all"]["current"] == 2
    pool.free(addresses[1])
    assert states(pool) == ["free"]
    assert pool.stats()["inactive_split"]["all"]["current"] == 0
    assert pool.stats()["inactive_split_bytes"]["all"]["current"] == 0
    assert pool.largest_free_bytes() == 2 * MIB


def test_a_noted_stream_delays_reuse_until_it_is_done(pool: _core.Pool, cuda: Cuda) -> None:
    other = cuda.create_stream()
    pool.alloc(100, other)
    address = pool.alloc(3 * MIB)
    cuda.fill(address, 4096, other)
    pool.record_stream(address, other)
    pool.free(address)
    stats = pool.stats()
    assert stats["allocation"]["all"]["current"] == 1
    assert stats["active"]["all"]["current"] == 2
    assert stats["active_bytes"]["large_pool"]["current"] == 3 * MIB
    assert "waiting" in states(pool)
    assert _core.device_of(address) == -1
    # The stream is passed to the pool once more, which so learns that it lives and marks it.
    pool.free(pool.alloc(100, other))
    cuda.synchronize()
    assert pool.alloc(3 * MIB) == address
    cuda.destroy_stream(other)


def test_a_noted_stream_that_was_destroyed_is_never_asked(pool: _core.Pool, cuda: Cuda) -> None:
    """Only the whole device tells when its work is complete."""
    other = cuda.create_stream()
    address = pool.alloc(3 * MIB)
    cuda.fill(address, 4096, other)
    pool.record_stream(address, other)
    mark = cuda.create_event()
    cuda.record(mark, other)
    cuda.destroy_stream(other)
    pool.free(address)
    assert pool.alloc(3 * MIB) != address
    pool.trim()
    assert "waiting" not in states(pool)
    assert cuda.is_complete(mark)
    cuda.destroy_event(mark)


def test_blocks_of_a_destroyed_stream_can_be_freed_and_trimmed(
    pool: _core.Pool, cuda: Cuda
) -> None:
    stream = cuda.create_stream()
    address = pool.alloc(3 * MIB, stream)
    cuda.fill(address, 4096, stream)
    cuda.destroy_stream(stream)
    pool.free(address)
    pool.alloc(100)
    pool.trim()
    assert len(pool.segments()) == 1


def test_a_new_stream_with_an_old_handle_gets_no_old_blocks(pool: _core.Pool, cuda: Cuda) -> None:
    """The driver may give a destroyed stream's handle to a new one; its blocks stay apart."""
    seen: dict[int, int] = {}
    for _ in range(8):
        stream = cuda.create_stream()
        address = pool.alloc(3 * MIB, stream)
        assert seen.get(stream) != address
        seen[stream] = address
        cuda.fill(address, 4096, stream)
        pool.free(address)
        cuda.destroy_stream(stream)


def test_the_per_thread_stream_is_one_stream_on_one_thread(pool: _core.Pool) -> None:
    per_thread = 2
    address = pool.alloc(3 * MIB, per_thread)
    pool.free(address)
    assert pool.alloc(3 * MIB, per_thread) == address


@pytest.mark.parametrize("address", ["freed", "inside", "foreign"])
def test_only_a_live_block_can_be_freed_or_noted(pool: _core.Pool, address: str) -> None:
    block = pool.alloc(4096)
    wrong = {"freed": block, "inside": block + 512, "foreign": 4096}[address]
    if address == "freed":
        pool.free(block)
    with pytest.raises(spillover.ConfigError, match="not the start of a live block"):
        pool.free(wrong)
    with pytest.raises(spillover.ConfigError, match="not the start of a live block"):
        pool.record_stream(wrong, 0)
    assert _core.device_of(wrong) == -1
    pool.check_invariants()


def test_device_of_a_live_block(pool: _core.Pool) -> None:
    address = pool.alloc(4096)
    assert _core.device_of(address) == 0
    assert _core.device_of(address + 512) == -1


def test_trim_returns_only_what_is_free(pool: _core.Pool) -> None:
    small, large = pool.alloc(100), pool.alloc(30 * MIB)
    pool.free(large)
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 32 * MIB
    pool.trim()
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 2 * MIB
    assert _core.device_of(small) == 0


def test_the_memory_fraction_limits_the_pool(pool: _core.Pool) -> None:
    _, total_bytes = _core.memory_info(0)
    pool.set_memory_fraction(64 * MIB / total_bytes)
    assert pool.memory_fraction() == pytest.approx(64 * MIB / total_bytes)
    held = pool.alloc(40 * MIB)
    with pytest.raises((spillover.SpilloverError, RuntimeError), match="memory fraction allows"):
        pool.alloc(30 * MIB)
    pool.free(held)
    # What is cached does not count against the limit: it is used first.
    assert pool.alloc(62 * MIB) != 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(pool: _core.Pool, fraction: float) -> None:
    with pytest.raises(spillover.ConfigError, match="from 0 to 1"):
        pool.set_memory_fraction(fraction)


def test_out_of_memory_says_what_is_held_and_what_to_do(pool: _core.Pool) -> None:
    held = [pool.alloc(8 * MIB) for _ in range(4)]
    pool.free(held[0])
    with pytest.raises(RuntimeError) as caught:
        pool.alloc(1 << 50)
    text = str(caught.value)
    assert isinstance(caught.value, spillover.SpilloverError)
    for part in (
        "device 0 is out of memory",
        "1024.00 TiB requested",
        "24.00 MiB allocated",
        "cached",
        "largest free block",
        "fragmentation is",
        "spillover.offload_activations",
    ):
        assert part in text, text
    assert pool.stats()["num_ooms"] == 1
    pool.check_invariants()


def test_out_of_memory_says_what_was_tried(pool: _core.Pool, cuda: Cuda) -> None:
    pool.configure(f"limit={96 * MIB},wait_max=0", "the tests")
    try:
        stream = cuda.create_stream()
        kept = pool.alloc(20 * MIB)
        pool.free(pool.alloc(16 * MIB))
        with allocator.tag("weights"):
            weights = pool.alloc(8 * MIB)
        busy = pool.alloc(30 * MIB, stream)
        cuda.fill(busy, 30 * MIB, stream)
        pool.free(busy)
        with pytest.raises(spillover.SpilloverError) as caught:
            pool.alloc(80 * MIB)
        text = str(caught.value)
        for part in (
            "28.00 MiB allocated",
            "By tag: untagged 20.00 MiB, 'weights' 8.00 MiB.",
            "Tried: blocks that threads keep",
            "for streams (gave",
            "returning idle memory to the driver",
            "reclaimers (there are none)",
            "The setting 'limit' allows the pool 96.00 MiB; raise it to at least 108.00 MiB",
        ):
            assert part in text, text
        pool.free(kept)
        pool.free(weights)
        cuda.destroy_stream(stream)
    finally:
        pool.configure("limit=none,wait_max=60s", "the tests")


def test_a_limit_that_would_help_is_above_the_one_that_did_not(pool: _core.Pool) -> None:
    pool.configure(f"limit={64 * MIB},wait_max=0", "the tests")
    try:
        # 1.5 MiB each: of those that are freed none covers a page of 2 MiB.
        blocks = [pool.alloc(3 * MIB // 2) for _ in range(40)]
        for block in blocks[::2]:
            pool.free(block)
        with pytest.raises(spillover.SpilloverError) as caught:
            pool.alloc(16 * MIB)
        found = re.search(
            r"allows the pool 64.00 MiB; raise it to at least (\d+)", str(caught.value)
        )
        assert found, str(caught.value)
        pool.configure(f"limit={int(found[1]) * MIB}", "the tests")
        pool.free(pool.alloc(16 * MIB))
        for block in blocks[1::2]:
            pool.free(block)
    finally:
        pool.configure("limit=none,wait_max=60s", "the tests")


def test_a_request_near_the_largest_size_is_refused(pool: _core.Pool) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.alloc(2**64 - 1)


def test_memory_that_waits_for_a_stream_is_used_before_failing(
    pool: _core.Pool, cuda: Cuda
) -> None:
    _, total_bytes = _core.memory_info(0)
    pool.set_memory_fraction(64 * MIB / total_bytes)
    other = cuda.create_stream()
    address = pool.alloc(60 * MIB)
    cuda.fill(address, 4096, other)
    pool.record_stream(address, other)
    pool.free(address)
    assert pool.alloc(60 * MIB) == address
    cuda.destroy_stream(other)


def test_a_use_on_the_default_stream_ends_no_capture(pool: _core.Pool, cuda: Cuda) -> None:
    """An event there would have to wait for the stream that captures, which orders with it."""
    blocking, other = cuda.create_stream(flags=0), cuda.create_stream()
    address = pool.alloc(3 * MIB, other)
    pool.record_stream(address, 0)
    with cuda.capture(blocking) as nodes:
        pool.free(address)
        assert "waiting" in states(pool)
    assert nodes == [0]
    cuda.destroy_stream(blocking)
    cuda.destroy_stream(other)


def test_peaks_and_totals_reset(pool: _core.Pool) -> None:
    pool.free(pool.alloc(MIB))
    pool.reset_peak_stats()
    assert pool.stats()["allocated_bytes"]["all"]["peak"] == 0
    pool.reset_accumulated_stats()
    counters = pool.stats()["allocated_bytes"]["all"]
    assert (counters["allocated"], counters["freed"]) == (0, 0)


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(spillover.ConfigError, match="does not exist"):
        _core.Pool(63)
    with pytest.raises(spillover.ConfigError, match="does not exist"):
        _core.Pool(-1)


def test_abi_version() -> None:
    assert _core.abi_version() == 6

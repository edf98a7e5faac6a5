"""What threads keep for themselves: no memory is lost to it, and no figure is wrong for it."""

from __future__ import annotations

import threading

import pytest
from cuda_calls import Cuda, live_blocks, on_thread

import spillover
from spillover import _core

MIB = 1 << 20


@pytest.mark.parametrize("size", [512, 4096, MIB, 8 * MIB])
def test_a_block_comes_back_by_its_exact_size(pool: _core.Pool, size: int) -> None:
    address = pool.alloc(size)
    pool.free(address)
    assert pool.alloc(size - 100) == address, "it rounds to the same size"


def test_a_kept_block_cannot_be_freed_again(pool: _core.Pool) -> None:
    address = pool.alloc(4096)
    pool.free(address)
    with pytest.raises(spillover.ConfigError, match="not the start of a live block"):
        pool.free(address)
    assert _core.device_of(address) == -1


def test_counters_are_exact_whatever_is_kept(pool: _core.Pool) -> None:
    for _ in range(3):
        blocks = [pool.alloc(5000) for _ in range(10)]
        for block in blocks:
            pool.free(block)
    stats = pool.stats()
    assert stats["allocation"]["all"] == {"current": 0, "peak": 10, "allocated": 30, "freed": 30}
    assert stats["allocated_bytes"]["small_pool"]["peak"] == 10 * 5120
    assert stats["requested_bytes"]["all"]["peak"] == 10 * 5000
    pool.check_invariants()


def test_peaks_count_from_their_reset(pool: _core.Pool) -> None:
    blocks = [pool.alloc(5000) for _ in range(10)]
    for block in blocks:
        pool.free(block)
    pool.reset_peak_stats()
    pool.free(pool.alloc(5000))
    assert pool.stats()["allocation"]["all"]["peak"] == 1


def test_what_one_thread_keeps_serves_another_before_the_pool_grows(pool: _core.Pool) -> None:
    def work() -> None:
        blocks = [pool.alloc(8 * MIB) for _ in range(2)]
        reserved.append(pool.stats()["reserved_bytes"]["all"]["current"])
        for block in blocks:
            pool.free(block)
        # The thread has not ended: what it keeps is taken from it.
        on_thread(lambda: held.append(pool.alloc(16 * MIB)))

    held: list[int] = []
    reserved: list[int] = []
    on_thread(work)
    assert pool.stats()["reserved_bytes"]["all"]["current"] == reserved[0]
    assert live_blocks(pool) == {held[0]: 16 * MIB}


def test_what_one_thread_keeps_serves_another_before_a_larger_block_is_split(
    pool: _core.Pool,
) -> None:
    pair = [pool.alloc(8 * MIB) for _ in range(2)]
    pool.alloc(2 * MIB)  # apart from what follows
    larger = pool.alloc(24 * MIB)
    pool.alloc(2 * MIB)
    pool.free(larger)
    pool.stats()  # what this thread keeps goes to the heap

    def work() -> None:
        pool.free(pool.alloc(4096))  # makes the thread's magazine
        for block in pair:
            pool.free(block)
        on_thread(lambda: served.append(pool.alloc(16 * MIB)))

    served: list[int] = []
    on_thread(work)
    assert served == [pair[0]]


def test_a_thread_that_ends_leaves_nothing_behind(pool: _core.Pool) -> None:
    on_thread(lambda: [pool.free(pool.alloc(size)) for size in (512, 100_000, 3 * MIB)])  # type: ignore[func-returns-value]
    assert pool.largest_free_bytes() >= 3 * MIB
    pool.check_invariants()
    pool.trim()
    assert pool.segments() == []


def test_a_block_freed_by_another_thread_counts_once(pool: _core.Pool) -> None:
    blocks = [pool.alloc(3000) for _ in range(100)]
    for part in range(4):
        on_thread(lambda part=part: [pool.free(b) for b in blocks[part::4]])  # type: ignore[misc]
    stats = pool.stats()["allocation"]["all"]
    assert (stats["current"], stats["peak"], stats["freed"]) == (0, 100, 100)


def test_peaks_of_several_threads_are_never_too_low(pool: _core.Pool) -> None:
    """Two threads hold ten blocks each at the same time."""
    barrier = threading.Barrier(2)

    def work() -> None:
        for _ in range(3):
            blocks = [pool.alloc(5000) for _ in range(10)]
            barrier.wait(10)
            barrier.wait(10)
            for block in blocks:
                pool.free(block)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counter = pool.stats()["allocation"]["all"]
    assert counter["current"] == 0
    assert 20 <= counter["peak"] <= 40
    pool.check_invariants()


def test_a_magazine_is_bounded(pool: _core.Pool) -> None:
    blocks = [pool.alloc(MIB) for _ in range(20)]
    for block in blocks:
        pool.free(block)
    # Kept blocks do not merge; what a full magazine gave back does.
    assert pool.alloc(2 * MIB) != 0
    assert pool.stats()["reserved_bytes"]["all"]["current"] <= 22 * MIB


@pytest.mark.parametrize("every", [0, 1])
def test_checking_the_invariants_leaves_magazines_as_they_are(
    pool: _core.Pool, kept_streams: list[int], every: int
) -> None:
    pool.configure(f"check_every={every}", "the test")
    first, second, noted = (pool.alloc(4096) for _ in range(3))
    pool.free(first)
    pool.free(second)
    pool.check_invariants()
    pool.record_stream(noted, kept_streams[0])
    pool.free(noted)  # It takes the mutex, so that the pool checks itself where it was told to.
    assert pool.alloc(4096) == second, "the block that was freed last; a heap gives the first"


def test_foreign_streams_have_no_magazine(pool: _core.Pool, cuda: Cuda) -> None:
    """Their handle may name another stream the next time: it is looked up each time."""
    stream = cuda.create_stream()
    address = pool.alloc(4096, stream)
    cuda.fill(address, 4096, stream)
    pool.free(address)
    cuda.destroy_stream(stream)
    again = cuda.create_stream()
    assert pool.alloc(4096, again) != address
    cuda.destroy_stream(again)

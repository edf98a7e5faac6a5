"""The pool where the driver chooses the addresses: chunks from cuMemAlloc, each on its own.

Runs on devices without virtual memory: test_pool_without_virtual_memory.py starts it.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cuda_calls import Cuda, live_blocks, wait_for_call

import spillover
from spillover import SpilloverError, _core, allocator, emulator
from spillover.emulator import Fault, faults

pytestmark = pytest.mark.fixed_memory

MIB = 1 << 20
RunEmulated = Callable[..., subprocess.CompletedProcess[str]]


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


@pytest.fixture
def limit() -> Iterator[int]:
    """64 MiB, which the pool may hold at most."""
    allocator.configure(limit=64 * MIB)
    yield 64 * MIB
    allocator.configure(limit=None)


def test_the_device_has_no_virtual_memory(pool: _core.Pool, cuda: Cuda) -> None:
    assert not cuda.has_virtual_memory
    with faults():
        pool.free(pool.alloc(40 * MIB))
        pool.trim()
        calls = emulator.calls()
    assert calls["cuMemAlloc"] == calls["cuMemFree"] == 1
    assert not [name for name in calls if "Map" in name or "MemCreate" in name or "Reserve" in name]


@pytest.mark.parametrize(
    ("size_bytes", "chunk_bytes"),
    [(1, 2), (MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (30 * MIB + 1, 32)],
)
def test_small_and_medium_requests_share_chunks(
    pool: _core.Pool, size_bytes: int, chunk_bytes: int
) -> None:
    pool.alloc(size_bytes)
    assert reserved_bytes(pool) == chunk_bytes * MIB


def test_a_chunk_of_the_exact_size_is_taken_where_a_shared_one_has_no_room(
    pool: _core.Pool, limit: int
) -> None:
    pool.alloc(limit - 6 * MIB)
    assert pool.alloc(5 * MIB)
    assert reserved_bytes(pool) == limit
    pool.check_invariants()


def test_chunks_that_are_neighbours_stay_apart(pool: _core.Pool) -> None:
    """Each is an allocation of its own for the driver, which takes back only whole ones."""
    blocks = sorted(pool.alloc(12 * MIB) for _ in range(6))
    neighbours = [a for a, b in itertools.pairwise(blocks) if b - a == 12 * MIB]
    assert neighbours, "the driver gave no two chunks side by side"
    for block in blocks:
        pool.free(block)
    assert pool.largest_free_bytes() == 12 * MIB
    assert sorted(segment["address"] for segment in pool.segments()) == blocks
    pool.check_invariants()
    # A block that would span two chunks comes from a new one.
    assert pool.alloc(24 * MIB)
    assert reserved_bytes(pool) == (6 * 12 + 24) * MIB
    # Live blocks in every other chunk: the chunks between them go one by one.
    kept = {pool.alloc(12 * MIB) for _ in range(3)}
    pool.trim()
    assert {segment["address"] for segment in pool.segments()} >= kept
    assert reserved_bytes(pool) == (3 * 12 + 24) * MIB
    pool.check_invariants()


def test_a_small_request_does_not_take_a_large_chunk_from_another_stream(
    pool: _core.Pool, kept_streams: list[int]
) -> None:
    """One small block would keep all of it."""
    first, second, _ = kept_streams
    pool.free(pool.alloc(200 * MIB, first))
    pool.alloc(512, second)
    pool.alloc(3 * MIB, second)
    assert pool.alloc(200 * MIB, first)
    assert reserved_bytes(pool) == (200 + 20 + 2) * MIB


def test_a_chunk_of_a_similar_size_changes_hands(pool: _core.Pool, kept_streams: list[int]) -> None:
    first, second, _ = kept_streams
    address = pool.alloc(40 * MIB, first)
    pool.free(address)
    assert pool.alloc(30 * MIB, second) == address
    (segment,) = pool.segments()
    assert (segment["stream"], segment["size_bytes"]) == (second, 40 * MIB)
    pool.check_invariants()


def test_a_chunk_with_a_live_block_stays_with_its_stream(
    pool: _core.Pool, kept_streams: list[int]
) -> None:
    first, second, _ = kept_streams
    blocks = [pool.alloc(8 * MIB, first) for _ in range(2)]  # of one chunk
    pool.free(blocks[0])
    pool.alloc(8 * MIB, second)
    assert reserved_bytes(pool) == 40 * MIB
    pool.check_invariants()


def test_busy_chunks_stay_until_their_work_is_done(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int], limit: int
) -> None:
    first, second, _ = kept_streams
    busy = pool.alloc(20 * MIB, first)
    cuda.fill(busy, 20 * MIB, first)
    pool.free(busy)
    assert pool.alloc(20 * MIB, second) != busy
    # Within the limit there is room for this one once the busy chunk has gone.
    assert pool.alloc(40 * MIB, second)
    assert reserved_bytes(pool) == 60 * MIB
    pool.check_invariants()


def test_chunks_of_the_wrong_size_go_before_a_request_fails(pool: _core.Pool, limit: int) -> None:
    for size in (20 * MIB, 12 * MIB, 100, 5 * MIB):
        pool.free(pool.alloc(size))
    assert pool.alloc(limit)
    assert reserved_bytes(pool) == limit
    assert pool.stats()["num_ooms"] == 0
    pool.check_invariants()


def test_trim_keeps_no_chunk_because_it_is_too_large(pool: _core.Pool) -> None:
    live = pool.alloc(60 * MIB)
    pool.free(pool.alloc(8 * MIB))
    pool.trim(79 * MIB)
    assert reserved_bytes(pool) == 60 * MIB
    pool.free(live)


def test_an_address_that_the_driver_gives_again_is_a_new_block(pool: _core.Pool) -> None:
    seen: set[int] = set()
    for size in (12 * MIB, 700, 3 * MIB, 12 * MIB, MIB, 9 * MIB):
        address = pool.alloc(size)
        assert live_blocks(pool) == {address: (size + 511) // 512 * 512}
        seen.add(address)
        pool.free(address)
        with pytest.raises(spillover.ConfigError, match="not the start of a live block"):
            pool.free(address)
        pool.trim()
        assert _core.device_of(address) == -1
    assert len(seen) < 6, "no address came twice"


def test_memory_is_taken_and_given_while_another_stream_captures(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
) -> None:
    pool.alloc(100)
    with cuda.capture(kept_streams[0]):
        pool.alloc(40 * MIB, kept_streams[1])
        pool.free(pool.alloc(3 * MIB, kept_streams[1]))


def test_the_pool_serves_others_while_the_driver_takes_a_chunk_back(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int], limit: int
) -> None:
    """cuMemFree waits for all streams, and they may wait for a thread that needs memory."""
    go = threading.Event()
    pool.free(pool.alloc(40 * MIB))
    with faults(), cuda.host_function(kept_streams[0], lambda: go.wait(30)):
        thread = threading.Thread(target=lambda: pool.alloc(60 * MIB))
        thread.start()
        wait_for_call("cuMemFree")
        address = pool.alloc(100)
        pool.check_invariants()
        pool.free(address)
        go.set()
        thread.join()
    assert reserved_bytes(pool) == (60 + 2) * MIB


def test_nobody_fails_for_memory_that_another_thread_gives_back(run_emulated: RunEmulated) -> None:
    run_emulated(
        """
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from cuda_calls import Cuda, wait_for_call
        from spillover import _core, allocator
        from spillover.emulator import faults

        MIB = 1 << 20
        cuda, pool = Cuda(), _core.Pool(0)
        stream = cuda.create_stream()
        go = threading.Event()
        pool.alloc(20 * MIB)
        pool.free(pool.alloc(40 * MIB))
        with faults(), cuda.host_function(stream, lambda: go.wait(30)):
            thread = threading.Thread(target=lambda: allocator.configure(limit="32MiB"))
            thread.start()  # gives 40 MiB back, for which the driver waits for the stream
            wait_for_call("cuMemFree")
            threading.Timer(0.1, go.set).start()
            assert pool.alloc(12 * MIB)
            thread.join()
        """,
        str(Path(__file__).parent),
        vram="64MiB",
    )


class TestFaults:
    def test_a_chunk_whose_release_failed_is_held_no_longer(self, pool: _core.Pool) -> None:
        held = [pool.alloc(32 * MIB) for _ in range(3)]
        pool.free(held[0])
        pool.free(held[2])
        # The driver has taken the first, and says otherwise; the second goes all the same.
        with faults(Fault("cuMemFree", call=1)), pytest.raises(SpilloverError, match="cuMemFree"):
            pool.trim()
        assert reserved_bytes(pool) == 32 * MIB
        pool.check_invariants()
        pool.free(held[1])
        pool.trim()
        assert pool.segments() == []
        assert pool.alloc(32 * MIB)

    def test_a_request_whose_release_failed_can_be_tried_again(
        self, pool: _core.Pool, limit: int
    ) -> None:
        pool.free(pool.alloc(40 * MIB))
        pool.free(pool.alloc(100))
        with faults(Fault("cuMemFree", call=1)), pytest.raises(SpilloverError, match="cuMemFree"):
            pool.alloc(60 * MIB)
        pool.check_invariants()
        assert pool.alloc(60 * MIB)

    def test_a_device_that_is_full_is_not_an_error(self, pool: _core.Pool) -> None:
        """The driver has less than it said: what is idle goes back, and the request is served."""
        pool.free(pool.alloc(40 * MIB))
        with faults(Fault("cuMemAlloc", call=1, error="CUDA_ERROR_OUT_OF_MEMORY")):
            assert pool.alloc(60 * MIB)
        assert pool.stats()["num_ooms"] == 0
        pool.check_invariants()


def test_random_calls_on_several_streams(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int], limit: int
) -> None:
    """Under a limit that is met often: chunks change hands, come and go."""
    generator = random.Random(3)
    live: list[int] = []
    for step in range(600):
        choice = generator.random()
        stream = generator.choice([0, *kept_streams])
        if choice < 0.55:
            size = generator.choice([512, 90_000, MIB, 2 * MIB, 7 * MIB, 11 * MIB, 24 * MIB])
            try:
                live.append(pool.alloc(size, stream))
            except RuntimeError:
                assert pool.stats()["allocated_bytes"]["all"]["current"] > 0
                continue
            cuda.fill(live[-1], min(size, 4096), stream)
        elif choice < 0.97 and live:
            pool.free(live.pop(generator.randrange(len(live))))
        else:
            pool.trim(generator.choice([0, 30 * MIB]))
        assert reserved_bytes(pool) <= limit
        if step % 10 == 0:
            pool.check_invariants()


def test_memory_at_fixed_addresses_cannot_sleep(pool: _core.Pool) -> None:
    with allocator.tag("weights"):
        pool.alloc(4 * MIB)
    with pytest.raises(spillover.ConfigError, match="no virtual memory"):
        allocator.sleep("weights")
    assert allocator.wake() == 0
    pool.check_invariants()

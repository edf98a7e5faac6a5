"""Where the pool takes memory from when no free block fits."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from cuda_calls import Cuda

from spillover import _core
from spillover.emulator import call_bytes, faults

MIB = 1 << 20


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


@pytest.fixture
def limit(pool: _core.Pool) -> Iterator[int]:
    """64 MiB, which the pool may hold at most."""
    _, total_bytes = _core.memory_info(0)
    pool.set_memory_fraction(64 * MIB / total_bytes)
    yield 64 * MIB
    pool.set_memory_fraction(1.0)


@pytest.mark.virtual_memory
def test_a_segment_grows_behind_its_last_free_block(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    # In a process of its own: what other tests leave of the addresses has gaps.
    run_emulated(
        """
        from spillover import _core

        MIB = 1 << 20
        pool = _core.Pool(0)
        held = pool.alloc(8 * MIB)
        pool.free(pool.alloc(8 * MIB))
        assert pool.alloc(20 * MIB) == held + 8 * MIB
        assert pool.stats()["reserved_bytes"]["all"]["current"] == 28 * MIB
        assert len(pool.segments()) == 1
        """
    )


@pytest.mark.virtual_memory
def test_a_large_block_is_put_together_from_idle_pieces(pool: _core.Pool, limit: int) -> None:
    pieces = [pool.alloc(4 * MIB) for _ in range(limit // (4 * MIB))]
    for piece in pieces[::2]:
        pool.free(piece)
    assert pool.largest_free_bytes() == 4 * MIB
    assert pool.alloc(32 * MIB) != 0
    assert reserved_bytes(pool) == limit
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_idle_pieces_are_used_before_more_is_taken(pool: _core.Pool) -> None:
    pieces = [pool.alloc(4 * MIB) for _ in range(16)]
    for piece in pieces[::2]:
        pool.free(piece)
    pool.alloc(40 * MIB)
    assert reserved_bytes(pool) == 64 * MIB + 8 * MIB
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_pieces_that_are_in_use_are_not_unmapped(pool: _core.Pool, cuda: Cuda) -> None:
    pieces = [pool.alloc(4 * MIB) for _ in range(16)]
    for piece in pieces[::2]:
        cuda.fill(piece, 4 * MIB, 0)
        pool.free(piece)
    pool.alloc(40 * MIB)
    assert reserved_bytes(pool) == 64 * MIB + 40 * MIB
    cuda.synchronize()


@pytest.mark.virtual_memory
def test_pieces_that_are_in_use_are_waited_for_before_failing(
    pool: _core.Pool, cuda: Cuda, limit: int
) -> None:
    pieces = [pool.alloc(4 * MIB) for _ in range(limit // (4 * MIB))]
    for piece in pieces[::2]:
        cuda.fill(piece, 4 * MIB, 0)
        pool.free(piece)
    assert pool.alloc(32 * MIB) != 0
    assert pool.stats()["num_alloc_retries"] == 1


@pytest.mark.virtual_memory
def test_unmapped_memory_is_kept_for_the_next_growth(pool: _core.Pool) -> None:
    pieces = [pool.alloc(4 * MIB) for _ in range(8)]
    for piece in pieces[::2]:
        pool.free(piece)
    address = pool.alloc(16 * MIB)
    pool.free(address)
    assert pool.alloc(24 * MIB) == address
    assert reserved_bytes(pool) == 40 * MIB


def test_small_blocks_keep_no_large_hole_apart(pool: _core.Pool) -> None:
    large = pool.alloc(8 * MIB)
    pool.alloc(512)
    pool.free(large)
    assert pool.alloc(8 * MIB) == large


@pytest.mark.virtual_memory
def test_free_blocks_on_both_sides_of_a_gap_are_joined(pool: _core.Pool) -> None:
    first, second, third, _ = (pool.alloc(8 * MIB) for _ in range(4))
    pool.free(second)
    pool.alloc(16 * MIB)  # takes the second one's chunks: a gap is left there
    pool.free(first)
    pool.free(third)
    with faults():
        assert pool.alloc(24 * MIB) == first
        assert call_bytes()["cuMemMap"] == 8 * MIB, "only the gap is mapped"
        assert "cuMemUnmap" not in call_bytes()
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_a_block_without_room_keeps_no_other_from_growing(pool: _core.Pool) -> None:
    first, second, _ = (pool.alloc(size * MIB) for size in (16, 8, 8))
    pool.free(second)
    pool.alloc(16 * MIB)  # takes the second one's chunks: a gap of 8 MiB is left there
    last = pool.alloc(12 * MIB)
    pool.free(first)
    pool.free(last)
    with faults():
        assert pool.alloc(28 * MIB) == last
        assert call_bytes()["cuMemMap"] == 16 * MIB, "only what is missing is mapped"
    pool.check_invariants()


SPARE = """
import spillover.emulator

spillover.emulator.enable(vram="8GiB", poison=False)

from spillover import _core
from spillover.emulator import Fault, call_bytes, faults

MIB = 1 << 20
pool = _core.Pool(0)


def half_idle(count):
    pieces = [pool.alloc(8 * MIB) for _ in range(count)]
    for piece in pieces[::2]:
        pool.free(piece)
    return pieces[1::2]


def reserved_mib():
    return pool.stats()["reserved_bytes"]["all"]["current"] // MIB


blocks = [pool.alloc(4096 * MIB), *half_idle(9)]
with faults():
"""


class TestSpareChunks:
    """The pool may hold 1/256 more than was ever in use before it moves idle chunks."""

    def test_a_few_new_chunks_save_moving_idle_ones(self, run_python: Callable[..., str]) -> None:
        run_python(
            SPARE
            + """
    blocks.append(pool.alloc(24 * MIB))
    assert call_bytes()["cuMemCreate"] == 8 * MIB, "what is missing behind the last piece"
    assert "cuMemUnmap" not in call_bytes()
    blocks.append(pool.alloc(24 * MIB))
    assert call_bytes()["cuMemCreate"] == 16 * MIB, "more would be too much"
    assert call_bytes()["cuMemUnmap"] == 16 * MIB
    assert reserved_mib() == 4096 + 80 + 16
"""
        )

    def test_idle_chunks_are_moved_where_the_driver_has_no_more(
        self, run_python: Callable[..., str]
    ) -> None:
        run_python(
            SPARE.replace("faults()", 'faults(Fault("cuMemCreate", times=None))')
            + """
    blocks.append(pool.alloc(24 * MIB))
    assert call_bytes()["cuMemUnmap"] == 8 * MIB
    assert reserved_mib() == 4096 + 80
    assert pool.stats()["num_alloc_retries"] == 0
"""
        )

    def test_a_peak_before_a_trim_does_not_count(self, run_python: Callable[..., str]) -> None:
        run_python(
            SPARE
            + """
    for block in blocks:
        pool.free(block)
    pool.trim()
    half_idle(16)
    pool.alloc(72 * MIB)
    assert reserved_mib() == 128 + 8
"""
        )


def test_a_small_heap_grows_by_no_more_than_it_needs(pool: _core.Pool) -> None:
    pool.alloc(64 * MIB)
    for _ in range(5):
        pool.alloc(MIB)
    assert pool.stats()["reserved_bytes"]["small_pool"]["current"] == 6 * MIB


class TestOtherStreams:
    @pytest.mark.virtual_memory
    def test_idle_memory_changes_hands_where_it_lies(
        self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = pool.alloc(8 * MIB, first)
        cuda.fill(address, 8 * MIB, first)
        pool.free(address)
        cuda.synchronize()
        assert pool.alloc(6 * MIB, second) == address
        assert reserved_bytes(pool) == 8 * MIB
        (start, rest) = pool.segments()
        assert (start["stream"], start["size_bytes"]) == (second, 6 * MIB)
        assert (rest["stream"], rest["size_bytes"]) == (first, 2 * MIB)

    def test_memory_comes_back_together(
        self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = pool.alloc(16 * MIB, first)
        pool.free(address)
        assert pool.alloc(14 * MIB, second) == address
        pool.free(address)
        assert pool.alloc(16 * MIB, first) != 0
        assert reserved_bytes(pool) == 16 * MIB

    def test_busy_memory_stays_with_its_stream(
        self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = pool.alloc(8 * MIB, first)
        cuda.fill(address, 8 * MIB, first)
        pool.free(address)
        assert pool.alloc(8 * MIB, second) != address
        cuda.synchronize()

    def test_busy_memory_is_waited_for_before_failing(
        self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int], limit: int
    ) -> None:
        first, second, _ = kept_streams
        address = pool.alloc(limit, first)
        cuda.fill(address, limit, first)
        pool.free(address)
        assert pool.alloc(limit, second) != 0
        assert reserved_bytes(pool) == limit

    def test_two_gigabytes_on_each_of_32_streams_take_two_gigabytes(
        self, pool: _core.Pool, cuda: Cuda
    ) -> None:
        # Scaled down: 2 x 16 MiB on fresh streams, which nobody promises to keep.
        for _ in range(32):
            stream = cuda.create_stream()
            blocks = [pool.alloc(16 * MIB, stream) for _ in range(2)]
            for block in blocks:
                cuda.fill(block, 4096, stream)
            for block in blocks:
                pool.free(block)
            cuda.destroy_stream(stream)
        # Foreign streams may hold up to 256 MiB before the device is waited for.
        assert reserved_bytes(pool) <= (256 + 2 * 32) * MIB

    def test_foreign_memory_is_waited_for_before_failing(
        self, pool: _core.Pool, cuda: Cuda, limit: int
    ) -> None:
        stream = cuda.create_stream()
        address = pool.alloc(limit, stream)
        cuda.fill(address, limit, stream)
        cuda.destroy_stream(stream)
        pool.free(address)
        assert pool.alloc(limit) != 0
        assert reserved_bytes(pool) == limit

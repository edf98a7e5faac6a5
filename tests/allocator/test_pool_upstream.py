"""Private arenas whose memory comes from another allocator's functions."""

from __future__ import annotations

import ctypes
import threading

import pytest
from cuda_calls import Cuda, live_blocks, on_thread
from upstream import ALLOC, DONE, FREE, Upstream

import spillover
from spillover import _core, allocator

MIB = 1 << 20
INVALID_ARGUMENT = 1


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


def test_memory_goes_back_where_it_came_from(pool: _core.Pool, cuda: Cuda) -> None:
    upstream = Upstream(cuda)
    first = pool.alloc_in(upstream.arena, 3 * MIB)
    second = pool.alloc_in(upstream.arena, 1000)
    assert upstream.sizes() == [2 * MIB, 20 * MIB]
    assert reserved_bytes(pool) == 22 * MIB
    assert upstream.holds(first)
    assert upstream.holds(second)
    pool.check_invariants()
    pool.free(first)
    assert pool.alloc_in(upstream.arena, 12 * MIB) == first
    pool.trim()
    assert len(upstream.live) == 2
    pool.release_arena(upstream.arena)
    pool.free(first)
    pool.check_invariants()
    # Idle memory of the arena serves nobody.
    assert not upstream.holds(pool.alloc(16 * MIB))
    pool.trim_arena(upstream.arena)
    assert upstream.sizes() == [2 * MIB]
    assert not upstream.done_count
    pool.free(second)
    pool.trim()
    upstream.check_ended()
    pool.check_invariants()


def test_each_stream_has_its_own(pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> None:
    upstream = Upstream(cuda)
    streams = [0, *kept_streams[:2]]
    blocks = [pool.alloc_in(upstream.arena, 30 * MIB, stream) for stream in streams]
    assert upstream.asked == [(30 * MIB, stream) for stream in streams]
    # A use on another stream is waited for, also at the end.
    cuda.fill(blocks[0], 30 * MIB, 0)
    cuda.order(0, streams[1])
    cuda.fill(blocks[0], 30 * MIB, streams[1])
    pool.record_stream(blocks[0], streams[1])
    for block in blocks:
        pool.free(block)
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()


def test_a_request_when_memory_has_run_out(pool: _core.Pool, cuda: Cuda) -> None:
    """What is idle of a released arena goes back for anybody's request."""
    upstream = Upstream(cuda)
    pool.free(pool.alloc_in(upstream.arena, 30 * MIB))
    pool.release_arena(upstream.arena)
    pool.configure("limit=40MiB", "the test")
    assert pool.alloc(30 * MIB) != 0
    upstream.check_ended()
    pool.configure("limit=none", "the test")


def test_an_upstream_without_memory_is_asked_again_when_memory_went_back(
    pool: _core.Pool, cuda: Cuda
) -> None:
    upstream = Upstream(cuda, before_alloc=lambda _: reserved_bytes(pool) == 0)
    pool.free(pool.alloc(40 * MIB))
    address = pool.alloc_in(upstream.arena, 32 * MIB)
    assert upstream.asked == [(32 * MIB, 0)] * 2
    pool.free(address)
    with pytest.raises(spillover.SpilloverError, match="gave no memory"):
        pool.alloc_in(upstream.arena, 64 * MIB)
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()


def test_a_smaller_chunk_where_there_is_no_larger_one(pool: _core.Pool, cuda: Cuda) -> None:
    upstream = Upstream(cuda, before_alloc=lambda size_bytes: size_bytes < 20 * MIB)
    pool.alloc_in(upstream.arena, 5 * MIB)
    assert upstream.sizes() == [6 * MIB]
    pool.release_arena(upstream.arena)


def test_whole_blocks_have_chunks_of_their_own(pool: _core.Pool, cuda: Cuda) -> None:
    upstream = Upstream(cuda)
    pool.set_arena_options(upstream.arena, is_whole=True)
    pool.alloc_in(upstream.arena, 1000)
    pool.alloc_in(upstream.arena, 1000)
    assert upstream.sizes() == [2 * MIB, 2 * MIB]
    pool.release_arena(upstream.arena)


def test_reclaimers_give_it_memory(pool: _core.Pool, cuda: Cuda) -> None:
    held = [pool.alloc(40 * MIB)]
    upstream = Upstream(cuda, before_alloc=lambda _: reserved_bytes(pool) == 0)

    def reclaim(_size_bytes: int, _stream: int) -> int:
        for address in held:
            pool.free(address)
        held.clear()
        return 40 * MIB

    with allocator.add_reclaimer(reclaim):
        assert upstream.holds(pool.alloc_in(upstream.arena, 30 * MIB))
    pool.release_arena(upstream.arena)


def test_the_limit_is_one_for_everything(pool: _core.Pool, cuda: Cuda) -> None:
    """Also while the function runs, which asks the pool for more than is left."""
    refused: list[str] = []

    def ask(_size_bytes: int) -> bool:
        with pytest.raises(spillover.SpilloverError, match="out of memory") as error:
            pool.alloc(16 * MIB)
        refused.append(str(error.value))
        return True

    pool.configure("limit=40MiB", "the test")
    upstream = Upstream(cuda, before_alloc=ask)
    pool.alloc_in(upstream.arena, 30 * MIB)
    assert len(refused) == 1
    with pytest.raises(spillover.SpilloverError, match="limit"):
        pool.alloc_in(upstream.arena, 12 * MIB)
    assert len(upstream.asked) == 1
    pool.configure("limit=none", "the test")
    pool.release_arena(upstream.arena)
    assert upstream.failures == []


def test_addresses_between_multiples_of_512(pool: _core.Pool, cuda: Cuda) -> None:
    """A little more is asked for, so that blocks can begin at multiples."""
    upstream = Upstream(cuda, offset=256)
    blocks = [pool.alloc_in(upstream.arena, size) for size in (1000, 30 * MIB, 31 * MIB)]
    assert all(block % 512 == 0 for block in blocks)
    assert upstream.sizes() == [2 * MIB + 512, 30 * MIB + 512, 32 * MIB + 512]
    assert [size for size, _ in upstream.asked].count(2 * MIB) == 1
    assert len(upstream.asked) == 4, "it is known after the first time"
    for block in blocks:
        cuda.fill(block, 1000, 0)
        pool.free(block)
    pool.check_invariants()
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()


def test_memory_that_the_pool_holds_already_is_refused(pool: _core.Pool) -> None:
    taken: list[int] = []
    given_back: list[int] = []
    done: list[bool] = []

    def alloc(_: int | None, size_bytes: int, stream: int | None) -> int:
        taken.append(pool.alloc(size_bytes))
        return taken[-1]

    functions = (
        ALLOC(alloc),
        FREE(lambda _, pointer, size_bytes: given_back.append(pointer)),
        DONE(lambda _: done.append(True)),
    )
    library = Upstream.library()
    arena = ctypes.c_uint32()
    make = library.spillover_make_arena_from
    assert make(0, *functions, None, ctypes.byref(arena)) == 0
    with pytest.raises(spillover.StateError, match="holds already"):
        pool.alloc_in(arena.value, 1000)
    assert taken == given_back
    assert len(taken) == 1
    pool.check_invariants()
    pool.release_arena(arena.value)
    pool.trim()
    assert done == [True]
    # Without a function nothing is made, and nothing is done with it.
    library.spillover_last_error.restype = ctypes.c_char_p
    for missing in (0, 1):
        some = [*functions]
        some[missing] = type(some[missing])()
        assert make(0, *some, None, ctypes.byref(arena)) == INVALID_ARGUMENT
        assert b"must not be null" in library.spillover_last_error()
    assert make(63, *functions, None, ctypes.byref(arena)) == INVALID_ARGUMENT
    assert done == [True]


@pytest.mark.parametrize("address", [1 << 60, (1 << 52) - MIB, (1 << 64) - 512, (1 << 64) - 1])
def test_what_is_no_device_memory_is_refused(pool: _core.Pool, cuda: Cuda, address: int) -> None:
    taken: list[int] = []
    upstream = Upstream(cuda, source=(lambda _: address, taken.append))
    for _ in range(2):
        with pytest.raises(spillover.StateError, match="where device memory does not lie"):
            pool.alloc_in(upstream.arena, 1000)
        pool.check_invariants()
    assert set(taken) == {address}
    assert reserved_bytes(pool) == 0
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()


def test_the_functions_may_call_the_pool(pool: _core.Pool, cuda: Cuda) -> None:
    """They run without a lock; one that gives memory back does not wait for itself."""
    pool.configure("wait_max=3600s", "the test")
    another = Upstream(cuda)
    pool.free(pool.alloc_in(another.arena, 30 * MIB))
    seen: list[int] = []

    def end_the_other() -> None:
        if not seen:
            seen.append(reserved_bytes(pool))
            pool.release_arena(another.arena)
            pool.trim_arena(another.arena)

    upstream = Upstream(cuda, before_free=end_the_other)
    pool.free(pool.alloc_in(upstream.arena, 30 * MIB))
    pool.release_arena(upstream.arena)
    pool.trim_arena(upstream.arena)
    assert seen == [30 * MIB]
    upstream.check_ended()
    another.check_ended()
    pool.configure("wait_max=60s", "the test")


def test_an_arena_that_is_released_while_its_upstream_is_asked(
    pool: _core.Pool, cuda: Cuda
) -> None:
    def end(_size_bytes: int) -> bool:
        on_thread(lambda: pool.release_arena(upstream.arena))
        on_thread(pool.trim)
        return True

    upstream = Upstream(cuda, before_alloc=end)
    with pytest.raises(spillover.ConfigError, match="released before"):
        pool.alloc_in(upstream.arena, 1000)
    upstream.check_ended()
    pool.check_invariants()


def test_other_threads_go_on_while_an_upstream_is_asked(pool: _core.Pool, cuda: Cuda) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def wait(_size_bytes: int) -> bool:
        asked.set()
        return go_on.wait(60)

    upstream = Upstream(cuda, before_alloc=wait)
    thread = threading.Thread(target=pool.alloc_in, args=(upstream.arena, 30 * MIB))
    thread.start()
    assert asked.wait(60)
    pool.free(pool.alloc(5 * MIB))
    pool.check_invariants()
    go_on.set()
    thread.join()
    assert upstream.sizes() == [30 * MIB]
    pool.release_arena(upstream.arena)


def test_a_graph_that_is_recorded_gets_memory(pool: _core.Pool, cuda: Cuda) -> None:
    upstream = Upstream(cuda)
    stream = cuda.create_stream()
    with cuda.capture(stream):
        block = pool.alloc_in(upstream.arena, 5 * MIB, stream)
        cuda.fill(block, 5 * MIB, stream)
        pool.free(block)
        assert pool.alloc_in(upstream.arena, 5 * MIB, stream) == block
        pool.free(block)
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()
    cuda.destroy_stream(stream)


def test_blocks_that_are_restored(pool: _core.Pool, cuda: Cuda) -> None:
    upstream = Upstream(cuda)
    kept = [pool.alloc_in(upstream.arena, size) for size in (1000, 5 * MIB)]
    checkpoint = list(live_blocks(pool).items())
    for address in kept:
        pool.free(address)
    later = pool.alloc_in(upstream.arena, 9 * MIB)
    pool.restore_arena(upstream.arena, checkpoint)
    assert later == kept[1]
    assert len(upstream.live) == 2
    for address in kept:
        pool.free(address)
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()


@pytest.mark.virtual_memory
def test_a_tag_sleeps_without_it(pool: _core.Pool, cuda: Cuda) -> None:
    """The memory is its owner's: it stays, serves and goes back while the tag sleeps."""
    host = _core.HostPool(limit_bytes=64 * MIB)
    tag = _core.tag_number("with an upstream")
    with allocator.tag("with an upstream"):
        upstream = Upstream(cuda)
        pool.alloc(5 * MIB)
    block = pool.alloc_in(upstream.arena, 30 * MIB)
    for tags in ([tag], [tag, 0]):
        assert pool.sleep(tags, host) == (5 * MIB if tags == [tag] else 0)
        pool.check_invariants()
        assert reserved_bytes(pool) == 30 * MIB
        cuda.fill(block, 30 * MIB, 0)
        pool.free(block)
        assert pool.alloc_in(upstream.arena, 30 * MIB) == block
    more = pool.alloc_in(upstream.arena, 25 * MIB)
    pool.free(more)
    pool.free(block)
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()
    pool.check_invariants()
    pool.wake([tag, 0])


@pytest.mark.virtual_memory
def test_chunks_at_both_sides(pool: _core.Pool, cuda: Cuda) -> None:
    """What the pool maps and what it was given stand side by side."""
    upstream = Upstream(cuda)
    blocks = []
    for _ in range(4):
        blocks.append(pool.alloc_in(upstream.arena, 21 * MIB))
        blocks.append(pool.alloc(21 * MIB))
        pool.check_invariants()
    for block in blocks:
        pool.free(block)
    pool.free(pool.alloc(80 * MIB))
    pool.check_invariants()
    assert upstream.sizes() == [22 * MIB] * 4
    pool.release_arena(upstream.arena)
    pool.trim()
    upstream.check_ended()

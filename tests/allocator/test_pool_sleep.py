"""Sleep: memory of a tag goes to the driver and comes back at its addresses, with its contents."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from cuda_calls import Cuda, on_thread, wait_for_call

import spillover
from spillover import _core, allocator, emulator
from spillover.emulator import Fault, faults

MIB = 1 << 20

pytestmark = pytest.mark.virtual_memory


@pytest.fixture
def host() -> _core.HostPool:
    return _core.HostPool(limit_bytes=256 * MIB)


class Blocks:
    """Blocks with contents that are known and can be looked at."""

    def __init__(self, pool: _core.Pool, cuda: Cuda, tag: str) -> None:
        self.pool, self.cuda = pool, cuda
        self.tag = tag
        self.number = _core.tag_number(tag)
        self.live: dict[int, tuple[int, int]] = {}
        self._host = cuda.pin(48 * MIB)

    def close(self) -> None:
        self.cuda.unpin(self._host)

    def add(self, size_bytes: int, stream: int = 0) -> int:
        with allocator.tag(self.tag):
            address = self.pool.alloc(size_bytes, stream)
        value = random.randrange(1, 255)
        self.live[address] = (size_bytes, value)
        self.cuda.fill(address, size_bytes, stream, value)
        return address

    def free(self, address: int) -> None:
        self.pool.free(address)
        del self.live[address]

    def check(self) -> None:
        for address, (size_bytes, value) in self.live.items():
            self.cuda.read(self._host, address, size_bytes, 0)
            self.cuda.synchronize()
            assert ctypes.string_at(self._host, size_bytes) == bytes([value]) * size_bytes

    def stats(self) -> dict[str, int]:
        return dict(allocator.tag_stats(self.tag))


@pytest.fixture
def weights(pool: _core.Pool, cuda: Cuda) -> Iterator[Blocks]:
    blocks = Blocks(pool, cuda, "weights")
    yield blocks
    pool.wake(pool.sleeping_tags())
    blocks.close()


def fill_with(blocks: Blocks, sizes: tuple[int, ...] = (512, 5000, MIB, 3 * MIB, 40 * MIB)) -> None:
    for size_bytes in sizes:
        blocks.add(size_bytes)


def test_contents_come_back_at_their_addresses(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    live_bytes = weights.stats()["allocated_bytes"]
    reserved = pool.stats()["reserved_bytes"]["all"]["current"]
    free_before = _core.memory_info(0)[0]
    assert pool.sleep([weights.number], host) == live_bytes
    pool.check_invariants()
    assert pool.stats()["reserved_bytes"]["all"]["current"] == 0
    assert _core.memory_info(0)[0] == free_before + reserved
    stats = weights.stats()
    assert (stats["allocated_bytes"], stats["reserved_bytes"]) == (live_bytes, 0)
    assert (stats["asleep_bytes"], stats["saved_bytes"]) == (reserved, live_bytes)
    assert {segment["is_asleep"] for segment in pool.segments()} == {True}
    assert host.stats().used_bytes >= live_bytes
    assert pool.wake([weights.number]) == live_bytes
    pool.check_invariants()
    assert host.stats().used_bytes == 0
    stats = weights.stats()
    assert (stats["reserved_bytes"], stats["asleep_bytes"], stats["saved_bytes"]) == (
        reserved,
        0,
        0,
    )
    weights.check()


def test_many_times_with_changes_between(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool, kept_streams: list[int]
) -> None:
    generator = random.Random(3)
    for _ in range(6):
        for _ in range(20):
            size_bytes = generator.choice((512, 4096, MIB, 3 * MIB, 9 * MIB))
            weights.add(size_bytes, generator.choice([0, *kept_streams]))
        for address in generator.sample(sorted(weights.live), 14):
            weights.free(address)
        pool.sleep([weights.number], host)
        for address in generator.sample(sorted(weights.live), 3):
            weights.free(address)
        pool.check_invariants()
        pool.wake([weights.number])
        pool.check_invariants()
        weights.check()


def test_twice_is_once(pool: _core.Pool, weights: Blocks, host: _core.HostPool) -> None:
    fill_with(weights)
    assert pool.wake([weights.number]) == 0
    assert pool.sleep([weights.number, weights.number], host) > 0
    assert pool.sleep([weights.number], None) == 0, "it sleeps already, and keeps its contents"
    assert pool.wake([weights.number]) > 0
    assert pool.wake([weights.number]) == 0
    weights.check()


def test_discarded_contents_cost_no_host_memory(pool: _core.Pool, weights: Blocks) -> None:
    address = weights.add(40 * MIB)
    assert pool.sleep([weights.number], None) == 0
    assert weights.stats()["saved_bytes"] == 0
    assert weights.stats()["asleep_bytes"] == 40 * MIB
    assert pool.wake([weights.number]) == 0
    weights.cuda.fill(address, 40 * MIB, 0, weights.live[address][1])
    weights.check()


def test_other_tags_work_on(pool: _core.Pool, weights: Blocks, host: _core.HostPool) -> None:
    cache = Blocks(pool, weights.cuda, "cache")
    fill_with(weights)
    fill_with(cache)
    pool.sleep([weights.number], host)
    cache.add(9 * MIB)
    cache.free(next(iter(cache.live)))
    pool.trim()
    pool.check_invariants()
    cache.check()
    pool.sleep([cache.number], host)
    pool.wake([weights.number])
    weights.check()
    pool.wake([cache.number])
    cache.check()
    cache.close()


def test_allocations_with_the_tag_say_that_it_sleeps(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    for size_bytes in (512, 5000, 3 * MIB):
        weights.free(weights.add(size_bytes))  # into the thread's magazine
    pool.sleep([weights.number], host)
    for size_bytes in (512, 5000, 3 * MIB):
        with (
            allocator.tag("weights"),
            pytest.raises(spillover.StateError, match="'weights' sleeps on device 0"),
        ):
            pool.alloc(size_bytes)
    pool.check_invariants()
    pool.wake([weights.number])
    weights.add(512)
    weights.check()


def test_frees_while_asleep_give_up_copy_and_memory(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool, kept_streams: list[int]
) -> None:
    kept, gone = weights.add(64 * MIB), weights.add(64 * MIB)
    pool.record_stream(gone, kept_streams[0])
    pool.sleep([weights.number], host)
    weights.free(gone)
    pool.check_invariants()
    assert host.stats().used_bytes == 64 * MIB
    assert weights.stats()["saved_bytes"] == 64 * MIB
    pool.trim()
    assert pool.wake([weights.number]) == 64 * MIB
    assert weights.stats()["reserved_bytes"] == 64 * MIB
    assert set(weights.live) == {kept}
    pool.check_invariants()


def test_everything_may_be_freed_while_asleep(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    pool.sleep([weights.number], host)
    for address in list(weights.live):
        weights.free(address)
    assert host.stats().used_bytes == 0
    assert pool.wake([weights.number]) == 0
    assert pool.segments() == []
    fill_with(weights)
    weights.check()


def test_sleep_waits_for_work_on_any_stream(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool, kept_streams: list[int]
) -> None:
    """The checker would find a copy or an unmapping that is not ordered behind the work."""
    address = weights.add(32 * MIB)
    weights.cuda.synchronize()
    weights.cuda.fill(address, 32 * MIB, kept_streams[1], 9)
    weights.live[address] = (32 * MIB, 9)
    pool.sleep([weights.number], host)
    pool.wake([weights.number])
    weights.check()


def test_host_memory_that_does_not_suffice_leaves_all_awake(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    pool.sleep([weights.number], host)
    pool.wake([weights.number])  # Has made the streams of the copies, which last.
    weights.add(90 * MIB - 4096)
    before = emulator.live()
    small = _core.HostPool(limit_bytes=64 * MIB)
    with pytest.raises(spillover.HostOutOfMemory):
        pool.sleep([weights.number], small)
    pool.check_invariants()
    assert pool.sleeping_tags() == []
    small.trim()
    assert emulator.live() == before
    weights._host, former = weights.cuda.pin(96 * MIB), weights._host
    weights.cuda.unpin(former)
    weights.check()
    weights.add(512)


def test_wake_without_device_memory_leaves_all_asleep(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    pool.sleep([weights.number], host)
    taken = pool.alloc(_core.memory_info(0)[0] - 20 * MIB)
    # Without torch it is a DriverError.
    with pytest.raises(Exception, match=r"waking memory with the tag 'weights' needs .* missing"):
        pool.wake([weights.number])
    pool.check_invariants()
    assert pool.sleeping_tags() == [weights.number]
    pool.free(taken)
    pool.wake([weights.number])
    weights.check()


def test_wake_takes_idle_memory_of_others(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool, kept_streams: list[int]
) -> None:
    fill_with(weights)
    pool.sleep([weights.number], host)
    free_bytes = _core.memory_info(0)[0]
    pool.free(pool.alloc(free_bytes - 16 * MIB, kept_streams[0]))
    pool.wake([weights.number])
    weights.check()


def test_wake_asks_reclaimers(pool: _core.Pool, weights: Blocks, host: _core.HostPool) -> None:
    fill_with(weights)
    pool.sleep([weights.number], host)
    taken = [pool.alloc(_core.memory_info(0)[0] - 20 * MIB)]

    def reclaim(missing_bytes: int, stream: int) -> int:
        if not taken:
            return 0
        pool.free(taken.pop())
        return missing_bytes

    with allocator.add_reclaimer(reclaim):
        pool.wake([weights.number])
    weights.check()


@pytest.mark.parametrize(
    ("times", "at"),
    [
        (1, (1,)),
        pytest.param(1, (2, 3, 4, 5, 8, 13, 21), marks=pytest.mark.soak),
        pytest.param(None, (1, 2, 3, 5, 8, 13, 21), marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        "cuCtxSynchronize",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuMemcpyDtoHAsync",
        "cuMemHostRegister",
        "cuMemMap",
        "cuMemUnmap",
        "cuMemSetAccess",
        "cuMemCreate",
        "cuMemRelease",
        "cuMemcpyHtoDAsync",
        "cuStreamSynchronize",
        "cuCtxGetCurrent",
    ],
)
def test_any_call_may_fail(
    pool: _core.Pool, weights: Blocks, function: str, times: int | None, at: tuple[int, ...]
) -> None:
    """A sleep or a waking that fails changes nothing, whichever call it was."""
    fill_with(weights, (512, 5000, MIB, 40 * MIB))
    pool.sleep([weights.number], _core.HostPool())
    pool.wake([weights.number])
    for step in ("sleep", "wake"):
        for call in at:
            if step == "wake":
                pool.sleep([weights.number], _core.HostPool())
            fresh = _core.HostPool()
            failed = False
            with faults(Fault(function, call=call, times=times)):
                try:
                    if step == "sleep":
                        pool.sleep([weights.number], fresh)
                    else:
                        pool.wake([weights.number])
                except spillover.SpilloverError as error:
                    failed = True
                    kept = "it is asleep, with its contents" in str(error)
            pool.check_invariants()
            if failed and step == "sleep" and not kept:
                assert pool.sleeping_tags() == []
            if failed and step == "wake":
                assert pool.sleeping_tags() == [weights.number]
            pool.wake([weights.number])
            weights.check()


def test_threads_allocate_meanwhile(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    fill_with(weights)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        weights.cuda.use_device()
        generator = random.Random(1)
        try:
            while not stop.is_set():
                held = [pool.alloc(generator.choice((512, MIB, 5 * MIB))) for _ in range(8)]
                for address in held:
                    pool.free(address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        pool.sleep([weights.number], host)
        pool.wake([weights.number])
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    weights.check()


def test_blocks_may_be_freed_by_other_threads_while_asleep(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    small = [weights.add(4096) for _ in range(10)]

    def allocate() -> None:
        weights.cuda.use_device()
        weights.free(weights.add(4096))

    on_thread(allocate)
    pool.sleep([weights.number], host)
    on_thread(lambda: [weights.free(address) for address in small[::2]] and None)
    pool.wake([weights.number])
    weights.check()


def test_private_arenas_sleep_with_the_tag_they_were_made_under(
    pool: _core.Pool, cuda: Cuda, weights: Blocks, host: _core.HostPool
) -> None:
    with allocator.tag("weights"):
        arena = pool.make_arena()
    address = pool.alloc_in(arena, 4 * MIB)
    freed = pool.alloc_in(arena, 6 * MIB)
    cuda.fill(address, 4 * MIB, 0, 5)
    cuda.fill(freed, 6 * MIB, 0, 6)
    pool.free(freed)
    pool.sleep([weights.number], host)
    assert weights.stats()["asleep_bytes"] == 10 * MIB
    with pytest.raises(spillover.StateError, match="sleeps"):
        pool.alloc_in(arena, 512)
    with pytest.raises(spillover.StateError, match="sleeps"):
        pool.restore_arena(arena, [])
    pool.check_invariants()
    pool.wake([weights.number])
    # A graph may use what is free in its pool: it is there, with its contents.
    weights.live[address] = (4 * MIB, 5)
    weights.live[freed] = (6 * MIB, 6)
    weights.check()
    weights.live.clear()
    pool.release_arena(arena)


def test_a_private_arena_may_be_released_while_asleep(
    pool: _core.Pool, weights: Blocks, host: _core.HostPool
) -> None:
    with allocator.tag("weights"):
        arena = pool.make_arena()
    address = pool.alloc_in(arena, 4 * MIB)
    pool.sleep([weights.number], host)
    pool.release_arena(arena)
    pool.free(address)
    pool.trim_arena(arena)
    pool.check_invariants()
    pool.wake([weights.number])
    assert pool.segments() == []


def test_counters_hold_while_a_waking_waits_for_the_device(
    pool: _core.Pool, cuda: Cuda, weights: Blocks, kept_streams: list[int]
) -> None:
    weights.add(32 * MIB)
    pool.sleep([weights.number], None)
    weights.live.clear()
    pool.configure(f"limit={64 * MIB}", "the test")
    blocks = [pool.alloc(8 * MIB) for _ in range(4)]
    busy = pool.alloc(32 * MIB, kept_streams[0])
    pool.free(blocks[1])  # is idle: its chunks are taken from between the others
    go = threading.Event()
    with faults(), cuda.host_function(kept_streams[0], lambda: go.wait(30)):
        pool.free(busy)  # is waited for
        pool.stats()  # What this thread keeps goes to the heaps.
        thread = threading.Thread(target=lambda: pool.wake([weights.number]))
        thread.start()
        wait_for_call("cuCtxSynchronize")
        try:
            pool.check_invariants()
        finally:
            go.set()
            thread.join()
    assert pool.sleeping_tags() == []
    pool.configure("limit=none", "the test")


def test_by_name(pool: _core.Pool, weights: Blocks) -> None:
    fill_with(weights)
    assert allocator.sleep("weights") == weights.stats()["allocated_bytes"]
    assert allocator.wake() == weights.stats()["allocated_bytes"]
    assert allocator.sleep(["weights"], contents="discard", device=0) == 0
    assert allocator.sleep() == 0
    allocator.wake("weights", device=0)
    weights.live.clear()
    with pytest.raises(spillover.ConfigError, match=r"tag 'wieghts'; tags so far: .*'weights'"):
        allocator.sleep("wieghts")
    for tags in ("\ud800", b"weights", [7]):
        with pytest.raises(spillover.ConfigError, match="a tag is a text that can be written in"):
            allocator.sleep(tags)  # type: ignore[arg-type]
    for action in (allocator.sleep, allocator.wake):
        with pytest.raises(spillover.ConfigError, match="tags=7 is neither the name of a tag nor"):
            action(7)  # type: ignore[operator]
    with pytest.raises(spillover.ConfigError, match="contents='disk' is not one of"):
        allocator.sleep("weights", contents="disk")  # type: ignore[arg-type]


def test_untagged_memory_sleeps_when_it_is_named(pool: _core.Pool, cuda: Cuda) -> None:
    plain = Blocks(pool, cuda, "")
    fill_with(plain)
    allocator.sleep()
    assert pool.sleeping_tags() == [number for number in pool.sleeping_tags() if number != 0]
    allocator.sleep("")
    with pytest.raises(spillover.StateError, match="sleeps"):
        pool.alloc(512)
    allocator.wake()
    plain.check()
    plain.close()


def test_a_forked_child_is_refused(pool: _core.Pool, run_python: Callable[..., str]) -> None:
    run_python(
        """
import os
import spillover.emulator
spillover.emulator.enable(vram="64MiB")
from spillover import StateError, _core, allocator
pool = _core.Pool(0)
with allocator.tag("weights"):
    address = pool.alloc(4 << 20)
allocator.sleep("weights")
child = os.fork()
if child == 0:
    try:
        allocator.wake("weights", device=0)
    except StateError:
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
allocator.wake("weights")
"""
    )

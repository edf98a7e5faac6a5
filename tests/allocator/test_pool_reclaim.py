"""Reclaimers: functions that free memory before an allocation fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cuda_calls import Cuda, live_blocks
from torch_process import TorchProcess

import spillover
from spillover import _core, allocator

MIB = 1 << 20
MEMORY_ERRORS = (spillover.SpilloverError, RuntimeError)


@pytest.fixture(autouse=True)
def limit(pool: _core.Pool) -> Iterator[None]:
    allocator.configure(limit="64MiB")
    yield
    allocator.configure(limit=None)


class Holder:
    """Blocks that it gives up one by one when it is asked."""

    def __init__(self, pool: _core.Pool, count: int, size_bytes: int, stream: int = 0) -> None:
        self.pool = pool
        self.size_bytes = size_bytes
        self.addresses = [pool.alloc(size_bytes, stream) for _ in range(count)]
        self.asked: list[tuple[int, int]] = []

    def __call__(self, missing_bytes: int, stream: int) -> int:
        self.asked.append((missing_bytes, stream))
        if not self.addresses:
            return 0
        self.pool.free(self.addresses.pop())
        return self.size_bytes


def test_a_request_is_served_by_what_a_reclaimer_frees(pool: _core.Pool) -> None:
    holder = Holder(pool, 4, 16 * MIB)
    with allocator.add_reclaimer(holder):
        assert pool.alloc(30 * MIB)
    assert holder.asked == [(30 * MIB, 0)] * 2
    assert len(holder.addresses) == 2, "it was asked for more than was needed"
    assert pool.stats()["num_ooms"] == 0
    pool.check_invariants()


def test_nobody_is_asked_while_memory_is_there(pool: _core.Pool, cuda: Cuda) -> None:
    holder = Holder(pool, 1, 16 * MIB)
    busy = pool.alloc(40 * MIB)
    cuda.fill(busy, 40 * MIB, 0)
    pool.free(busy)
    stream = cuda.create_stream()
    with allocator.add_reclaimer(holder):
        pool.alloc(40 * MIB, stream)  # waits for the default stream
    assert not holder.asked
    cuda.destroy_stream(stream)


def test_reclaimers_are_asked_in_order_until_none_has_more(pool: _core.Pool) -> None:
    first, second = Holder(pool, 1, 10 * MIB), Holder(pool, 2, 10 * MIB)
    kept = pool.alloc(34 * MIB)
    with (
        allocator.add_reclaimer(first),
        allocator.add_reclaimer(second),
        pytest.raises(MEMORY_ERRORS, match=r"freed 30\.00 MiB"),
    ):
        pool.alloc(32 * MIB)
    assert (first.addresses, second.addresses) == ([], [])
    assert pool.stats()["num_ooms"] == 1
    assert list(live_blocks(pool)) == [kept]


def test_what_it_frees_may_still_be_in_use(
    pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
) -> None:
    holder = Holder(pool, 1, 60 * MIB, kept_streams[0])
    cuda.fill(holder.addresses[0], 60 * MIB, kept_streams[0])
    with allocator.add_reclaimer(holder):
        address = pool.alloc(60 * MIB)
    cuda.fill(address, 60 * MIB, 0)  # The hazard checker compares it with the fill before.
    cuda.synchronize()


def test_its_own_requests_do_not_reclaim(pool: _core.Pool) -> None:
    holder = Holder(pool, 1, 60 * MIB)
    calls = 0

    def reclaim(missing_bytes: int, stream: int) -> int:
        nonlocal calls
        calls += 1
        with pytest.raises(MEMORY_ERRORS):
            pool.alloc(8 * MIB)
        return holder(missing_bytes, stream)

    with allocator.add_reclaimer(reclaim):
        assert pool.alloc(60 * MIB)
    assert calls == 1


def test_one_that_raises_counts_as_nothing(
    pool: _core.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append(args.exc_value))

    def broken(missing_bytes: int, stream: int) -> int:
        raise KeyError("broken")

    holder = Holder(pool, 1, 60 * MIB)
    with allocator.add_reclaimer(broken), allocator.add_reclaimer(holder):
        assert pool.alloc(60 * MIB)
    assert [type(error) for error in reported] == [KeyError]


@pytest.mark.parametrize("result", ["much", None, 1.5, -1, 1 << 64])
def test_one_that_returns_no_number_counts_as_nothing(
    pool: _core.Pool, monkeypatch: pytest.MonkeyPatch, result: Any
) -> None:
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append(args.exc_value))
    pool.alloc(60 * MIB)
    with (
        allocator.add_reclaimer(lambda missing_bytes, stream: result),
        pytest.raises(MEMORY_ERRORS),
    ):
        pool.alloc(60 * MIB)
    assert [type(error) for error in reported] == [
        OverflowError if isinstance(result, int) else TypeError
    ]
    assert "?" not in str(reported[0])


def test_what_others_free_meanwhile_counts(pool: _core.Pool) -> None:
    """Two threads ask at once: one call frees everything, and the other finds nothing to free."""
    holder = Holder(pool, 1, 60 * MIB)

    def too_late(missing_bytes: int, stream: int) -> int:
        thread = threading.Thread(target=holder, args=(missing_bytes, stream))
        thread.start()
        thread.join()
        return 0

    with allocator.add_reclaimer(too_late):
        assert pool.alloc(60 * MIB)


def test_one_that_always_claims_to_free_does_not_hang(pool: _core.Pool) -> None:
    pool.alloc(60 * MIB)
    with (
        allocator.add_reclaimer(lambda missing_bytes, stream: missing_bytes),
        pytest.raises(MEMORY_ERRORS),
    ):
        pool.alloc(60 * MIB)


def test_a_removed_one_is_not_asked(pool: _core.Pool) -> None:
    holder = Holder(pool, 1, 60 * MIB)
    handle = allocator.add_reclaimer(holder)
    handle.remove()
    handle.remove()
    with pytest.raises(MEMORY_ERRORS):
        pool.alloc(60 * MIB)
    assert not holder.asked


def test_it_may_remove_itself(pool: _core.Pool) -> None:
    holder = Holder(pool, 2, 30 * MIB)

    def once(missing_bytes: int, stream: int) -> int:
        handle.remove()
        return holder(missing_bytes, stream)

    handle = allocator.add_reclaimer(once)
    assert pool.alloc(20 * MIB)
    assert len(holder.asked) == 1


def test_removing_waits_for_a_call(pool: _core.Pool) -> None:
    """After remove() what the function uses may go away."""
    entered, leave = threading.Event(), threading.Event()
    holder = Holder(pool, 1, 60 * MIB)
    ended = []

    def slow(missing_bytes: int, stream: int) -> int:
        entered.set()
        leave.wait()
        ended.append(True)
        return holder(missing_bytes, stream)

    handle = allocator.add_reclaimer(slow)
    thread = threading.Thread(target=lambda: pool.alloc(60 * MIB))
    thread.start()
    entered.wait()
    threading.Timer(0.05, leave.set).start()
    handle.remove()
    assert ended == [True]
    thread.join()


def test_other_threads_go_on_while_one_reclaims(pool: _core.Pool) -> None:
    holder = Holder(pool, 1, 40 * MIB)
    results: list[int] = []

    def reclaim(missing_bytes: int, stream: int) -> int:
        thread = threading.Thread(target=lambda: results.append(pool.alloc(10 * MIB)))
        thread.start()
        thread.join()
        return holder(missing_bytes, stream)

    with allocator.add_reclaimer(reclaim):
        assert pool.alloc(50 * MIB)
    assert len(results) == 1


def test_two_pools_tell_their_reclaimers_apart(run_python: Callable[..., str]) -> None:
    """One that takes away another device's waits for that one's end, whatever their numbers are."""
    output = run_python(
        """
import threading
import spillover
from spillover import allocator
spillover.emulator.enable(vram="64MiB", devices=2)
pools = [allocator.Pool(device, wait_max=0) for device in range(2)]
entered, leave = threading.Event(), threading.Event()
def exhaust(pool):
    try:
        pool.allocate("100MiB")
    except spillover.DriverError:
        pass
def slow(missing_bytes, stream):
    entered.set()
    leave.wait()
    print("ended")
    return 0
def remover(missing_bytes, stream):
    threading.Timer(0.05, leave.set).start()
    handle.remove()
    print("removed")
    return 0
handle = allocator.add_reclaimer(slow, device=1)
allocator.add_reclaimer(remover, device=0)
thread = threading.Thread(target=exhaust, args=(pools[1],))
thread.start()
entered.wait()
exhaust(pools[0])
thread.join()
"""
    )
    assert output.split() == ["ended", "removed"]


# Without a reclaimer most threads are where their DriverError is raised.
@pytest.mark.parametrize(("threads", "reclaimers"), [(3, 1), (8, 0)])
def test_daemon_threads_may_be_out_of_memory_when_the_program_ends(
    run_python: Callable[..., str], threads: int, reclaimers: int
) -> None:
    run_python(
        """
import sys, threading, time
import spillover
from spillover import allocator
threads, reclaimers = map(int, sys.argv[1:])
spillover.emulator.enable(vram="64MiB")
pool = allocator.Pool(0, wait_max=0)
entered = threading.Event()
def slow(missing_bytes, stream):
    entered.set()
    time.sleep(0.001)
    return 0
for _ in range(reclaimers):
    allocator.add_reclaimer(slow)
def exhaust():
    while True:
        try:
            pool.allocate("100MiB")
        except spillover.DriverError:
            if not reclaimers:
                entered.set()
for _ in range(threads):
    threading.Thread(target=exhaust, daemon=True).start()
entered.wait()
""",
        str(threads),
        str(reclaimers),
    )


def test_tensors_are_freed_for_tensors(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        spilled = []
        class Cache:
            def __init__(self):
                self.tensors = [torch.ones(100 * MiB, dtype=torch.uint8, device="cuda")
                                for _ in range(4)]
            def reclaim(self, missing_bytes, stream):
                if not self.tensors:
                    return 0
                tensor = self.tensors.pop()
                spilled.append(tensor.cpu())
                return tensor.nbytes
        cache = Cache()
        with allocator.add_reclaimer(cache.reclaim):
            wanted = torch.ones(250 * MiB, dtype=torch.uint8, device="cuda")
        assert wanted[-1].item() == 1
        assert len(cache.tensors) == 2
        assert all(bool((tensor == 1).all()) for tensor in spilled)
        allocator.check_invariants()
        """
    )

"""Threads that share a host pool: budgets, memory on its way to the system, and the checker."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from fake_machine import GIB, MIB

from spillover import HostOutOfMemory, HostPool
from spillover._core import HostPool as CoreHostPool


def run_threads(count: int, work: Callable[[random.Random], None]) -> None:
    """Run it on threads, each with a seed of its own; the first failure is raised here."""
    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            work(random.Random(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_nobody_is_refused_what_another_thread_is_giving_back() -> None:
    """What is held never passes the limit, so there is always room once idle memory has gone."""
    pool = CoreHostPool(limit_bytes=4 * 2 * MIB)

    def work(chosen: random.Random) -> None:
        for _ in range(200):
            pool.allocate(chosen.randrange(40_000, 2 * MIB, 4096))

    run_threads(4, work)
    assert pool.stats().reserved_bytes_max <= 8 * MIB
    assert pool._is_valid()


@pytest.mark.parametrize("ahead", [True, False])
def test_threads_race_for_the_budget(ahead: bool) -> None:
    pool = CoreHostPool(limit_bytes=8 * MIB, pinned=False)
    if ahead:
        pool._reserve(4 * MIB, None)

    def work(chosen: random.Random) -> None:
        held: list[tuple[memoryview, int]] = []
        for step in range(300):
            try:
                view = memoryview(pool.allocate(chosen.choice([300, 20_000, 70_000, MIB, 3 * MIB])))
                mark = step % 251
                view[0] = view[-1] = mark
                held.append((view, mark))
                if chosen.random() < 0.05:
                    pool.trim()
                if chosen.random() < 0.05:
                    pool._reserve(chosen.choice([4096, MIB]), None)
            except HostOutOfMemory:
                held.clear()
            if held and chosen.random() < 0.6:
                view, mark = held.pop(chosen.randrange(len(held)))
                assert view[0] == view[-1] == mark
                del view

    run_threads(4, work)
    stats = pool.stats()
    assert stats.used_bytes == stats.buffer_count == 0
    assert stats.reserved_bytes_max <= 8 * MIB
    assert pool._is_valid()
    pool.trim()
    assert pool.stats().reserved_bytes == 0


def test_what_another_thread_is_pinning_is_not_idle() -> None:
    """Pinning much makes nobody give back what is kept for reuse."""
    pool = HostPool(limit=GIB)
    kept = pool.allocate(8 * MIB).address

    held: list[object] = []

    def allocate(done_bytes: int) -> None:
        if not held:
            held.append(pool.allocate(MIB))

    pool.reserve(256 * MIB, progress=allocate)
    assert pool.allocate(8 * MIB).address == kept


def test_the_checker_follows_memory_from_thread_to_thread() -> None:
    """One thread waits for the copy and frees; another, which did not, gets the memory."""
    pool = HostPool(limit=64 * MIB)
    count = 1 << 16
    device = torch.ones(count, device="cuda")
    torch.cuda.synchronize()
    addresses: list[int] = []

    def copy() -> None:
        host = pool.empty(count, torch.float32)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            host.copy_(device, non_blocking=True)
        stream.synchronize()
        addresses.append(host.data_ptr())

    thread = threading.Thread(target=copy)
    thread.start()
    # Not by a lock of Python's: the checker sees those by itself.
    while not addresses or pool.stats().buffer_count:
        time.sleep(0.001)
    copy()
    thread.join()
    assert addresses[0] == addresses[1]

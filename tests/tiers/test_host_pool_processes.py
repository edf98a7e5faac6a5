"""Host pools in forked children, in DataLoader workers, and at the end of the interpreter."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_machine import MIB

from spillover import DriverError, HostPool, StateError
from spillover._core import HostPool as CoreHostPool

Run = Callable[..., subprocess.CompletedProcess[str]]

#: A child that waits for a lock that nobody holds is ended by this.
SECONDS_MAX = 60


def in_child(check: Callable[[], None]) -> int:
    """The exit code of a forked child that makes the check."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS_MAX)
        try:
            check()
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("pinned", [True, False])
def test_a_forked_child_gets_errors_and_harms_nothing(pinned: bool) -> None:
    """Whatever it calls: locks of the parent's threads may be held there for ever."""
    pool = HostPool(limit=32 * MIB, reserve=16 * MIB, pinned=pinned)
    host = pool.empty((MIB,), torch.uint8).fill_(5)
    kept: list[Any] = [pool.allocate(100), pool.allocate(MIB), pool]

    def check() -> None:
        assert int(host[-1]) == 5
        for call in (lambda: pool.allocate(MIB), lambda: pool.reserve(MIB), pool.stats):
            with pytest.raises(StateError, match="forked child"):
                call()
        assert pool.trim() == 0
        kept.clear()

    assert in_child(check) == 0
    assert pool.stats().buffer_count == 3
    assert pool._is_valid()
    host.fill_(7)
    assert int(host[-1]) == 7
    assert pool.allocate(MIB).size_bytes == MIB


def test_a_forked_child_has_pools_of_its_own() -> None:
    torch.cuda.init()
    parent = HostPool(limit=32 * MIB, pinned=False)
    held = parent.allocate(MIB)

    def check() -> None:
        with pytest.raises((StateError, DriverError), match="a forked child"):
            HostPool(limit=MIB).allocate(100)
        pool = HostPool(limit=32 * MIB, pinned=False)
        memoryview(pool.allocate(MIB))[0] = 1
        assert pool.stats().reserved_bytes == MIB
        assert pool.trim() == MIB
        grandchild = in_child(lambda: expect_state_error(pool))
        assert grandchild == 0

    assert in_child(check) == 0
    assert held.size_bytes == parent.stats().used_bytes


def expect_state_error(pool: CoreHostPool) -> None:
    with pytest.raises(StateError, match="forked child"):
        pool.stats()


def test_children_forked_while_threads_use_a_pool(run_emulated: Run) -> None:
    run_emulated("""
        import os, signal, threading
        from spillover import DriverError, HostPool, StateError

        pool = HostPool(limit="64MiB", reserve="8MiB")
        over = threading.Event()

        def work():
            held = []
            while not over.is_set():
                held = [pool.allocate(size) for size in (100, 5000, 70_000)]
                pool.stats()

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        inherited = [pool.allocate(100), pool.allocate(70_000)]
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                inherited.clear()
                try:
                    pool.stats()
                except StateError:
                    os._exit(0)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        over.set()
        for thread in threads:
            thread.join()
        assert pool._is_valid()
    """)


def test_data_loader_workers_forked_while_copies_run(run_emulated: Run) -> None:
    """Copies from and to pool memory are under way at each fork, and get the right bytes."""
    code = """
        import torch
        from torch.utils.data import DataLoader, Dataset
        from spillover import DriverError, HostPool, StateError

        pool = HostPool(limit="64MiB", reserve="16MiB")
        count = 1 << 18

        class Numbers(Dataset):
            '''Lies in memory of the pool, which workers read and may not take from.'''
            def __init__(self):
                self.numbers = pool.empty(64, torch.int64)
                self.numbers.copy_(torch.arange(64))
            def __len__(self):
                return 64
            def __getitem__(self, index):
                try:
                    pool.allocate(100)
                except StateError:
                    return self.numbers[index].clone()
                raise AssertionError("a worker got memory of its parent's pool")

        data = Numbers()
        out, back = torch.cuda.Stream(), torch.cuda.Stream()
        for epoch in range(3):
            device = torch.full((count,), epoch + 1, dtype=torch.int32, device="cuda")
            saved = pool.empty(count, torch.int32)
            torch.cuda.synchronize()
            loader = DataLoader(
                data, batch_size=8, num_workers=2, multiprocessing_context="fork"
            )
            with torch.cuda.stream(out):
                saved.copy_(device, non_blocking=True)
            batches = iter(loader)  # Forks.
            out.synchronize()
            assert torch.equal(saved, torch.full((count,), epoch + 1, dtype=torch.int32))
            fetched = torch.empty_like(device)
            seen = 0
            with torch.cuda.stream(back):
                fetched.copy_(saved, non_blocking=True)
            others = iter(loader)
            for batch in batches:
                pinned = pool.empty(8, torch.int64)
                pinned.copy_(batch)
                moved = pinned.to("cuda", non_blocking=True)
                seen += int(moved.sum())
            back.synchronize()
            assert torch.equal(fetched, device)
            assert seen == sum(range(64)) == sum(int(batch.sum()) for batch in others)
        assert pool._is_valid()
        del saved, data, loader, pinned
        assert pool.stats().reserved_bytes >= 16 << 20
    """
    for schedule in ("late", "threaded"):
        run_emulated(code, schedule=schedule)


def test_interpreters_end_in_any_order_of_destruction(run_emulated: Run) -> None:
    """Views, tensors and cycles outlive the pool, and some of them the driver."""
    done = run_emulated("""
        import atexit, gc, sys, threading, time
        import numpy, torch
        from spillover import HostPool

        gc.disable()
        pool = HostPool(limit="64MiB", reserve="8MiB")
        device = torch.arange(1000, device="cuda")
        tensor = pool.empty(1000, torch.int64)
        tensor.copy_(device, non_blocking=True)
        array = numpy.frombuffer(pool.allocate(1 << 20), numpy.uint8)
        view = memoryview(pool.allocate(100))[10:]

        class Cycle:
            pass

        cycle = Cycle()
        cycle.own, cycle.buffer, cycle.pool = cycle, pool.allocate(70_000), pool
        del cycle
        sys.kept_for_ever = [pool.allocate(4096), tensor, HostPool(limit="1MiB", reserve="1MiB")]

        def late():
            assert int(tensor[7]) == 7
            array[:] = 3
            pool.allocate(5000)
            sys.at_exit = pool.allocate(2 << 20)

        def forever():
            while True:
                held = pool.allocate(5000)
                time.sleep(0.001)

        threading.Thread(target=forever, daemon=True).start()
        torch.cuda.synchronize()
        atexit.register(late)
        del device
    """)
    assert done.stderr == ""


def test_a_view_keeps_its_pool_alive() -> None:
    pool = HostPool(limit=32 * MIB, reserve=4 * MIB)
    array = np.frombuffer(pool.allocate(MIB), np.uint8)
    tensor = torch.from_numpy(array)[5:].view(torch.uint8)
    view = memoryview(pool.allocate(100))
    del pool, array
    tensor.fill_(9)
    view[0] = 3
    assert int(tensor.sum()) == 9 * (MIB - 5)


def test_a_copied_or_pickled_pool_is_refused() -> None:
    pool = HostPool(limit=MIB, pinned=False)
    buffer = pool.allocate(100)
    for what in (pool, buffer):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                attempt(what)

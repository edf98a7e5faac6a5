"""What a host thread knows of the device reaches another through Python's synchronisation only."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spillover import emulator

Handover = Callable[[Callable[[], None], Callable[[], None]], None]


def thread_end(first: Callable[[], None], then: Callable[[], None]) -> None:
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    then()


def _with(signal: Callable[[], None], wait: Callable[[], object]) -> Handover:
    def handover(first: Callable[[], None], then: Callable[[], None]) -> None:
        def work() -> None:
            first()
            signal()

        thread = threading.Thread(target=work)
        thread.start()
        wait()
        then()
        thread.join()

    return handover


def event(first: Callable[[], None], then: Callable[[], None]) -> None:
    done = threading.Event()
    _with(done.set, done.wait)(first, then)


def semaphore(first: Callable[[], None], then: Callable[[], None]) -> None:
    done = threading.Semaphore(0)
    _with(done.release, done.acquire)(first, then)


def barrier(first: Callable[[], None], then: Callable[[], None]) -> None:
    done = threading.Barrier(2)
    _with(lambda: done.wait() and None, done.wait)(first, then)


def condition(first: Callable[[], None], then: Callable[[], None]) -> None:
    done, ready = threading.Condition(), []

    def signal() -> None:
        with done:
            ready.append(True)
            done.notify_all()

    def wait() -> None:
        with done:
            done.wait_for(lambda: ready)

    _with(signal, wait)(first, then)


def fifo(first: Callable[[], None], then: Callable[[], None]) -> None:
    done: queue.Queue[int] = queue.Queue()
    _with(lambda: done.put(1), done.get)(first, then)


def simple_queue(first: Callable[[], None], then: Callable[[], None]) -> None:
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    _with(lambda: done.put(1), done.get)(first, then)


def future(first: Callable[[], None], then: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first).result()
        then()


def event_loop(first: Callable[[], None], then: Callable[[], None]) -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, first)
        then()

    asyncio.run(main())


HANDOVERS = (
    thread_end,
    event,
    semaphore,
    barrier,
    condition,
    fifo,
    simple_queue,
    future,
    event_loop,
)


@pytest.mark.parametrize("handover", HANDOVERS, ids=lambda handover: handover.__name__)
def test_handover_is_seen(handover: Handover) -> None:
    tensor, side = torch.zeros(1 << 12, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(side):
            tensor.add_(1)
        side.synchronize()

    def use() -> None:
        tensor.mul_(2)

    handover(work, use)
    assert tensor.sum().item() == 2 << 12


def test_a_flag_is_no_handover_unless_annotated() -> None:
    for annotated in (True, False):
        tensor, side, ready = torch.zeros(1 << 12, device="cuda"), torch.cuda.Stream(), [False]
        torch.cuda.synchronize()

        def work(annotated=annotated, tensor=tensor, side=side, ready=ready) -> None:  # type: ignore[no-untyped-def]
            with torch.cuda.stream(side):
                tensor.add_(1)
            side.synchronize()
            if annotated:
                emulator.release("flag")
            ready[0] = True

        thread = threading.Thread(target=work)
        thread.start()
        while not ready[0]:
            pass
        if annotated:
            emulator.acquire("flag")
            tensor.mul_(2)
        else:
            with pytest.raises(RuntimeError, match="is not ordered after write by aten::add_"):
                tensor.mul_(2)
            emulator.clear_hazards()
        thread.join()


def test_locks_behave_as_before() -> None:
    lock, reentrant = threading.Lock(), threading.RLock()
    assert lock.acquire(timeout=1)
    assert lock.locked()
    assert not lock.acquire(blocking=False)
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()
    with reentrant, reentrant:
        assert not threading.Thread(target=reentrant.acquire, daemon=True).is_alive()
    with pytest.raises(RuntimeError):
        reentrant.release()


def test_synchronisation_objects_that_outlive_their_modules_say_nothing(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = run_emulated(
        """
        import os, sys, threading
        import torch
        torch.zeros(8, device="cuda")
        child = os.fork()
        if child == 0:
            try:
                torch.zeros(8, device="cuda")
            finally:
                sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert "Exception ignored" not in result.stderr, result.stderr

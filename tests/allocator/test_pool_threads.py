"""The pool under several threads that free each other's blocks."""

from __future__ import annotations

import _thread
import queue
import random
import threading
import time

from cuda_calls import Cuda

from spillover import _core

MIB = 1 << 20
THREADS = 4
STEPS = 250


def test_threads_free_each_others_blocks(pool: _core.Pool, cuda: Cuda) -> None:
    mailboxes: list[queue.SimpleQueue[int]] = [queue.SimpleQueue() for _ in range(THREADS)]
    failures: list[BaseException] = []
    owners: dict[int, int] = {}
    owners_lock = threading.Lock()
    streams = [cuda.create_stream() for _ in range(THREADS)]

    def work(index: int) -> None:
        try:
            cuda.use_device()
            generator = random.Random(index)
            for step in range(STEPS):
                size = generator.choice([100, 5000, MIB // 3, MIB, 2 * MIB])
                address = pool.alloc(size, streams[index])
                with owners_lock:
                    assert address not in owners, "a live block was given out again"
                    owners[address] = index
                if step % 7 == 0:
                    pool.record_stream(address, streams[generator.randrange(THREADS)])
                mailboxes[generator.randrange(THREADS)].put(address)
                while generator.random() < 0.6 and not mailboxes[index].empty():
                    freed = mailboxes[index].get()
                    with owners_lock:
                        del owners[freed]
                    pool.free(freed)
                if step % 100 == 50:
                    pool.trim()
                    pool.check_invariants()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    pool.check_invariants()
    left = sum(mailbox.qsize() for mailbox in mailboxes)
    stats = pool.stats()
    assert stats["allocation"]["all"]["current"] == left == len(owners)
    assert stats["allocation"]["all"]["allocated"] == THREADS * STEPS
    for address in owners:
        pool.free(address)
    for stream in streams:
        cuda.destroy_stream(stream)


def test_another_threads_default_stream_is_not_asked(pool: _core.Pool, cuda: Cuda) -> None:
    """One handle names every thread's own default stream: blocks must not cross threads by it."""
    per_thread = 2
    address = pool.alloc(3 * MIB, per_thread)
    cuda.fill(address, 3 * MIB, per_thread)
    pool.free(address)
    found: list[int] = []

    def work() -> None:
        cuda.use_device()
        found.append(pool.alloc(3 * MIB, per_thread))
        noted = pool.alloc(3 * MIB)
        pool.record_stream(noted, per_thread)
        found.append(noted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] != address
    # This thread cannot mark the other's stream: the block waits for the device.
    pool.free(found[1])
    assert pool.stats()["active"]["all"]["current"] == 2
    pool.trim()
    assert pool.stats()["active"]["all"]["current"] == 1


def test_a_stream_that_was_forgotten_meanwhile_is_not_taken_for_idle(
    pool: _core.Pool, cuda: Cuda
) -> None:
    """Threads that wait for the device at the same time: one forgets a stream, one uses it anew."""
    stream = cuda.create_stream()
    failures: list[BaseException] = []
    go = threading.Barrier(9)

    def wait_for_the_device() -> None:
        try:
            cuda.use_device()
            go.wait(30)
            pool.trim()
        except BaseException as error:
            failures.append(error)

    for _ in range(20):
        blocks = [pool.alloc(2 * MIB, stream) for _ in range(8)]
        for block in blocks:
            cuda.fill(block, 2 * MIB, stream)
            pool.free(block)
        threads = [threading.Thread(target=wait_for_the_device) for _ in range(8)]
        for thread in threads:
            thread.start()
        go.wait(30)
        while any(thread.is_alive() for thread in threads):
            if pool.largest_free_bytes() > 0:
                continue
            block = pool.alloc(2 * MIB, stream)
            cuda.fill(block, 2 * MIB, stream)
            pool.free(block)
            pool.check_invariants()
        for thread in threads:
            thread.join()
    assert failures == []
    cuda.destroy_stream(stream)


def test_a_use_that_came_during_a_wait_is_not_taken_for_complete(
    pool: _core.Pool, cuda: Cuda
) -> None:
    """A thread waits for the device while another frees a block that a stream begins to use."""
    stream = cuda.create_stream()
    failures: list[BaseException] = []

    def wait_for_the_device() -> None:
        try:
            cuda.use_device()
            for _ in range(60):
                pool.trim()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=wait_for_the_device) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        block = pool.alloc(2 * MIB)
        pool.record_stream(block, stream)
        cuda.fill(block, 2 * MIB, stream)
        pool.free(block)
    for thread in threads:
        thread.join()
    assert failures == []
    cuda.destroy_stream(stream)


def test_what_one_thread_waited_for_another_may_use(pool: _core.Pool, cuda: Cuda) -> None:
    """The pool waits for the device in one thread; what became free then serves another's work.

    The order is that of the pool's mutex, which the hazard checker must know of.
    """
    stream = cuda.create_stream()
    limit_bytes = 6 * 64 * MIB

    def free_and_wait() -> None:
        cuda.use_device()
        blocks = [pool.alloc(64 * MIB, stream) for _ in range(6)]
        for block in blocks:
            cuda.fill(block, 64 * MIB, stream)
            pool.free(block)
        pool.alloc(300 * MIB)  # needs their memory, so that the pool waits

    def use_the_rest() -> None:
        cuda.use_device()
        block = pool.alloc(48 * MIB)
        cuda.fill(block, 48 * MIB, 0)

    pool.configure(f"limit={limit_bytes}", "test")
    try:
        for work in (free_and_wait, use_the_rest):
            # Not join(): the checker would see that edge by itself.
            done = _thread.allocate_lock()
            done.acquire()
            thread = threading.Thread(target=lambda work=work, done=done: (work(), done.release()))
            thread.start()
            while done.locked():
                time.sleep(0.001)
    finally:
        pool.configure("limit=none", "test")
    cuda.synchronize()
    cuda.destroy_stream(stream)

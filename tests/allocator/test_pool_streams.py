"""Streams that come and go while the pool has memory of theirs; the hazard checker watches."""

from __future__ import annotations

import random
import threading

from cuda_calls import Cuda

from spillover import _core

MIB = 1 << 20
PER_THREAD = 2


def reissued_stream(cuda: Cuda, handle: int) -> tuple[int, list[int]]:
    """A new stream with a handle that was destroyed, and the others that were made before it."""
    others: list[int] = []
    for _ in range(64):
        stream = cuda.create_stream()
        if stream == handle:
            return stream, others
        others.append(stream)
    raise AssertionError("the driver did not reissue the handle")


def test_a_noted_stream_is_not_taken_for_a_new_one_with_its_handle(
    pool: _core.Pool, cuda: Cuda
) -> None:
    """An event on the new stream would say nothing about the old one's work."""
    old = cuda.create_stream()
    address = pool.alloc(3 * MIB)
    cuda.fill(address, 3 * MIB, old)
    pool.record_stream(address, old)
    mark = cuda.create_event()
    cuda.record(mark, old)
    cuda.destroy_stream(old)
    new, others = reissued_stream(cuda, old)
    pool.free(address)
    for _ in range(5):
        pool.free(pool.alloc(4096, new))
        if not cuda.is_complete(mark):
            assert pool.alloc(3 * MIB) != address
    pool.trim()
    assert cuda.is_complete(mark)
    for stream in [new, *others]:
        cuda.destroy_stream(stream)
    cuda.destroy_event(mark)


def test_streams_come_and_go_under_load(pool: _core.Pool, cuda: Cuda) -> None:
    """Blocks outlive their streams, are noted on others, and are freed in any order."""
    generator = random.Random(11)
    streams = [cuda.create_stream() for _ in range(4)]
    live: list[int] = []
    handles: set[int] = set()
    created = 0
    for step in range(400):
        stream = generator.choice(streams)
        size = generator.choice([600, 70_000, MIB, 2 * MIB, 5 * MIB])
        address = pool.alloc(size, stream)
        cuda.fill(address, min(size, 4096), stream)
        live.append(address)
        if generator.random() < 0.3:
            other = generator.choice(streams)
            cuda.order(stream, other)
            cuda.fill(address, min(size, 4096), other)
            pool.record_stream(address, other)
            if other != stream:
                cuda.order(other, stream)
        if generator.random() < 0.3:
            index = generator.randrange(len(streams))
            cuda.destroy_stream(streams[index])
            streams[index] = cuda.create_stream()
            handles.add(streams[index])
            created += 1
        while len(live) > 20:
            pool.free(live.pop(generator.randrange(len(live))))
        if step % 50 == 0:
            pool.check_invariants()
    assert len(handles) < created, "no handle came twice"
    for address in live:
        pool.free(address)
    for stream in streams:
        cuda.destroy_stream(stream)
    pool.trim()
    assert pool.segments() == []


def test_the_default_stream_of_a_thread_that_has_ended(pool: _core.Pool, cuda: Cuda) -> None:
    """Nobody can ask it any more, and no later thread's stream is taken for it."""
    found: list[int] = []

    def work() -> None:
        cuda.use_device()
        found.append(pool.alloc(3 * MIB, PER_THREAD))
        cuda.fill(found[-1], 3 * MIB, PER_THREAD)

    def on_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    on_thread()
    pool.free(found[0])
    on_thread()
    assert found[1] != found[0]
    pool.free(found[1])
    assert pool.alloc(3 * MIB, PER_THREAD) not in found
    pool.trim()
    assert len(pool.segments()) == 1
    pool.check_invariants()


def test_threads_on_their_own_default_streams(pool: _core.Pool, cuda: Cuda) -> None:
    failures: list[BaseException] = []
    shared: list[int] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        try:
            cuda.use_device()
            generator = random.Random(seed)
            for _ in range(150):
                size = generator.choice([600, MIB, 3 * MIB])
                address = pool.alloc(size, PER_THREAD)
                cuda.fill(address, min(size, 4096), PER_THREAD)
                with lock:
                    shared.append(address)
                    freed = shared.pop(generator.randrange(len(shared)))
                pool.free(freed)  # of whichever thread
        except BaseException as error:
            failures.append(error)

    for _ in range(2):  # the second threads find what the first have left
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert pool.stats()["allocation"]["all"]["current"] == 0
    pool.check_invariants()

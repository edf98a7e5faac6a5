"""Memory of a busy stream serves another one as soon as the work before its free is done."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from cuda_calls import Cuda

import spillover
from spillover import _core, emulator
from spillover.emulator import calls, faults

MIB = 1 << 20
LIMIT = 64 * MIB


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


@pytest.fixture
def full(pool: _core.Pool, kept_streams: list[int]) -> Iterator[_core.Pool]:
    """A pool that may hold 64 MiB and that two streams use."""
    _, total_bytes = _core.memory_info(0)
    pool.set_memory_fraction(LIMIT / total_bytes)
    for stream in kept_streams[:2]:
        pool.free(pool.alloc(512, stream))
    pool.trim()
    yield pool
    pool.configure("wait_max=60s", "the test")


@pytest.fixture
def impatient(full: _core.Pool) -> _core.Pool:
    """The same, with requests that wait for 20 ms at most."""
    full.configure("wait_max=20ms", "the test")
    return full


class TestPipelines:
    """The first stream goes on only after the second one has got its memory and used it."""

    def test_memory_is_had_that_was_freed_before_the_stream_waits(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        received = threading.Event()
        in_time: list[bool] = []
        address = full.alloc(LIMIT, first)
        cuda.fill(address, LIMIT, first)
        full.free(address)
        with cuda.host_function(first, lambda: in_time.append(received.wait(5))):
            assert full.alloc(LIMIT, second) == address
            cuda.fill(address, LIMIT, second)
            received.set()
            cuda.synchronize()
        assert in_time == [True]

    @pytest.mark.virtual_memory
    def test_what_is_freed_beside_it_later_does_not_matter(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        blocks = [full.alloc(16 * MIB, first) for _ in range(4)]
        for block in blocks:
            cuda.fill(block, 16 * MIB, first)
        for block in blocks[1:3]:
            full.free(block)
        with cuda.stuck(first):
            for block in (blocks[0], blocks[3]):
                cuda.fill(block, 16 * MIB, first)
                full.free(block)
            assert full.alloc(32 * MIB, second) == blocks[1]
            cuda.fill(blocks[1], 32 * MIB, second)
        cuda.synchronize()

    @pytest.mark.virtual_memory
    def test_pieces_are_put_together_whatever_lies_between_them(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        blocks = [full.alloc(8 * MIB, first) for _ in range(8)]
        for block in blocks[::2]:
            cuda.fill(block, 8 * MIB, first)
            full.free(block)
        with cuda.stuck(first):
            for block in blocks[1::2]:
                cuda.fill(block, 8 * MIB, first)
                full.free(block)
            wanted = full.alloc(32 * MIB, second)
            cuda.fill(wanted, 32 * MIB, second)
            full.check_invariants()
        cuda.synchronize()
        assert reserved_bytes(full) == LIMIT

    @pytest.mark.virtual_memory
    def test_threads_keep_little_to_themselves(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        """Blocks of a size that a thread would keep for its next request."""
        first, second, _ = kept_streams
        blocks = [full.alloc(MIB + 512, first) for _ in range(LIMIT // MIB * 3 // 4)]
        for block in blocks:
            cuda.fill(block, MIB, first)
            full.free(block)
        with cuda.stuck(first):
            wanted = full.alloc(32 * MIB, second)
            cuda.fill(wanted, 32 * MIB, second)
        cuda.synchronize()

    def test_what_was_kept_before_there_was_a_second_stream_is_known(
        self, run_emulated: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        run_emulated(
            """
            import sys
            sys.path.insert(0, sys.argv[1])
            from cuda_calls import Cuda
            from spillover import _core
            MIB = 1 << 20
            cuda, pool = Cuda(), _core.Pool(0)
            first, second = cuda.create_stream(), cuda.create_stream()
            for stream in (first, second):
                pool.keep_stream(stream)
            pool.set_memory_fraction(8 * MIB / _core.memory_info(0)[1])
            pool.configure("wait_max=2s", "the test")
            address = pool.alloc(6 * MIB, first)
            cuda.fill(address, 6 * MIB, first)
            pool.free(address)
            pool.free(pool.alloc(512, second))
            with cuda.stuck(first):
                wanted = pool.alloc(6 * MIB, second)
                cuda.fill(wanted, 6 * MIB, second)
            cuda.synchronize()
            pool.check_invariants()
            """,
            __file__.rpartition("/")[0],
        )


class TestWaitsOfTheDevice:
    """Before a request fails its stream is put behind the work before a free."""

    def test_the_stream_waits_where_the_host_has_waited_enough(
        self, impatient: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = impatient.alloc(LIMIT, first)
        used = cuda.create_event()
        with cuda.stuck(first):
            cuda.fill(address, LIMIT, first)
            impatient.free(address)
            with faults():
                assert impatient.alloc(LIMIT, second) == address
                assert calls()["cuStreamWaitEvent"] == 1
            cuda.fill(address, LIMIT, second)
            cuda.record(used, second)
            assert not cuda.is_complete(used)
        cuda.synchronize()
        assert cuda.is_complete(used)
        cuda.destroy_event(used)

    def test_it_waits_for_no_more_than_that(
        self, impatient: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = impatient.alloc(LIMIT, first)
        with cuda.stuck(first) as let_go:
            cuda.fill(address, LIMIT, first)
            impatient.free(address)
            with cuda.stuck(first):
                assert impatient.alloc(LIMIT, second) == address
                cuda.fill(address, LIMIT, second)
                let_go()
                cuda.synchronize_stream(second)
        cuda.synchronize()

    def test_others_wait_too_for_what_it_gives_back(
        self, impatient: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, third = kept_streams
        address = impatient.alloc(LIMIT, first)
        with cuda.stuck(first):
            cuda.fill(address, LIMIT, first)
            impatient.free(address)
            half = impatient.alloc(LIMIT // 2, second)
            impatient.check_invariants()
            impatient.free(half)
            for _ in range(2):
                wanted = impatient.alloc(LIMIT // 2, third)
                cuda.fill(wanted, LIMIT // 2, third)
        cuda.synchronize()

    def test_a_stream_is_never_put_behind_what_was_submitted_after_the_free(
        self, impatient: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        """Blocks too small to be marked one by one, when the memory runs out behind them."""
        first, second, _ = kept_streams
        held = impatient.alloc(LIMIT - 2 * MIB, first)
        small = impatient.alloc(MIB + 512, first)
        impatient.free(small)
        with cuda.stuck(first), faults():
            with pytest.raises(spillover.SpilloverError, match="out of memory"):
                impatient.alloc(2 * MIB, second)
            assert "cuStreamWaitEvent" not in calls()
            assert "cuCtxSynchronize" not in calls(), "that would hang behind the stuck stream"
        impatient.free(held)

    def test_a_failed_wait_leaves_the_block_where_it_is(
        self, impatient: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        address = impatient.alloc(LIMIT, first)
        with cuda.stuck(first):
            cuda.fill(address, LIMIT, first)
            impatient.free(address)
            with (
                faults(emulator.Fault("cuStreamWaitEvent", times=None)),
                pytest.raises(spillover.SpilloverError, match="out of memory"),
            ):
                impatient.alloc(LIMIT, second)
            impatient.check_invariants()
        assert impatient.alloc(LIMIT, first) == address


@pytest.mark.virtual_memory
@pytest.mark.parametrize("function", ["cuEventCreate", "cuEventRecord", "cuStreamIsCapturing"])
def test_a_free_succeeds_where_no_mark_can_be_had(
    full: _core.Pool, cuda: Cuda, kept_streams: list[int], function: str
) -> None:
    first, second, _ = kept_streams
    blocks = [full.alloc(LIMIT // 2, first) for _ in range(2)]
    for block in blocks:
        cuda.fill(block, LIMIT // 2, first)
    with faults(emulator.Fault(function, times=None)):
        full.free(blocks[0])
    full.free(blocks[1])  # its mark covers the first one too
    with cuda.stuck(first):
        wanted = full.alloc(LIMIT, second)
        cuda.fill(wanted, LIMIT, second)
    cuda.synchronize()


class TestForeignStreams:
    def test_their_memory_is_reused_without_a_wait_for_the_device(
        self, full: _core.Pool, cuda: Cuda
    ) -> None:
        with faults():
            for _ in range(8):
                stream = cuda.create_stream()
                address = full.alloc(LIMIT // 2, stream)
                cuda.fill(address, LIMIT // 2, stream)
                full.free(address)
                full.free(full.alloc(512, stream))  # passed to the pool once more
                cuda.destroy_stream(stream)
            assert "cuCtxSynchronize" not in calls()
        assert reserved_bytes(full) <= LIMIT

    def test_noting_a_use_on_a_stream_tells_that_it_is_alive(
        self, full: _core.Pool, cuda: Cuda
    ) -> None:
        stream = cuda.create_stream()
        noted = full.alloc(512)
        address = full.alloc(LIMIT // 2, stream)
        cuda.fill(address, LIMIT // 2, stream)
        full.free(address)
        full.record_stream(noted, stream)
        cuda.destroy_stream(stream)
        with faults():
            assert full.alloc(LIMIT - 4 * MIB)
            assert "cuCtxSynchronize" not in calls()

    def test_a_handle_that_is_issued_again_is_not_the_same_stream(
        self, full: _core.Pool, cuda: Cuda
    ) -> None:
        stream = cuda.create_stream()
        address = full.alloc(LIMIT, stream)
        cuda.fill(address, LIMIT, stream)
        full.free(address)
        full.record_stream(full.alloc(LIMIT, stream), stream)
        cuda.fill(address, LIMIT, stream)
        full.free(address)  # not covered: the stream is not passed to the pool again
        cuda.destroy_stream(stream)
        again = cuda.create_stream()
        assert again == stream, "the emulated driver issues handles again"
        with faults():
            assert full.alloc(LIMIT, again) != 0
            assert calls()["cuCtxSynchronize"] == 1
        cuda.fill(address, LIMIT, again)
        cuda.synchronize()
        cuda.destroy_stream(again)

    def test_a_mark_outlives_its_stream(self, full: _core.Pool, cuda: Cuda) -> None:
        stream = cuda.create_stream()
        address = full.alloc(LIMIT - 2 * MIB, stream)
        cuda.fill(address, LIMIT - 2 * MIB, stream)
        full.free(address)
        full.free(full.alloc(512, stream))
        cuda.destroy_stream(stream)
        again = cuda.create_stream()
        with cuda.stuck(again), faults():
            address = full.alloc(LIMIT - 2 * MIB, again)
            assert "cuCtxSynchronize" not in calls()
        cuda.fill(address, LIMIT - 2 * MIB, again)
        cuda.synchronize()
        cuda.destroy_stream(again)


class TestCost:
    def test_a_program_with_one_stream_records_nothing(
        self, run_emulated: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        run_emulated(
            """
            from spillover import _core
            from spillover.emulator import calls, faults
            MIB = 1 << 20
            pool = _core.Pool(0)
            with faults():
                for size in (1, 5, 30, 100):
                    blocks = [pool.alloc(size * MIB + 512) for _ in range(3)]
                    for block in blocks:
                        pool.free(block)
                    pool.free(pool.alloc(2 * size * MIB))
                made = {name for name in calls() if "Event" in name}
            assert not made, made
            """
        )

    def test_a_thread_reuses_its_blocks_without_a_call(
        self, full: _core.Pool, kept_streams: list[int]
    ) -> None:
        full.free(full.alloc(MIB + 512, kept_streams[0]))
        with faults():
            for _ in range(100):
                full.free(full.alloc(MIB + 512, kept_streams[0]))
            # That the stream does not record a graph is asked each time.
            assert set(calls()) <= {"cuCtxGetCurrent", "cuStreamIsCapturing"}

    def test_marks_and_events_are_bounded(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        before = emulator.live().events
        with cuda.stuck(first):
            for _ in range(1000):
                address = full.alloc(4 * MIB, first)
                cuda.fill(address, 4096, first)
                full.free(address)
            full.check_invariants()
            assert emulator.live().events - before <= 100
        address = full.alloc(LIMIT, second)
        cuda.fill(address, LIMIT, second)
        cuda.synchronize()

    def test_capture_is_not_disturbed(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        first, second, _ = kept_streams
        blocks = [full.alloc(8 * MIB, stream) for stream in (first, second, first)]
        with cuda.capture(first) as nodes, faults():
            for block in blocks:
                full.free(block)
            assert calls().get("cuEventRecord", 0) == 1, "the other stream's"
        assert nodes == [0]
        assert full.alloc(LIMIT, second) != 0

    def test_capture_is_not_disturbed_by_frees_on_the_default_stream(
        self, full: _core.Pool, cuda: Cuda, kept_streams: list[int]
    ) -> None:
        """An event there would have to wait for the stream that captures."""
        blocks = [full.alloc(8 * MIB) for _ in range(2)]
        blocking = cuda.create_stream(flags=0)
        with cuda.capture(blocking) as nodes, faults():
            full.free(blocks[0])
            assert "cuEventRecord" not in calls()
        assert nodes == [0]
        with faults():
            full.free(blocks[1])
            assert calls()["cuEventRecord"] == 1
        cuda.destroy_stream(blocking)


class RandomProgram:
    """Streams that use, free and reuse memory which they have too little of; some are stuck."""

    SIZES = (512, 100_000, MIB + 512, 3 * MIB, 8 * MIB, 8 * MIB, 20 * MIB)

    def __init__(self, pool: _core.Pool, cuda: Cuda, streams: list[int], seed: int) -> None:
        self.pool, self.cuda, self.streams = pool, cuda, streams
        self.random = random.Random(seed)
        self.blocks: list[tuple[int, int, int]] = []
        self.stuck = contextlib.ExitStack()

    def allocate(self) -> None:
        size, stream = self.random.choice(self.SIZES), self.random.choice(self.streams)
        try:
            address = self.pool.alloc(size, stream)
        except spillover.SpilloverError as error:
            if "out of memory" not in str(error):
                raise
            return
        self.cuda.fill(address, size, stream)
        self.blocks.append((address, size, stream))

    def free(self) -> None:
        if not self.blocks:
            return
        address, size, stream = self.blocks.pop(self.random.randrange(len(self.blocks)))
        self.cuda.fill(address, size, stream)
        self.pool.free(address)

    def stick(self) -> None:
        self.stuck.enter_context(self.cuda.stuck(self.random.choice(self.streams)))

    def let_go(self) -> None:
        self.stuck.close()
        self.cuda.synchronize()

    def run(self, steps: int) -> None:
        for step in range(steps):
            actions = (self.allocate, self.free, self.stick, self.let_go)
            (action,) = self.random.choices(actions, (50, 50, 3, 2))
            action()
            if step % 10 == 0:
                self.pool.check_invariants()
        self.let_go()
        for address, _, _ in self.blocks:
            self.pool.free(address)


@pytest.mark.virtual_memory
@pytest.mark.parametrize("seed", range(6))
def test_random_programs_are_free_of_hazards(
    impatient: _core.Pool, cuda: Cuda, kept_streams: list[int], seed: int
) -> None:
    impatient.configure("wait_max=1ms", "the test")
    RandomProgram(impatient, cuda, [0, *kept_streams], seed).run(400)


@pytest.mark.soak
@pytest.mark.virtual_memory
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_programs_are_free_of_hazards(
    impatient: _core.Pool, cuda: Cuda, kept_streams: list[int], seed: int
) -> None:
    impatient.configure("wait_max=1ms", "the test")
    RandomProgram(impatient, cuda, [0, *kept_streams], seed).run(600)

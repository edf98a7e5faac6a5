"""Each driver call of a program on arenas with upstreams fails in turn, and each of their own.

The upstream's functions take memory of the driver's, so a fault of cuMemAlloc or cuMemFree is one
of theirs: "no memory", or memory that they could not give back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from cuda_calls import Cuda, live_blocks
from pool_program import OWN_CALLS
from upstream import Upstream

from spillover import ConfigError, SpilloverError, _core, emulator
from spillover.emulator import Fault, calls, faults

MIB = 1 << 20
VALUE = 5


class UpstreamProgram:
    """Uses arenas with upstreams in every way that makes the pool or them call the driver."""

    def __init__(self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> None:
        self.pool = pool
        self.cuda = cuda
        self.first, self.second = kept_streams[:2]
        self.upstreams: list[Upstream] = []
        self.answer_count = 0
        #: Numbers of the upstreams' answers that are "no memory".
        self.refused: set[int] = set()
        self._may_sleep = cuda.has_virtual_memory
        self._host = _core.HostPool(limit_bytes=64 * MIB)

    def make(self, offset: int = 0) -> Upstream:
        def answers(_size_bytes: int) -> bool:
            self.answer_count += 1
            return self.answer_count not in self.refused

        upstream = Upstream(self.cuda, offset=offset, before_alloc=answers)
        self.upstreams.append(upstream)
        return upstream

    def alloc_in(self, upstream: Upstream, size_bytes: int, stream: int = 0) -> int:
        address = self.pool.alloc_in(upstream.arena, size_bytes, stream)
        self.cuda.fill(address, size_bytes, stream, VALUE)
        return address

    def run(self) -> list[int]:
        """Do it all; gives what must be the same each time."""
        pool = self.pool
        pool.configure("limit=160MiB", "the test")
        upstream, uneven = self.make(), self.make(offset=256)
        blocks = [self.alloc_in(upstream, size) for size in (1000, 5 * MIB, 30 * MIB)]
        there = self.alloc_in(upstream, 5 * MIB, self.first)
        odd = self.alloc_in(uneven, 3 * MIB)
        pool.record_stream(there, self.second)
        pool.free(there)
        pool.free(blocks.pop())
        # What it has serves it again, what it lends others.
        blocks.append(self.alloc_in(upstream, 29 * MIB))
        checkpoint = [
            (address, block)
            for address, block in live_blocks(pool).items()
            if upstream.holds(address)
        ]
        pool.free(blocks.pop())
        pool.restore_arena(upstream.arena, checkpoint)
        ordinary = pool.alloc(20 * MIB)
        if self._may_sleep:
            pool.sleep([0], self._host)
            pool.wake([0])
        # More than the limit allows beside what the upstreams gave: all is tried.
        try:
            pool.alloc_in(upstream.arena, 150 * MIB)
        except SpilloverError as error:
            if "out of memory" not in str(error):
                raise
        pool.free(ordinary)
        pool.free(odd)
        pool.release_arena(uneven.arena)
        pool.trim_arena(uneven.arena)
        for address in live_blocks(pool):
            pool.free(address)
        pool.release_arena(upstream.arena)
        # Its idle memory has to go for this one.
        pool.free(pool.alloc(150 * MIB))
        pool.trim()
        return [len(pool.segments()), upstream.done_count, uneven.done_count]

    def check(self) -> None:
        """Nothing is in effect any more: everything goes back, once, to whom it came from."""
        pool = self.pool
        pool.check_invariants()
        pool.configure("limit=none", "the test")
        pool.wake([0])
        self.cuda.synchronize()
        for address in live_blocks(pool):
            pool.free(address)
        for upstream in self.upstreams:
            with contextlib.suppress(ConfigError):  # It was released before.
                pool.release_arena(upstream.arena)
        pool.trim()
        pool.check_invariants()
        assert pool.segments() == []
        assert pool.stats()["reserved_bytes"]["all"]["current"] == 0
        for upstream in self.upstreams:
            assert (upstream.live, upstream.done_count) == ({}, 1)
            # A free of its own that failed, if any.
            assert all("failed with CUresult" in str(error) for error in upstream.failures)
            assert len(upstream.failures) <= 4, upstream.failures
        self.upstreams.clear()
        self.answer_count = 0


@pytest.fixture
def program(pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> Iterator[UpstreamProgram]:
    program = UpstreamProgram(pool, cuda, kept_streams)
    program.run()
    program.check()
    yield program
    program.check()


def fault_points(program: UpstreamProgram) -> dict[str, int]:
    with faults():
        program.run()
        counts = calls()
    program.check()
    return {name: count for name, count in counts.items() if name not in OWN_CALLS}


def faults_at(function: str, call: int) -> list[Fault]:
    """Once, a few times, and with an error other than the likely one."""
    return [
        Fault(function, call=call),
        Fault(function, call=call, times=3),
        Fault(function, call=call, error="CUDA_ERROR_OPERATING_SYSTEM"),
    ]


def sweep(program: UpstreamProgram, points: list[Fault]) -> None:
    # A free of the upstream's own that failed has done its work all the same: docs/faults.md.
    report = emulator.sweep(program.run, points=points, check=program.check)
    report.check()
    assert report.points > 0.9 * len(points)


def test_any_call_may_fail(program: UpstreamProgram) -> None:
    counts = fault_points(program)
    assert {"cuMemAlloc", "cuMemFree", "cuCtxSynchronize", "cuEventRecord"} <= counts.keys()
    generator = random.Random(11)
    points = [
        generator.choice(faults_at(name, generator.randint(1, count)))
        for name, count in counts.items()
    ]
    sweep(program, points)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variant", range(3))
def test_every_call_may_fail(program: UpstreamProgram, variant: int) -> None:
    """Of a function that is called often, calls that are evenly spread."""
    counts = fault_points(program)
    points = [
        faults_at(name, call)[variant]
        for name, count in counts.items()
        for call in range(1, count + 1, 1 + count // 10)
    ]
    sweep(program, points)


def test_each_answer_of_the_upstreams_may_be_no_memory(program: UpstreamProgram) -> None:
    program.run()
    count = program.answer_count
    program.check()
    assert count >= 6
    for first in range(1, count + 1):
        # Asked again when memory went back, it has some, or has none to the end.
        for last in (first, count * 3):
            program.refused = set(range(first, last + 1))
            if last == first:
                program.run()
            else:
                with pytest.raises(SpilloverError, match="out of memory"):
                    program.run()
            program.refused = set()
            program.check()

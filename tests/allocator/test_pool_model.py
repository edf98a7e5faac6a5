"""Random calls against the pool, checked after each one against a model in Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from cuda_calls import Cuda, live_blocks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from spillover import _core

KIB, MIB = 1 << 10, 1 << 20
STREAM_COUNT = 3
# Both sides of each limit in the pool's size classes, and anything between.
SIZES = st.one_of(
    st.sampled_from(
        [1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 3 * MIB, 10 * MIB - 1, 10 * MIB, 21 * MIB + 5]
    ),
    st.integers(1, 4 * KIB),
    st.integers(4 * KIB, 3 * MIB),
)
STREAMS = st.integers(0, STREAM_COUNT - 1)


@dataclass
class ModelBlock:
    """What the model knows of a block that it was given."""

    address: int
    requested_bytes: int
    size_bytes: int
    stream: int
    uses: set[int] = field(default_factory=set)


class PoolModel(RuleBasedStateMachine):
    """The pool must agree with a dictionary of live blocks."""

    blocks = Bundle("blocks")

    @initialize()
    def start(self) -> None:
        self.cuda = Cuda()
        self.pool = _core.Pool(0)
        self.cuda.synchronize()
        self.pool.trim()
        self.pool.reset_peak_stats()
        self.pool.reset_accumulated_stats()
        self.streams = [0] + [self.cuda.create_stream() for _ in range(STREAM_COUNT - 1)]
        self.live: dict[int, ModelBlock] = {}
        # Freed blocks, each with an event of our own behind every use on another stream.
        self.gated: list[tuple[ModelBlock, list[int]]] = []
        self.allocated_count = 0
        self.freed_count = 0
        self.peak_bytes = 0

    @rule(target=blocks, size_bytes=SIZES, stream=STREAMS)
    def alloc(self, size_bytes: int, stream: int) -> ModelBlock:
        address = self.pool.alloc(size_bytes, self.streams[stream])
        assert address % 512 == 0
        assert address not in self.live
        block = ModelBlock(address, size_bytes, live_blocks(self.pool)[address], stream)
        self._check_gates(block)
        self.live[address] = block
        self.allocated_count += 1
        self.peak_bytes = max(self.peak_bytes, self._live_bytes())
        self.cuda.fill(address, min(size_bytes, 4 * KIB), self.streams[stream])
        return block

    @rule(block=consumes(blocks))
    def free(self, block: ModelBlock) -> None:
        events = []
        for stream in sorted(block.uses):
            events.append(self.cuda.create_event())
            self.cuda.record(events[-1], self.streams[stream])
        self.pool.free(block.address)
        del self.live[block.address]
        self.freed_count += 1
        if events:
            self.gated.append((block, events))

    @rule(block=blocks, stream=STREAMS)
    def use_on_another_stream(self, block: ModelBlock, stream: int) -> None:
        if stream == block.stream:
            return
        self.cuda.order(self.streams[block.stream], self.streams[stream])
        self.cuda.fill(block.address, min(block.requested_bytes, 4 * KIB), self.streams[stream])
        self.cuda.order(self.streams[stream], self.streams[block.stream])
        # Noted twice: the second note must change nothing.
        self.pool.record_stream(block.address, self.streams[stream])
        self.pool.record_stream(block.address, self.streams[stream])
        block.uses.add(stream)

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        stats = self.pool.stats()
        assert stats["active"]["all"]["current"] == len(self.live)
        for segment in self.pool.segments():
            assert any(block["state"] == "live" for block in segment["blocks"])

    @rule()
    def synchronize(self) -> None:
        self.cuda.synchronize()

    @rule()
    def reset_peak(self) -> None:
        self.pool.reset_peak_stats()
        self.peak_bytes = self._live_bytes()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        sizes = live_blocks(self.pool)
        assert sizes == {block.address: block.size_bytes for block in self.live.values()}
        end = 0
        for address in sorted(sizes):
            assert address >= end, "two live blocks overlap"
            end = address + sizes[address]
        stats = self.pool.stats()
        waiting_bytes = sum(
            block["requested_bytes"]
            for segment in self.pool.segments()
            for block in segment["blocks"]
            if block["state"] == "waiting"
        )
        requested = sum(block.requested_bytes for block in self.live.values()) + waiting_bytes
        assert stats["requested_bytes"]["all"]["current"] == requested
        assert stats["allocation"]["all"] == {
            "current": len(self.live),
            "peak": stats["allocation"]["all"]["peak"],
            "allocated": self.allocated_count,
            "freed": self.freed_count,
        }
        assert stats["allocated_bytes"]["all"]["current"] == self._live_bytes()
        assert stats["allocated_bytes"]["all"]["peak"] == self.peak_bytes
        for counters in stats.values():
            if isinstance(counters, dict):
                for key in ("current", "allocated", "freed"):
                    parts = counters["small_pool"][key] + counters["large_pool"][key]
                    assert counters["all"][key] == parts

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for address in list(self.live):
            self.pool.free(address)
        self.pool.trim()
        assert self.pool.segments() == []
        for _, events in self.gated:
            for event in events:
                self.cuda.destroy_event(event)
        for stream in self.streams[1:]:
            self.cuda.destroy_stream(stream)

    def _live_bytes(self) -> int:
        return sum(block.size_bytes for block in self.live.values())

    def _check_gates(self, block: ModelBlock) -> None:
        """No byte of a freed block is given out before the streams that used it are done."""
        still_gated = []
        for freed, events in self.gated:
            overlaps = (
                block.address < freed.address + freed.size_bytes
                and freed.address < block.address + block.size_bytes
            )
            if not overlaps:
                still_gated.append((freed, events))
                continue
            assert all(self.cuda.is_complete(event) for event in events)
            for event in events:
                self.cuda.destroy_event(event)
        self.gated = still_gated


TestPoolModel = PoolModel.TestCase
# Derandomised: the same cases on each machine, and a failure is reproduced by running it again.
TestPoolModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)

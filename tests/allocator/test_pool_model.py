"""Random programs against the pool, compared with the reference of ``pool_model``."""

from __future__ import annotations

import functools
import os

from cuda_calls import Cuda
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pool_model import EDGE_SIZES, KIB, MIB, ModelledPool
from pool_workers import ModelBlock, ModelStream, Worker

from spillover import _core

SIZES = st.one_of(
    st.sampled_from(EDGE_SIZES), st.integers(1, 4 * KIB), st.integers(4 * KIB, 3 * MIB)
)
PICKS = st.integers(0, 1000)  # Of what there is, by the remainder.
TAGS = st.lists(st.integers(0, 2), min_size=1, max_size=2)
FOREIGN_STREAMS_MAX = 4


@functools.lru_cache(maxsize=1)
def kept_streams() -> list[int]:
    """Streams that live as long as the process: it may not destroy them."""
    cuda = Cuda()
    streams = [cuda.create_stream() for _ in range(2)]
    for stream in streams:
        _core.Pool(0).keep_stream(stream)
    return streams


def test_handles_are_reissued(cuda: Cuda) -> None:
    """What the random programs rely on to tell a new stream from one that had its handle."""
    first = cuda.create_stream()
    cuda.destroy_stream(first)
    second = cuda.create_stream()
    cuda.destroy_stream(second)
    assert second == first


class PoolModel(RuleBasedStateMachine):
    """Threads, streams and limits that come and go.

    What a rule draws, and whether it may run, depends on nothing that threads at work at once leave
    open: a rule without anything to choose from does nothing.
    """

    @initialize()
    def begin(self) -> None:
        self.model = ModelledPool(Cuda(), kept_streams())

    def _worker(self, pick: int) -> Worker:
        return self.model.workers[pick % len(self.model.workers)]

    def _block(self, pick: int) -> ModelBlock:
        blocks = list(self.model.live.values())
        return blocks[pick % len(blocks)]

    def _stream(self, worker: Worker, pick: int) -> ModelStream:
        streams = self.model.streams_of(worker)
        return streams[pick % len(streams)]

    @rule(worker=PICKS, size_bytes=SIZES, stream=PICKS, tag=st.sampled_from([0, 0, 1, 2, 3]))
    def alloc(self, worker: int, size_bytes: int, stream: int, tag: int) -> None:
        thread = self._worker(worker)
        of_thread = self._stream(thread, stream)
        self.model.alloc(thread, size_bytes, of_thread, self.model.places[tag])

    @rule(worker=PICKS, block=PICKS)
    def free(self, worker: int, block: int) -> None:
        if self.model.live:
            self.model.free(self._worker(worker), self._block(block))

    @rule(worker=PICKS, block=PICKS, stream=PICKS)
    def use_on_another_stream(self, worker: int, block: int, stream: int) -> None:
        thread = self._worker(worker)
        if self.model.live:
            self.model.use(thread, self._block(block), self._stream(thread, stream))

    @rule(worker=PICKS, size_bytes=SIZES, stream=PICKS, count=st.integers(2, 12))
    def fill_a_magazine(self, worker: int, size_bytes: int, stream: int, count: int) -> None:
        thread = self._worker(worker)
        blocks = [
            self.model.alloc(thread, size_bytes, self._stream(thread, stream)) for _ in range(count)
        ]
        for block in blocks:
            if block is not None:
                self.model.free(thread, block)

    @rule(worker=PICKS)
    def create_stream(self, worker: int) -> None:
        if len(self.model.foreign) < FOREIGN_STREAMS_MAX:
            self.model.create_stream(self._worker(worker))

    @rule(worker=PICKS, stream=PICKS)
    def destroy_stream(self, worker: int, stream: int) -> None:
        if foreign := self.model.foreign:
            self.model.destroy_stream(self._worker(worker), foreign[stream % len(foreign)])

    @rule(worker=PICKS)
    def end_a_thread(self, worker: int) -> None:
        self.model.replace(self._worker(worker))

    @rule(limit_mib=st.sampled_from([None, 8, 24, 40, 64]))
    def limit(self, limit_mib: int | None) -> None:
        self.model.set_limit(None if limit_mib is None else limit_mib * MIB)

    @rule(worker=PICKS, tags=TAGS, contents=st.sampled_from(["host", "host", "short", "discard"]))
    def sleep(self, worker: int, tags: list[int], contents: str) -> None:
        if not self.model.cuda.has_virtual_memory:
            return
        limit_bytes = None if contents == "host" else MIB
        host = None if contents == "discard" else _core.HostPool(limit_bytes=limit_bytes)
        self.model.sleep(self._worker(worker), [self.model.tags[tag] for tag in tags], host)

    @rule(worker=PICKS, tags=TAGS)
    def wake(self, worker: int, tags: list[int]) -> None:
        self.model.wake(self._worker(worker), [self.model.tags[tag] for tag in tags])

    @rule()
    def renew_upstream(self) -> None:
        self.model.renew_upstream()

    @rule()
    def trim(self) -> None:
        self.model.trim()

    @rule()
    def synchronize(self) -> None:
        self.model.synchronize()

    @rule()
    def reset_peak(self) -> None:
        self.model.reset_peak()

    @rule()
    def inspect(self) -> None:
        """Not after each step: what shows every block empties the magazines first."""
        self.model.inspect()

    @rule(seed=st.integers(0, 1 << 32))
    def work_at_once(self, seed: int) -> None:
        self.model.burst(seed)

    @invariant()
    def equations_hold(self) -> None:
        if hasattr(self, "model"):
            self.model.pool.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.close()


TestPoolModel = PoolModel.TestCase
# Derandomised: the same cases on each machine, and a failure is reproduced by running it again.
TestPoolModel.settings = (
    settings(max_examples=600, stateful_step_count=80, deadline=None, print_blob=True)
    if os.environ.get("SPILLOVER_SOAK") == "1"
    else settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=True)
)

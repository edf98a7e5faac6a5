"""A simple reference allocator beside the pool, which must agree with it after each call.

The reference is a dictionary of live blocks. Beside it stand *gates*: freed blocks with an event
behind each stream's last access to them, so that memory which is given out too early is seen. And
each block carries a pattern, written on its stream and read back there before it is freed, so that
two addresses of the same memory are seen as well. Memory of a tag that sleeps is neither read nor
used until it wakes, when it must have its pattern again.
"""

from __future__ import annotations

import concurrent.futures
import functools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from cuda_calls import Cuda, live_blocks
from pool_workers import BLOCK_BYTES, CHUNK_BYTES, ModelBlock, ModelStream, Worker, rounded
from upstream import Upstream

from spillover import HostOutOfMemory, SpilloverError, StateError, _core, emulator

KIB, MIB = 1 << 10, 1 << 20
#: Both sides of each limit in the pool's size classes.
EDGE_SIZES = (1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 3 * MIB, 10 * MIB, 21 * MIB + 5)
BURST_SIZES = (1, 512, 700, 40 * KIB, MIB // 3, MIB + 1, 2 * MIB + 7, 9 * MIB)
#: What one magazine may hold: 8 MiB of small blocks and a 64th of the device in large ones.
MAGAZINE_BYTES = 8 * MIB + _core.memory_info(0)[1] // 64
#: Numbers of private arenas begin here; in place of a tag they say where to allocate.
FIRST_PRIVATE_ARENA = 1 << 31


@dataclass
class Burst:
    """What one thread did while others were at it as well."""

    kept: list[ModelBlock]
    streams: list[ModelStream] = field(default_factory=list)
    allocated_count: int = 0
    allocated_bytes: int = 0
    freed_count: int = 0
    refused_count: int = 0


class ModelledPool:
    """The pool and its reference. Methods that take a worker do their work on its thread."""

    def __init__(self, cuda: Cuda, kept_streams: list[int], *, workers: int = 3) -> None:
        self.cuda = cuda
        cuda.use_device()
        self.pool = _core.Pool(0)
        for address in live_blocks(self.pool):  # Of a program that failed.
            self.pool.free(address)
        self.pool.set_memory_fraction(1.0)
        self.pool.wake(self.pool.sleeping_tags())
        cuda.synchronize()
        self.pool.trim()
        assert self.pool.segments() == []
        self._foreign_bytes = emulator.live().device_bytes
        self.pool.reset_peak_stats()
        self.pool.reset_accumulated_stats()
        self.pool.configure("check_every=1", "the model")
        self.workers = [Worker(cuda) for _ in range(workers)]
        self._ended: list[Worker] = []
        self.lasting = [ModelStream(0, "default")]
        self.lasting += [ModelStream(handle, "kept") for handle in kept_streams]
        self.foreign: list[ModelStream] = []
        self.live: dict[int, ModelBlock] = {}
        self.limit_bytes = self.device_bytes = _core.memory_info(0)[1]
        self.allocated_count = self.freed_count = self.refused_count = 0
        # The true peak is between them: several threads at once leave it open.
        self.peak_bytes_least = self.peak_bytes_most = 0
        self._gates: list[tuple[ModelBlock, list[tuple[ModelStream, int]]]] = []
        self._events: list[int] = []
        self._dead: list[ModelStream] = []
        self._value = 0
        self.tags = [0, _core.tag_number("one"), _core.tag_number("another")]
        self.asleep: set[int] = set()
        self._discarded: set[int] = set()  # Of those: what is in them is not defined any more.
        self.upstreams = [Upstream(cuda)]

    @property
    def places(self) -> list[int]:
        """Tags, and the arena with an upstream that is in use."""
        return [*self.tags, self.upstreams[-1].arena]

    def streams_of(self, worker: Worker) -> list[ModelStream]:
        """The streams that the worker may use."""
        return [*self.lasting, worker.stream, *self.foreign]

    def _held_bytes(self) -> int:
        """What the pool holds of the driver, asked there: it changes nothing in the pool."""
        return emulator.live().device_bytes - self._foreign_bytes

    @property
    def live_bytes(self) -> int:
        return sum(block.size_bytes for block in self.live.values())

    # ---- one call at a time ----

    def alloc(
        self, worker: Worker, size_bytes: int, stream: ModelStream, tag: int = 0
    ) -> ModelBlock | None:
        """A new block; None where memory is really short."""
        if tag in self.asleep:
            with pytest.raises(StateError, match="sleeps on device 0; wake it before"):
                worker.run(lambda: self._alloc(size_bytes, stream, tag, []))
            return None
        held_bytes = self._held_bytes()
        block: ModelBlock | None
        block = worker.run(lambda: self._alloc(size_bytes, stream, tag, self._gates))
        if block is None:
            self.refused_count += 1
            self._check_shortage(worker, size_bytes, stream, tag)
            return None
        assert self._held_bytes() <= max(held_bytes, self.limit_bytes)
        for other in self.live.values():
            assert other.end <= block.address or block.end <= other.address, "blocks overlap"
        self.live[block.address] = block
        self.allocated_count += 1
        self._note_peak(self.live_bytes, self.live_bytes)
        return block

    def free(self, worker: Worker, block: ModelBlock) -> None:
        gate = worker.run(lambda: self._free(worker, block))
        del self.live[block.address]
        self.freed_count += 1
        self._gates.append((block, gate))

    def use(self, worker: Worker, block: ModelBlock, stream: ModelStream) -> None:
        """Read the block on another stream, which the pool is told."""
        worker.run(lambda: self._use(worker, block, stream))

    def create_stream(self, worker: Worker) -> None:
        """Add a stream that the pool does not know to last."""
        handle = worker.run(self.cuda.create_stream)
        self.foreign.append(ModelStream(handle, "foreign"))

    def destroy_stream(self, worker: Worker, stream: ModelStream) -> None:
        """Destroy a foreign stream, whatever is still to be done on it."""
        blocks = [block for block in self.live.values() if block.stream is stream]
        worker.run(lambda: self._destroy(worker, stream, blocks))
        self.foreign.remove(stream)

    def replace(self, worker: Worker) -> None:
        """Let the worker's thread end with what it keeps, and another one begin."""
        blocks = [block for block in self.live.values() if block.stream is worker.stream]
        worker.run(lambda: self._leave(worker, worker.stream, blocks))
        worker.end()
        self._ended.append(worker)
        self.workers[self.workers.index(worker)] = Worker(self.cuda)

    def set_limit(self, size_bytes: int | None) -> None:
        """Let the pool hold no more than this from now on."""
        self.limit_bytes = self.device_bytes if size_bytes is None else size_bytes
        self.pool.set_memory_fraction(self.limit_bytes / self.device_bytes)

    def sleep(self, worker: Worker, tags: list[int], host: _core.HostPool | None) -> None:
        """Put tags to sleep, with their contents in a host pool or without.

        Where the contents have no room there nothing changes.
        """
        fresh = set(tags) - self.asleep
        held_bytes = self._held_bytes()
        contents_bytes = sum(block.size_bytes for block in self._blocks_of(fresh))
        try:
            copied_bytes = worker.run(lambda: self.pool.sleep(tags, host))
        except HostOutOfMemory:
            assert host is not None
            assert host.stats().limit_bytes < contents_bytes
            assert host.stats().used_bytes == 0
            return
        assert copied_bytes == (0 if host is None else contents_bytes)
        assert self._held_bytes() <= held_bytes
        self.asleep |= fresh
        if host is None:
            self._discarded |= fresh
        for block in self._blocks_of(fresh):
            block.uses.clear()  # It has waited for the device.

    def wake(self, worker: Worker, tags: list[int]) -> None:
        """Wake tags; where memory is really short they sleep on."""
        wakers = set(tags) & self.asleep
        held_bytes = self._held_bytes()
        kept = self._blocks_of(wakers - self._discarded)
        try:
            copied_bytes = worker.run(lambda: self.pool.wake(tags))
        except SpilloverError as error:
            if "waking memory with the tag" not in str(error):
                raise
            self.synchronize()
            self.trim()
            missing_bytes = self._chunk_bytes(self._blocks_of(wakers))
            assert self._held_bytes() + missing_bytes > self.limit_bytes, "there was memory"
            assert set(self.pool.sleeping_tags()) == self.asleep
            return
        assert self._held_bytes() <= max(held_bytes, self.limit_bytes)
        # A piece is copied as a whole as long as one block of it is live.
        assert copied_bytes >= sum(block.size_bytes for block in kept)
        self.asleep -= wakers
        for block in self._blocks_of(wakers & self._discarded):
            worker.run(functools.partial(self._write, block, self.lasting[0]))
        self.cuda.synchronize()
        self._discarded -= wakers

    def _blocks_of(self, tags: set[int]) -> list[ModelBlock]:
        return [block for block in self.live.values() if block.tag in tags]

    def _chunk_bytes(self, blocks: list[ModelBlock]) -> int:
        """Size of the chunks that the blocks lie in."""
        chunks = set()
        for block in blocks:
            chunks.update(range(block.address // CHUNK_BYTES, -(-block.end // CHUNK_BYTES)))
        return CHUNK_BYTES * len(chunks)

    def renew_upstream(self) -> None:
        """Release the arena with an upstream, whatever lives in it, and make another one."""
        self.pool.release_arena(self.upstreams[-1].arena)
        self.upstreams.append(Upstream(self.cuda))

    def trim(self) -> None:
        self.pool.trim()
        stats = self.pool.stats()
        reserved_bytes = stats["reserved_bytes"]["all"]["current"]
        segments = [segment for segment in self.pool.segments() if not segment["is_asleep"]]
        assert reserved_bytes == sum(segment["size_bytes"] for segment in segments)
        given_bytes = self._check_upstreams(segments)
        if self.cuda.has_virtual_memory:
            awake = self._blocks_of(set(self.tags) - self.asleep)
            assert reserved_bytes == self._chunk_bytes(awake) + given_bytes
        for segment in segments:
            if segment["arena"] == self.upstreams[-1].arena:
                continue
            assert any(block["state"] == "live" for block in segment["blocks"])
        assert stats["active"]["all"]["current"] == len(self.live), "a block still waits"

    def synchronize(self) -> None:
        """Wait for the device, and look at everything that was read back."""
        self.cuda.synchronize()
        for worker in [*self.workers, *self._ended]:
            worker.compare()
        for worker in self._ended:
            worker.close()
        self._ended.clear()
        for event in self._events:
            self.cuda.destroy_event(event)
        self._events.clear()
        self._gates.clear()
        for block in self.live.values():
            block.uses.clear()
        for stream in self._dead:
            stream.last_event = None
        self._dead.clear()

    def reset_peak(self) -> None:
        self.pool.reset_peak_stats()
        self.peak_bytes_least = self.peak_bytes_most = self.live_bytes

    def close(self) -> None:
        """Free what is left; the pool must then hold nothing."""
        for block in list(self.live.values()):
            self.free(self.workers[0], block)
        self.wake(self.workers[0], self.tags)
        for stream in list(self.foreign):
            self.destroy_stream(self.workers[0], stream)
        self.synchronize()
        self.inspect()
        for worker in self.workers:
            worker.end()
            worker.close()
        self.pool.check_invariants()
        self.pool.release_arena(self.upstreams[-1].arena)
        self.pool.trim()
        assert self.pool.segments() == []
        for upstream in self.upstreams:
            upstream.check_ended()
        self.pool.set_memory_fraction(1.0)
        self.pool.configure("check_every=64", "the model")

    # ---- several threads at once ----

    def burst(self, seed: int, steps: int = 25) -> None:
        """Let all threads work at once, and compare afterwards."""
        generator = random.Random(seed)
        # Only a thread itself can read on its own default stream.
        hands: dict[Worker, list[ModelBlock]] = {worker: [] for worker in self.workers}
        owners = {worker.stream: worker for worker in self.workers}
        for block in self.live.values():
            hands[owners.get(block.stream) or generator.choice(self.workers)].append(block)
        before_bytes = self.live_bytes
        futures = [
            worker.start(functools.partial(self._burst, worker, generator.random(), hand, steps))
            for worker, hand in hands.items()
        ]
        concurrent.futures.wait(futures)
        bursts: list[Burst] = [future.result() for future in futures]
        kept = [block for burst in bursts for block in burst.kept]
        self.live = {block.address: block for block in kept}
        assert len(self.live) == len(kept), "a live block was given out again"
        for burst in bursts:
            self.foreign += burst.streams
            self.allocated_count += burst.allocated_count
            self.freed_count += burst.freed_count
            self.refused_count += burst.refused_count
        allocated_bytes = sum(burst.allocated_bytes for burst in bursts)
        self._note_peak(max(before_bytes, self.live_bytes), before_bytes + allocated_bytes)
        self.synchronize()
        self.inspect()

    def _burst(self, worker: Worker, seed: float, held: list[ModelBlock], steps: int) -> Burst:
        generator = random.Random(seed)
        own = ModelStream(self.cuda.create_stream(), "foreign")
        done = Burst(held, [own])
        streams = [*self.streams_of(worker), own]
        awake = [tag for tag in self.tags if tag not in self.asleep]
        calls = ["alloc", "free", "use", "look", "trim"]
        # The second kind has threads wait for the device while others free what streams use.
        weights = generator.choice([(50, 40, 6, 2, 2), (35, 30, 20, 1, 14)])
        for call in generator.choices(calls, weights, k=steps):
            if call == "alloc":
                size_bytes, stream = generator.choice(BURST_SIZES), generator.choice(streams)
                place = generator.choice([*awake, self.upstreams[-1].arena])
                block = self._alloc(size_bytes, stream, place, [])
                if block is None:
                    done.refused_count += 1
                    continue
                held.append(block)
                done.allocated_count += 1
                done.allocated_bytes += block.size_bytes
            elif call == "free" and held:
                self._free(worker, held.pop(generator.randrange(len(held))))
                done.freed_count += 1
            elif call == "use" and held:
                self._use(worker, generator.choice(held), generator.choice(streams))
            elif call == "look":
                generator.choice([self.pool.stats, self.pool.check_invariants])()
            elif call == "trim":
                self.pool.trim()
        if generator.random() < 0.7:
            self._destroy(worker, own, [block for block in held if block.stream is own])
            done.streams.clear()
        return done

    # ---- on a worker's thread ----

    def _alloc(
        self,
        size_bytes: int,
        stream: ModelStream,
        tag: int,
        gates: list[tuple[ModelBlock, list[tuple[ModelStream, int]]]],
    ) -> ModelBlock | None:
        """Gives None where the pool refuses."""
        is_private = tag >= FIRST_PRIVATE_ARENA
        _core.set_tag(0 if is_private else tag)
        try:
            address = (
                self.pool.alloc_in(tag, size_bytes, stream.handle)
                if is_private
                else self.pool.alloc(size_bytes, stream.handle)
            )
        except SpilloverError as error:
            if "out of memory" not in str(error):
                raise
            return None
        finally:
            _core.set_tag(0)
        assert address % BLOCK_BYTES == 0
        self._value = self._value % 255 + 1
        block = ModelBlock(address, size_bytes, stream, self._value, tag)
        for freed, accesses in gates:
            if block.address < freed.end and freed.address < block.end:
                for other, event in accesses:
                    assert other is stream or self.cuda.is_complete(event), "given out too early"
        self._write(block, stream)
        return block

    def _write(self, block: ModelBlock, stream: ModelStream) -> None:
        for start, probe_bytes in block.probes():
            self.cuda.fill(start, probe_bytes, stream.handle, block.value)

    def _free(self, worker: Worker, block: ModelBlock) -> list[tuple[ModelStream, int]]:
        """Gives what must be complete before others get the memory."""
        if block.tag in self.asleep:
            self.pool.free(block.address)
            return []
        accesses = list(block.uses)
        stream = block.stream
        if stream.kind == "thread" and stream.is_alive and stream is not worker.stream:
            # This thread cannot reach that stream, and what is on it may be anything.
            self.cuda.synchronize()
        elif stream.is_alive:
            worker.read_back(block, stream)
            accesses.append((stream, self._record(stream)))
        elif stream.last_event is not None:
            accesses.append((stream, stream.last_event))
        self.pool.free(block.address)
        return accesses

    def _use(self, worker: Worker, block: ModelBlock, stream: ModelStream) -> None:
        own = block.stream
        is_reachable = own.is_alive and (own.kind != "thread" or own is worker.stream)
        if not is_reachable or stream is own or block.tag in self.asleep:
            return
        self.cuda.order(own.handle, stream.handle)
        worker.read_back(block, stream)
        # Noted twice: the second note must change nothing.
        self.pool.record_stream(block.address, stream.handle)
        self.pool.record_stream(block.address, stream.handle)
        block.uses.append((stream, self._record(stream)))

    def _leave(self, worker: Worker, stream: ModelStream, blocks: list[ModelBlock]) -> None:
        """The last that happens on a stream."""
        for block in blocks:
            if block.tag not in self.asleep:
                worker.read_back(block, stream)
        stream.last_event = self._record(stream)
        stream.is_alive = False
        self._dead.append(stream)

    def _destroy(self, worker: Worker, stream: ModelStream, blocks: list[ModelBlock]) -> None:
        self._leave(worker, stream, blocks)
        self.cuda.destroy_stream(stream.handle)

    def _record(self, stream: ModelStream) -> int:
        event = self.cuda.create_event()
        self.cuda.record(event, stream.handle)
        self._events.append(event)
        return event

    # ---- comparisons ----

    def inspect(self) -> None:
        """Compare everything that the pool tells about itself."""
        self.pool.check_invariants()
        sizes = live_blocks(self.pool)
        assert sizes == {block.address: block.size_bytes for block in self.live.values()}
        for segment in self.pool.segments():
            for found in segment["blocks"]:
                if found["state"] == "live":
                    assert segment["arena"] == self.live[found["address"]].tag
        for tag in self.places:
            sizes_of_tag = [block.size_bytes for block in self.live.values() if block.tag == tag]
            of_tag = self.pool.tag_stats(tag)
            assert of_tag["allocation"] == len(sizes_of_tag)
            assert of_tag["allocated_bytes"] == sum(sizes_of_tag)
            if tag in self.asleep:
                assert of_tag["reserved_bytes"] == 0
                kept_bytes = 0 if tag in self._discarded else sum(sizes_of_tag)
                assert of_tag["asleep_bytes"] >= sum(sizes_of_tag)
                assert of_tag["saved_bytes"] >= kept_bytes
            else:
                assert of_tag["asleep_bytes"] == of_tag["saved_bytes"] == 0
        assert set(self.pool.sleeping_tags()) == self.asleep
        stats = self.pool.stats()
        waiting_bytes = sum(
            block["requested_bytes"]
            for segment in self.pool.segments()
            for block in segment["blocks"]
            if block["state"] == "waiting"
        )
        requested_bytes = sum(block.requested_bytes for block in self.live.values())
        assert stats["requested_bytes"]["all"]["current"] == requested_bytes + waiting_bytes
        allocation = stats["allocation"]["all"]
        assert allocation["current"] == len(self.live)
        assert allocation["allocated"] == self.allocated_count
        assert allocation["freed"] == self.freed_count
        assert stats["num_ooms"] == self.refused_count
        allocated = stats["allocated_bytes"]["all"]
        assert allocated["current"] == self.live_bytes
        magazines_bytes = MAGAZINE_BYTES * len(self.lasting) * len(self.workers)
        assert self.peak_bytes_least <= allocated["peak"] <= self.peak_bytes_most + magazines_bytes
        for counters in stats.values():
            if isinstance(counters, dict):
                for key in ("current", "allocated", "freed"):
                    parts = counters["small_pool"][key] + counters["large_pool"][key]
                    assert counters["all"][key] == parts

    def _check_upstreams(self, segments: list[Any]) -> int:
        """Each has what its arena shows, the idle part too where it is in use; gives the sum."""
        given_bytes = 0
        for upstream in self.upstreams:
            assert upstream.failures == []
            sizes = {
                segment["address"]: segment["size_bytes"]
                for segment in segments
                if segment["arena"] == upstream.arena
            }
            assert sizes == upstream.live
            is_ended = upstream is not self.upstreams[-1] and not sizes
            assert upstream.done_count == is_ended
            given_bytes += sum(sizes.values())
        return given_bytes

    def _note_peak(self, least_bytes: int, most_bytes: int) -> None:
        self.peak_bytes_least = max(self.peak_bytes_least, least_bytes)
        self.peak_bytes_most = max(self.peak_bytes_most, most_bytes)

    def _check_shortage(
        self, worker: Worker, size_bytes: int, stream: ModelStream, tag: int
    ) -> None:
        """With all work complete and everything idle given back the request cannot fit."""
        self.synchronize()
        self.trim()
        held_bytes = self.pool.stats()["reserved_bytes"]["all"]["current"]
        assert held_bytes + rounded(size_bytes, CHUNK_BYTES) > self.limit_bytes
        again = worker.run(lambda: self._alloc(size_bytes, stream, tag, []))
        assert again is None, "memory was refused that was there"
        self.refused_count += 1

"""A program on the pool whose driver calls tests let fail."""

from __future__ import annotations

import ctypes

from cuda_calls import Cuda, live_blocks

from spillover import SpilloverError, _core

MIB = 1 << 20
#: By whether the device has virtual memory: chunks at fixed addresses leave more of it unused.
LIMIT_BYTES = {True: 72 * MIB, False: 160 * MIB}
#: Driver calls of the program itself, not of the pool.
OWN_CALLS = {"cuMemsetD8Async", "cuCtxSetCurrent"}


class Program:
    """Allocates and frees in every way that makes the pool call the driver.

    What is live is noted, so that it can be looked at and freed wherever a call has failed.
    """

    def __init__(self, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> None:
        self.pool = pool
        self.cuda = cuda
        self.default, self.first, self.second = 0, *kept_streams[:2]
        self.foreign = cuda.create_stream()
        self.live: dict[int, tuple[int, int]] = {}  # address: size and value
        self._host = cuda.pin(4096)
        self._limit_bytes = LIMIT_BYTES[cuda.has_virtual_memory]
        self._value = 0

    def close(self) -> None:
        self.cuda.destroy_stream(self.foreign)
        self.cuda.unpin(self._host)

    def alloc(self, size_bytes: int, stream: int, written_on: int | None = None) -> int:
        address = self.pool.alloc(size_bytes, stream)
        self._value = self._value % 255 + 1
        self.live[address] = (size_bytes, self._value)
        for start, probe_bytes in self._probes(address, size_bytes):
            written = stream if written_on is None else written_on
            self.cuda.fill(start, probe_bytes, written, self._value)
        return address

    def free(self, address: int) -> None:
        noted = self.live.pop(address)
        try:
            self.pool.free(address)
        except SpilloverError:
            # The error may be of work that came with the free.
            if _core.device_of(address) == 0:
                self.live[address] = noted
            raise

    def run(self) -> list[str]:
        """Do it all; gives what must be the same each time."""
        pool = self.pool
        limit_bytes = self._limit_bytes
        pool.set_memory_fraction(limit_bytes / _core.memory_info(0)[1])
        sizes = (100, 5000, 700_000, MIB, MIB + 1, 3 * MIB, 9 * MIB)
        streams = (self.default, self.first, self.second, self.foreign)
        blocks = [self.alloc(size, stream) for size in sizes[:6] for stream in streams]
        for block in blocks[::2]:
            self.free(block)
        # Out of magazines, of a heap, and of the memory of another stream.
        for i in range(0, len(blocks), 2):
            blocks[i] = self.alloc(sizes[5 - i // 2 % 3], streams[i // 2 % 3])
        # Blocks that other streams use: one that may be asked, one that may not.
        for stream in (self.second, self.foreign):
            block = self.alloc(3 * MIB, self.default, written_on=stream)
            pool.record_stream(block, stream)
            self.free(block)
        for block in blocks[::3]:
            self.free(block)
        # Larger than any hole: put together from idle chunks, after waiting for the streams.
        large = self.alloc(26 * MIB, self.first)
        try:
            self.alloc(limit_bytes, self.second)
            outcome = "given"
        except SpilloverError as error:
            if "out of memory" not in str(error):
                raise
            outcome = "refused"
        self.free(large)
        pool.trim()
        self.alloc(9 * MIB, self.foreign)
        for address in list(self.live):
            self.free(address)
        pool.trim()
        return [outcome, str(len(pool.segments()))]

    def check(self) -> None:
        """Nothing is in effect any more: what is live has its data and can be freed."""
        self.pool.check_invariants()
        self.cuda.synchronize()
        assert live_blocks(self.pool).keys() == self.live.keys()
        for address, (size_bytes, value) in self.live.items():
            for start, probe_bytes in self._probes(address, size_bytes):
                self.cuda.read(self._host, start, probe_bytes, self.default)
                self.cuda.synchronize()
                found = ctypes.string_at(self._host, probe_bytes)
                assert found == bytes([value]) * probe_bytes, "a live block was overwritten"
        for address in list(self.live):
            self.free(address)
        self.pool.trim()
        self.pool.check_invariants()
        assert self.pool.segments() == []
        assert self.pool.stats()["active"]["all"]["current"] == 0
        assert self.pool.stats()["reserved_bytes"]["all"]["current"] == 0

    @staticmethod
    def _probes(address: int, size_bytes: int) -> list[tuple[int, int]]:
        starts = {address, address + max(0, size_bytes - 64)}
        starts.update(range(-(-address // (2 * MIB)) * 2 * MIB, address + size_bytes, 2 * MIB))
        return [(start, min(64, address + size_bytes - start)) for start in sorted(starts)]

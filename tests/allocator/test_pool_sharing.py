"""Blocks that other processes open, by the pool's C interface: most of it within one process.

What torch makes of it, between processes, is in test_torch_sharing.py.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
from cuda_calls import Cuda
from upstream import Upstream

from spillover import SpilloverError, _core, emulator
from spillover._paths import library_path
from spillover.emulator import Fault, faults

MIB = 1 << 20
OK, INVALID_ARGUMENT, OUT_OF_MEMORY, DRIVER_FAILURE, BROKEN_STATE = range(5)


class Chunk(ctypes.Structure):
    _fields_ = (("size_bytes", c_size_t), ("file", c_int), ("identity", c_uint64))


class SharedBlock(ctypes.Structure):
    _fields_ = (
        ("offset_bytes", c_size_t),
        ("process", c_int),
        ("chunk_count", c_size_t),
        ("chunks", POINTER(Chunk)),
        ("handle", ctypes.c_ubyte * 64),
    )


_VISITOR = ctypes.CFUNCTYPE(None, c_void_p, POINTER(SharedBlock))


class Sharing:
    """The functions of the interface that share."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(library_path("libspillover.so")))
        self.library.spillover_share.argtypes = [c_void_p, _VISITOR, c_void_p]
        self.library.spillover_close_shared.argtypes = [c_void_p]
        self.library.spillover_last_error.restype = ctypes.c_char_p

    def try_share(self, address: int) -> tuple[int, SharedBlock]:
        kept = SharedBlock()

        @_VISITOR
        def keep(_: object, block: object) -> None:
            shown = block[0]  # type: ignore[index]
            ctypes.memmove(byref(kept), byref(shown), ctypes.sizeof(shown))
            copies = (Chunk * shown.chunk_count)(*shown.chunks[: shown.chunk_count])
            kept.chunks = ctypes.cast(copies, POINTER(Chunk))

        return self.library.spillover_share(address, keep, None), kept

    def share(self, address: int) -> SharedBlock:
        status, block = self.try_share(address)
        assert status == OK, self.error()
        return block

    def try_open(self, block: SharedBlock) -> tuple[int, int]:
        out = c_void_p()
        status = self.library.spillover_open_shared(0, byref(block), byref(out))
        return status, out.value or 0

    def open(self, block: SharedBlock) -> int:
        status, address = self.try_open(block)
        assert status == OK, self.error()
        return address

    def close(self, address: int) -> int:
        return int(self.library.spillover_close_shared(address))

    def error(self) -> str:
        return str(self.library.spillover_last_error().decode())


def chunks_of(block: SharedBlock) -> list[tuple[int, int, int]]:
    return [(c.size_bytes, c.file, c.identity) for c in block.chunks[: block.chunk_count]]


@pytest.fixture
def sharing(pool: _core.Pool) -> Sharing:
    return Sharing()


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.virtual_memory
@pytest.mark.parametrize("size_bytes", [1000, MIB, 3 * MIB, 30 * MIB + 512])
def test_what_is_opened_is_the_blocks_memory(
    pool: _core.Pool, cuda: Cuda, sharing: Sharing, size_bytes: int
) -> None:
    before = pool.alloc(700 * 1024)
    address = pool.alloc(size_bytes)
    block = sharing.share(address)
    chunks = chunks_of(block)
    assert block.process == os.getpid()
    assert sum(size for size, _, _ in chunks) >= block.offset_bytes + size_bytes
    assert sum(size for size, _, _ in chunks[1:]) < block.offset_bytes + size_bytes
    base = sharing.open(block)
    assert base not in (0, address)
    host = cuda.pin(512)
    for value, target, source in ((3, address, base), (5, base, address)):
        offset = block.offset_bytes
        at = {address: address, base: base + offset}
        cuda.fill(at[target] + size_bytes - 8, 8, 0, value)
        cuda.read(host, at[source] + size_bytes - 8, 8, 0)
        cuda.synchronize()
        assert ctypes.string_at(host, 8) == bytes([value]) * 8
    cuda.unpin(host)
    assert sharing.close(base) == OK
    assert pool.stats()["allocation"]["all"]["current"] == 2
    pool.free(before)


def test_memory_of_an_upstream(pool: _core.Pool, cuda: Cuda, sharing: Sharing) -> None:
    """By the handle of what the driver gave, whatever part of it the upstream gives."""
    upstream = Upstream(cuda, offset=4096)
    first, second = (pool.alloc_in(upstream.arena, 1000) for _ in range(2))
    one, other = sharing.share(first), sharing.share(second)
    assert (one.offset_bytes, other.offset_bytes) == (4096, 4096 + second - first)
    assert one.chunk_count == other.chunk_count == 0
    assert bytes(one.handle) == bytes(other.handle) != bytes(64)
    unable = Upstream(cuda, source=(cuda.malloc_ordered, cuda.free_ordered))
    address = pool.alloc_in(unable.arena, 1000)
    status, _ = sharing.try_share(address)
    assert status == BROKEN_STATE
    assert "takes it from cudaMalloc" in sharing.error()
    pool.check_invariants()
    for each, addresses in ((upstream, (first, second)), (unable, (address,))):
        for address in addresses:
            pool.free(address)
        pool.release_arena(each.arena)
    pool.trim()
    upstream.check_ended()
    unable.check_ended()


@pytest.mark.virtual_memory
def test_chunks_of_several_sizes(run_emulated: Callable[..., object]) -> None:
    """Very large blocks have large chunks, and small ones where these do not fit."""
    run_emulated(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_pool_sharing
        test_pool_sharing.several_sizes()
        """,
        str(Path(__file__).parent),
        vram="1GiB",
    )


def several_sizes() -> None:
    cuda, pool, sharing = Cuda(), _core.Pool(0), Sharing()
    size_bytes = 515 * MIB
    block = sharing.share(pool.alloc(size_bytes))
    assert {size for size, _, _ in chunks_of(block)} == {2 * MIB, 32 * MIB}
    base = sharing.open(block)
    cuda.fill(base + size_bytes - MIB, MIB, 0)
    cuda.fill(base, MIB, 0)
    cuda.synchronize()
    assert sharing.close(base) == OK
    pool.check_invariants()


@pytest.mark.virtual_memory
def test_memory_that_is_open_keeps_its_address(pool: _core.Pool, sharing: Sharing) -> None:
    address = pool.alloc(5 * MIB)
    neighbour = pool.alloc(5 * MIB)
    block = sharing.share(address)
    with faults():
        assert chunks_of(sharing.share(address)) == chunks_of(block), "made once"
        assert "cuMemExportToShareableHandle" not in emulator.calls()
    base = sharing.open(block)
    with faults():
        assert sharing.open(block) == base
        assert sharing.open(sharing.share(address)) == base
        assert "cuMemMap" not in emulator.calls()
    other = sharing.open(sharing.share(neighbour))
    assert other != base
    with faults():
        assert [sharing.close(base) for _ in range(2)] == [OK, OK]
        assert "cuMemUnmap" not in emulator.calls()
        assert sharing.close(base) == OK
        calls = emulator.calls()
    assert calls["cuCtxSynchronize"] == calls["cuMemUnmap"] == 1
    assert sharing.close(base) == INVALID_ARGUMENT
    assert "closed before" in sharing.error()
    assert sharing.close(other) == OK


@pytest.mark.virtual_memory
def test_files_are_closed_with_the_memory(pool: _core.Pool, sharing: Sharing) -> None:
    before = files()
    address = pool.alloc(20 * MIB)
    block = sharing.share(address)
    assert files() > before
    base = sharing.open(block)
    assert sharing.close(base) == OK
    pool.free(address)
    pool.trim()
    assert files() == before
    # The number may be another file's by now, and then is another memory's.
    status, _ = sharing.try_open(block)
    assert status in (BROKEN_STATE, DRIVER_FAILURE), sharing.error()


@pytest.mark.virtual_memory
def test_files_of_freed_blocks_do_not_pile_up(pool: _core.Pool, sharing: Sharing) -> None:
    """Chunks stay mapped when their blocks are freed, and those that follow are other memory."""
    before = files()
    kept = pool.alloc(2 * MIB)
    wanted = chunks_of(sharing.share(kept))
    for _ in range(40):
        blocks = [pool.alloc(2 * MIB) for _ in range(20)]
        for block in blocks:
            sharing.share(block)
        for block in blocks:
            pool.free(block)
        # What is mapped somewhere else counts anew.
        pool.free(pool.alloc(60 * MIB))
    assert files() - before <= 3 * 64
    assert chunks_of(sharing.share(kept)) == wanted, "a live block keeps its files"


@pytest.mark.virtual_memory
def test_what_was_sent_is_not_moved(pool: _core.Pool, cuda: Cuda, sharing: Sharing) -> None:
    """Idle chunks around a shared block are moved together; it stays where both have it."""
    blocks = [pool.alloc(4 * MIB) for _ in range(20)]
    cuda.fill(blocks[9], 4 * MIB, 0, 9)
    shared = sharing.share(blocks[9])
    base = sharing.open(shared)
    for block in blocks[:9] + blocks[10:]:
        pool.free(block)
    pool.configure(f"limit={80 * MIB}", "the test")
    large = pool.alloc(70 * MIB)
    pool.configure("limit=none", "the test")
    cuda.fill(large, 70 * MIB, 0, 1)
    host = cuda.pin(512)
    cuda.read(host, base + shared.offset_bytes, 8, 0)
    cuda.synchronize()
    assert ctypes.string_at(host, 8) == b"\t" * 8
    cuda.unpin(host)
    assert chunks_of(sharing.share(blocks[9])) == chunks_of(shared)
    assert sharing.close(base) == OK


@pytest.mark.virtual_memory
def test_any_driver_call_may_fail(pool: _core.Pool, sharing: Sharing) -> None:
    """Nothing is kept of an attempt that failed, and the next one is not hindered."""
    open_files = files()

    def run() -> None:
        address = pool.alloc(5 * MIB)
        try:
            status, block = sharing.try_share(address)
            if status == OK:
                status, base = sharing.try_open(block)
            if status != OK:
                raise SpilloverError(sharing.error())
            assert sharing.close(base) == OK
        finally:
            pool.free(address)
            pool.trim()

    def check() -> None:
        pool.check_invariants()
        assert files() == open_files
        assert pool.segments() == []

    share = "cuMemExportToShareableHandle"
    points = [Fault(share, call=call) for call in (1, 2, 3)]
    points += [Fault("cuMemImportFromShareableHandle", call=call) for call in (1, 3)]
    # The first three mappings and the first permission are the pool's own, and perhaps the first
    # reservation.
    points += [Fault("cuMemMap", call=call) for call in (4, 6)]
    points += [Fault("cuMemAddressReserve", call=call) for call in (1, 2)]
    points += [Fault("cuMemSetAccess", call=2)]
    report = emulator.sweep(run, points=points, check=check)
    report.check()
    assert report.points >= len(points) - 1


@pytest.mark.virtual_memory
def test_a_driver_without_file_handles(run_emulated: Callable[..., object]) -> None:
    """A driver may promise them and refuse: the pool does without, and says what can be done."""
    run_emulated(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_pool_sharing
        test_pool_sharing.refused()
        """,
        str(Path(__file__).parent),
    )


def refused() -> None:
    pool, sharing = _core.Pool(0), Sharing()
    with faults(Fault("cuMemCreate", call=1, error="CUDA_ERROR_NOT_SUPPORTED")):
        address = pool.alloc(5 * MIB)
    status, _ = sharing.try_share(address)
    assert status == BROKEN_STATE
    assert "virtual_memory=off" in sharing.error()
    pool.free(address)
    pool.check_invariants()


def test_arguments(pool: _core.Pool, sharing: Sharing) -> None:
    address = pool.alloc(5000)
    assert sharing.library.spillover_share(address, _VISITOR(), None) == INVALID_ARGUMENT
    for wrong in (address + 512, 4096, 0):
        assert sharing.try_share(wrong)[0] == INVALID_ARGUMENT
    pool.free(address)
    assert sharing.try_share(address)[0] == INVALID_ARGUMENT
    assert "freed before" in sharing.error()
    out = c_void_p(7)
    assert sharing.library.spillover_open_shared(0, None, byref(out)) == INVALID_ARGUMENT
    assert sharing.library.spillover_open_shared(0, byref(SharedBlock()), None) == INVALID_ARGUMENT
    assert out.value == 7
    assert sharing.try_open(SharedBlock(0, os.getpid(), 1, None))[0] == INVALID_ARGUMENT
    # A handle of zeros.
    assert sharing.try_open(SharedBlock())[0] == DRIVER_FAILURE
    for address in (0, 4096, pool.alloc(100)):
        assert sharing.close(address) == INVALID_ARGUMENT


@pytest.mark.virtual_memory
def test_wrong_blocks(pool: _core.Pool, sharing: Sharing) -> None:
    pool.alloc(100)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    unknown = os.memfd_create("not a device's")

    def block(process: int, *chunks: tuple[int, int]) -> SharedBlock:
        kept = (Chunk * len(chunks))(*[(size, file, 0) for size, file in chunks])
        return SharedBlock(0, process, len(chunks), ctypes.cast(kept, POINTER(Chunk)))

    for status, words, wrong in (
        (INVALID_ARGUMENT, "0 bytes", block(os.getpid(), (0, unknown))),
        (INVALID_ARGUMENT, "descriptor -1", block(os.getpid(), (2 * MIB, -1))),
        (INVALID_ARGUMENT, "of this form", block(os.getpid(), *[(1 << 45, 3)] * 3)),
        (DRIVER_FAILURE, "cuMemImport", block(os.getpid(), (2 * MIB, unknown))),
        (DRIVER_FAILURE, "cuMemAddressReserve", block(os.getpid(), (1000, unknown))),
        (BROKEN_STATE, "closed that file", block(os.getpid(), (2 * MIB, 9999))),
        (BROKEN_STATE, "closed that file", block(os.getppid(), (2 * MIB, 9999))),
        (BROKEN_STATE, "has ended", block(ended.pid, (2 * MIB, 3))),
    ):
        found, _ = sharing.try_open(wrong)
        assert (found, words in sharing.error()) == (status, True), sharing.error()
    os.close(unknown)


@pytest.mark.virtual_memory
def test_without_file_descriptors(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_pool_sharing
        test_pool_sharing.few_descriptors()
        """,
        str(Path(__file__).parent),
    )


def few_descriptors() -> None:
    pool, sharing = _core.Pool(0), Sharing()
    addresses = [pool.alloc(100 * MIB), pool.alloc(3 * MIB)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files() + 20, hard))
    status, _ = sharing.try_share(addresses[0])
    assert status == BROKEN_STATE
    assert "ulimit -n" in sharing.error(), sharing.error()
    pool.check_invariants()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    base = sharing.open(sharing.share(addresses[0]))
    assert sharing.close(base) == OK


@pytest.mark.fixed_memory
def test_fixed_memory_has_a_handle(pool: _core.Pool, sharing: Sharing) -> None:
    first, second = pool.alloc(3 * MIB), pool.alloc(3 * MIB)
    blocks = [sharing.share(address) for address in (first, second)]
    assert [block.chunk_count for block in blocks] == [0, 0]
    assert bytes(blocks[0].handle) == bytes(blocks[1].handle) != bytes(64)
    assert blocks[1].offset_bytes - blocks[0].offset_bytes == second - first
    assert sharing.try_open(blocks[0])[0] == DRIVER_FAILURE, "a process cannot open its own"
    assert "cuIpcOpenMemHandle" in sharing.error()


@pytest.mark.virtual_memory
def test_in_a_forked_child(run_emulated: Callable[..., object]) -> None:
    """It opens nothing, and lets go of what the parent has opened without a word."""
    run_emulated(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_pool_sharing
        test_pool_sharing.forked()
        """,
        str(Path(__file__).parent),
    )


def forked() -> None:
    pool, sharing = _core.Pool(0), Sharing()
    address = pool.alloc(3 * MIB)
    block = sharing.share(address)
    base = sharing.open(block)
    child = os.fork()
    if child == 0:
        refusals = []
        for attempt in (lambda: sharing.try_share(address), lambda: sharing.try_open(block)):
            refusals.append((attempt()[0], "fork" in sharing.error()))
        is_well = refusals == [(BROKEN_STATE, True)] * 2 and sharing.close(base) == OK
        os._exit(0 if is_well else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sharing.open(block) == base
    assert [sharing.close(base), sharing.close(base)] == [OK, OK]

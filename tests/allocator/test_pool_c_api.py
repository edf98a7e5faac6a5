"""The C interface of the pool, as the torch adapter and other C users see it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_calls import Cuda, live_blocks
from upstream import Upstream

import spillover
from spillover import _core
from spillover._paths import library_path
from spillover.emulator import Fault, faults

OK, INVALID_ARGUMENT, OUT_OF_MEMORY, DRIVER_FAILURE, BROKEN_STATE, BUSY = range(6)
MIB = 1 << 20
CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture
def library(pool: _core.Pool) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path("libspillover.so")))
    library.spillover_last_error.restype = ctypes.c_char_p
    library.spillover_alloc.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    library.spillover_try_alloc.argtypes = library.spillover_alloc.argtypes
    for name in ("spillover_free", "spillover_device_of"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.spillover_record_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.spillover_base.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    return library


def alloc(library: ctypes.CDLL, size_bytes: int) -> int:
    out = ctypes.c_void_p()
    assert library.spillover_alloc(0, size_bytes, None, ctypes.byref(out)) == OK
    return out.value or 0


def test_python_and_c_share_one_pool(library: ctypes.CDLL, pool: _core.Pool) -> None:
    address = alloc(library, 1000)
    assert _core.device_of(address) == 0
    pool.free(address)
    assert library.spillover_device_of(address) == -1


def test_base_of_any_address_inside_a_segment(library: ctypes.CDLL, pool: _core.Pool) -> None:
    first, second = alloc(library, 1000), alloc(library, 1000)
    base, size = ctypes.c_void_p(), ctypes.c_size_t()
    for address in (first, second, second + 100):
        assert library.spillover_base(address, ctypes.byref(base), ctypes.byref(size)) == OK
        assert (base.value, size.value) == (first, 2 << 20)
    assert library.spillover_base(4096, ctypes.byref(base), ctypes.byref(size)) == INVALID_ARGUMENT
    assert b"not in spillover's device memory" in library.spillover_last_error()


def test_failures_give_a_status_and_a_sentence(library: ctypes.CDLL) -> None:
    out = ctypes.c_void_p(123)
    assert library.spillover_alloc(0, 1 << 50, None, ctypes.byref(out)) == OUT_OF_MEMORY
    assert out.value == 123
    assert b"is out of memory" in library.spillover_last_error()
    assert library.spillover_alloc(63, 100, None, ctypes.byref(out)) == INVALID_ARGUMENT
    assert b"device 63 does not exist" in library.spillover_last_error()
    assert library.spillover_alloc(0, 100, None, None) == INVALID_ARGUMENT
    assert library.spillover_free(4096) == INVALID_ARGUMENT
    assert library.spillover_stats(0, None) == INVALID_ARGUMENT
    assert library.spillover_visit_segments(0, None, None) == INVALID_ARGUMENT


def test_sizes_are_rounded_to_divisions_of_powers_of_two(
    library: ctypes.CDLL, pool: _core.Pool
) -> None:
    def divisions(*values: int) -> ctypes.Array[ctypes.c_size_t]:
        return (ctypes.c_size_t * 16)(*values)

    def allocated(size_bytes: int) -> int:
        before = pool.stats()["allocated_bytes"]["all"]["current"]
        pointer = alloc(library, size_bytes)
        after = pool.stats()["allocated_bytes"]["all"]["current"]
        pool.free(pointer)
        return int(after - before)

    try:
        assert library.spillover_round_sizes(divisions(0, 8, 0, 2)) == OK
        assert allocated((3 << 20) + 1) == (3 << 20) + (256 << 10)
        assert allocated((9 << 20) + 1) == 12 << 20
        assert allocated(1_300_000) == 1_300_480
        assert library.spillover_round_sizes(divisions(1 << 15, *[1 << 15] * 15)) == OK
        assert allocated((16 << 20) + 1) == (16 << 20) + 512
        for wrong in (3, 1 << 16):
            assert library.spillover_round_sizes(divisions(2, wrong)) == INVALID_ARGUMENT
            assert f"to {wrong} divisions".encode() in library.spillover_last_error()
        assert library.spillover_round_sizes(None) == INVALID_ARGUMENT
        assert allocated((16 << 20) + 1) == (16 << 20) + 512
    finally:
        assert library.spillover_round_sizes(divisions()) == OK
    assert allocated((3 << 20) + 1) == (3 << 20) + 512


class OutOfMemory(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("requested", "free", "total", "limit")),
        ("is_limited", ctypes.c_int),
        *(
            (name, ctypes.c_size_t)
            for name in ("reserved", "allocated", "waiting", "cached", "largest_free")
        ),
        ("fragmentation", ctypes.c_double),
        ("details", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
    )


def test_figures_of_the_last_out_of_memory(library: ctypes.CDLL, pool: _core.Pool) -> None:
    held = [alloc(library, 8 << 20) for _ in range(3)]
    pool.free(held[0])
    report, out = OutOfMemory(), ctypes.c_void_p()
    last = library.spillover_last_out_of_memory
    assert library.spillover_alloc(0, 1 << 50, None, ctypes.byref(out)) == OUT_OF_MEMORY
    assert last(ctypes.byref(report)) == OK
    assert (report.requested, report.allocated, report.waiting) == (1 << 50, 16 << 20, 0)
    assert report.limit == 2**64 - 1
    assert not report.is_limited
    assert report.reserved == report.allocated + report.cached
    assert report.total == _core.memory_info(0)[1] >= report.free
    assert b"Tried: " in report.details
    assert b"spillover.optim" in report.details
    assert report.text.startswith(
        b"CUDA out of memory. Tried to allocate 1048576.00 GiB. GPU 0 has"
    )
    assert report.text.endswith(report.details)
    # A failure of another kind has no such figures.
    assert library.spillover_free(4096) == INVALID_ARGUMENT
    sentence = library.spillover_last_error()
    assert last(ctypes.byref(report)) == INVALID_ARGUMENT
    assert library.spillover_last_error() == sentence
    assert last(None) == INVALID_ARGUMENT


def test_only_minus_one_means_every_device(library: ctypes.CDLL, pool: _core.Pool) -> None:
    before = pool.settings()
    for device in (-2, 63):
        assert library.spillover_configure(device, b"limit=1MiB") == INVALID_ARGUMENT
        assert f"device {device} does not exist".encode() in library.spillover_last_error()
    assert pool.settings() == before


def test_an_address_is_told_as_people_write_it(library: ctypes.CDLL) -> None:
    assert library.spillover_free(0xABC000) == INVALID_ARGUMENT
    assert b"the address 0xabc000 is not in" in library.spillover_last_error()


def test_null_and_size_zero_are_allowed(library: ctypes.CDLL) -> None:
    assert alloc(library, 0) == 0
    assert library.spillover_free(None) == OK
    assert library.spillover_record_stream(None, None) == OK
    assert library.spillover_device_of(None) == -1


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "use.c"
    source.write_text(
        '#include "allocator/c_api.h"\n#include "transfer/c_api.h"\n'
        "int main(void) { return spillover_abi_version() - 1; }\n"
    )
    subprocess.run(
        [
            compiler,
            "-std=c99",
            "-pedantic-errors",
            "-Wall",
            "-Werror",
            f"-I{CSRC}",
            "-fsyntax-only",
            str(source),
        ],
        check=True,
    )


def test_try_free_frees(library: ctypes.CDLL, pool: _core.Pool) -> None:
    library.spillover_try_free.argtypes = [ctypes.c_void_p]
    address = alloc(library, 1000)
    live = pool.stats()["allocation"]["all"]["current"]
    assert library.spillover_try_free(address) == OK
    assert pool.stats()["allocation"]["all"]["current"] == live - 1
    assert library.spillover_try_free(address) == INVALID_ARGUMENT
    assert library.spillover_try_free(None) == OK

    noted = alloc(library, 1000)
    assert library.spillover_record_stream(noted, 2) == OK  # the per-thread default stream
    assert library.spillover_try_free(noted) == OK
    assert library.spillover_device_of(noted) == -1
    pool.check_invariants()


def test_memory_at_an_address(library: ctypes.CDLL, pool: _core.Pool, cuda: Cuda) -> None:
    """Of the stream's and the arena's free memory, and of nothing else."""

    def alloc_at(address: int, size_bytes: int, stream: int = 0, arena: int = 0) -> int:
        out = ctypes.c_void_p()
        status: int = library.spillover_alloc_at(
            0,
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
            ctypes.c_uint32(arena),
            ctypes.c_void_p(address),
            ctypes.byref(out),
        )
        assert (out.value or 0) == (address if status == OK else 0)
        return status

    blocks = [alloc(library, size) for size in (5 * MIB, 8 * MIB, 5 * MIB, 1000)]
    pool.free(blocks[1])
    middle = blocks[1] + 2 * MIB
    assert alloc_at(middle, 3 * MIB) == OK
    pool.check_invariants()
    assert alloc_at(middle, 3 * MIB) == BROKEN_STATE
    assert b"no 3.00 MiB of free memory" in library.spillover_last_error()
    assert alloc_at(blocks[1], 2 * MIB) == OK
    assert alloc_at(middle + 3 * MIB, 3 * MIB) == OK
    for address in (blocks[1], middle, middle + 3 * MIB):
        pool.free(address)
    # What the thread keeps is free; a small block is no place for a large one.
    pool.free(blocks[3])
    assert alloc_at(blocks[3], 2 * MIB) == BROKEN_STATE
    assert alloc_at(blocks[3], 600) == OK
    stream = cuda.create_stream()
    arena = pool.make_arena()
    for no_place in ((blocks[1], 2 * MIB, stream), (blocks[1], 2 * MIB, 0, arena), (1 << 40, 512)):
        assert alloc_at(*no_place) == BROKEN_STATE
    for wrong in (
        (blocks[1] + 8, 512),
        (0, 512),
        (blocks[1], 0),
        (blocks[1], 512, 0, (1 << 32) - 1),
    ):
        assert alloc_at(*wrong) == INVALID_ARGUMENT
    held = pool.alloc_in(arena, 3 * MIB)
    pool.free(held)
    assert alloc_at(held, 3 * MIB, 0, arena) == OK
    tag = ctypes.c_uint32()
    assert library.spillover_tag_of(ctypes.c_void_p(held), ctypes.byref(tag)) == OK
    assert tag.value == arena
    pool.release_arena(arena)
    assert alloc_at(held + 2 * MIB, 512, 0, arena) == INVALID_ARGUMENT
    cuda.destroy_stream(stream)


def test_segments_are_told_as_they_come_and_go(
    library: ctypes.CDLL, pool: _core.Pool, cuda: Cuda
) -> None:
    """What was mapped less what went is what there is, through steals, sleep and upstreams."""

    class Change(ctypes.Structure):
        _fields_ = (
            ("device", ctypes.c_int),
            ("is_mapped", ctypes.c_int),
            ("is_fixed", ctypes.c_int),
            ("address", ctypes.c_size_t),
            ("size_bytes", ctypes.c_size_t),
            ("stream", ctypes.c_size_t),
            ("tag", ctypes.c_uint32),
        )

    unit = 2 * MIB
    units: dict[int, tuple[int, int]] = {}
    problems: list[str] = []

    def observe(pointer: ctypes._Pointer[Change]) -> None:
        change = pointer.contents
        if change.address % 512 != 0:
            problems.append("an address")
        for address in range(change.address, change.address + change.size_bytes, unit):
            owner = (change.stream, change.tag)
            if change.is_mapped and address not in units:
                units[address] = owner
            elif not change.is_mapped and units.get(address) == owner:
                del units[address]
            else:
                problems.append(f"{change.is_mapped} {address:#x} {owner} {units.get(address)}")

    def there() -> dict[int, tuple[int, int]]:
        return {
            address: (segment["stream"], segment["arena"])
            for segment in pool.segments()
            if not segment["is_asleep"]
            for address in range(
                segment["address"], segment["address"] + segment["size_bytes"], unit
            )
        }

    observer = ctypes.CFUNCTYPE(None, ctypes.POINTER(Change))(observe)
    library.spillover_observe_segments(observer)
    try:
        stream = cuda.create_stream()
        pool.keep_stream(stream)
        arena, upstream = pool.make_arena(), Upstream(cuda)
        own = pool.alloc_in(upstream.arena, 25 * MIB)
        pool.free(pool.alloc(30 * MIB))
        pool.alloc(10 * MIB, stream)  # Of what the other stream had.
        pool.alloc(600, stream)
        pool.alloc_in(arena, 12 * MIB)
        assert (units, problems) == (there(), [])
        if pool.segments() and not all(segment["is_fixed"] for segment in pool.segments()):
            host = _core.HostPool(limit_bytes=128 * MIB)
            pool.sleep([0], host)
            assert (units, problems) == (there(), [])
            assert set(units.values()) == {(0, upstream.arena)}
            pool.wake([0])
            assert (units, problems) == (there(), [])
            for function in ("cuMemUnmap", "cuMemMap", "cuMemCreate", "cuCtxGetCurrent"):
                for act in (lambda: pool.sleep([0], host), lambda: pool.wake([0])):
                    with contextlib.suppress(spillover.SpilloverError), faults(Fault(function)):
                        act()
                    assert problems == []
                pool.wake([0])
                assert (units, problems) == (there(), [])
        pool.free(own)
        pool.release_arena(upstream.arena)
        pool.release_arena(arena)
        for address in live_blocks(pool):
            pool.free(address)
        pool.trim()
        upstream.check_ended()
        assert (units, there(), problems) == ({}, {}, [])
    finally:
        library.spillover_observe_segments(None)


def test_a_capture_gets_no_ordinary_memory(
    library: ctypes.CDLL, pool: _core.Pool, cuda: Cuda, kept_streams: list[int]
) -> None:
    """Not from the thread's magazine either, which has a block of that size."""
    stream, out = kept_streams[0], ctypes.c_void_p()
    address = pool.alloc(7000, stream)
    pool.free(address)
    with cuda.capture(stream) as nodes:
        assert library.spillover_alloc(0, 7000, stream, ctypes.byref(out)) == BROKEN_STATE
        assert b"recording a CUDA graph" in library.spillover_last_error()
        assert out.value is None
    assert nodes == [0]
    assert library.spillover_alloc(0, 7000, stream, ctypes.byref(out)) == OK
    assert out.value == address
    assert library.spillover_free(address) == OK


def test_try_alloc_gives_what_the_thread_has_freed(library: ctypes.CDLL, pool: _core.Pool) -> None:
    out = ctypes.c_void_p()
    assert library.spillover_try_alloc(0, 7000, None, ctypes.byref(out)) == BUSY
    address = alloc(library, 7000)
    assert library.spillover_free(address) == OK
    assert library.spillover_try_alloc(0, 7100, None, ctypes.byref(out)) == OK
    assert out.value == address, "both round to 7,168 bytes"
    assert library.spillover_try_alloc(0, 7000, None, ctypes.byref(out)) == BUSY
    assert library.spillover_free(address) == OK


class Sleeper:
    """One tag, and the calls that put it to sleep and wake it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.spillover_make_host_store.restype = ctypes.c_void_p
        library.spillover_make_host_store.argtypes = [ctypes.c_size_t, ctypes.c_int]
        library.spillover_release_store.argtypes = [ctypes.c_void_p]
        library.spillover_release_store.restype = None
        tags, out = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_size_t)
        library.spillover_sleep.argtypes = [
            ctypes.c_int,
            tags,
            ctypes.c_size_t,
            ctypes.c_void_p,
            out,
        ]
        library.spillover_wake.argtypes = [ctypes.c_int, tags, ctypes.c_size_t, out]
        tag = ctypes.c_uint32()
        assert library.spillover_tag(b"weights", ctypes.byref(tag)) == OK
        self.tags = (ctypes.c_uint32 * 1)(tag.value)

    @contextlib.contextmanager
    def tagged(self) -> Iterator[None]:
        previous = ctypes.c_uint32()
        set_tag = self._library.spillover_set_tag
        assert set_tag(self.tags[0], ctypes.byref(previous)) == OK
        yield
        set_tag(previous, None)

    def alloc(self, size_bytes: int) -> int:
        with self.tagged():
            return alloc(self._library, size_bytes)

    def sleep(self, store: int | None = None) -> tuple[int, int]:
        """Status, and bytes copied."""
        copied = ctypes.c_size_t(77)
        status = self._library.spillover_sleep(0, self.tags, 1, store, ctypes.byref(copied))
        return status, copied.value

    def wake(self) -> tuple[int, int]:
        copied = ctypes.c_size_t(77)
        return self._library.spillover_wake(0, self.tags, 1, ctypes.byref(copied)), copied.value


@pytest.mark.virtual_memory
class TestSleep:
    @pytest.fixture
    def sleeper(self, library: ctypes.CDLL) -> Iterator[Sleeper]:
        sleeper = Sleeper(library)
        yield sleeper
        assert sleeper.wake()[0] == OK

    def test_contents_come_back(
        self, library: ctypes.CDLL, pool: _core.Pool, cuda: Cuda, sleeper: Sleeper
    ) -> None:
        address = sleeper.alloc(3 * MIB)
        cuda.fill(address, 3 * MIB, 0, 9)
        store = library.spillover_make_host_store(64 * MIB, 0)
        assert sleeper.sleep(store) == (OK, 3 * MIB)
        library.spillover_release_store(store)  # What it keeps stays.
        assert sleeper.sleep(None) == (OK, 0), "it sleeps already"
        assert pool.stats()["reserved_bytes"]["all"]["current"] == 0
        assert pool.sleeping_tags() == list(sleeper.tags)
        with sleeper.tagged():
            out = ctypes.c_void_p()
            assert library.spillover_alloc(0, 100, None, ctypes.byref(out)) == BROKEN_STATE
            assert b"sleeps on device 0" in library.spillover_last_error()
        assert sleeper.wake() == (OK, 3 * MIB)
        assert sleeper.wake() == (OK, 0)
        host = cuda.pin(3 * MIB)
        cuda.read(host, address, 3 * MIB, 0)
        cuda.synchronize()
        assert ctypes.string_at(host, 3 * MIB) == bytes([9]) * (3 * MIB)
        cuda.unpin(host)
        assert library.spillover_free(address) == OK

    def test_a_store_without_room_changes_nothing(
        self, library: ctypes.CDLL, pool: _core.Pool, sleeper: Sleeper
    ) -> None:
        sleeper.alloc(3 * MIB)
        small = library.spillover_make_host_store(MIB, 0)
        assert sleeper.sleep(small) == (OUT_OF_MEMORY, 77)
        assert b"host memory" in library.spillover_last_error()
        report = OutOfMemory()
        last = library.spillover_last_out_of_memory(ctypes.byref(report))
        assert last == INVALID_ARGUMENT, "no request was refused"
        library.spillover_release_store(small)
        assert pool.sleeping_tags() == []
        assert sleeper.alloc(100)

    def test_without_a_store_nothing_is_copied(
        self, library: ctypes.CDLL, pool: _core.Pool, sleeper: Sleeper
    ) -> None:
        address = sleeper.alloc(3 * MIB)
        assert sleeper.sleep(None) == (OK, 0)
        assert library.spillover_wake(0, sleeper.tags, 1, None) == OK
        assert library.spillover_device_of(address) == 0
        library.spillover_release_store(None)

    @pytest.mark.parametrize("has_upstream", [False, True])
    def test_the_number_of_a_private_arena_is_no_tag(
        self, library: ctypes.CDLL, pool: _core.Pool, cuda: Cuda, has_upstream: bool
    ) -> None:
        """The memory of one with an upstream is not the pool's to unmap."""
        upstream = Upstream(cuda) if has_upstream else None
        arena = upstream.arena if upstream else pool.make_arena()
        address = pool.alloc_in(arena, 3 * MIB)
        number, copied = (ctypes.c_uint32 * 1)(arena), ctypes.c_size_t(77)
        for status in (
            library.spillover_sleep(0, number, 1, None, ctypes.byref(copied)),
            library.spillover_wake(0, number, 1, ctypes.byref(copied)),
        ):
            assert status == INVALID_ARGUMENT
            assert b"private arena" in library.spillover_last_error()
        assert copied.value == 77
        cuda.fill(address, 3 * MIB, 0, 5)  # It is still there.
        pool.free(address)
        pool.release_arena(arena)
        pool.trim()
        if upstream:
            upstream.check_ended()

    def test_failures_are_told_and_can_be_repeated(
        self, library: ctypes.CDLL, pool: _core.Pool, sleeper: Sleeper
    ) -> None:
        sleeper.alloc(32 * MIB)
        with faults(Fault("cuMemUnmap")):
            assert sleeper.sleep(None)[0] == DRIVER_FAILURE
        assert sleeper.sleep(None) == (OK, 0)
        pool.configure("limit=16MiB", "the test")
        assert sleeper.wake()[0] == OUT_OF_MEMORY
        assert b"waking memory with the tag 'weights'" in library.spillover_last_error()
        pool.configure("limit=none", "the test")
        none = (ctypes.c_uint32 * 1)(4000)
        assert library.spillover_sleep(0, none, 1, None, None) == INVALID_ARGUMENT
        assert library.spillover_wake(0, none, 1, None) == INVALID_ARGUMENT
        assert library.spillover_wake(0, None, 1, None) == INVALID_ARGUMENT
        assert library.spillover_sleep(0, None, 0, None, None) == OK
        assert library.spillover_wake(63, sleeper.tags, 1, None) == INVALID_ARGUMENT

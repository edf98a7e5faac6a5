"""The disk store's engines: how one is chosen, what it lacks, what holds up nothing."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from disk_calls import random_bytes

from spillover import ConfigError, StateError, StorageError
from spillover._core import DiskStore, HostPool, Ticket
from spillover.emulator import StorageFault, calls, faults, stuck

BLOCK = 4096
MIB = 1 << 20
CHUNKS = (512 << 10, 4 << 20)  # Of the io_uring engine: memory of any alignment, of blocks.

Make = Callable[..., DiskStore]


def round_trip(store: DiskStore, data: bytes) -> None:
    payload, ticket = store.write(data)
    ticket.wait()
    target = bytearray(len(data))
    store.read(payload, target).wait()
    assert target == data


@pytest.fixture
def store(make_store: Make, tmp_path: Path) -> Iterator[DiskStore]:
    made = make_store([str(tmp_path)])
    yield made
    made.close()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "size", [*CHUNKS, *(chunk + 1 for chunk in CHUNKS), 8 * MIB + BLOCK - 1, 40 * MIB + 12345]
)
def test_extents_of_many_chunks(store: DiskStore, size: int, offset: int) -> None:
    data = random_bytes(size)
    buffer = memoryview(HostPool(pinned=False).allocate(size + offset))[offset:]
    buffer[:] = data
    payload, ticket = store.write(buffer)
    ticket.wait()
    buffer[:] = bytes(size)
    store.read(payload, buffer).wait()
    assert buffer == data


def test_short_transfers_of_many_chunks(store: DiskStore) -> None:
    plan = [StorageFault(way, "short", times=None, probability=0.4) for way in ("read", "write")]  # type: ignore[arg-type]
    with faults(storage=plan, seed=1):
        round_trip(store, random_bytes(20 * MIB + 77))


@pytest.mark.parametrize("call", [1, 2, 17])
@pytest.mark.parametrize("kind", ["error", "flip"])
def test_failing_chunk_fails_its_request_alone(
    store: DiskStore, kind: str, call: int, tmp_path: Path
) -> None:
    data = random_bytes(16 * MIB)
    payload, ticket = store.write(data)
    ticket.wait()
    # Never of blocks, by chance either: such memory has fewer and larger chunks.
    target = memoryview(mmap.mmap(-1, 16 * MIB + 1))[1:]
    chunks = 2 if store.stats().engine == "threads" else 32
    # Of this folder: stores of other tests, which are garbage by now, may still read.
    fault = StorageFault("read", kind, call=min(call, chunks), folder=tmp_path)  # type: ignore[arg-type]
    with faults(storage=[fault]):
        with pytest.raises(StorageError) as caught:
            store.read(payload, target).wait()
        assert caught.value.errno == errno.EIO
        store.read(payload, target).wait()
    assert target == data
    assert store.stats().pending_extents == 0


def test_slow_transfer_does_not_hold_up_the_others(store: DiskStore) -> None:
    payload, ticket = store.write(random_bytes(BLOCK))
    ticket.wait()
    with faults(storage=[StorageFault("read", "delay", delay_us=2_000_000)]):
        slow = store.read(payload, bytearray(BLOCK))
        while calls().get("storage.read", 0) == 0:
            time.sleep(0.001)
        target = bytearray(BLOCK)
        store.read(payload, target).wait()
        assert not slow.is_done()
        slow.wait()
    assert target == random_bytes(BLOCK)


def test_hanging_gates_hold_up_neither_reads_nor_other_writes(store: DiskStore) -> None:
    data = random_bytes(MIB)
    payload, ticket = store.write(data)
    ticket.wait()
    stream = torch.cuda.Stream()
    tickets: list[Ticket] = []
    payloads = []
    with stuck(stream, timeout_s=30):
        event = torch.cuda.Event()
        event.record(stream)
        for _ in range(20):
            gated, ticket = store.write(data, after=event)
            payloads.append(gated)
            tickets.append(ticket)
        round_trip(store, random_bytes(3 * MIB))
        target = bytearray(MIB)
        store.read(payload, target).wait()
        assert target == data
        assert not any(ticket.is_done() for ticket in tickets)
    for gated, ticket in zip(payloads, tickets, strict=True):
        ticket.wait()
        target = bytearray(MIB)
        store.read(gated, target).wait()
        assert target == data


def test_close_waits_for_gates(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)])
    event = torch.cuda.Event()
    event.record()
    requests = [store.write(random_bytes(MIB), after=event) for _ in range(10)]
    store.close()
    assert all(payload.is_stored for payload, _ in requests)


def test_forked_child_may_drop_a_store_that_has_every_thread(store: DiskStore) -> None:
    event = torch.cuda.Event()
    event.record()
    payload, ticket = store.write(b"abc", after=event)
    ticket.wait()
    child = os.fork()
    if child == 0:
        del payload, ticket, store
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    round_trip(store, b"abc")


def test_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine='aio' is not known; choose auto"):
        DiskStore([str(tmp_path)], engine="aio")


def test_engine_in_use_is_told(store: DiskStore, tmp_path: Path) -> None:
    stats = store.stats()
    assert stats.engine in ("threads", "io_uring")
    assert stats.engine_notes == ""
    assert [folder.folder for folder in stats.folders] == [str(tmp_path)]
    assert stats.folders[0].is_direct == stats.is_direct


_WITHOUT_IO_URING = """
import ctypes, struct
# A seccomp filter as container runtimes have one: io_uring_setup, 425, is not permitted.
refuse, allow = 0x00050000 | {error}, 0x7FFF0000
rows = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
code = b"".join(struct.pack("HBBI", *row) for row in rows)
program = ctypes.create_string_buffer(code)
header = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, header, 0, 0) == 0
"""


def run_python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "ENOMEM"])
def test_refused_io_uring_leaves_threads_and_a_reason(tmp_path: Path, error: str) -> None:
    code = _WITHOUT_IO_URING.format(error=getattr(errno, error)) + textwrap.dedent(
        """
        import errno, os, sys
        from spillover import StorageError
        from spillover._core import DiskStore
        store = DiskStore([sys.argv[1]])
        payload, ticket = store.write(b"data")
        ticket.wait()
        target = bytearray(4)
        store.read(payload, target).wait()
        assert target == b"data"
        print(store.stats().engine, store.stats().engine_notes)
        try:
            DiskStore([sys.argv[1]], engine="io_uring")
        except StorageError as error:
            print(errno.errorcode[error.errno], error)
        """
    )
    chosen, refused = run_python(code, str(tmp_path)).splitlines()
    assert chosen.startswith("threads io_uring cannot be used: io_uring_setup: ")
    assert os.strerror(getattr(errno, error)) in chosen
    assert refused.startswith(error)


def test_small_limit_on_locked_memory(tmp_path: Path, make_store: Make) -> None:
    make_store([str(tmp_path)]).close()
    if os.geteuid() != 0:
        pytest.skip("giving up CAP_IPC_LOCK needs root")
    code = """
        import os, resource, sys
        os.chdir(sys.argv[1])
        from spillover._core import DiskStore
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        os.setuid(int(sys.argv[3]))
        store = DiskStore([sys.argv[1]], engine="io_uring")
        data = os.urandom((20 << 20) + 5)
        payload, ticket = store.write(data)
        ticket.wait()
        target = bytearray(len(data))
        store.read(payload, target).wait()
        assert target == data
        print(store.stats().engine_notes)
        # What the limit leaves is shared with other memory, and all of it works.
        buffer = bytearray((8 << 20) + 4096)
        registration = store.register(buffer)
        assert registration.registered_bytes <= limit
        payload, ticket = store.write(buffer)
        ticket.wait()
        store.read(payload, buffer).wait()
        assert buffer == bytearray((8 << 20) + 4096)
    """
    # Huge pages count as a whole, so that fewer fit where the kernel uses them.
    for limit, registered in ((64 << 10, "0"), (3 << 19, "[0-3]")):
        # Not below pytest's folders, which are closed to other users.
        with tempfile.TemporaryDirectory() as folder:
            # The kernel counts locked memory by user, that of a ring also for a while after its
            # process has ended: each run has a user of its own.
            user = random.SystemRandom().randrange(100_000, 2**31)
            os.chown(folder, user, -1)
            notes = run_python(code, folder, str(limit), str(user))
            assert re.search(f"leaves {registered} of 8 registered buffers", notes)


def test_registered_memory(store: DiskStore, tmp_path: Path) -> None:
    pool = HostPool(pinned=False)
    buffer = pool.allocate(24 * MIB)
    registration = store.register(buffer)
    uring = store.stats().engine == "io_uring"
    assert registration.registered_bytes in ([24 * MIB, 0] if uring else [0])
    view = memoryview(buffer)
    data = random_bytes(24 * MIB)
    for start, size in ((0, 24 * MIB), (BLOCK, 3 * MIB + 5), (7, MIB), (20 * MIB, 4 * MIB)):
        view[start : start + size] = data[:size]
        payload, ticket = store.write(view[start : start + size])
        ticket.wait()
        view[start : start + size] = bytes(size)
        store.read(payload, view[start : start + size]).wait()
        assert view[start : start + size] == data[:size]
    with pytest.raises(ConfigError, match="registered already"):
        store.register(view[MIB : 2 * MIB])
    payload, ticket = store.write(view)
    registration.remove()
    registration.remove()
    ticket.wait()
    round_trip(store, data)
    # The address is free for other memory then.
    again = store.register(view[MIB : 2 * MIB])
    store.read(payload, view).wait()
    store.close()
    again.remove()
    with pytest.raises(StateError, match="closed"):
        store.register(view)
    # What a registration holds, it lets go of.
    del registration, again, view, buffer
    assert pool.stats().buffer_count == 0


def test_process_may_end_with_transfers_under_way(make_store: Make, tmp_path: Path) -> None:
    code = """
        import os, sys
        from spillover import StateError
        from spillover._core import DiskStore
        store = DiskStore([sys.argv[1]], engine=sys.argv[2])
        data = bytearray(64 << 20)
        payload, first = store.write(data)
        first.wait()
        requests = [store.write(data) for _ in range(4)] + [store.read(payload, data)]
        if sys.argv[3] == "raise":
            raise SystemExit("ended by an exception")
        if sys.argv[3] == "fork":
            child = os.fork()
            if child == 0:
                try:
                    first.wait()
                except StateError:
                    sys.exit(0)
                sys.exit("a child waited")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            for _, ticket in requests[:-1]:
                ticket.wait()
        print("end", flush=True)
    """
    store = make_store([str(tmp_path)])
    engine = store.stats().engine
    store.close()
    for way, code_expected in (("end", 0), ("raise", 1), ("fork", 0)):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), engine, way],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == code_expected, (way, result.stderr)
        assert ("ended by an exception" in result.stderr) == (way == "raise")
    assert list(tmp_path.iterdir()) == []


def test_ring_that_breaks_gives_errors(make_store: Make, tmp_path: Path) -> None:
    """Programs that become daemons close every descriptor they find."""
    store = make_store([str(tmp_path)])
    if store.stats().engine != "io_uring":
        store.close()
        pytest.skip("about rings")
    store.close()
    code = """
        import os, sys
        from spillover import StorageError
        from spillover._core import DiskStore
        store = DiskStore([sys.argv[1]], engine="io_uring")
        # More than the ring has under way at once.
        data = bytes(80 << 20)
        payload, ticket = store.write(data)
        ticket.wait()
        for name in os.listdir("/proc/self/fd"):
            try:
                if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                    os.close(int(name))
            except FileNotFoundError:
                pass
        for _ in range(3):
            try:
                store.read(payload, bytearray(len(data))).wait()
            except StorageError as error:
                print(error.errno)
        assert store.stats().pending_extents == 0
        store.close()
    """
    assert run_python(code, str(tmp_path)).split() == [str(errno.EBADF)] * 3

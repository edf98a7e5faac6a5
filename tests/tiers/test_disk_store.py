"""The disk tier: exact bytes, real files that nobody can find, and typed errors."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_calls import fetched, random_bytes, stored

from spillover import ConfigError, CorruptData, DiskFull, StateError, StorageError
from spillover._core import DiskPayload, DiskStore, HostPool
from spillover.emulator import StorageFault, faults

BLOCK = 4096
MIB = 1 << 20


Make = Callable[..., DiskStore]


@pytest.fixture
def store(make_store: Make, tmp_path: Path) -> Iterator[DiskStore]:
    made = make_store([str(tmp_path / "a"), str(tmp_path / "b")], extent_bytes_max=16 * BLOCK)
    yield made
    made.close()


@pytest.mark.parametrize(
    "size", [1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 16 * BLOCK, 16 * BLOCK + 7, 3 * MIB + 123]
)
@pytest.mark.parametrize("offset", [0, 1, 512])
def test_bytes_come_back(store: DiskStore, size: int, offset: int) -> None:
    data = random_bytes(size, seed=size)
    buffer = memoryview(HostPool(pinned=False).allocate(size + offset))[offset:]
    buffer[:] = data
    payload, ticket = store.write(buffer)
    ticket.wait()
    buffer[:] = bytes(size)
    store.read(payload, buffer).wait()
    assert bytes(buffer) == data
    assert store.stats().written_bytes == store.stats().read_bytes == size


def test_folders_are_striped_and_private(store: DiskStore, tmp_path: Path) -> None:
    payload = stored(store, random_bytes(64 * BLOCK))
    extents = payload._extents()
    assert [folder for folder, _, _ in extents] == [0, 1, 0, 1]
    assert sum(size for _, _, size in extents) == 64 * BLOCK
    for name in ("a", "b"):
        folder = tmp_path / name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.iterdir()) == []
    for index in (0, 1):
        status = os.fstat(store._descriptor(index))
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0


def test_direct_io_is_used_where_the_file_system_has_it(store: DiskStore, tmp_path: Path) -> None:
    flags = os.O_RDWR | os.O_TMPFILE | os.O_DIRECT
    try:
        os.close(os.open(tmp_path, flags, 0o600))
    except OSError as error:
        pytest.skip(f"this file system refuses O_DIRECT: {error}")
    import fcntl

    assert store.stats().is_direct
    assert fcntl.fcntl(store._descriptor(0), fcntl.F_GETFL) & os.O_DIRECT


def test_space_is_reused_and_given_back(store: DiskStore) -> None:
    payloads = [stored(store, random_bytes(40_000, seed=index)) for index in range(8)]
    full = store.stats()
    assert full.used_bytes == 8 * 10 * BLOCK
    for index in (1, 3, 5, 6):
        payloads[index] = stored(store, random_bytes(40_000, seed=index + 100))
    del payloads[2]
    assert store.stats().used_bytes == 7 * 10 * BLOCK
    # A new payload is written before the old one goes, so one hole each folder is normal.
    assert store.stats().file_bytes <= full.file_bytes + 2 * 10 * BLOCK
    payloads.clear()
    assert store.stats().used_bytes == store.stats().file_bytes == 0


def test_many_requests_at_once(store: DiskStore) -> None:
    data = [random_bytes(10_000 + 77 * index, seed=index) for index in range(200)]
    requests = [store.write(item) for item in data]
    for _, ticket in requests:
        ticket.wait()
    targets = [bytearray(len(item)) for item in data]
    tickets = [
        store.read(payload, target) for (payload, _), target in zip(requests, targets, strict=True)
    ]
    for ticket in reversed(tickets):
        ticket.wait()
    assert [bytes(target) for target in targets] == data
    assert store.stats().pending_extents == 0


def test_a_dropped_ticket_keeps_its_memory_until_the_end(store: DiskStore) -> None:
    payload = stored(store, random_bytes(MIB))
    for _ in range(20):
        # Ticket and buffer are dropped at once; the I/O must not write into freed memory.
        store.read(payload, bytearray(MIB))
    assert store.stats().pending_extents == 0
    assert fetched(store, payload) == random_bytes(MIB)


def test_threads_may_share_a_store(store: DiskStore) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round_ in range(20):
                data = random_bytes(1 + 9999 * (seed + 1), seed=seed * 100 + round_)
                assert fetched(store, stored(store, data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.stats().used_bytes == 0


def damage(store: DiskStore, payload: DiskPayload, extent: int) -> None:
    folder, offset, _ = payload._extents()[extent]
    page = mmap.mmap(-1, BLOCK)
    descriptor = store._descriptor(folder)
    os.preadv(descriptor, [page], offset)
    page[10] ^= 1
    os.pwrite(descriptor, page, offset)


def test_a_changed_byte_is_found(store: DiskStore, tmp_path: Path) -> None:
    data = random_bytes(100_000)
    payload = stored(store, data)
    damage(store, payload, 1)
    target = bytearray(len(data))
    ticket = store.read(payload, target)
    with pytest.raises(CorruptData, match="changed on the disk") as caught:
        ticket.wait()
    assert caught.value.filename == str(tmp_path / "b")
    assert caught.value.errno == errno.EIO
    with pytest.raises(CorruptData):
        ticket.wait()
    damage(store, payload, 1)
    assert fetched(store, payload) == data


def test_a_cut_file_is_found(store: DiskStore) -> None:
    payload = stored(store, random_bytes(100_000))
    os.ftruncate(store._descriptor(0), 0)
    with pytest.raises(CorruptData, match="was cut"):
        store.read(payload, bytearray(100_000)).wait()


@contextlib.contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    with mounted(tmp_path / "small", MIB) as folder:
        yield folder


@pytest.mark.parametrize("preallocate", [True, False])
def test_a_full_disk_is_an_error_and_loses_nothing(
    make_store: Make, small_disk: Path, preallocate: bool
) -> None:
    store = make_store([str(small_disk)], extent_bytes_max=128 << 10, preallocate=preallocate)
    kept = random_bytes(700_000)
    payload = stored(store, kept)
    used = store.stats().used_bytes
    with pytest.raises(DiskFull, match="No space left") as caught:
        store.write(random_bytes(700_000))[1].wait()
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk) in str(caught.value)
    assert store.stats().used_bytes == used
    assert fetched(store, payload) == kept
    # What fits still fits, and space that is given back is usable.
    assert fetched(store, stored(store, kept[:200_000])) == kept[:200_000]
    del payload
    assert fetched(store, stored(store, kept)) == kept
    store.close()


def test_a_write_that_found_the_disk_full_gives_back_what_its_end_had(
    make_store: Make, small_disk: Path
) -> None:
    """Its last extents may be written first, and leave no room for the first ones."""
    store = make_store([str(small_disk)], extent_bytes_max=128 << 10, preallocate=False)
    kept = random_bytes(700_000)
    payload = stored(store, kept)
    late = StorageFault("write", "delay", delay_us=300_000, folder=small_disk)
    with faults(storage=[late]), pytest.raises(DiskFull):
        store.write(random_bytes(700_000))[1].wait()
    assert fetched(store, stored(store, kept[:200_000])) == kept[:200_000]
    assert fetched(store, payload) == kept
    store.close()


def test_another_folder_takes_what_a_full_one_cannot(
    make_store: Make, small_disk: Path, tmp_path: Path
) -> None:
    store = make_store([str(small_disk), str(tmp_path / "large")], extent_bytes_max=256 << 10)
    data = random_bytes(5 * MIB)
    assert fetched(store, stored(store, data)) == data
    store.close()


def test_a_failed_write_leaves_no_extent(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)], preallocate=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = np.zeros(MIB, dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, before[1]))
    try:
        payload, ticket = store.write(data)
        with pytest.raises(StorageError) as caught:
            ticket.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not isinstance(caught.value, DiskFull)
    assert "offset" in str(caught.value)
    assert store.stats().used_bytes == 0
    with pytest.raises(StateError, match="its write failed"):
        store.read(payload, bytearray(MIB))
    store.close()


def test_the_write_limit_is_kept(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)], write_limit_bytes=100_000)
    payload = stored(store, bytes(90_000))
    with pytest.raises(DiskFull, match="write limit"):
        store.write(bytes(10_001))
    assert stored(store, bytes(10_000)).size_bytes == 10_000
    assert store.stats().written_bytes == 100_000
    assert fetched(store, payload) == bytes(90_000)
    store.close()


def test_close_waits_and_then_refuses(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)])
    payload, ticket = store.write(bytearray(8 * MIB))
    store.close()
    store.close()
    assert ticket.is_done()
    assert payload.is_stored
    with pytest.raises(StateError, match="closed"):
        store.write(b"x")
    with pytest.raises(StateError, match="closed"):
        store.read(payload, bytearray(8 * MIB))


def test_wrong_calls_are_named(store: DiskStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one folder"):
        DiskStore([])
    with pytest.raises(ConfigError, match="threads_per_folder"):
        DiskStore([str(tmp_path)], threads_per_folder=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        DiskStore([str(tmp_path / "file")])
    assert caught.value.errno == errno.ENOTDIR
    with pytest.raises(ConfigError, match="contiguous"):
        store.write(np.zeros((10, 10), dtype=np.uint8)[:, ::2])
    with pytest.raises(ConfigError, match="some bytes"):
        store.write(b"")
    payload = stored(store, b"12345")
    with pytest.raises(ConfigError, match="4 bytes"):
        store.read(payload, bytearray(4))
    other = DiskStore([str(tmp_path / "other")])
    with pytest.raises(StateError, match="another disk store"):
        other.read(payload, bytearray(5))
    other.close()


def test_a_killed_process_leaves_no_files(tmp_path: Path) -> None:
    code = f"""
        import time
        from spillover._core import DiskStore
        store = DiskStore([{str(tmp_path)!r}])
        payload, ticket = store.write(bytearray(1 << 20))
        ticket.wait()
        print("ready", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    free = os.statvfs(tmp_path).f_bavail
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
    for _ in range(100):
        if os.statvfs(tmp_path).f_bavail > free:
            break
        time.sleep(0.02)


def test_a_forked_child_may_drop_a_store(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)])
    payload = stored(store, b"abc")
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(StateError):
            store.write(b"x")
            code = 2
        del payload, store
        os._exit(0 if code == 1 else code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert fetched(store, payload) == b"abc"
    store.close()

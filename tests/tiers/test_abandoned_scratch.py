"""Where there are no unnamed files: what a killed process leaves goes, and nothing else does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_calls import fetched, stored

from spillover._core import DiskStore, crc32c
from spillover.emulator import StorageFault, calls, faults

#: As the first open() of a store's file answers on NFS; the folder's is the one before.
WITHOUT_UNNAMED_FILES = StorageFault("open", error="EOPNOTSUPP", call=2)
NAME = r"\.spillover-scratch-[0-9a-f]{16}-[0-9a-f]{8}"


def scratch_name(number: str = "0123456789abcdef") -> str:
    return f".spillover-scratch-{number}-{crc32c(number.encode()):08x}"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def wait_for_names(folder: Path, process: subprocess.Popen[str]) -> list[str]:
    while not (found := names(folder)):
        assert process.poll() is None, "the process has ended"
        time.sleep(0.001)
    return found


@contextlib.contextmanager
def opening(folder: Path, held_up_at: str, delay_us: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is held up before it locks its scratch file, or before it unlinks that."""
    code = """
        import sys
        from spillover._core import DiskStore
        from spillover.emulator import StorageFault, enable, faults
        enable(vram="64MiB")
        plan = [
            StorageFault("open", error="EOPNOTSUPP", call=2),
            StorageFault(sys.argv[2], "delay", delay_us=int(sys.argv[3])),
        ]
        with faults(storage=plan):
            store = DiskStore([sys.argv[1]])
        payload, ticket = store.write(b"data")
        ticket.wait()
        target = bytearray(4)
        store.read(payload, target).wait()
        print(target.decode(), flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), held_up_at, str(delay_us)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def open_store(folder: Path) -> None:
    store = DiskStore([str(folder)])
    assert fetched(store, stored(store, b"mine")) == b"mine"
    store.close()


@pytest.mark.parametrize("held_up_at", ["lock", "unlink"])
def test_killed_before_its_file_has_no_name(tmp_path: Path, held_up_at: str) -> None:
    with opening(tmp_path, held_up_at, delay_us=600_000_000) as process:
        [left] = wait_for_names(tmp_path, process)
    assert re.fullmatch(NAME, left)
    assert (tmp_path / left).stat().st_size == 0
    assert names(tmp_path) == [left]
    open_store(tmp_path)
    assert names(tmp_path) == []


def test_living_process_keeps_its_file(tmp_path: Path) -> None:
    with opening(tmp_path, "unlink", delay_us=600_000_000) as process:
        found = wait_for_names(tmp_path, process)
        # The name is there before the lock is.
        while not is_locked(tmp_path / found[0]):
            time.sleep(0.001)
        open_store(tmp_path)
        assert names(tmp_path) == found


def is_locked(file: Path) -> bool:
    with file.open("r+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_file_that_is_found_before_its_lock_is_made_again(tmp_path: Path) -> None:
    with opening(tmp_path, "lock", delay_us=1_000_000) as process:
        wait_for_names(tmp_path, process)
        open_store(tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "data\n"
        assert names(tmp_path) == []


def test_what_only_looks_alike_stays(tmp_path: Path) -> None:
    (tmp_path / ".spillover-scratch-0123456789abcdef-00000000").touch()
    (tmp_path / ".spillover-scratch-").touch()
    (tmp_path / f"{scratch_name()}.bak").touch()
    (tmp_path / scratch_name("0123456789abcde")).touch()
    (tmp_path / scratch_name("1" * 16)).write_bytes(b"x")
    (tmp_path / scratch_name("2" * 16)).mkdir()
    (tmp_path / scratch_name("3" * 16)).symlink_to(tmp_path / ".spillover-scratch-")
    os.mkfifo(tmp_path / scratch_name("4" * 16))
    (tmp_path / scratch_name("5" * 16)).touch()
    (tmp_path / "hard link").hardlink_to(tmp_path / scratch_name("5" * 16))
    kept = names(tmp_path)
    (tmp_path / scratch_name()).touch()
    open_store(tmp_path)
    assert names(tmp_path) == kept


def test_where_files_cannot_be_locked_nothing_goes(tmp_path: Path) -> None:
    (tmp_path / scratch_name()).touch()
    with faults(storage=[StorageFault("lock", error="ENOLCK", times=None)]):
        open_store(tmp_path)
    assert names(tmp_path) == [scratch_name()]
    with faults(
        storage=[WITHOUT_UNNAMED_FILES, StorageFault("lock", error="ENOLCK", times=None)]
    ) as injected:
        open_store(tmp_path)
        assert len(injected.fired()) == 3
    assert names(tmp_path) == [scratch_name()]


@pytest.mark.parametrize(
    "fault",
    [
        StorageFault("list", error="EIO"),
        StorageFault("open", error="EACCES", call=3),
        StorageFault("unlink", error="EROFS"),
    ],
    ids=lambda fault: fault.operation,
)
def test_a_folder_that_cannot_be_cleaned_is_used(tmp_path: Path, fault: StorageFault) -> None:
    (tmp_path / scratch_name()).touch()
    with faults(storage=[fault]) as injected:
        open_store(tmp_path)
        assert injected.fired()
    open_store(tmp_path)
    assert names(tmp_path) == []


def test_file_without_a_name_where_direct_io_is_refused(tmp_path: Path) -> None:
    plan = [
        StorageFault("open", error="EOPNOTSUPP", call=2),
        StorageFault("open", error="EINVAL", call=3),
        StorageFault("open", error="EOPNOTSUPP", call=4),
    ]
    with faults(storage=plan):
        store = DiskStore([str(tmp_path)])
        assert calls()["storage.unlink"] == 2
    assert not store.stats().is_direct
    store.close()
    assert names(tmp_path) == []


def test_many_that_open_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from spillover._core import DiskStore
        from spillover.emulator import StorageFault, enable, faults
        enable(vram="64MiB")
        for _ in range(40):
            with faults(storage=[StorageFault("open", error="EOPNOTSUPP", call=2)]):
                store = DiskStore([sys.argv[1]], engine="threads", threads_per_folder=1)
            payload, ticket = store.write(b"data")
            ticket.wait()
            store.close()
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)])
        for _ in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert names(tmp_path) == []

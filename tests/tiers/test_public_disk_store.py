"""``spillover.DiskStore`` and ``spillover doctor``: options, and folders of all kinds."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import spillover
from spillover import ConfigError, DiskFull, DiskStore, StateError, StorageError
from spillover.emulator import StorageFault, faults

DATA = random.Random(0).randbytes(100_000)


def round_trip(store: DiskStore) -> None:
    payload, ticket = store.write(DATA)
    ticket.wait()
    target = bytearray(len(DATA))
    store.read(payload, target).wait()
    assert target == DATA


def test_limits_are_sizes(tmp_path: Path) -> None:
    with DiskStore([tmp_path], limit="1MiB", write_limit="1.5MiB") as store:
        payload, ticket = store.write(bytes(1 << 20))
        ticket.wait()
        with pytest.raises(DiskFull, match=r"the limit of 1.00 MiB on space"):
            store.write(b"x")
        del payload
        with pytest.raises(DiskFull, match=r"the write limit of 1.50 MiB"):
            store.write(bytes(1 << 20))
        assert store.stats().used_bytes == 0
    with pytest.raises(StateError, match="closed"):
        store.write(b"x")


def test_relative_and_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with DiskStore("a/b") as store:
        monkeypatch.chdir("/")
        assert [folder.folder for folder in store.stats().folders] == [str(tmp_path / "a/b")]
        round_trip(store)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "at least one folder"),
        ("", "must be paths"),
        ([7], "must be paths"),
        (["/spill", "/spill"], "named twice"),
    ],
)
def test_wrong_folders_are_named(folders: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiskStore(folders)


@pytest.mark.parametrize(
    "options", [{"limit": "much"}, {"write_limit": -1}, {"engine": "aio"}, {"limit": 0}]
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DiskStore(tmp_path, **options)


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        DiskStore(tmp_path / "file" / "folder")
    assert caught.value.errno == errno.ENOTDIR
    assert str(tmp_path / "file") in str(caught.value)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")


def test_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:
        mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path))
    try:
        with pytest.raises(StorageError) as caught:
            DiskStore(tmp_path)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert caught.value.filename == str(tmp_path)
        with pytest.raises(StorageError):
            DiskStore(tmp_path / "missing")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_folder_removed_while_open(tmp_path: Path, engine: Any) -> None:
    folder = tmp_path / "gone"
    store = DiskStore(folder, engine=engine)
    shutil.rmtree(folder)
    round_trip(store)
    store.close()
    assert not folder.exists()


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    code = f"""
        import sys
        from spillover import DiskStore
        store = DiskStore({str(tmp_path)!r})
        mine = bytes([int(sys.argv[1])]) * 3_000_000
        for _ in range(20):
            payload, ticket = store.write(mine)
            ticket.wait()
            target = bytearray(len(mine))
            store.read(payload, target).wait()
            assert target == mine
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(number)])
        for number in (1, 2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_no_direct_io_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # As tmpfs answered before Linux 6.6.
    with (
        caplog.at_level(logging.WARNING, logger="spillover"),
        faults(storage=[StorageFault("open", error="EINVAL", call=2)]),
    ):
        store = DiskStore(tmp_path)
    assert "refuses O_DIRECT" in caplog.text
    assert str(tmp_path) in caplog.text
    assert not store.stats().is_direct
    round_trip(store)
    store.close()


def test_tmpfs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount("-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path))
    try:
        with DiskStore(tmp_path) as store:
            round_trip(store)
            with pytest.raises(DiskFull):
                store.write(bytes(2 << 20))[1].wait()
            round_trip(store)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spillover", "doctor", *arguments],
        env={**os.environ, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_shows_each_folder(tmp_path: Path) -> None:
    result = doctor("--disk", str(tmp_path), "--disk", str(tmp_path / "missing"))
    assert result.returncode == 1, result.stderr
    with DiskStore(tmp_path) as store:
        stats = store.stats()
    assert f"engine {stats.engine}" in result.stdout
    assert ("O_DIRECT" if stats.is_direct else "buffered") in result.stdout
    assert "there is no such folder" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert doctor().returncode == 0


def test_is_exported_without_torch() -> None:
    code = "import sys, spillover; spillover.DiskStore; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "DiskStore" in spillover.__all__

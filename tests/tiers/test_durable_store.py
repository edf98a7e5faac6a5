"""``spillover.DurableStore``: what it gives back, when, and what it says when it cannot."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from durable_cases import ENTRIES, EXTENT, FILE, Open, assert_holds, get, put, some
from hypothesis import given, settings
from hypothesis import strategies as st

import spillover
from spillover import (
    ConfigError,
    DiskFull,
    DurableStore,
    StateError,
    StorageError,
)
from spillover.emulator import StorageFault, faults


def test_what_was_committed_is_there_for_the_next(open_store: Open, folders: list[Path]) -> None:
    with open_store() as store:
        assert (store.sequence, store.extra, store.entries) == (0, None, ENTRIES)
        assert not store.is_committed("weight")
        put(store, 1)
        assert store.commit({"step": 1, "rate": 1e-3}) == 1
        put(store, 2, "bias")
        assert_holds(store, {"bias": 2, "weight": 1})
    folders.reverse()  # Any order.
    with open_store(None) as store:
        assert (store.sequence, store.extra, store.entries) == (
            1,
            {"step": 1, "rate": 1e-3},
            ENTRIES,
        )
        assert store.is_committed("bias")
        assert_holds(store, {"bias": 1, "weight": 1, "flag": 1})
        store.verify()


def test_newest_and_committed_contents(open_store: Open) -> None:
    store = open_store()
    with pytest.raises(StateError, match="never written"):
        get(store, "weight")
    put(store, 1)
    with pytest.raises(StateError, match="no committed contents"):
        get(store, "weight", committed=True)
    store.commit()
    for seed in (2, 3):  # Steps between commits write in place.
        put(store, seed)
        assert_holds(store, dict.fromkeys(ENTRIES, seed))
        assert get(store, "weight", committed=True) == some("weight", 1)
    store.rollback()
    assert_holds(store, dict.fromkeys(ENTRIES, 1))
    put(store, 4, "bias")
    assert store.commit(b"raw") == 2
    assert store.extra == b"raw"
    assert_holds(store, {"weight": 1, "bias": 4, "flag": 1})


def test_parts_of_entries(open_store: Open) -> None:
    store = open_store()
    put(store, 1)
    store.commit()
    part = random.Random(5).randbytes(EXTENT)
    store.write("weight", part, offset=EXTENT).wait()
    store.commit()
    expected = some("weight", 1)[:EXTENT] + part + some("weight", 1)[2 * EXTENT :]
    assert get(store, "weight") == expected
    tail = bytearray(EXTENT + 100)
    store.read("weight", tail, offset=2 * EXTENT).wait()
    assert tail == expected[2 * EXTENT :]
    for offset, size in ((1, EXTENT), (0, 100), (4 * EXTENT, 1), (0, ENTRIES["weight"] + 1)):
        with pytest.raises(ConfigError, match="entry 'weight'"):
            store.write("weight", bytes(size), offset=offset)
    with pytest.raises(ConfigError, match=r"no entry 'wieght'; the nearest is 'weight'"):
        store.read("wieght", tail)


def test_requests_do_not_overtake_each_other(open_store: Open, engine: Any) -> None:
    store = open_store()
    put(store, 1)
    slow = StorageFault("write", "delay", times=None, delay_us=100_000)
    with faults(storage=[slow]):
        ticket = store.write("bias", some("bias", 2))
        with pytest.raises(StateError, match="being written"):
            store.write("bias", some("bias", 3))
        with pytest.raises(StateError, match="still being written"):
            get(store, "bias")
        assert store.commit() == 1  # Waits for it.
        assert ticket.is_done()
    assert_holds(store, {"bias": 2, "weight": 1})
    with faults(storage=[StorageFault("read", "delay", times=None, delay_us=100_000)]):
        target = bytearray(ENTRIES["bias"])
        ticket = store.read("bias", target)
        put(store, 3, "bias")  # The other slot.
        store.commit()
        with pytest.raises(StateError, match="being read"):
            store.write("bias", some("bias", 4))
        ticket.wait()
    assert target == some("bias", 2)


def test_threads_write_while_another_commits(open_store: Open) -> None:
    store = open_store()
    put(store, 0)
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for seed in range(30):
                store.write(name, some(name, seed)).wait()
                assert get(store, name) == some(name, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ENTRIES]
    for thread in threads:
        thread.start()
    for number in range(10):
        store.commit(number)
    for thread in threads:
        thread.join()
    assert errors == []
    store.commit("end")
    assert_holds(store, dict.fromkeys(ENTRIES, 29))


def test_extra_comes_back_as_it_was_or_is_refused(open_store: Open) -> None:
    store = open_store(extra_limit="4KiB")
    for extra in (None, b"", b"\0\xff", "text", [1, 2.5, None, float("nan")], {"a": {"b": [True]}}):
        store.commit(extra)
        assert repr(store.extra) == repr(extra)
    for extra in ((1, 2), {1: 2}, {"a": (1,)}, object()):
        with pytest.raises(ConfigError, match="extra"):
            store.commit(extra)
    with pytest.raises(ConfigError, match="room for 4096"):
        store.commit(bytes(4097))
    assert store.sequence == 6


def test_write_limit(open_store: Open) -> None:
    store = open_store(write_limit=10_000)
    put(store, 1, "bias")
    put(store, 2, "bias")
    with pytest.raises(DiskFull, match="the write limit of"):
        put(store, 3, "bias")
    store.commit()
    assert_holds(store, {"bias": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": {**ENTRIES, "bias": 4999}}, "'bias' has 5000 bytes there and 4999"),
        ({"entries": {**ENTRIES, "more": 1}}, "it has no 'more'"),
        ({"entries": {"bias": 5000}}, "it also has"),
        ({"extent_bytes": 4096}, "extents of 8192 bytes"),
        ({"extra_limit": "2MiB"}, "room for 1048576 bytes of extra"),
    ],
)
def test_store_of_another_layout_is_not_touched(
    open_store: Open, change: dict[str, Any], message: str
) -> None:
    with open_store() as store:
        put(store, 1)
        store.commit()
    with pytest.raises(ConfigError, match=message):
        open_store(**change)
    assert_holds(open_store(), {"bias": 1})


@pytest.mark.parametrize(
    ("entries", "message"),
    [({}, "at least one entry"), ({"a": 0}, "0 bytes"), ({"a": "1"}, "sizes"), ({"": 1}, "name")],
)
def test_wrong_entries(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DurableStore(tmp_path, entries)
    assert list(tmp_path.iterdir()) == []


def test_files_are_private_and_relative_folders_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with DurableStore("x/y", {"a": 1}) as store:
        monkeypatch.chdir("/")
        assert [folder.folder for folder in store.stats().folders] == [str(tmp_path / "x/y")]
    assert stat.S_IMODE((tmp_path / "x/y").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "x/y" / FILE).stat().st_mode) == 0o600


def test_no_store_leaves_nothing(tmp_path: Path) -> None:
    for act in (lambda: DurableStore(tmp_path), lambda: DurableStore.delete(tmp_path)):
        with pytest.raises(StorageError, match="there is no durable store") as caught:
            act()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError):
        DurableStore(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_delete_removes_files_only(open_store: Open, folders: list[Path]) -> None:
    store = open_store()
    (folders[0] / "mine").write_text("")
    with pytest.raises(StorageError, match="in use"):
        DurableStore.delete(folders)
    store.close()
    store.close()
    with pytest.raises(StateError, match="closed"):
        store.commit()
    DurableStore.delete(folders)
    assert [path.name for folder in folders for path in folder.iterdir()] == ["mine"]


def test_lost_folder_is_named(open_store: Open, folders: list[Path]) -> None:
    open_store().close()
    for lost, kept in ((0, 1), (1, 0)):
        away = folders[lost].rename(folders[lost].with_name("away"))
        for entries in (None, ENTRIES):
            folders[lost].mkdir(exist_ok=True)
            with pytest.raises(StorageError) as caught:
                open_store(entries)
            assert str(folders[lost]) in str(caught.value)
            assert "lost, or not mounted" in str(caught.value)
        shutil.rmtree(folders[lost])
        away.rename(folders[lost])
        with pytest.raises(ConfigError, match="has 2 folders, and 1 were given"):
            DurableStore(folders[kept])
    open_store(None)


def test_parts_of_different_stores(tmp_path: Path, open_store: Open, folders: list[Path]) -> None:
    open_store().close()
    DurableStore([tmp_path / "c", tmp_path / "d"], ENTRIES).close()
    with pytest.raises(ConfigError, match="different durable stores"):
        DurableStore([folders[0], tmp_path / "d"])


def run_python(code: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    store = DurableStore(tmp_path, {"a": 1})
    code = """
        import sys
        from spillover import DurableStore, StorageError
        try:
            DurableStore(sys.argv[1])
        except StorageError as error:
            print(error.errno, error.filename)
        else:
            print("opened")
    """
    lock = tmp_path / "spillover.durable.lock"
    assert run_python(code, tmp_path).split() == [str(errno.EWOULDBLOCK), str(lock)]
    store.close()
    assert run_python(code, tmp_path).strip() == "opened"


def test_forked_child_neither_uses_the_store_nor_keeps_it(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from spillover import DurableStore, StateError
        store = DurableStore(sys.argv[1], {"a": 4})
        store.write("a", b"abcd").wait()
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writes)
            try:
                store.commit()
            except StateError:
                os.read(reads, 1)  # Until the parent has closed and opened.
                del store
                os._exit(0)
            os._exit(1)
        store.commit()
        store.close()
        store = DurableStore(sys.argv[1])
        os.write(writes, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        try:
            DurableStore(sys.argv[1])
        except OSError:
            print("still locked")
    """
    assert run_python(code, tmp_path).strip() == "still locked"


def test_a_forked_child_that_outlives_its_killed_parent_does_not_hold_the_store(
    tmp_path: Path,
) -> None:
    code = """
        import os, sys
        from spillover import DurableStore
        store = DurableStore(sys.argv[1], {"a": 4})
        other = DurableStore(sys.argv[2], {"a": 4})
        other.close()
        store.write("a", b"abcd").wait()
        store.commit()
        if os.fork() == 0:
            # The numbers of what was closed are those of other files.
            files = [os.open("/dev/null", os.O_RDONLY) for _ in range(9)]
            other = DurableStore(sys.argv[2])
            if os.fork() == 0:
                files.append(os.open("/dev/null", os.O_RDONLY))
                del store, other
                print("forked", flush=True)
            else:
                os.wait()
            sys.stdin.read()  # Until it is told to end.
            for file in files:
                os.fstat(file)
            print("child", flush=True)
            os._exit(0)
        os.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "one", tmp_path / "two"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        with pytest.raises(StorageError, match="in use"):
            DurableStore(tmp_path / "one")
        process.kill()
        process.wait(60)
        with DurableStore(tmp_path / "one") as store:
            assert store.sequence == 1
        with pytest.raises(StorageError, match="in use"):
            DurableStore(tmp_path / "two")  # The child's own.
        process.stdin.close()
        assert process.stdout.read() == "child\n" * 2
    DurableStore(tmp_path / "two").close()


def test_folder_removed_while_open(open_store: Open, folders: list[Path]) -> None:
    store = open_store()
    put(store, 1)
    store.commit()
    shutil.rmtree(folders[1])
    put(store, 2)
    with pytest.raises(StorageError, match="removed or replaced") as caught:
        store.commit()
    assert caught.value.filename == str(folders[1])
    assert get(store, "weight", committed=True) == some("weight", 1)


def mounted_tmpfs(path: Path, options: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")


def test_full_disk_says_how_much_is_needed_and_leaves_nothing(tmp_path: Path) -> None:
    full = tmp_path / "full"
    mounted_tmpfs(full, "size=1M")
    try:
        other = tmp_path / "other"
        with pytest.raises(DiskFull, match=rf"needs \d.*bytes\) in {full}") as caught:
            DurableStore([other, full], {"a": 8 << 20}, extent_bytes=1 << 20)
        assert caught.value.filename == str(full)
        assert list(full.iterdir()) == list(other.iterdir()) == []
        with DurableStore([other, full], {"a": 4096}) as store:
            store.write("a", bytes(4096)).wait()
            store.commit()
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)


def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ro"
    mounted_tmpfs(folder, "ro")
    try:
        with pytest.raises(StorageError) as caught:
            DurableStore(folder, {"a": 1})
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.sampled_from(["weight", "bias", "flag", "part", "commit", "rollback", "reopen"]),
        min_size=5,
        max_size=40,
    )
)
def test_store_does_what_a_dictionary_would(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    root = tmp_path_factory.mktemp("model")
    folders = [root / "a", root / "b"]
    store = DurableStore(folders, ENTRIES, extent_bytes=EXTENT)
    committed: dict[str, bytes] = {}
    newest: dict[str, bytes] = {}
    sequence = 0
    for number, step in enumerate(steps):
        if step in ENTRIES:
            newest[step] = some(step, number)
            store.write(step, newest[step]).wait()
        elif step == "part" and "weight" in newest:
            part = random.Random(number).randbytes(EXTENT)
            store.write("weight", part, offset=EXTENT).wait()
            newest["weight"] = newest["weight"][:EXTENT] + part + newest["weight"][2 * EXTENT :]
        elif step == "commit":
            sequence += 1
            assert store.commit(number) == sequence
            committed = dict(newest)
        elif step == "rollback":
            store.rollback()
            newest = dict(committed)
        elif step == "reopen":
            store.close()
            store = DurableStore(folders)
            newest = dict(committed)
        for contents, is_committed in ((newest, False), (committed, True)):
            for name, data in contents.items():
                assert get(store, name, committed=is_committed) == data
    store.close()
    DurableStore.delete(folders)


def test_command_line(tmp_path: Path) -> None:
    with DurableStore(tmp_path, {"momentum": 5000}) as store:
        store.write("momentum", bytes(5000)).wait()
        store.commit({"step": 7})

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "spillover", "store", *map(str, arguments)],
            capture_output=True,
            text=True,
            input="n\n",
            check=False,
        )

    shown = run("show", tmp_path)
    assert "momentum" in shown.stdout
    assert "{'step': 7}" in shown.stdout
    assert run("verify", tmp_path).stdout == "commit 1: all checksums are good\n"
    assert run("delete", tmp_path).returncode == 1
    assert run("delete", "--yes", tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert "there is no durable store" in run("show", tmp_path).stderr


def test_is_exported_without_torch() -> None:
    run_python("import sys, spillover; spillover.DurableStore; assert 'torch' not in sys.modules")
    assert "DurableStore" in spillover.__all__

"""Durable stores after a crash: the last commit, whole, whatever was cut, killed or refused."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from benchmarks._crash import killed, simulated
from benchmarks._crash.simulated import Workload

from spillover import CorruptData, DiskFull, DurableStore, SpilloverError, StorageError
from spillover.emulator import StorageFault, calls, faults

SOAK = os.environ.get("SPILLOVER_SOAK") == "1"
ENTRIES = {"weight": 20_000, "bias": 100}


@pytest.mark.parametrize("number", range(24 if SOAK else 3))
@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_every_cut_gives_the_last_commit(number: int, engine: str) -> None:
    workload = Workload(number, commits=3 if SOAK else 2, engine=engine)
    count, problems = simulated.cut_everywhere(workload, 4 if SOAK else 1)
    assert count > 80
    assert problems == []


def test_disk_that_forgets_what_was_flushed_is_noticed() -> None:
    """The check can fail: without flushes it does."""
    assert simulated.lost_without_syncs(Workload(1), 2) > 0


def test_killed_processes_lose_nothing_committed(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    assert killed.kill_many(tmp_path, 60 if SOAK else 6, seed=seed) == []


def contents(number: int) -> dict[str, bytes]:
    return {
        name: random.Random(f"{name} {number}").randbytes(size) for name, size in ENTRIES.items()
    }


def run_commits(folders: list[Path], acknowledged: list[int]) -> None:
    with DurableStore(folders, ENTRIES, extent_bytes=8192, engine="threads") as store:
        acknowledged.append(0)
        for number in (1, 2):
            for name, data in contents(number).items():
                store.write(name, data).wait()
            try:
                acknowledged.append(store.commit(number))
            finally:
                assert_committed(store, {acknowledged[-1]})


def assert_committed(store: DurableStore, possible: set[int]) -> None:
    if store.sequence == 0:
        assert 0 in possible
        return
    assert store.extra in possible
    for name, data in contents(store.extra).items():
        target = bytearray(len(data))
        store.read(name, target, committed=True).wait()
        assert target == data, (name, possible)


OPERATIONS = [
    "make_folder",
    "open",
    "rename",
    "lock",
    "allocate",
    "sync",
    "read",
    "write",
]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_may_fail(tmp_path: Path, operation: str, error: str) -> None:
    with faults():
        run_commits([tmp_path / "0a", tmp_path / "0b"], [])
        count = calls()[f"storage.{operation}"]
    numbers = range(1, count + 1)
    if not SOAK and count > 12:
        numbers = sorted(random.Random(0).sample(numbers, 12))
    for number in numbers:
        folders = [tmp_path / f"{number}{name}" for name in "ab"]
        acknowledged: list[int] = []
        fault = StorageFault(operation, error=error, call=number)  # type: ignore[arg-type]
        caught = None
        with faults(storage=[fault]) as injected:
            try:
                run_commits(folders, acknowledged)
            except StorageError as failed:
                caught = failed
            assert injected.fired()
        if caught is not None:
            assert not isinstance(caught, CorruptData)
            is_space = operation in ("allocate", "write") and error == "ENOSPC"
            assert isinstance(caught, DiskFull) or not is_space, (number, caught)
            assert caught.errno is not None
            assert caught.filename
        if not acknowledged:
            left = [path for folder in folders if folder.exists() for path in folder.iterdir()]
            # Whoever could not get a lock may not remove the file: others might have it.
            if operation in ("lock", "open"):
                left = [path for path in left if not path.name.endswith(".lock")]
            assert left == [], number
            run_commits(folders, acknowledged)
        with DurableStore(folders) as store:
            assert_committed(store, {acknowledged[-1], acknowledged[-1] + 1})
            store.verify()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_failed_flush_is_the_end_until_it_is_opened_again(tmp_path: Path, call: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    store = DurableStore(folders, ENTRIES, extent_bytes=8192)
    for number in (1, 2):
        for name, data in contents(number).items():
            store.write(name, data).wait()
        if number == 1:
            store.commit(1)
    with faults(storage=[StorageFault("sync", call=call)]), pytest.raises(StorageError):
        store.commit(2)
    with pytest.raises(StorageError, match="takes no more writes"):
        store.write("bias", bytes(100))
    with pytest.raises(StorageError, match="open it again"):
        store.commit(2)
    assert_committed(store, {1})
    store.close()
    with DurableStore(folders) as store:
        assert_committed(store, {1, 2})


def test_descriptors_that_run_out_are_an_error_not_a_hang(tmp_path: Path) -> None:
    run_commits([tmp_path], [])
    with faults():
        DurableStore(tmp_path).close()
        count = calls()["storage.open"]
    for call in range(1, count + 1):
        fault = StorageFault("open", error="EMFILE", call=call, times=None)
        with faults(storage=[fault]), pytest.raises(StorageError) as caught:
            DurableStore(tmp_path)
        assert caught.value.errno == errno.EMFILE
    with DurableStore(tmp_path) as store:
        fault = StorageFault("open", error="EMFILE")
        with faults(storage=[fault]), pytest.raises(StorageError):
            store.commit(3)
        store.commit(2)  # Nothing was written, so it may be tried again.
        assert_committed(store, {2})


def test_failed_write_can_be_repeated_or_rolled_back(tmp_path: Path) -> None:
    with DurableStore(tmp_path, ENTRIES, extent_bytes=8192) as store:
        for name, data in contents(1).items():
            store.write(name, data).wait()
        store.commit(1)
        for way in ("repeat", "roll back"):
            with faults(storage=[StorageFault("write")]), pytest.raises(StorageError):
                store.write("weight", contents(2)["weight"]).wait()
            with pytest.raises(SpilloverError, match="a write of it failed"):
                store.commit(2)
            assert_committed(store, {1})
            if way == "repeat":
                store.write("weight", contents(1)["weight"]).wait()
            else:
                store.rollback()
            store.commit(1)
            assert_committed(store, {1})


def test_flipped_and_torn_writes_are_found(tmp_path: Path) -> None:
    with DurableStore(tmp_path, ENTRIES, extent_bytes=8192) as store:
        for number, kind in enumerate(("flip", "torn")):
            with faults(storage=[StorageFault("write", kind)]):  # type: ignore[arg-type]
                store.write("weight", contents(number)["weight"]).wait()
            with pytest.raises(CorruptData, match="entry 'weight'"):
                store.read("weight", bytearray(20_000)).wait()

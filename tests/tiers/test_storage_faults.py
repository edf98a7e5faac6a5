"""What the disk tier does when the disk fails: typed errors, repeats, other data untouched."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk_calls import fetched, random_bytes, stored

from spillover import CorruptData, DiskFull, StorageError
from spillover._core import DiskStore
from spillover.emulator import StorageFault, calls, faults

BLOCK = 4096
EXTENT = 16 * BLOCK

Make = Callable[..., DiskStore]


@pytest.fixture
def store(make_store: Make, tmp_path: Path) -> Iterator[DiskStore]:
    made = make_store([str(tmp_path)], extent_bytes_max=EXTENT, threads_per_folder=1)
    yield made
    made.close()


@pytest.mark.parametrize("size", [100, BLOCK, EXTENT, 3 * EXTENT + 777])
@pytest.mark.parametrize(
    "fault",
    [
        StorageFault("write", "short", times=None, probability=0.7),
        StorageFault("read", "short", times=None, probability=0.7),
        StorageFault("write", error="EINTR", times=20),
        StorageFault("read", error="EAGAIN", times=20),
        StorageFault("write", "delay", times=None),
        StorageFault("allocate", error="EINTR", times=3),
        StorageFault("allocate", error="EOPNOTSUPP"),
    ],
    ids=lambda fault: f"{fault.operation}-{fault.kind}-{fault.error}",
)
def test_what_can_be_repeated_is(store: DiskStore, fault: StorageFault, size: int) -> None:
    data = random_bytes(size)
    with faults(storage=[fault], seed=3) as injected:
        payload = stored(store, data)
        assert fetched(store, payload) == data
        assert injected.fired() or fault.probability < 1
    assert fetched(store, payload) == data


@pytest.mark.parametrize(
    ("fault", "error", "number"),
    [
        (StorageFault("write"), StorageError, errno.EIO),
        (StorageFault("write", error="ENOSPC"), DiskFull, errno.ENOSPC),
        (StorageFault("write", error="EAGAIN", times=None), StorageError, errno.EAGAIN),
        (StorageFault("allocate"), StorageError, errno.EIO),
        (StorageFault("allocate", error="ENOSPC", times=None), DiskFull, errno.ENOSPC),
    ],
    ids=lambda value: f"{value.operation}-{value.error}" if hasattr(value, "kind") else "",
)
def test_failed_write_says_what_and_leaves_the_rest(
    store: DiskStore, tmp_path: Path, fault: StorageFault, error: type[OSError], number: int
) -> None:
    kept = stored(store, random_bytes(2 * EXTENT))
    used = store.stats().used_bytes
    with faults(storage=[fault]), pytest.raises(StorageError) as caught:
        stored(store, random_bytes(30 << 20, seed=1))
    assert type(caught.value) is error
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
    assert store.stats().used_bytes == used
    assert fetched(store, kept) == random_bytes(2 * EXTENT)
    again = stored(store, random_bytes(EXTENT, seed=2))
    assert fetched(store, again) == random_bytes(EXTENT, seed=2)


def test_failed_read_can_be_repeated(store: DiskStore) -> None:
    payload = stored(store, random_bytes(3 * EXTENT))
    with faults(storage=[StorageFault("read", call=2)]) as injected:
        with pytest.raises(StorageError) as caught:
            fetched(store, payload)
        assert caught.value.errno == errno.EIO
        assert injected.fired() == ["storage.read 2: EIO"]
        assert fetched(store, payload) == random_bytes(3 * EXTENT)


@pytest.mark.parametrize("kind", ["flip", "torn"])
@pytest.mark.parametrize("size", [2 * BLOCK, EXTENT, EXTENT + 5000])
def test_damage_on_the_way_out_is_found(store: DiskStore, kind: str, size: int) -> None:
    other = stored(store, random_bytes(EXTENT, seed=9))
    with faults(storage=[StorageFault("write", kind)]):  # type: ignore[arg-type]
        payload = stored(store, random_bytes(size))
    with pytest.raises(CorruptData, match="changed on the disk"):
        fetched(store, payload)
    assert fetched(store, other) == random_bytes(EXTENT, seed=9)


def test_damage_on_the_way_in_is_found_and_not_kept(store: DiskStore) -> None:
    payload = stored(store, random_bytes(EXTENT))
    with faults(storage=[StorageFault("read", "flip")]), pytest.raises(CorruptData):
        fetched(store, payload)
    assert fetched(store, payload) == random_bytes(EXTENT)


def test_full_folder_is_passed_over(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path / name) for name in "ab"], threads_per_folder=1)
    with faults(storage=[StorageFault("allocate", error="ENOSPC", times=2)]):
        payload = stored(store, random_bytes(EXTENT))
    assert [folder for folder, _, _ in payload._extents()] == [1]
    store.close()


@pytest.mark.parametrize("call", [1, 2, 5])
def test_folder_that_fills_up_in_the_middle_of_a_stripe(
    make_store: Make, tmp_path: Path, call: int
) -> None:
    """Where space was promised and is not there: the payload fails whole, and nothing else."""
    folders = [str(tmp_path / name) for name in "ab"]
    store = make_store(folders, extent_bytes_max=EXTENT)
    kept = stored(store, random_bytes(8 * EXTENT))
    used = store.stats().used_bytes
    striped = random_bytes(30 << 20, seed=1)
    full = StorageFault("write", error="ENOSPC", call=call, times=None, folder=folders[1])
    with faults(storage=[full]) as injected:
        with pytest.raises(DiskFull) as caught:
            stored(store, striped)
        assert injected.fired()
    assert caught.value.filename == folders[1]
    assert store.stats().used_bytes == used
    assert fetched(store, kept) == random_bytes(8 * EXTENT)
    assert fetched(store, stored(store, striped)) == striped
    store.close()


@pytest.mark.parametrize("error", ["EACCES", "EMFILE", "EROFS"])
@pytest.mark.parametrize("call", [1, 2])
def test_folder_that_cannot_be_used(tmp_path: Path, error: str, call: int) -> None:
    with (
        faults(storage=[StorageFault("open", error=error, call=call)]),
        pytest.raises(StorageError) as caught,
    ):
        DiskStore([str(tmp_path)])
    assert caught.value.errno == getattr(errno, error)
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_unlinked_is_not_used(tmp_path: Path) -> None:
    without_unnamed_files = StorageFault("open", error="EOPNOTSUPP", call=2)
    with faults(storage=[without_unnamed_files]):
        store = DiskStore([str(tmp_path)])
        assert calls()["storage.unlink"] == 1
    assert list(tmp_path.iterdir()) == []
    store.close()
    with (
        faults(storage=[without_unnamed_files, StorageFault("unlink", error="EPERM")]),
        pytest.raises(StorageError) as caught,
    ):
        DiskStore([str(tmp_path)])
    assert caught.value.errno == errno.EPERM

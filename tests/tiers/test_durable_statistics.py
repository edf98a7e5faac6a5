"""What durable stores count and trace, and commits of several folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import chrome_format
import spillover
from spillover import DurableStore, StorageError, trace
from spillover.emulator import StorageFault, calls, faults

EXTENT = 8192
FOLDERS = ("a", "b", "c")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DurableStore]:
    folders = [tmp_path / name for name in FOLDERS]
    with DurableStore(folders, {"weights": 6 * EXTENT}, extent_bytes=EXTENT) as made:
        yield made


def write(store: DurableStore) -> None:
    store.write("weights", bytes(range(256)) * (6 * EXTENT // 256)).wait()


def test_figures_are_in_the_stats_of_the_process(store: DurableStore, tmp_path: Path) -> None:
    write(store)
    store.commit({"step": 1})
    store.read("weights", bytearray(6 * EXTENT)).wait()
    names = [str(tmp_path / name) for name in FOLDERS]
    (found,) = (
        one for one in spillover.stats().durables if [each.folder for each in one.folders] == names
    )
    assert found.sequence == found.commit_count == 1
    assert found.commit_seconds > 0
    assert found.pending_extents == 0
    for folder in found.folders:
        assert folder.writes.bytes == folder.reads.bytes == 2 * EXTENT
        assert folder.writes.bandwidth_bytes_s
        assert folder.file_bytes > 4 * EXTENT
    text = str(spillover.stats())
    for part in ("durable store", "commits", "durable write", "durable read"):
        assert part in text


def test_store_that_is_gone_has_no_figures(tmp_path: Path) -> None:
    before = len(spillover.stats().durables)
    store = DurableStore(tmp_path, {"flag": 1})
    assert len(spillover.stats().durables) == before + 1
    del store
    assert len(spillover.stats().durables) == before


def test_folders_are_flushed_at_once(store: DurableStore) -> None:
    """Each flush begins while the others are under way."""
    write(store)
    with faults(storage=[StorageFault("sync", "delay", delay_us=300_000, times=3)]):
        committing = threading.Thread(target=store.commit)
        committing.start()
        while calls().get("storage.sync", 0) < 3:
            assert committing.is_alive()
        committing.join()
    assert store.sequence == 1


@pytest.mark.parametrize("call", [1, 2, 3])
def test_each_flush_may_fail_alone(store: DurableStore, tmp_path: Path, call: int) -> None:
    write(store)
    with faults(storage=[StorageFault("sync", call=call)]), pytest.raises(StorageError) as caught:
        store.commit()
    assert Path(caught.value.filename).parent == tmp_path
    store.close()
    with DurableStore([tmp_path / name for name in FOLDERS]) as again:
        assert again.sequence == 0


def test_commits_and_flushes_are_in_the_trace(store: DurableStore, tmp_path: Path) -> None:
    write(store)
    with trace.record(tmp_path / "out.json"):
        store.commit()
    found = chrome_format.read(tmp_path / "out.json")
    (commit,) = chrome_format.spans(found, "commit")
    flushes = chrome_format.spans(found, "flush")
    names = chrome_format.row_names(found)
    rows = [names[span["pid"], span["tid"]] for span in flushes]
    # One of each, and two more of the primary, for the record.
    assert sorted(rows) == [f"disk flush {tmp_path / name}" for name in "aaabc"]
    for span in flushes:
        assert commit["ts"] <= span["ts"]
        assert span["ts"] + span["dur"] <= commit["ts"] + commit["dur"]

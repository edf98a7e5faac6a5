"""What a disk store counts and traces of each folder and direction, against known work."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_calls import fetched, random_bytes, stored

import chrome_format
from spillover import StorageError, _core, trace
from spillover._core import DiskDirectionStats, DiskStore
from spillover.emulator import StorageFault, calls, faults

MIB = 1 << 20
BLOCK = 4096

Make = Callable[..., DiskStore]


@pytest.fixture
def store(make_store: Make, tmp_path: Path) -> Iterator[DiskStore]:
    made = make_store([str(tmp_path)], extent_bytes_max=MIB)
    yield made
    made.close()


def directions(store: DiskStore, folder: int = 0) -> tuple[DiskDirectionStats, DiskDirectionStats]:
    found = store.stats().folders[folder]
    return found.writes, found.reads


def test_each_direction_is_counted(store: DiskStore) -> None:
    payload = stored(store, random_bytes(5 * MIB + 1))
    for _ in range(2):
        fetched(store, payload)
    writes, reads = directions(store)
    assert (writes.bytes, writes.extents, writes.errors) == (5 * MIB + 1, 6, 0)
    assert (reads.bytes, reads.extents, reads.errors) == (10 * MIB + 2, 12, 0)
    for way in (writes, reads):
        assert way.queue_depth == way.resubmits == 0
        assert 1 <= way.queue_depth_max <= 6
        assert 0 < way.checksum_s < way.moving_s
        assert 0 < way.busy_s <= way.moving_s + way.queued_s
        assert way.queued_s >= 0
        assert way.submitting_s > 0


def test_nothing_is_counted_of_nothing(store: DiskStore) -> None:
    for way in directions(store):
        assert (way.bytes, way.extents, way.busy_s, way.queue_depth_max) == (0, 0, 0, 0)
    assert store.stats().waits.count == 0


def test_folders_are_counted_apart(make_store: Make, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    store = make_store(folders, extent_bytes_max=MIB)
    payload = stored(store, random_bytes(8 * MIB))
    fetched(store, payload)
    extents = payload._extents()
    for folder in range(2):
        expected = sum(size for place, _, size in extents if place == folder)
        assert [way.bytes for way in directions(store, folder)] == [expected, expected]
        assert expected > 0
    store.close()


def test_failures_are_errors_and_no_bytes(store: DiskStore) -> None:
    payload = stored(store, random_bytes(3 * BLOCK))
    with faults(storage=[StorageFault("read"), StorageFault("write", error="ENOSPC")]):
        with pytest.raises(StorageError):
            fetched(store, payload)
        with pytest.raises(StorageError):
            stored(store, random_bytes(BLOCK))
    with faults(storage=[StorageFault("read", "flip")]), pytest.raises(StorageError) as caught:
        fetched(store, payload)
    assert caught.value.errno == errno.EIO
    writes, reads = directions(store)
    assert (writes.bytes, writes.extents, writes.errors) == (3 * BLOCK, 2, 1)
    assert (reads.bytes, reads.extents, reads.errors) == (0, 2, 2)
    assert writes.queue_depth == reads.queue_depth == 0


def test_transfers_that_are_taken_up_again_are_counted(store: DiskStore) -> None:
    data = random_bytes(64 * BLOCK)
    payload = stored(store, data)
    # Half, then half of the rest, then all.
    with faults(storage=[StorageFault("read", "short", times=2)]):
        assert fetched(store, payload) == data
    with faults(storage=[StorageFault("write", error="EINTR", times=5)]):
        stored(store, data)
    writes, reads = directions(store)
    assert (reads.resubmits, writes.resubmits) == (2, 5)


def test_queue_depth_is_what_is_under_way(store: DiskStore) -> None:
    payload = stored(store, random_bytes(BLOCK))
    with faults(storage=[StorageFault("read", "delay", delay_us=300_000, times=None)]):
        tickets = [store.read(payload, bytearray(BLOCK)) for _ in range(3)]
        while calls().get("storage.read", 0) < 3:
            pass
        assert directions(store)[1].queue_depth == store.stats().pending_extents == 3
        busy_s = directions(store)[1].busy_s
        for ticket in tickets:
            ticket.wait()
    reads = directions(store)[1]
    assert (reads.queue_depth, reads.queue_depth_max) == (0, 3)
    assert reads.busy_s > busy_s > 0
    # It was busy once, not three times.
    assert reads.busy_s < reads.moving_s + reads.queued_s
    waits = store.stats().waits
    assert 1 <= waits.count <= 4
    assert waits.seconds > 0


def test_requests_that_closing_refuses_are_over(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)])
    payload = stored(store, random_bytes(BLOCK))
    store.close()
    assert [way.queue_depth for way in directions(store)] == [0, 0]
    del payload


@pytest.fixture
def traced(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Gives what was recorded since the test began, and ends the recording."""
    trace.start()

    def stop() -> dict[str, Any]:
        trace.stop()
        return chrome_format.read(trace.save(tmp_path / "trace.json"))

    return stop


def test_each_extent_is_a_span_of_its_folder(
    store: DiskStore, tmp_path: Path, traced: Callable[[], dict[str, Any]]
) -> None:
    payload = stored(store, random_bytes(5 * MIB + 1))
    fetched(store, payload)
    found = traced()
    names = chrome_format.row_names(found)
    for name in ("write", "read"):
        spans = chrome_format.spans(found, name)
        assert sorted(span["args"]["bytes"] for span in spans) == [1, *[MIB] * 5]
        for span in spans:
            assert span["args"].keys() == {"bytes", "gate_us", "queued_us", "checksum_us"}
            assert span["args"]["checksum_us"] <= span["dur"] + 1
            assert names[span["pid"], span["tid"]].startswith(f"disk {name} {tmp_path}")
        depths = chrome_format.counter(found, f"disk {name} queue {tmp_path}", "extents")
        assert len(depths) == 12
        assert depths[-1] == 0
        assert max(depths) == directions(store)[name == "read"].queue_depth_max
    sums = chrome_format.spans(found, "checksum")
    assert sum(span["args"]["bytes"] for span in sums) == 2 * (5 * MIB + 1)


def test_failed_extents_are_called_so(
    store: DiskStore, traced: Callable[[], dict[str, Any]]
) -> None:
    payload = stored(store, random_bytes(BLOCK))
    with faults(storage=[StorageFault("read")]), pytest.raises(StorageError):
        fetched(store, payload)
    found = traced()
    counts = [len(chrome_format.spans(found, name)) for name in ("read", "read (failed)", "write")]
    assert counts == [0, 1, 1]


def test_an_arrow_leads_to_a_write(store: DiskStore, traced: Callable[[], dict[str, Any]]) -> None:
    flow = _core.next_trace_flow()
    _core.set_trace_flow(flow)
    stored(store, random_bytes(2 * MIB))
    _core.set_trace_flow(0)
    stored(store, random_bytes(MIB))
    found = traced()
    ends = [event for event in found["traceEvents"] if event["ph"] == "f"]
    assert [event["id"] for event in ends] == [flow, flow]


def test_a_store_without_a_trace_leaves_nothing(store: DiskStore, tmp_path: Path) -> None:
    trace.start()
    trace.stop()
    fetched(store, stored(store, random_bytes(MIB)))
    found = chrome_format.read(trace.save(tmp_path / "trace.json"))
    assert [event["ph"] for event in found["traceEvents"]] == ["M"]

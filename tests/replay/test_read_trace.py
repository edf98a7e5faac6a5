"""Trace files: what each form becomes, and that a malformed one is named with its place."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from spillover.replay import Trace, TraceError, read_trace

OWN = """op,id,bytes,stream,thread
alloc,a,512,0,71
# a comment
alloc,b,1024,0x7f00,71
record_stream,b,,0x8f00,72
free,a,,,72
free,b,
alloc,a,100
"""
RMM = """Thread,Time,Action,Pointer,Size,Stream
9,15:47:02.841,free,0x9000,64,0x0
9,15:47:02.842,allocate,0x1000,4096,0x0
9,15:47:02.843,allocate failure,0x0,99999999,0x0
9,15:47:02.844,allocate,0x0,0,0x0
9,15:47:02.845,allocate,0x0,0,0x0
8,15:47:02.846,allocate,0x2000,100,0x55
8,15:47:02.847,free,0x1000,4096,0x55
"""


def events_of(trace: Trace) -> list[tuple[int, ...]]:
    """(kind, block, bytes, stream, thread) of each event."""
    fields = ("kind", "block", "size_bytes", "stream", "thread")
    return [tuple(int(event[field]) for field in fields) for event in trace.events]


def written(tmp_path: Path, content: str | bytes, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_own_csv_with_streams_and_threads(tmp_path: Path, compress: bool) -> None:
    content = gzip.compress(OWN.encode()) if compress else OWN.encode()
    trace = read_trace(written(tmp_path, content, "run.csv.gz" if compress else "run.csv"))
    assert trace.name == "run"
    assert events_of(trace) == [
        (0, 0, 512, 0, 0),
        (0, 1, 1024, 1, 0),
        (2, 1, 0, 2, 1),
        (1, 0, 0, 0, 1),
        (1, 1, 0, 0, 2),
        (0, 2, 100, 0, 2),
    ]
    assert (trace.block_count, trace.stream_count, trace.thread_count) == (3, 3, 3)
    assert trace.live_bytes().tolist() == [512, 1536, 1536, 1024, 0, 100]
    assert trace.peak_bytes == 1536


def test_rmm_log(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, RMM))
    assert events_of(trace) == [
        (0, 0, 4096, 0, 0),
        (0, 1, 0, 0, 0),
        (0, 2, 100, 1, 1),
        (1, 0, 0, 0, 1),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "trace.csv: the file is empty"),
        ("# nothing\n", "trace.csv: the file has no events"),
        ("alloc,1,512\nalloc,1,512\n", "trace.csv:2: block 1 is allocated already"),
        ("alloc,1,512\nfree,2,\n", "trace.csv:2: block 2 is not allocated at this point"),
        ("alloc,1,512\nfree,1,\nfree,1,\n", "trace.csv:3: block 1 is not allocated"),
        ("alloc,1,\n", "trace.csv:1: '' is not a number of bytes"),
        ("alloc,1,-5\n", "trace.csv:1: -5 is not a size of a block"),
        ("alloc,1,512\nmove,1,2\n", "trace.csv:2: 'move' is not one of alloc, free and record"),
        ("alloc,1,512,0,0,0\n", "trace.csv:1: a line has 5 fields at most, not 6"),
        ("alloc,,512\n", "trace.csv:1: the block has no id"),
        ("record_stream,1,,7\n", "trace.csv:1: block 1 is not allocated"),
        (RMM + "9,1:0,allocate,0x3000,64\n", "trace.csv:9: a line of an RMM log has 6 fields"),
        (RMM + "9,1:0,shuffle,0x3000,64,0\n", "trace.csv:9: 'shuffle' is not an action"),
        (b"\xff\xfe\x00junk", "trace.csv: neither text nor a pickle"),
        (b"\x1f\x8bjunk", "trace.csv: cannot be read"),
        (gzip.compress(OWN.encode())[:-12], "trace.csv: cannot be read"),
    ],
)
def test_malformed_file_is_named_with_its_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(TraceError) as raised:
        read_trace(written(tmp_path, content))
    assert f"{tmp_path}/{message}" in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "no.csv")


def event(action: str, addr: int, size: int = 512, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": []}


def snapshot_of(*events: dict[str, Any], blocks: tuple[tuple[str, int], ...] = ()) -> bytes:
    """A snapshot of one device with one segment of 512-byte blocks from address 4096 on."""
    segment = {
        "device": 0,
        "address": 4096,
        "stream": 0,
        "blocks": [
            {"state": state, "size": 512, "requested_size": requested}
            for state, requested in blocks
        ],
    }
    return pickle.dumps({"segments": [segment], "device_traces": [list(events)]})


def test_snapshot_begins_with_what_was_live_before(tmp_path: Path) -> None:
    content = snapshot_of(
        event("free_requested", 0x9000, size=700, stream=5),
        event("free_completed", 0x9000, size=700, stream=5),
        event("segment_alloc", 0x10000),
        event("alloc", 4096 + 512, size=40),
        blocks=(("active_allocated", 300), ("active_allocated", 40), ("inactive", 0)),
    )
    trace = read_trace(written(tmp_path, content, "dump.pickle"))
    assert events_of(trace) == [
        (0, 0, 300, 0, 0),
        (0, 1, 700, 1, 0),
        (1, 1, 0, 0, 0),
        (0, 2, 40, 0, 0),
    ]


def test_snapshot_frees_a_block_when_its_free_is_complete(tmp_path: Path) -> None:
    content = snapshot_of(
        event("alloc", 1),
        event("free_requested", 1),
        event("alloc", 2),
        event("free_completed", 1),
        event("free_requested", 2),
    )
    kinds = [(kind, block) for kind, block, *_ in events_of(read_trace(written(tmp_path, content)))]
    assert kinds == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_snapshot_of_a_live_run(tmp_path: Path) -> None:
    kept = torch.empty(1000, device="cuda")
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        made = [torch.empty(size, device="cuda") for size in (10, 2000)]
        del made[0]
        torch.cuda.memory._dump_snapshot(str(tmp_path / "dump.pickle"))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    trace = read_trace(tmp_path / "dump.pickle")
    sizes = [size for kind, _, size, *_ in events_of(trace) if kind == 0]
    assert sizes[-2:] == [40, 8000]
    assert kept.numel() * 4 in sizes[:-2]
    assert sum(kind == 1 for kind, *_ in events_of(trace)) == 1


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_never_executes_anything(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "executed"
    content = pickle.dumps({"segments": [], "device_traces": [[Bomb(target)]]}, protocol)
    with pytest.raises(TraceError, match=r"the pickle is refused: it names \w+\.system"):
        read_trace(written(tmp_path, content))
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"segments": []}), "not a memory snapshot of torch: no device_traces"),
        (pickle.dumps([1, 2]), "not a memory snapshot"),
        (pickle.dumps({"segments": [], "device_traces": [[{"a": 1}]]}), "KeyError: 'action'"),
        (pickle.dumps({"segments": [], "device_traces": [[event("jump", 1)]]}), "'jump'"),
        (pickle.dumps({"segments": [], "device_traces": []}), "no events of device 0"),
        (pickle.dumps({"segments": [], "device_traces": [[]]}), "_record_memory_history"),
        (snapshot_of(event("alloc", 1), event("alloc", 1)), "event 1 of device 0: block 1"),
        (snapshot_of(event("alloc", 1))[:-9], "the pickle is"),
        (b"\x80\x04\x95\xff\xff", "the pickle is"),
    ],
)
def test_a_pickle_that_is_no_snapshot_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(TraceError) as raised:
        read_trace(written(tmp_path, content, "dump.pickle"))
    assert str(tmp_path / "dump.pickle") in str(raised.value)
    assert message in str(raised.value)

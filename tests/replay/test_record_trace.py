"""Recordings of live runs: complete, in order, with streams and threads, and replayable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spillover import ConfigError, StateError, StorageError
from spillover.allocator import record_trace
from spillover.replay import ReplayOptions, read_trace, replay

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]
KIB = 1 << 10


def make(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")


# In a process of its own, where nothing else is live.
EVERY_EVENT = """
import sys, threading
import torch
from spillover.allocator import record_trace

def make(size_bytes):
    return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")

older = make(700)
side = torch.cuda.Stream()
with record_trace(sys.argv[1]):
    first = make(3072)
    with torch.cuda.stream(side):
        second = make(5120)
    first[100:].record_stream(side)
    torch.cuda.current_stream().wait_stream(side)
    del first
    worker = threading.Thread(target=make, args=(7168,))
    worker.start()
    worker.join()
    del older
make(9216)
del second
print(hex(side.cuda_stream))
"""


def test_recording_has_every_event_in_order(tmp_path: Path, run_emulated: RunEmulated) -> None:
    path = tmp_path / "run.csv"
    side = run_emulated(EVERY_EVENT, str(path)).stdout.strip()
    trace = read_trace(path)
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert rows[0][2] == "700", "what was live before comes first"
    kinds = [row[0] for row in rows[1:]]
    assert kinds == ["alloc", "alloc", "record_stream", "free", "alloc", "free", "free"]
    assert [row[2] for row in rows if row[0] == "alloc"] == ["700", "3072", "5120", "7168"]
    assert rows[2][3] == rows[3][3] == side
    assert len({row[4] for row in rows[1:]}) == 2
    assert (trace.stream_count, trace.thread_count) == (2, 2)
    found = replay(trace, "ours", ReplayOptions(vram="1GiB"))
    assert found.failed_at is None


def test_recordings_begin_and_end(tmp_path: Path) -> None:
    original = torch.Tensor.record_stream
    recording = record_trace(tmp_path / "first.csv")
    with pytest.raises(StateError, match=r"first\.csv is under way; remove it first"):
        record_trace(tmp_path / "second.csv")
    recording.remove()
    recording.remove()
    assert torch.Tensor.record_stream is original
    with record_trace(tmp_path / "second.csv"):
        block = make(11 * KIB)
    del block
    assert f",{11 * KIB}," in (tmp_path / "second.csv").read_text()
    assert f",{11 * KIB}," not in (tmp_path / "first.csv").read_text()


def test_a_recording_ends_with_its_block_when_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_trace(tmp_path / "run.csv"):
        raise ZeroDivisionError
    record_trace(tmp_path / "next.csv").remove()


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        record_trace(tmp_path / "nowhere" / "run.csv")
    with pytest.raises(ConfigError, match="there is no CUDA device 7"):
        record_trace(tmp_path / "run.csv", device=7)
    for device in ("0", "cuda:0", -1, None, 1 << 40):
        with pytest.raises(ConfigError, match="is not the index of a CUDA device, 0 or more"):
            record_trace(tmp_path / "run.csv", device=device)  # type: ignore[arg-type]
    assert not (tmp_path / "run.csv").exists()
    with pytest.raises(StorageError, match="No space left"), record_trace("/dev/full"):
        make(KIB)


SCRIPT = """
import sys, torch
import spillover.allocator
assert spillover.allocator.is_installed()
x = torch.empty(13 << 10, dtype=torch.uint8, device="cuda")
del x
print(sys.argv[1:])
"""


def test_spillover_run_records_our_own_allocator(tmp_path: Path) -> None:
    script, csv = tmp_path / "script.py", tmp_path / "run.csv"
    script.write_text(SCRIPT)
    python = [sys.executable, "-m", "spillover"]
    run = [*python, "run", "--record-trace", str(csv), str(script), "--flag"]
    result = subprocess.run(
        [*python, "emulate", "--vram", "512MiB", "--", *run],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['--flag']\n"
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    (block,) = (row[1] for row in rows if row[2] == str(13 << 10))
    assert ["free", block] in [row[:2] for row in rows]


FORKING = """
import os, sys
import spillover.emulator
spillover.emulator.enable(vram="64MiB")
import torch
from spillover.allocator import record_trace

record_trace(sys.argv[1])
x = torch.empty(13 << 10, dtype=torch.uint8, device="cuda")
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_adds_nothing_and_the_end_of_the_program_completes_it(
    tmp_path: Path,
) -> None:
    csv = tmp_path / "run.csv"
    subprocess.run([sys.executable, "-c", FORKING, str(csv)], check=True)
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert rows[0] == ["op", "id", "bytes", "stream", "thread"]
    assert [row[:3] for row in rows[1:]] == [["alloc", "0", str(13 << 10)]]

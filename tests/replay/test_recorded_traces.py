"""The traces that benchmarks replay: what they must be, and that they can be made again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spillover.replay import read_trace

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "traces" / "recorded"
GIB = 1 << 30


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.csv.gz")), ids=lambda path: path.name)
def test_recorded_trace_is_large_and_small(path: Path) -> None:
    trace = read_trace(path)
    assert trace.peak_bytes >= 8 * GIB
    assert len(trace.events) >= 5000
    assert path.stat().st_size < 200_000
    assert trace.stream_count == (4 if path.name.startswith("two_stream") else 1)


def test_there_are_recorded_traces() -> None:
    assert len(list(RECORDED.glob("*.csv.gz"))) >= 6


@pytest.mark.soak
@pytest.mark.skipif(
    not torch.__version__.startswith("2.14."), reason="another torch may allocate otherwise"
)
def test_recording_again_gives_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks._allocator.record import record; "
        "record('two_stream_pipeline', Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    name = "two_stream_pipeline.csv.gz"
    assert (tmp_path / name).read_bytes() == (RECORDED / name).read_bytes()

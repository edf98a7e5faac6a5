"""What who uses the clock sees: timings, traces and errors."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clocked import STEP, run_clocked

from spillover import emulator
from spillover.emulator import costs


def test_user_timings_are_simulated() -> None:
    found = run_clocked(
        """
        a = torch.zeros(1024, 1024, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(100):
            a @ a
        end.record()
        polls = 0
        while not end.query():
            polls += 1
        report = emulator.clock_report()
        mm = next(s for s in report.operations if s.name == "aten::mm")
        before = emulator.now_ns()
        emulator.advance(123)
        emulator.busy("cpu-optimizer", ns=1000)
        emulator.busy("disk-read", bytes=1 << 20)
        after = emulator.now_ns()
        print(json.dumps({"ms": start.elapsed_time(end), "mm": mm.ns, "polls": polls,
                          "host": after - before}))
        """
    )
    assert found["ms"] * 1e6 >= found["mm"] > 0  # type: ignore[operator]
    disk = emulator.load_profile("rtx4090").disk
    assert found["host"] == 123 + 1000 + costs.disk_ns(disk, 1 << 20, "read")


def test_trace_and_summary_of_a_script(tmp_path: Path) -> None:
    script, trace = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text(
        "import subprocess, sys\n"
        "import torch, torch.nn.functional as F\n"
        "from spillover import emulator\n" + STEP + "side = torch.cuda.Stream()\n"
        "with torch.cuda.stream(side):\n"
        "    torch.ones(1 << 16).pin_memory().to('cuda', non_blocking=True)\n"
        "torch.cuda.current_stream().wait_stream(side)\n"
        "tokens + 1\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
    )
    command = [
        *[sys.executable, "-m", "spillover", "emulate", "--profile", "rtx4090"],
        *["--trace", str(trace), "--vram", "1GiB", "--hazards", "raise", "--", "python"],
        str(script),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("simulated time on rtx4090") == 2
    assert len(list(tmp_path.glob("out*.json"))) == 2  # the child's has its number
    contents = json.loads(trace.read_text())
    events, makespan = contents["traceEvents"], int(contents["otherData"]["makespan_ns"])
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["ph"] for event in events} >= {"X", "M", "s", "f", "C"}
    assert all(
        span["ts"] >= 0 and (span["ts"] + span["dur"]) * 1000 <= makespan + 1 for span in spans
    )
    # Every resource does one thing at a time, and their sum is what the summary says.
    compute = sorted(
        (span["ts"], span["dur"])
        for span in spans
        if span["pid"] == 3 and span["args"]["resource"] == "compute"
    )
    for (start, duration), (following, _) in itertools.pairwise(compute):
        assert start + duration <= following + 1e-6
    busy_ms = sum(duration for _, duration in compute) / 1000
    summary = re.findall(r"compute of cuda:0: busy ([0-9.]+) ms", result.stderr)
    assert f"{busy_ms:.3f}" in summary


def test_mistakes_are_sentences() -> None:
    found = run_clocked(
        """
        from spillover import ConfigError
        messages = []
        for mistake in (lambda: emulator.busy("gpu", ns=1), lambda: emulator.advance(-1),
                        lambda: emulator.busy("disk-read", bytes=-1)):
            try:
                mistake()
            except ConfigError as error:
                messages.append(str(error))
        print(json.dumps({"messages": messages}))
        """
    )
    assert len(found["messages"]) == 3  # type: ignore[arg-type]
    if "torch" in sys.modules and emulator.is_enabled():
        with pytest.raises(Exception, match="the virtual clock is off"):
            emulator.now_ns()

"""torch.multiprocessing sends CUDA tensors between processes on emulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

EXPANDABLE = "expandable_segments:True"


def run(schedule: str, *arguments: str, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_")}
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "ipc_programs.py", schedule, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, **variables},
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stderr


def test_queue_and_pipe() -> None:
    errors = run("late", "abandoned")
    assert "Producer process has been terminated before all shared CUDA tensors" in errors


def test_expandable_segments() -> None:
    run("late", PYTORCH_CUDA_ALLOC_CONF=EXPANDABLE, PYTORCH_ALLOC_CONF=EXPANDABLE)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["eager", "threaded", "random"])
def test_schedules(schedule: str) -> None:
    run(schedule, "abandoned")

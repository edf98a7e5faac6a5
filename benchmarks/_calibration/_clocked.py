"""The calibration's training runs through the clock itself: real programs, run dry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
#: What ``_transformer_program`` has no code for, or a dry run no kernels.
_UNWRITTEN = ("compiled", "fused_kernels", "gated", "rotary", "recompute")


def is_runnable(kind: str, model: dict[str, Any]) -> bool:
    """Whether there is a program for a case.

    The clock does not know that convolutions in NCHW transpose their operands, so ResNet-50 is run
    in NHWC only.
    """
    if kind == "resnet50":
        return model.get("layout") == "nhwc"
    return kind in ("transformer", "transformer_ms") and not any(map(model.get, _UNWRITTEN))


def step_ns(name: str) -> int:
    """Simulated time of one optimizer step of the case's program, in a process of its own."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._calibration._program", name],
        cwd=_ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the program of {name} failed:\n{result.stderr[-2000:]}")
    return int(json.loads(result.stdout.splitlines()[-1])["step_ns"])


def figure(case_unit: str, model: dict[str, Any], duration_ns: int) -> float:
    """The step's duration in the unit of the published figure."""
    if case_unit == "ms":
        return duration_ns / 1e6
    items = model["batch"] * model.get("micro_steps", 1)
    if case_unit == "tokens/s":
        items *= model["sequence"]
    return float(items / duration_ns * 1e9)

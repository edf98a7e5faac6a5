"""The virtual clock and dry runs: what repeats, what agrees, and how far published figures are off.

The physical limit is equality: simulated time may not differ between runs, nor a dry run's memory
from that of one which computes. No peer simulates the time of unmodified PyTorch programs. All
times but the seconds a run are simulated.
"""

from __future__ import annotations

from typing import Any

from benchmarks import _calibration, dry
from benchmarks._clock import repeatable


def run(*, quick: bool) -> dict[str, Any]:
    """Repeat a program with two host threads, half of the runs beside a CPU load; calibrate."""
    metrics, details = repeatable.measure(repeats=2 if quick else 20)
    calibration, dry_runs = _calibration.run(quick=quick), dry.run(quick=quick)
    return {
        "metrics": {**metrics, **calibration["metrics"], **dry_runs["metrics"]},
        "details": {"repeatable": details, "calibration": calibration["details"]},
        "notes": [
            "clock_repeatable: every number of the report and each step's end are equal in all "
            "runs of a small GPT with a loader thread, half beside a load on all processors",
            "clock_step_ms is simulated on the rtx4090 profile",
            "calibration_error_percent: the cost model on shapes, against published figures that "
            "it was not fit on",
            *dry_runs["notes"],
        ],
    }

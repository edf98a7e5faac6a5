"""The virtual clock and dry runs: what repeats, what agrees, and how far published figures are off.

The physical limit is equality: simulated time may not differ between runs, nor a dry run's memory
and time from those of one which computes. No peer simulates the time of unmodified PyTorch
programs; peers' offloading is simulated on the clock, and plain training is its limit. All times
but the seconds a run are simulated.
"""

from __future__ import annotations

from typing import Any

from benchmarks import _calibration, dry
from benchmarks._clock import offloading, repeatable


def run(*, quick: bool) -> dict[str, Any]:
    """Repeat a program with two host threads, half of the runs beside a CPU load; calibrate."""
    metrics, details = repeatable.measure(repeats=2 if quick else 20)
    simulated, offloaded, missing = offloading.measure(quick=quick)
    calibration, dry_runs = _calibration.run(quick=quick), dry.run(quick=quick)
    return {
        "metrics": {**metrics, **simulated, **calibration["metrics"], **dry_runs["metrics"]},
        "details": {
            "repeatable": details,
            "offloading": offloaded,
            "calibration": calibration["details"],
        },
        "notes": [
            "clock_repeatable: every number of the report and each step's end are equal in all "
            "runs of a small GPT with a loader thread, half beside a load on all processors",
            "clock_step_ms is simulated on the rtx4090 profile",
            "calibration_error_percent: the cost model on shapes, against published figures that "
            "it was not fit on",
            "simulated_slowdown.PROFILE.WAY: a training step of a 7B model (quick: a small one), "
            "2,048 tokens, over the plain one on a card with room for everything",
            *missing,
            *dry_runs["notes"],
        ],
    }

"""The virtual clock: whether simulated time repeats to the nanosecond.

The physical limit is equality: nothing may differ between runs, whatever else the machine does. No
peer simulates the time of unmodified PyTorch programs. All times but the seconds a run are
simulated.
"""

from __future__ import annotations

from typing import Any

from benchmarks._clock import repeatable


def run(*, quick: bool) -> dict[str, Any]:
    """Repeat a program with two host threads, every other time beside a CPU load."""
    metrics, details = repeatable.measure(repeats=2 if quick else 20)
    return {
        "metrics": metrics,
        "details": {"repeatable": details},
        "notes": [
            "clock_repeatable: every number of the report and each step's end are equal in all "
            "runs of a small GPT with a loader thread, half beside a load on all processors",
            "clock_step_ms is simulated on the rtx4090 profile",
        ],
    }

"""Activations off the device: ours beside peers, the plain run and the bound.

Whole steps of a 7B shape are simulated on the virtual clock.
"""

from __future__ import annotations

from typing import Any

from benchmarks._activations import simulated


def run(*, quick: bool) -> dict[str, Any]:
    """Measure all; see the notes of the result for what each metric is."""
    metrics, details, notes = simulated.measure(quick=quick)
    return {"metrics": metrics, "details": {"simulated": details}, "notes": notes}

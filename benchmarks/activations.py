"""Activations off the device: ours beside peers, the plain run and the bound.

A small GPT computes, for its peak of memory and its gradients; the hooks of saved tensors are timed
alone; whole steps of a 7B shape are simulated on the virtual clock.
"""

from __future__ import annotations

from typing import Any

from benchmarks._activations import hooks, peak, simulated


def run(*, quick: bool) -> dict[str, Any]:
    """Measure all; see the notes of the result for what each metric is."""
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    notes: list[str] = []
    for name, part in (("peak", peak), ("hooks", hooks), ("simulated", simulated)):
        found, details[name], what = part.measure(quick=quick)
        metrics.update(found)
        notes += what
    return {"metrics": metrics, "details": details, "notes": notes}

"""The transfer engine beside raw driver copies, and small transfers beside torch's own copies.

The physical limit is the raw loop: cuMemcpyAsync for each payload, in the same process, between the
same kinds of memory. It takes turns with ours. What arrived is compared with what left, outside of
the time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks._harness import spread
from benchmarks._transfer import host_memory

_PROFILE = "h100-pcie"


def run(*, quick: bool) -> dict[str, Any]:
    """Measure in wall time, and on the virtual clock where the device is emulated."""
    pairs, count, repeats = (3, 2, 5) if quick else (9, 4, 30)
    found = _measure("", pairs, count, repeats)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"device": found["device"]}
    _add_large(metrics, details, found["large"], "")
    for name, values in found["small"].items():
        metrics[f"per_transfer_us.{name}"] = statistics.median(values)
        details[f"per_transfer_us.{name}"] = spread(values)
    notes = [
        f"ratio_to_raw: raw time over ours for {count} payloads of 64 MiB, median of {pairs} rows; "
        "in a row each copies twice and goes first once",
        "ratio_to_raw.both: put and fetch at once, each way with host memory of its own",
        "per_transfer_us: 4 KiB transfers, 256 at a time, the wait for all included; torch: "
        "copy_(non_blocking=True) with pinned memory on a side stream, of which no copy can be "
        "waited for by itself; torch_with_events: each can, as each single one of ours",
    ]
    if found["is_emulated"]:
        notes.append(
            "the device is emulated: wall times say what the CPU does, memcpy in place of the link "
            "included, and nothing about a GPU; copies of both directions do not overlap there"
        )
        simulated = _measure(_PROFILE, 1, count, 1)
        _add_large(metrics, details, simulated["large"], "simulated_")
        notes.append(
            f"simulated_ratio_to_raw: the same on the virtual clock of {_PROFILE}, where both "
            "directions share the link"
        )
    else:
        notes.append(f"device: {found['device']}")
    metrics.update(host_memory.measure(quick=quick))
    notes.append(
        "host_bytes_over_stored: pinned memory held / stored, masters, moments and gradients of "
        "Llama 3.2 1B; ours_reserved is cut from memory pinned ahead"
    )
    return {"metrics": metrics, "details": details, "notes": notes}


def _add_large(
    metrics: dict[str, float], details: dict[str, Any], large: dict[str, Any], prefix: str
) -> None:
    for direction, rows in large["rows"].items():
        ratios = [raw / ours for raw, ours in rows]
        moved_bytes = large["bytes"] * (2 if direction == "both" else 1)
        metrics[f"{prefix}ratio_to_raw.{direction}"] = statistics.median(ratios)
        for index, way in enumerate(("raw", "ours")):
            metrics[f"{prefix}gb_s.{direction}.{way}"] = moved_bytes / statistics.median(
                row[index] for row in rows
            )
        details[f"{prefix}ratio_to_raw.{direction}"] = spread(ratios)


def _measure(profile: str, *numbers: int) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._transfer.worker", profile, *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))

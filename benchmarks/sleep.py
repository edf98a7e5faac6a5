"""Sleep and wake beside plain copies of the same bytes, and beside torch_memory_saver.

One run, everything on the emulated device. The physical limit is the link: copies out and in with
nothing else. The rates are simulated on the virtual clock, which charges driver calls, pinning and
copies as a card's host would pay them; the wall-clock rates say only what the emulator does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks._sleep.worker import WAYS
from spillover._paths import library_path

PROFILES = ("h100-pcie", "a100-sxm")
_GIB = 1 << 30


def run(*, quick: bool) -> dict[str, Any]:
    """Measure each way in a process of its own, in turns with raw copies there."""
    size_bytes, repeats = (64 << 20, 2) if quick else (1 << 30, 9)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    notes = [
        "sleep_wake_gib_s.NAME: simulated, bytes both ways over the time of a sleep and a waking, "
        f"median of {repeats} that take turns with raw copies; profile {PROFILES[0]}, "
        "and with the profile in the name the others",
        "sleep_wake_ratio: over the raw copy's in the same process, median of the pairs",
        "sleep_wake_cold_gib_s: the first time, which pins host memory",
        "sleep_wake_wall_gib_s: wall-clock time on the emulated device; nothing about a GPU",
    ]
    for profile in PROFILES[: 1 if quick else None]:
        suffix = "" if profile == PROFILES[0] else f".{profile}"
        for way in WAYS:
            found = _measure(way, size_bytes, repeats, profile)
            if isinstance(found, str):
                notes.append(f"{way} on {profile}: {found}")
                continue
            details[f"{way}.{profile}"] = found
            metrics |= _metrics(found, way, suffix)
    return {"metrics": metrics, "details": details, "notes": notes}


def _metrics(found: dict[str, Any], way: str, suffix: str) -> dict[str, float]:
    cold, *warm = found["rows"]
    bytes_gib = 2 * found["bytes"] / _GIB

    def seconds(row: dict[str, Any], unit: str, *steps: str) -> float:
        return float(sum(row[step][unit] for step in steps)) / 1e9

    def rate(unit: str, *steps: str) -> float:
        return bytes_gib / statistics.median(seconds(row, unit, *steps) for row in warm)

    def ratio(unit: str) -> float:
        return statistics.median(
            seconds(row, unit, "out", "back") / seconds(row, unit, "sleep", "wake") for row in warm
        )

    metrics = {
        f"sleep_wake_gib_s.{way}": rate("simulated_ns", "sleep", "wake"),
        f"sleep_wake_ratio.{way}": ratio("simulated_ns"),
        f"sleep_wake_cold_gib_s.{way}": bytes_gib / seconds(cold, "simulated_ns", "sleep", "wake"),
        f"sleep_wake_wall_gib_s.{way}": rate("wall_ns", "sleep", "wake"),
        f"sleep_freed_share.{way}": found["freed_bytes"] / found["bytes"],
    }
    if way == "ours":
        metrics["sleep_wake_gib_s.raw_copy"] = rate("simulated_ns", "out", "back")
        metrics["sleep_wake_wall_gib_s.raw_copy"] = rate("wall_ns", "out", "back")
    return {name + suffix: value for name, value in metrics.items()}


def _measure(way: str, size_bytes: int, repeats: int, profile: str) -> dict[str, Any] | str:
    """What the process found, or why it could not run."""
    environment = dict(os.environ)
    if way == "torch_memory_saver":
        if importlib.util.find_spec("torch_memory_saver") is None:
            return "not installed (pip install torch_memory_saver)"
        folder = str(library_path("emulator/libcuda.so.1").parent)
        environment["LD_PRELOAD"] = _preload()
        environment["LD_LIBRARY_PATH"] = f"{folder}:{environment.get('LD_LIBRARY_PATH', '')}"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks._sleep.worker"),
            *(way, str(size_bytes), str(repeats), profile),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["without a word"])[-1]
        if way == "ours":
            raise AssertionError(result.stderr)
        return f"it ended with exit code {result.returncode}: {last}"
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _preload() -> str:
    """Its library goes first, then the emulated driver and runtime that it is linked to."""
    spec = importlib.util.find_spec("torch_memory_saver")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parents[1]
    (library,) = folder.glob("torch_memory_saver_hook_mode_preload_cu13*.so")
    return ":".join(
        str(path)
        for path in (
            library,
            library_path("emulator/libcuda.so.1"),
            library_path("emulator/libcudart.so.13"),
        )
    )

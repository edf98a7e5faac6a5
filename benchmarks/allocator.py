"""The pool beside PyTorch's allocators: utilisation, driver calls, latency, stranding, OOM.

One run, everything on the emulated device. The physical limit of utilisation is 100 %: every byte
held from the driver is one that the program asked for. Latencies are of this machine's processor
and are real; driver calls are counted, and priced with an A100's times.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._allocator import ladder, pairs
from spillover.replay import ALLOCATORS, ReplayOptions, Trace, read_trace, replay
from spillover.replay._trace import TraceBuilder

_TRACES = Path(__file__).parent / "traces"
_OPTIONS = ReplayOptions(vram="80GiB")
_GIB = 1 << 30
#: The quick form replays these.
_QUICK_TRACES = ("transformer_medium_1024_inference", "diffusion_unet")


def run(*, quick: bool) -> dict[str, Any]:
    """Replay the traces, then measure pairs, stranding and the ladder."""
    metrics, replays = _replays(quick=quick)
    metrics.update(_stranding())
    pair_metrics, samples = pairs.measure(quick=quick)
    metrics.update(pair_metrics)
    rung_metrics, rungs = ladder.measure()
    metrics.update(rung_metrics)
    return {
        "metrics": metrics,
        "oom_ladder": rungs,
        "details": {"replays": replays, "pair_ns": samples},
        "notes": [
            "utilisation: requested bytes live at their peak / bytes held at the peak of that",
            "pair_ns: wall-clock time * min(threads, cores) / pairs of all threads; median of "
            "repeats that take turns; default stream, statistics on",
            "pair_ratio: median over repeats of native's time over ours",
            "priced_driver_ms: driver calls at an A100's times for each 2 MiB page; "
            "priced_driver_by_call_ms: once a call (docs/replay.md has the table)",
            "stranding_gib: held after two blocks of 1 GiB lived on each of 32 streams in turn",
            "oom_ladder: 1 where the run came to its end",
        ],
    }


def _replays(*, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    metrics: dict[str, float] = {}
    details = []
    for path in sorted(_TRACES.rglob("*.csv.gz")):
        trace = read_trace(path)
        if quick and trace.name not in _QUICK_TRACES:
            continue
        for allocator in ALLOCATORS:
            found = replay(trace, allocator, _OPTIONS)
            if found.failed_at is not None:
                raise AssertionError(f"{trace.name} failed on {allocator}: {found.error}")
            name = f"{trace.name}.{allocator}"
            metrics[f"utilisation.{name}"] = found.utilisation
            metrics[f"priced_driver_ms.{name}"] = found.priced_ms
            metrics[f"priced_driver_by_call_ms.{name}"] = found.priced_by_call_ms
            row = asdict(found)
            del row["reserved_bytes"]
            details.append(row)
    for allocator in ALLOCATORS:
        values = [metrics[key] for key in metrics if _is_utilisation_of(key, allocator)]
        metrics[f"utilisation_mean.{allocator}"] = sum(values) / len(values)
    return metrics, details


def _is_utilisation_of(metric: str, allocator: str) -> bool:
    return metric.startswith("utilisation.") and metric.endswith(f".{allocator}")


def _stranding() -> dict[str, float]:
    trace = _fresh_streams(32)
    return {
        f"stranding_gib.{allocator}": replay(trace, allocator, _OPTIONS).reserved_end_bytes / _GIB
        for allocator in ALLOCATORS
    }


def _fresh_streams(count: int) -> Trace:
    """Two blocks of 1 GiB allocated and freed on one stream after the other."""
    builder = TraceBuilder("fresh_streams")
    for stream in range(count):
        for block in "ab":
            builder.alloc(block, _GIB, stream=stream, place="")
        for block in "ab":
            builder.free(block, place="")
    return builder.finish()

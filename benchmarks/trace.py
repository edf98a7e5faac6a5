"""What a span costs while nobody records and while somebody does.

One run. The physical limit is the clock: a span cannot do without two questions for the time. The
peer is torch's ``record_function``, with and without its profiler, beside a span of Python's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _harness
from spillover import _core, trace

_THREADS = 4
_EVENTS_MAX = 1 << 18


def run(*, quick: bool) -> dict[str, Any]:
    """Time loops of spans in turns; the medians count."""
    count, repeats = (20_000, 3) if quick else (1_000_000, 15)
    python_count = count // 20
    ways: dict[str, Callable[[], float]] = {
        "clock_pair_ns": lambda: _core._time_clock_pairs(count),
        "span_ns.off": lambda: _core._time_trace_spans(count * 10),
        "span_ns.on": lambda: _recording(lambda: _core._time_trace_spans(count)),
        "span_ns.on_threads": lambda: _recording(lambda: _in_threads(count)),
        "python_span_ns.off": lambda: _loop(trace.span("benchmark"), python_count),
        "python_span_ns.on": lambda: _recording(
            lambda: _loop(trace.span("benchmark"), python_count)
        ),
        "record_function_ns.off": lambda: _record_function(python_count),
        "record_function_ns.on": lambda: _profiled(python_count),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, measure in ways.items():
            samples[name].append(measure())
    metrics = {name: statistics.median(values) for name, values in samples.items()}
    metrics |= _export()
    return {
        "metrics": metrics,
        "details": {name: _harness.spread(values) for name, values in samples.items()},
        "notes": [
            f"medians of {repeats} loops of {count} spans that take turns; one event is 64 bytes",
            f"span_ns.on_threads: {_THREADS} threads that do nothing else on "
            f"{len(os.sched_getaffinity(0))} processors, each span's time in its own thread",
            "record_function_ns: torch's profiler on the CPU, an empty region in the same loop",
            f"export_s: writes {_EVENTS_MAX} events as a file",
        ],
    }


def _recording(measure: Callable[[], float]) -> float:
    trace.start(events_max=_EVENTS_MAX)
    try:
        return measure()
    finally:
        trace.stop()


def _in_threads(count: int) -> float:
    found: list[float] = []
    threads = [
        threading.Thread(target=lambda: found.append(_core._time_trace_spans(count)))
        for _ in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(found)


def _loop(span: Any, count: int) -> float:
    begin_ns = time.monotonic_ns()
    for _ in range(count):
        with span:
            pass
    return (time.monotonic_ns() - begin_ns) / count


def _record_function(count: int) -> float:
    begin_ns = time.monotonic_ns()
    for _ in range(count):
        with torch.profiler.record_function("benchmark"):
            pass
    return (time.monotonic_ns() - begin_ns) / count


def _profiled(count: int) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return _record_function(count)


def _export() -> dict[str, float]:
    """Fills the ring, writes it, and checks that everything is there."""
    trace.start(events_max=_EVENTS_MAX)
    _core._time_trace_spans(_EVENTS_MAX)
    trace.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        begin_ns = time.monotonic_ns()
        trace.save(path)
        took_ns = time.monotonic_ns() - begin_ns
        events = json.loads(path.read_text())["traceEvents"]
        size_bytes = path.stat().st_size
    sizes = [event.get("args", {}).get("bytes", 0) for event in events if event["ph"] == "X"]
    assert sizes == list(range(_EVENTS_MAX)), "the file does not have what was recorded"
    return {"export_s": took_ns / 1e9, "export_bytes_an_event": size_bytes / _EVENTS_MAX}

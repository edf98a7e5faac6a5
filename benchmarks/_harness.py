"""What all benchmarks share: the machine's facts, spread, and how results are shown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn


def machine_facts() -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    model = "unknown"
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "spillover": metadata.version("spillover"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def end_measurement(result: object) -> NoReturn:
    """Print the result of a process that measures as JSON, its last line, and end the process.

    At once: where Python shuts down while one of autograd's threads still frees a Python object,
    the thread is ended inside of a destructor and the process aborts.
    """
    print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)


def print_result(result: dict[str, Any]) -> None:
    """Show the metrics and notes of a result."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", title=f"benchmark: {result['benchmark']}")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    for note in result.get("notes", []):
        console.print(f"- {note}")

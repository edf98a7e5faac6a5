"""Runs cases both ways, each way in one process, and compares what the allocator did."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: What has to be equal both ways, from ``torch.cuda.memory_stats()``.
PEAKS = (
    "allocated_bytes.all.peak",
    "reserved_bytes.all.peak",
    "active_bytes.all.peak",
    "requested_bytes.all.peak",
    "inactive_split_bytes.all.peak",
    "reserved_bytes.all.current",
    "allocated_bytes.all.current",
)
COUNTS = (
    "allocation.all.allocated",
    "allocation.all.freed",
    "allocated_bytes.all.allocated",
    "segment.all.allocated",
    "segment.all.freed",
    "num_alloc_retries",
    "num_ooms",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case, both ways: by name of the statistic, or the error that it ended with."""

    name: str
    computed: dict[str, int] | str
    dry: dict[str, int] | str

    def difference(self, names: Sequence[str]) -> int:
        """The largest difference in these statistics; an error counts as an infinite one."""
        if isinstance(self.computed, str) or isinstance(self.dry, str):
            return sys.maxsize
        return max(abs(self.computed[name] - self.dry[name]) for name in names)


def compare_cases(names: Sequence[str] | None = None) -> list[Comparison]:
    """Run the named cases, or all that the installed packages allow, computed and dry."""
    computed, dry = (_run(way, names) for way in ("computed", "dry"))
    return [
        Comparison(name=name, computed=computed[name], dry=dry.get(name, "was not run"))
        for name in computed
    ]


def _run(way: str, names: Sequence[str] | None) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._dry.compare", way, json.dumps(names)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the {way} process failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _main(way: str, wanted: list[str] | None) -> None:
    import spillover.emulator

    spillover.emulator.enable(vram="16GiB", dry=way == "dry")
    import torch

    from benchmarks._dry import cases

    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    for name, case in cases.all_cases():
        if wanted is not None and name not in wanted:
            continue
        start = time.monotonic()
        try:
            results[name] = cases.measure(case)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.monotonic() - start:.2f} s", file=sys.stderr)
    found = spillover.emulator.hazards()
    if found:
        raise AssertionError("\n".join(found))
    print(json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))

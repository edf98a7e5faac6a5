"""Runs cases both ways, each way in one process, and compares memory and simulated time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A card on which these small models spend their time in launches, and one with a host that costs
#: next to nothing, on which they spend it in kernels and copies.
PROFILE = "h100-pcie"
DEVICE_BOUND_PROFILE = f"rtx3060+{Path(__file__).with_name('instant_host.toml')}"

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

    def schedule_error(self) -> float:
        """The largest relative difference in simulated time: the case's, and each resource's."""
        if isinstance(self.computed, str) or isinstance(self.dry, str):
            return math.inf
        names = {name for name in (*self.computed, *self.dry) if name.endswith("_ns")}
        pairs = [(self.computed.get(name, 0), self.dry.get(name, 0)) for name in names]
        return max(
            (abs(one - other) / max(one, other) for one, other in pairs if one != other),
            default=0.0,
        )


def compare_cases(
    names: Sequence[str] | None = None, *, profile: str = PROFILE
) -> list[Comparison]:
    """Run the named cases, or all that the installed packages allow, computed and dry.

    ``profile`` is the card of the virtual clock; ``""`` leaves the clock off.
    """
    computed, dry = (_run(way, names, profile) for way in ("computed", "dry"))
    return [
        Comparison(name=name, computed=computed[name], dry=dry.get(name, "was not run"))
        for name in computed
    ]


def _run(way: str, names: Sequence[str] | None, profile: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._dry.compare", way, json.dumps(names), profile],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the {way} process failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _main(way: str, wanted: list[str] | None, profile: str) -> None:
    import spillover.emulator

    spillover.emulator.enable(vram="16GiB", dry=way == "dry", profile=profile)
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
    _main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])

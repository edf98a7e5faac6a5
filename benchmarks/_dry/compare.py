"""Runs cases both ways, each way in one process, and compares memory and simulated time."""

from __future__ import annotations

import json
import math
import os
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


#: Cases of the variants below: a sample, since the variants only change who hands out blocks.
_SAMPLE = (
    "gpt amp fp16 with GradScaler",
    "gpt checkpointing",
    "conv net channels-last",
    "generate with a cache",
    "spillover offloaded activations",
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How both processes are set up, and which cases they run (None: all without routers)."""

    environment: tuple[tuple[str, str], ...] = ()
    uses_spillover_allocator: bool = False
    routing: str = ""
    cases: tuple[str, ...] | None = None
    #: Statistics that follow the device's progress, and so need not be equal.
    ignored: tuple[str, ...] = ()


VARIANTS = {
    "default": Variant(),
    "expandable segments": Variant(
        environment=(("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),), cases=_SAMPLE
    ),
    # How it merges free blocks depends on which streams it has found idle.
    "spillover allocator": Variant(
        uses_spillover_allocator=True,
        cases=_SAMPLE,
        ignored=("inactive_split_bytes.all.peak",),
    ),
    "uniform routing": Variant(
        routing="uniform", cases=("mixture of experts", "hugging face mixtral")
    ),
    "routing of 1.5": Variant(routing="1.5", cases=("mixture of experts",)),
    # The router of a model that was not trained does not route evenly: only close.
    "untrained router": Variant(routing="uniform", cases=("hugging face mixtral in a loop",)),
}
#: Variants whose two ways are not expected to be equal.
INEXACT = ("untrained router",)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case, both ways: by name of the statistic, or the error that it ended with."""

    name: str
    variant: str
    computed: dict[str, int] | str
    dry: dict[str, int] | str

    def difference(self, names: Sequence[str]) -> int:
        """The largest difference in these statistics; an error counts as an infinite one."""
        if isinstance(self.computed, str) or isinstance(self.dry, str):
            return sys.maxsize
        ignored = VARIANTS[self.variant].ignored
        return max(
            abs(self.computed[name] - self.dry[name]) for name in names if name not in ignored
        )

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
    names: Sequence[str] | None = None, *, profile: str = PROFILE, variant: str = "default"
) -> list[Comparison]:
    """Run the named cases, or all of the variant that the packages allow, computed and dry.

    ``profile`` is the card of the virtual clock; ``""`` leaves the clock off.
    """
    wanted = VARIANTS[variant].cases if names is None else names
    computed, dry = (_run(way, variant, wanted, profile) for way in ("computed", "dry"))
    return [
        Comparison(
            name=name, variant=variant, computed=computed[name], dry=dry.get(name, "was not run")
        )
        for name in computed
    ]


def _run(way: str, variant: str, names: Sequence[str] | None, profile: str) -> dict[str, Any]:
    arguments = (way, variant, json.dumps(names), profile)
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._dry.compare", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **dict(VARIANTS[variant].environment)},
    )
    if result.returncode != 0:
        raise RuntimeError(f"the {way} process of {variant} failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _main(way: str, variant: str, wanted: list[str] | None, profile: str) -> None:
    import spillover.emulator

    chosen = VARIANTS[variant]
    spillover.emulator.enable(
        vram="16GiB", dry=way == "dry", profile=profile, routing=chosen.routing
    )
    import torch

    if chosen.uses_spillover_allocator:
        import spillover

        spillover.allocator.install()

    from benchmarks._dry import cases

    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    for name, case in cases.all_cases():
        if name not in (cases.UNROUTED if wanted is None else wanted):
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
    _main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])

"""Dry runs: memory and schedule equal to runs that compute, and what a large model's cost here.

Every case of ``benchmarks/_dry/cases.py`` runs twice on the emulated device, computed and dry, and
all of torch's peaks and counts are compared, and simulated time. No peer makes dry runs through the
real allocator.
"""

from __future__ import annotations

from typing import Any

from benchmarks._dry import compare_cases
from benchmarks._dry.compare import (
    COUNTS,
    DEVICE_BOUND_PROFILE,
    INEXACT,
    PEAKS,
    PROFILE,
    VARIANTS,
    Comparison,
)
from benchmarks._dry.large import run_large

#: At least one of each kind of model, for the quick form.
_QUICK = (
    "gpt amp fp16 with GradScaler",
    "gpt checkpointing",
    "gpt save_on_cpu",
    "llama LoRA",
    "conv net channels-last",
    "generate with a cache",
)


def run(*, quick: bool) -> dict[str, Any]:
    """Compare every case both ways, and dry-run 7B fully trained and 70B with LoRA."""
    names = _QUICK if quick else None
    comparisons = compare_cases(names, profile=PROFILE)
    device_bound = compare_cases(names, profile=DEVICE_BOUND_PROFILE)
    close = []
    for variant in () if quick else VARIANTS:
        if variant in INEXACT:
            close += compare_cases(profile="", variant=variant)
        elif variant != "default":
            comparisons += compare_cases(profile="", variant=variant)
    full = run_large("1b" if quick else "7b")
    metrics: dict[str, int | float] = {
        "dry_cases": len(comparisons),
        "dry_peak_error_bytes_max": max(one.difference(PEAKS) for one in comparisons),
        "dry_allocation_count_error_max": max(one.difference(COUNTS) for one in comparisons),
        "dry_schedule_error": max(one.schedule_error() for one in (*comparisons, *device_bound)),
        "dry_7b_seconds": full["seconds"],
        "dry_7b_rss_gib": full["rss_gib"],
        "dry_7b_peak_gib": full["report"]["peak_allocated_bytes"] / 2**30,
    }
    notes = [
        f"{one.name} ({one.variant}): computed {one.computed!r}, dry {one.dry!r}"
        for one in (*comparisons, *device_bound)
        if one.difference((*PEAKS, *COUNTS)) or one.schedule_error()
    ]
    notes.append(
        "dry_schedule_error: the largest relative difference, dry against computed, of a case's "
        "simulated time or of any resource's busy time; with the h100-pcie profile and with one "
        "on which the device is the limit"
    )
    if quick:
        notes.append("quick: dry_7b_* are of a model of 1.1B parameters")
    else:
        metrics["dry_untrained_router_peak_difference_percent"] = max(map(_peak_difference, close))
        adapted = run_large("70b", low_rank=True, checkpoint=True)
        metrics |= {
            "dry_70b_lora_seconds": adapted["seconds"],
            "dry_70b_lora_rss_gib": adapted["rss_gib"],
            "dry_70b_lora_peak_gib": adapted["report"]["peak_allocated_bytes"] / 2**30,
        }
    return {"metrics": metrics, "notes": notes}


def _peak_difference(one: Comparison) -> float:
    """Of the dry run's allocated peak from the computed one's, in percent of this."""
    name = PEAKS[0]
    if isinstance(one.computed, str) or isinstance(one.dry, str):
        raise TypeError(f"{one.name} ({one.variant}): computed {one.computed!r}, dry {one.dry!r}")
    return 100 * abs(one.dry[name] - one.computed[name]) / one.computed[name]

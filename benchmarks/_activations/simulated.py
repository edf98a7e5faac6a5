"""A whole step with activations off the device, simulated: ours, peers, and the bound.

Dry runs under the virtual clock train a Llama shape of 7B. Ours has the card's memory; the plain
run, whose kernels the bound of docs/bounds.md takes its compute from, has a card of the same speed
with room for everything; a peer that does not fit into the card's memory gets that one, too.
"""

from __future__ import annotations

from typing import Any

from benchmarks._dry.simulation import run_module

PROFILES = ("h100-pcie", "rtx4090")
TOKENS = (4096, 16384, 65536)
#: Ours and the peers; ``checkpoint`` recomputes each block.
WAYS = ("ours", "save_on_cpu", "checkpoint")
_EVERYTHING = "1TiB"


def measure(*, quick: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Metrics, details and notes; a way that cannot run is absent, and a note says why."""
    if quick:
        # A small shape, and memory for half of its activations.
        return _measure("quick", {"rtx4090": 300 << 20}, (4096,))
    from spillover.emulator import load_profile

    limits = {name: int(load_profile(name).gpu.memory_gib * 2**30) for name in PROFILES}
    return _measure("7b", limits, TOKENS)


def _measure(
    shape: str, limits: dict[str, int], token_counts: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    metrics: dict[str, Any] = {}
    details: dict[str, Any] = {}
    notes = [
        f"simulated_*: dry runs of a {shape} Llama shape in bfloat16, one sequence, gradients "
        "given up as they appear, scores of 2,048 tokens at a time; over the plain run on a card "
        "with room for everything. over_bound: ours over the bound of docs/bounds.md. Ours has the "
        "card's memory and no budgets",
        "host_pool_hit_rate: of ours' copies out after the first step of each case, how many got "
        "pinned memory without a new cuMemHostRegister",
    ]
    for profile, limit in limits.items():
        for tokens in token_counts:
            case = f"{profile}_{tokens // 1024}k"
            plain = _run("plain", shape, profile, tokens, _EVERYTHING)
            bound = bound_of(plain, profile, limit)
            found = {"plain": plain, "bound": bound}
            for way in WAYS:
                result = _run(way, shape, profile, tokens, str(limit))
                if way != "ours" and "error" in result:
                    result = _run(way, shape, profile, tokens, _EVERYTHING)
                    result["does_not_fit"] = True
                    notes.append(f"{case}: {way} does not fit, and has a card with more memory")
                found[way] = result
                if "error" in result:
                    notes.append(f"simulated_slowdown.{case}.{way}: {result['error']}")
                    continue
                slowdown = result["step_ns"] / plain["step_ns"]
                metrics[f"simulated_slowdown.{case}.{way}"] = slowdown
                if way == "ours":
                    over = result["step_ns"] / bound["bound_ns"]
                    metrics[f"simulated_over_bound.{case}"] = over
            metrics[f"simulated_bound_over_plain.{case}"] = bound["bound_ns"] / plain["step_ns"]
            details[case] = found
    ours = [found["ours"] for found in details.values() if "error" not in found["ours"]]
    copied = sum(result["copied_after_first_step"] for result in ours)
    if copied:
        pinned = sum(result["pinned_after_first_step"] for result in ours)
        metrics["host_pool_hit_rate"] = 1 - pinned / copied
    return metrics, details, notes


def bound_of(plain: dict[str, Any], profile: str, limit_bytes: int) -> dict[str, Any]:
    """The bound of docs/bounds.md for what the plain run computes and saves, and what it is of."""
    from spillover.emulator import load_profile
    from spillover.planner import Rates, activation_bound

    spilled_bytes = max(0, plain["base_bytes"] + plain["saved_bytes"] - limit_bytes)
    bound_ns = activation_bound(
        forward_ns=plain["forward_compute_ns"],
        backward_ns=plain["backward_compute_ns"],
        spilled_bytes=spilled_bytes,
        rates=Rates.of(load_profile(profile)),
    )
    return {
        "bound_ns": bound_ns,
        "forward_ns": plain["forward_compute_ns"],
        "backward_ns": plain["backward_compute_ns"],
        "saved_bytes": plain["saved_bytes"],
        "spilled_bytes": spilled_bytes,
        "limit_bytes": limit_bytes,
    }


def _run(way: str, shape: str, profile: str, tokens: int, vram: str) -> dict[str, Any]:
    # Of the simulated machine: save_on_cpu's copies of 64 thousand tokens and of all weights.
    return run_module(
        "benchmarks._activations.step",
        way,
        shape,
        profile,
        str(tokens),
        vram,
        host_limit="1TiB",
    )

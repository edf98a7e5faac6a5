"""AdamW on the CPU beside torch's fused kernel and DeepSpeed's, and beside the memory's bandwidth;
then whole training steps with the optimizer on the host, simulated on the virtual clock.

One process for all, which take turns on the same memory, with as many threads each as torch has.
The physical limit is an in-place scale of four arrays of the same size. Results are compared with
float64 outside of the time. Whole trainings are compared in ``_optimizer/training.py``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks._harness import spread
from benchmarks._optimizer import equality, memory, simulated

#: Bytes that a step moves for a parameter, and a scale of four arrays for an element of each.
_STEP_BYTES = {"ours_fp32": 28, "ours_mixed": 28, "ours_8bit": 16 + 4 * 4 / 256}
_STREAM_BYTES = 32
_MEMORY_BYTES = {"1b": 7 << 30}


def run(*, quick: bool) -> dict[str, Any]:
    """Measure 64 Mi parameters, and the tensors of Llama 3.2 1B."""
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    notes = [
        "gparam_s: 1e9 parameters a second; mixed: bf16 gradient in, fp32 master and moments, bf16 "
        "weight out, which DeepSpeed does as its fp32 step and a cast before and after; 8bit: the "
        "same with moments in 8 bits",
        "torch_fused: torch._fused_adamw_, which torch.optim.AdamW(fused=True) calls",
        "ratio: peer's time over ours in the same round, median; of fp32 to the peer that is "
        "faster by the median",
        "fraction_of_stream: bytes that ours_fp32 (fraction_of_stream_mixed: ours_mixed) moves a "
        "second over those of an in-place scale of four arrays, by torch or ours, the faster",
    ]
    runs = [("", str(1 << 20) if quick else str(64 << 20), 3 if quick else 15)]
    if not quick:
        reason = _too_little_memory(_MEMORY_BYTES["1b"])
        if reason:
            notes.append(f"no figures for the 1B shape list: {reason}")
        else:
            runs.append(("_1b", "1b", 4))
    for suffix, shapes, rounds in runs:
        found = _measure(shapes, rounds)
        _add(metrics, details, found, suffix)
        notes.append(
            f"{found['count']} parameters in {found['tensors']} tensors, in {found['windows']} "
            f"windows over the same memory, {found['threads']} threads, {rounds} rounds"
        )
        if found["no_deepspeed"]:
            notes.append(f"no figures of DeepSpeed: {found['no_deepspeed']}")
    equal, what = equality.measure(quick=quick)
    metrics.update(equal)
    notes += what
    for part in (memory, simulated):
        found, details[part.__name__.rpartition(".")[2]], what = part.measure(quick=quick)
        metrics.update(found)
        notes += what
    return {"metrics": metrics, "details": details, "notes": notes}


def _add(
    metrics: dict[str, float], details: dict[str, Any], found: dict[str, Any], suffix: str
) -> None:
    seconds: dict[str, list[float]] = found["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    count = found["count"]
    for name, median in medians.items():
        if name.startswith("stream"):
            continue
        metrics[f"gparam_s{suffix}.{name}"] = count / median / 1e9
        details[f"gparam_s{suffix}.{name}"] = spread([count / s / 1e9 for s in seconds[name]])
    stream = min(("stream.torch", "stream.ours"), key=lambda name: medians[name])
    metrics[f"stream_gb_s{suffix}"] = _STREAM_BYTES * count / medians[stream] / 1e9
    details[f"gb_s{suffix}"] = {
        name: spread([_STREAM_BYTES * count / s / 1e9 for s in seconds[name]])
        for name in ("stream.torch", "stream.ours")
    }

    def ratio(ours: str, other: str) -> float:
        rows = zip(seconds[other], seconds[ours], strict=True)
        return statistics.median(theirs / mine for theirs, mine in rows)

    peers = [name for name in ("torch_fused", "deepspeed_fp32") if name in medians]
    best = min(peers, key=lambda name: medians[name])
    metrics[f"ratio{suffix}.fp32_to_best_peer"] = ratio("ours_fp32", best)
    if "deepspeed_mixed" in medians:
        metrics[f"ratio{suffix}.mixed_to_deepspeed"] = ratio("ours_mixed", "deepspeed_mixed")
    for name, metric in (("ours_fp32", ""), ("ours_mixed", "_mixed")):
        fraction = ratio(name, stream) * _STEP_BYTES[name] / _STREAM_BYTES
        metrics[f"fraction_of_stream{metric}{suffix}"] = fraction
    for name, size in _STEP_BYTES.items():
        details[f"gb_s{suffix}"][name] = size * count / medians[name] / 1e9


def _too_little_memory(wanted_bytes: int) -> str:
    from spillover._core import available_host_memory

    available, source = available_host_memory()
    if available >= wanted_bytes:
        return ""
    return f"it needs {wanted_bytes >> 30} GiB, and {available / (1 << 30):.1f} are left ({source})"


def _measure(shapes: str, rounds: int) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks._optimizer.worker", shapes, str(rounds)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))

"""What peers' offloading costs a training step, simulated: a dry Llama shape under the clock.

Every way trains the same bf16 model with AdamW, fused, without clipping (torchao's optimizer has
none), on a card with room for everything, so that only the way differs. Plain training is the
limit: a slowdown is the step's simulated time over that of the plain step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import _harness
from benchmarks._dry.large import SHAPES
from benchmarks._dry.simulation import make_llama, reason_of, run_module

PROFILES = ("h100-pcie", "rtx4090")
#: Plain training, and PyTorch's and torchao's ways of offloading activations, the optimizer, and
#: weights with the optimizer.
WAYS = ("plain", "save_on_cpu", "torchao", "fsdp2_cpu_offload")
_TOKENS = 2048
_STEPS = 3


def measure(*, quick: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Metrics, details and notes; a way that cannot run is absent, and a note says why."""
    shape, profiles = ("quick", PROFILES[:1]) if quick else ("7b", PROFILES)
    metrics: dict[str, Any] = {}
    details: dict[str, Any] = {}
    notes = []
    for profile in profiles:
        found = {way: _run(way, shape, profile) for way in WAYS}
        plain_s = found["plain"]["step_time_s"]
        for way, result in found.items():
            if "error" in result:
                notes.append(f"simulated_slowdown.{profile}.{way}: {reason_of(result)}")
                continue
            metrics[f"simulated_step_ms.{profile}.{way}"] = result["step_time_s"] * 1e3
            if way != "plain":
                metrics[f"simulated_slowdown.{profile}.{way}"] = result["step_time_s"] / plain_s
        details[profile] = found
    return metrics, details, notes


def _run(way: str, shape: str, profile: str) -> dict[str, Any]:
    return run_module("benchmarks._clock.offloading", way, shape, profile)


def _optimizer(way: str, parameters: Iterable[Any]) -> Any:
    import torch

    if way != "torchao":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=1e-4, fused=True)


def _train(way: str, shape: str) -> None:
    import torch
    import torch.nn.functional as F

    from benchmarks._dry import models

    vocabulary = SHAPES[shape][3]
    model = make_llama(shape, torch.bfloat16)
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if way == "save_on_cpu":
        context = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
    shards = way == "fsdp2_cpu_offload"
    with models.sharded_on_the_host(model) if shards else contextlib.nullcontext():
        optimizer = _optimizer(way, model.parameters())
        for _ in range(_STEPS):
            tokens = torch.randint(0, vocabulary, (1, _TOKENS + 1), device="cuda")
            with context():
                scores = model(tokens[:, :-1])
                loss = F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def _main(way: str, shape: str, profile: str) -> None:
    from spillover import emulator

    emulator.enable(dry=True, vram="1TiB", profile=profile)
    _train(way, shape)
    report = emulator.dry_report()
    _harness.end_measurement(
        {
            "step_time_s": report.step_time_s,
            "tokens_per_second": report.tokens_per_second,
            "peak_allocated_bytes": report.peak_allocated_bytes,
            "limits": report.limits,
        }
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])

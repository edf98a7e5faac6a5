"""A whole step with the optimizer on the host, simulated: ours, peers, and the bound.

Dry runs under the virtual clock train a Llama shape of 7B, 4,096 tokens a micro-step, every block
checkpointed, on a card with room for everything, so that only the way differs. The bound is that of
docs/bounds.md: from shapes, the profile's rates, and what the kernels of a plain forward and
backward pass take.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import _harness
from benchmarks._dry.large import SHAPES
from benchmarks._dry.simulation import busy_ns, make_llama, reason_of, run_module

PROFILES = ("h100-pcie", "rtx4090")
ACCUMULATIONS = (1, 8)
#: Without offloading; ours in two forms; peers. ``torchao`` and ``no_offload`` keep weights and
#: moments in bfloat16, without masters, so they move half of the bytes of ours;
#: ``torchao_fp32`` has float32 weights under autocast, as many bytes as ours.
WAYS = ("no_offload", "ours", "ours_8bit", "torchao", "torchao_fp32", "fsdp2_cpu_offload")
#: Bytes that an update reads and writes for a parameter.
UPDATE_BYTES = {"ours": 28, "ours_8bit": 16.0625, "torchao": 14, "torchao_fp32": 28}
_QUICK_WAYS = ("no_offload", "ours", "fsdp2_cpu_offload")
_TOKENS = 4096
_STEPS = 3
_MAX_NORM = 1.0


def measure(*, quick: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Metrics, details and notes; a way that cannot run is absent, and a note says why."""
    if quick:
        return _measure("quick", PROFILES[1:], (2,), _QUICK_WAYS)
    return _measure("7b", PROFILES, ACCUMULATIONS, WAYS)


def _measure(
    shape: str, profiles: tuple[str, ...], accumulations: tuple[int, ...], ways: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    metrics: dict[str, Any] = {}
    details: dict[str, Any] = {}
    notes = []
    for profile in profiles:
        compute = _run("compute", shape, profile, 1)
        for accumulation in accumulations:
            case = f"{profile}_accumulation_{accumulation}"
            found = {way: _run(way, shape, profile, accumulation) for way in ways}
            bound_ms = bound_ns(compute, profile, accumulation) / 1e6
            metrics[f"simulated_bound_ms.{case}"] = bound_ms
            plain_s = found["no_offload"]["step_time_s"]
            for way, result in found.items():
                if "error" in result:
                    notes.append(f"simulated_step_ms.{case}.{way}: {reason_of(result)}")
                    continue
                step_s = result["step_time_s"]
                metrics[f"simulated_step_ms.{case}.{way}"] = step_s * 1e3
                if way != "no_offload":
                    metrics[f"simulated_fraction_of_no_offload.{case}.{way}"] = plain_s / step_s
            ours_ms = found["ours"]["step_time_s"] * 1e3
            metrics[f"simulated_fraction_of_bound.{case}"] = bound_ms / ours_ms
            details[case] = found
    notes.append(
        f"simulated_*: dry runs of a {shape} Llama shape in bfloat16, {_TOKENS} tokens a "
        "micro-step, blocks checkpointed, gradients clipped by their global norm (torchao's cannot "
        "be, and so are not). ours: fp32 masters and moments, 28 bytes a parameter for an update; "
        "ours_8bit: fp32 masters, moments in 8 bits, 16; torchao: bf16 weights and moments, no "
        "masters, 14; torchao_fp32: fp32 weights under autocast, 28; fsdp2_cpu_offload: fp32 "
        "weights, bf16 compute, one process, every micro-step's gradients go to the host"
    )
    return metrics, details, notes


def bound_ns(compute: dict[str, Any], profile: str, accumulation: int) -> int:
    """The bound of docs/bounds.md: fp32 state and masters on the host, with clipping.

    ``compute``: kernels' time of a plain forward and backward pass, and parameters.
    """
    from spillover.emulator import load_profile
    from spillover.planner import MicroStep, Rates, optimizer_bound

    micro_step = MicroStep(forward_ns=compute["forward_ns"], backward_ns=compute["backward_ns"])
    count = compute["parameters"]
    return optimizer_bound(
        micro_steps=[micro_step] * accumulation,
        gradient_bytes=2 * count,
        weight_bytes=2 * count,
        update_bytes=28 * count,
        rates=Rates.of(load_profile(profile)),
        clipping=True,
    )


def _run(way: str, shape: str, profile: str, accumulation: int) -> dict[str, Any]:
    return run_module("benchmarks._optimizer.simulated", way, shape, profile, str(accumulation))


def _optimizer(way: str, model: Any) -> tuple[Any, Callable[..., Any] | None]:
    """The optimizer, and what clips."""
    import torch

    import spillover

    if way.startswith("ours"):
        optimizer: Any = spillover.optim.AdamW(
            model.named_parameters(),
            lr=1e-4,
            moments="blockwise8" if way == "ours_8bit" else "float32",
            offload_gradients=True,
            overlap=model,
        )
        return optimizer, spillover.optim.clip_grad_norm_
    if way.startswith("torchao"):
        from torchao.optim import CPUOffloadOptimizer

        parameters = list(model.parameters())
        return CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=1e-4, fused=True), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return optimizer, torch.nn.utils.clip_grad_norm_


@contextlib.contextmanager
def _prepared(way: str, model: Any) -> Iterator[Any]:
    """Yields what makes the context of a forward."""
    import torch

    from benchmarks._dry import models

    if way == "fsdp2_cpu_offload":
        with models.sharded_on_the_host(model, low_precision=torch.bfloat16):
            yield contextlib.nullcontext
    elif way == "torchao_fp32":
        yield functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    else:
        yield contextlib.nullcontext


def _loss(shape: str, model: Any) -> Any:
    import torch
    import torch.nn.functional as F

    tokens = torch.randint(0, SHAPES[shape][3], (1, _TOKENS + 1), device="cuda")
    scores = model(tokens[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _train(way: str, shape: str, accumulation: int) -> int:
    """What a step takes: from the end of a last backward pass to the next, in nanoseconds.

    Whatever is offloaded, the device has nothing to do then. The first step, which pins memory,
    does not count.
    """
    import torch

    from spillover import emulator

    ends: list[int] = []
    is_wide = way in ("torchao_fp32", "fsdp2_cpu_offload")
    dtype = torch.float32 if is_wide else torch.bfloat16
    model = make_llama(shape, dtype, checkpoint=True)
    with _prepared(way, model) as context:
        optimizer, clip = _optimizer(way, model)
        for _ in range(_STEPS):
            for _ in range(accumulation):
                with context():
                    loss = _loss(shape, model)
                (loss / accumulation).backward()
            torch.cuda.synchronize()
            ends.append(emulator.now_ns())
            if len(ends) == _STEPS:
                break
            if clip is not None:
                clip(model.parameters(), _MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return ends[-1] - ends[-2]


def _compute(shape: str) -> dict[str, Any]:
    """Kernels' time of one forward and one backward pass, nothing offloaded."""
    import torch

    model = make_llama(shape, torch.bfloat16, checkpoint=True)
    times = [busy_ns()]
    for _ in range(2):
        loss = _loss(shape, model)
        times.append(busy_ns())
        loss.backward()
        times.append(busy_ns())
        model.zero_grad()
    count = sum(parameter.numel() for parameter in model.parameters())
    forward_ns, backward_ns = times[3] - times[2], times[4] - times[3]
    return {"forward_ns": forward_ns, "backward_ns": backward_ns, "parameters": count}


def _main(way: str, shape: str, profile: str, accumulation: int) -> None:
    from spillover import emulator

    # A micro-step's gradients are added to what torchao's copies may still read.
    hazards: Any = "count" if way.startswith("torchao") else "raise"
    emulator.enable(dry=True, vram="1TiB", profile=profile, hazards=hazards)
    if way == "compute":
        _harness.end_measurement(_compute(shape))
    step_ns = _train(way, shape, accumulation)
    report = emulator.dry_report()
    clock = emulator.clock_report()
    _harness.end_measurement(
        {
            "step_time_s": step_ns / 1e9,
            "peak_allocated_bytes": report.peak_allocated_bytes,
            "limits": report.limits,
            "busy_s_a_step": {
                use.name: use.busy_ns / 1e9 / _STEPS for use in clock.resources if use.busy_ns
            },
        }
    )


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

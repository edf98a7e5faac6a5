"""How much of the activations' peak is left: a GPT that computes, its gradients compared.

In a process of its own, on the machine's device where there is one, else on an emulated one. All
ways train the same model in turns with torch's allocator. The peak is of device memory above what a
step begins with: weights, gradients and inputs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from typing import Any

from benchmarks import _harness
from benchmarks._dry.simulation import run_module

WAYS = ("ours_host", "ours_disk", "save_on_cpu", "torchtune_style")
#: Rows, positions, width and blocks.
_SHAPE, _QUICK_SHAPE = (8, 256, 256, 8), (4, 128, 192, 4)
_VOCABULARY, _HEADS = 1000, 4
_WARM_UP_STEPS = 2


def measure(*, quick: bool) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Metrics, details and notes."""
    shape = _QUICK_SHAPE if quick else _SHAPE
    found = run_module(__name__, json.dumps(shape))
    assert "error" not in found, found["error"]
    plain = found["plain"]
    metrics = {f"peak_fraction.{way}": found[way]["bytes"] / plain["bytes"] for way in WAYS}
    metrics |= {f"peak_step_ms.{way}": result["step_ms"] for way, result in found.items()}
    rows, positions, width, blocks = shape
    note = (
        "peak_fraction: peak of device memory above weights, gradients and inputs, over that of "
        f"the plain run ({plain['bytes'] / 2**20:.0f} MiB), of a GPT with {blocks} blocks of width "
        f"{width} and {rows} rows of {positions} tokens in float32; peak_step_ms: what its step "
        "takes, simulated on rtx4090 where the device is emulated. Gradients of all ways are "
        "bitwise those of the plain run. ours: nothing kept on the device nor brought ahead, a "
        "quarter of the largest tensor's bytes in flight; torchtune_style: its OffloadActivations, "
        "by its behaviour"
    )
    return metrics, found, [note]


def _make_context(way: str, largest_bytes: int, folder: str) -> Any:
    import torch

    import spillover
    from benchmarks._activations.torchtune_style import OffloadActivations

    if way == "plain":
        return contextlib.nullcontext()
    if way == "save_on_cpu":
        return torch.autograd.graph.save_on_cpu(pin_memory=True)
    if way == "torchtune_style":
        return OffloadActivations()
    tier: dict[str, Any] = {"tier": "host"}
    if way == "ours_disk":
        tier = {"tier": "disk", "directory": folder}
    return spillover.offload_activations(
        **tier, keep_on_device=0, in_flight_max=largest_bytes // 4, prefetch=0
    )


def _main(shape: tuple[int, int, int, int]) -> None:
    from spillover import _core, emulator

    if not _core.driver_available():
        emulator.enable(profile="rtx4090", poison=False)
    import torch
    import torch.nn.functional as F

    from benchmarks._dry.models import LanguageModel

    rows, positions, width, blocks = shape
    torch.manual_seed(0)
    model = LanguageModel(vocabulary=_VOCABULARY, width=width, heads=_HEADS, layers=blocks).cuda()
    tokens = torch.randint(0, _VOCABULARY, (rows, positions + 1)).cuda()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    largest_bytes = rows * positions * 4 * max(4 * width, _VOCABULARY)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    results: dict[str, Any] = {}
    expected: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ("plain", *WAYS):
            context = _make_context(way, largest_bytes, folder)
            for _ in range(_WARM_UP_STEPS + 1):
                model.zero_grad(set_to_none=False)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                with context:
                    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets)
                loss.backward()
                end.record()
                del loss
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - base
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            if way == "plain":
                expected = [gradient.cpu() for gradient in gradients]
            for gradient, wanted in zip(gradients, expected, strict=True):
                assert torch.equal(gradient.cpu(), wanted), f"{way}: a gradient differs"
            del context, gradients
            results[way] = {"bytes": peak, "step_ms": start.elapsed_time(end)}
    _harness.end_measurement(results)


if __name__ == "__main__":
    _main(tuple(json.loads(sys.argv[1])))

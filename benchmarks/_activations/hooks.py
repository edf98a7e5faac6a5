"""What the hooks cost the processor: saving many small tensors and getting them back.

In a process of its own, on the machine's device where there is one, else on an emulated one. Each
round saves new tensors in one autograd function, and its backward reads all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import _harness
from benchmarks._dry.simulation import run_module

_TENSORS = 256
_TENSOR_BYTES = (4 << 10, 16 << 10, 64 << 10)
_PEERS = ("save_on_cpu_pinned", "save_on_cpu_pageable")


def measure(*, quick: bool) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Metrics, details and notes."""
    seconds: dict[str, list[float]] = run_module(__name__, "3" if quick else "15")
    assert "error" not in seconds, seconds
    micros = {name: [1e6 * s / _TENSORS for s in values] for name, values in seconds.items()}
    peer = min(_PEERS, key=lambda name: statistics.median(micros[name]))
    metrics = {
        "hook_us_per_tensor.ours": statistics.median(micros["ours"]),
        "hook_us_per_tensor.save_on_cpu": statistics.median(micros[peer]),
        "hook_ratio": statistics.median(
            mine / theirs for mine, theirs in zip(micros["ours"], micros[peer], strict=True)
        ),
    }
    details = {name: _harness.spread(values) for name, values in micros.items()}
    return (
        metrics,
        details,
        [
            f"hook_us_per_tensor: processor time of saving {_TENSORS} tensors of 4, 16 and 64 KiB "
            "and getting them back, median of rounds in turns; save_on_cpu is the faster of pinned "
            f"and pageable memory (here {peer}); hook_ratio: ours over it in the same round"
        ],
    )


def _main(rounds: int) -> None:
    from spillover import _core, emulator

    if not _core.driver_available():
        emulator.enable(vram="1GiB", schedule="eager", poison=False, hazards="off")
    import torch

    import spillover

    class _Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
            ctx.save_for_backward(*tensors)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            came_back.append(ctx.saved_tensors)
            return gradient, None

    came_back: list[tuple[torch.Tensor, ...]] = []
    offloaded = spillover.offload_activations(min_bytes=0, keep_on_device=0)
    contexts: dict[str, Callable[[], Any]] = {
        "ours": lambda: offloaded,
        "save_on_cpu_pinned": lambda: torch.autograd.graph.save_on_cpu(pin_memory=True),
        "save_on_cpu_pageable": torch.autograd.graph.save_on_cpu,
    }
    x = torch.ones(1, device="cuda", requires_grad=True)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    names = list(contexts)
    for number in range(-2, rounds):  # Memory is pinned in the first ones.
        for name in names[number % 3 :] + names[: number % 3]:
            tensors = [
                torch.full((_TENSOR_BYTES[i % 3] // 4,), float(i), device="cuda")
                for i in range(_TENSORS)
            ]
            torch.cuda.synchronize()
            begin = time.process_time()
            with contexts[name]():
                y = _Saves.apply(x, tensors)
            saved_s = time.process_time() - begin
            torch.cuda.synchronize()
            wanted = [tensor[0].item() for tensor in tensors]
            del tensors
            begin = time.process_time()
            y.backward()
            total_s = saved_s + time.process_time() - begin
            torch.cuda.synchronize()
            assert [tensor[-1].item() for tensor in came_back.pop()] == wanted
            if number >= 0:
                seconds[name].append(total_s)
    _harness.end_measurement(seconds)


if __name__ == "__main__":
    _main(int(sys.argv[1]))

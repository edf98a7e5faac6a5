"""Host memory, the CPU optimizer and the cost of an operator, measured with torch on the CPU."""

from __future__ import annotations

import os

from spillover.bench._timing import fastest_seconds

#: Bytes that AdamW on fp32 moves a parameter: parameter, both moments twice, the gradient once.
_ADAMW_BYTES = 28


def measure(*, size_bytes: int, rounds: int) -> dict[str, float]:
    """Numbers of a ``[host]`` table."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bandwidth_gb_s": memory_bandwidth(size_bytes=size_bytes, rounds=rounds),
        "optimizer_bandwidth_gb_s": optimizer_bandwidth(size_bytes=size_bytes, rounds=rounds),
    }


def memory_bandwidth(*, size_bytes: int, rounds: int) -> float:
    """GB/s of ``c = a + b`` over arrays of ``size_bytes`` together, on all of torch's threads."""
    import torch

    count = size_bytes // 12
    a, b, c = (torch.ones(count) for _ in range(3))
    seconds = fastest_seconds(lambda: torch.add(a, b, out=c), rounds=rounds)
    return 12 * count / seconds / 1e9


def optimizer_bandwidth(*, size_bytes: int, rounds: int) -> float:
    """GB/s of torch's fused AdamW on the CPU."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(size_bytes // 16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    seconds = fastest_seconds(optimizer.step, rounds=rounds)
    return _ADAMW_BYTES * parameter.numel() / seconds / 1e9

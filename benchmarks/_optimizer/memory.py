"""How many bytes a parameter takes off the device, by mode, beside the documentation's arithmetic.

In a process of its own, on the machine's device where there is one, else on an emulated one. Each
mode makes AdamW over the tensors of one Llama layer and its embedding, and a step; then device
memory must be what it was, and pinned memory what the optimizer says.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

from benchmarks import _harness
from benchmarks._dry.simulation import run_module

TIERS = ("device", "host", "disk")
#: Pinned memory that a tensor's arrays may take beyond their bytes: a page for each of three.
_SLACK_BYTES = 3 * 4096


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to keep AdamW's state, with the bytes a parameter of docs/optimizer.md."""

    host: float = 0.0
    disk: float = 0.0
    dtype: str = "bfloat16"
    device: str = "cuda"
    options: dict[str, Any] = field(default_factory=dict)


# Two moments of 4, 2 or 1 + 4/256 bytes; a master of 4, or 2 where the weight is on the host; on
# disk twice that and twice the weight.
_CODES = 1 + 4 / 256
MODES = {
    "fp32": Mode(host=8, dtype="float32"),
    "mixed": Mode(host=12),
    "mixed_bf16_moments": Mode(host=8, options={"moments": "bfloat16"}),
    "mixed_8bit": Mode(host=2 * _CODES + 4, options={"moments": "blockwise8"}),
    "split": Mode(host=10, device="cpu", options={"master": "split"}),
    "disk_mixed": Mode(disk=2 * 12 + 2 * 2, options={"tier": "disk"}),
    "disk_8bit": Mode(
        disk=2 * (2 * _CODES + 4) + 2 * 2, options={"tier": "disk", "moments": "blockwise8"}
    ),
    "auto_mixed": Mode(host=12, disk=2 * 12 + 2 * 2, options={"tier": "auto"}),
}


def measure(*, quick: bool) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Metrics, details and notes."""
    found = run_module(__name__, "256" if quick else "1024")
    assert "error" not in found, found
    metrics: dict[str, float] = {}
    errors = []
    for name, mode in MODES.items():
        expected = {"device": 0.0, "host": mode.host, "disk": mode.disk}
        for tier in TIERS:
            value = metrics[f"bytes_per_parameter.{tier}.{name}"] = found[name][tier]
            errors.append(abs(value - expected[tier]) / max(1.0, expected[tier]))
    metrics["bytes_per_parameter_error"] = max(errors)
    return (
        metrics,
        {"bytes_per_parameter": found},
        [
            "bytes_per_parameter: AdamW's state between two steps, by tier and mode, over the "
            "tensors of a Llama layer and its embedding; bytes_per_parameter_error: the largest "
            "relative difference from the arithmetic of docs/optimizer.md (alignment)"
        ],
    )


def _shapes(width: int) -> list[tuple[int, ...]]:
    inner, keys = 4 * width, width // 4
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    return [
        (16 * width, width),
        *attention,
        (inner, width),
        (inner, width),
        (width, inner),
        (width,),
        (width,),
    ]


def _measure(mode: Mode, width: int) -> dict[str, float]:
    import torch

    import spillover
    from spillover.optim import AdamW

    weights = [
        torch.nn.Parameter(torch.ones(s, dtype=getattr(torch, mode.dtype), device=mode.device))
        for s in _shapes(width)
    ]
    before = torch.cuda.memory_allocated()
    pool = spillover.HostPool()
    with tempfile.TemporaryDirectory() as folder:
        options = dict(mode.options)
        if "tier" in options:
            options["directory"] = folder
        optimizer = AdamW(weights, pool=pool, **options)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        stats = optimizer.stats()
        count = sum(weight.numel() for weight in weights)
        found = dict(stats.bytes_per_parameter)
        # What is claimed is what is there.
        assert stats.elements == count
        found["device"] = (torch.cuda.memory_allocated() - before) / count
        if "tier" not in options:
            used_bytes = pool.stats().used_bytes
            assert 0 <= used_bytes - found["host"] * count <= _SLACK_BYTES * len(weights)
        del optimizer
        gc.collect()
    return found


def _main(width: int) -> None:
    from spillover import _core, emulator

    if not _core.driver_available():
        emulator.enable(vram="1GiB", schedule="eager", poison=False, hazards="off")
    _harness.end_measurement({name: _measure(mode, width) for name, mode in MODES.items()})


if __name__ == "__main__":
    _main(int(sys.argv[1]))

"""How the tests of activation offloading make a context, read it and compare with the plain run."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activation_models import assert_same

from spillover import offload_activations
from spillover.hooks import OffloadedActivations, _saved_transfers

#: Budgets that make every byte leave, wait for room, and come back on demand or shortly before.
TIGHT = {"in_flight_max": "16KiB", "prefetch": "16KiB"}

_OLDER_NAMES = {"in_flight_max": "inflight", "host_budget": "host"}

Context = contextlib.AbstractContextManager[Any]


def offloading(**options: Any) -> OffloadedActivations:
    """A context in which every saved tensor of whatever size moves, but for what options say."""
    wanted = {"min_bytes": 1, "keep_on_device": 0, **options}
    known = inspect.signature(offload_activations).parameters
    named = {
        name if name in known else _OLDER_NAMES.get(name, name): value
        for name, value in wanted.items()
    }
    return offload_activations(**{name: value for name, value in named.items() if name in known})


def on_disk(folder: str | Path) -> dict[str, Any]:
    """Options of the disk tier."""
    return {"tier": "disk", "directory": folder}


def offloaded_bytes(context: OffloadedActivations) -> int:
    """Copied off the device since the context was made."""
    return context.stats.host_bytes + context.stats.disk_bytes


def offloaded_tensors(context: OffloadedActivations) -> int:
    """Saved tensors that left, those that shared a copy included."""
    return context.stats.tensors


def check_equal(
    run: Callable[[Context], list[torch.Tensor]], *, steps: int = 1, **options: Any
) -> OffloadedActivations:
    """``run`` gives the same bits with offloading as without, at each step; and bytes did move."""
    expected = run(contextlib.nullcontext())
    context = offloading(**options)
    for _ in range(steps):
        assert_same(run(context), expected)
    assert offloaded_bytes(context) > 0
    return context


def on_host(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Copies on the CPU of those that are not None."""
    return [tensor.detach().cpu() for tensor in tensors if tensor is not None]


def settle() -> None:
    """Have nothing under way, and nothing held by what is garbage."""
    torch.cuda.synchronize()
    gc.collect()
    _saved_transfers.settle()

"""How the tests of activation offloading make a context, read it and compare with the plain run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activation_models import assert_same

from spillover import HostPool, offload_activations
from spillover.hooks import OffloadedActivations, _activations
from spillover.hooks._activation_device import ActivationDevice

#: Budgets that make every byte leave, wait for room, and come back on demand or shortly before.
TIGHT = {"in_flight_max": "16KiB", "prefetch": "16KiB"}

Context = contextlib.AbstractContextManager[Any]


def offloading(**options: Any) -> OffloadedActivations:
    """A context in which every saved tensor of whatever size moves, but for what options say."""
    return offload_activations(**{"min_bytes": 1, "keep_on_device": 0, **options})


def on_disk(folder: str | Path) -> dict[str, Any]:
    """Options of the disk tier, with so little memory for the passage that the disk is used."""
    return {"tier": "disk", "directory": folder, "pool": HostPool("256KiB")}


def offloaded_bytes(context: OffloadedActivations) -> int:
    """Copied off the device since the context was made."""
    return context.stats().offloaded_bytes


def offloaded_tensors(context: OffloadedActivations) -> int:
    """Saved tensors that left, those that shared a copy included."""
    return context.stats().tensors


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


def reloaded_tensors(context: OffloadedActivations) -> int:
    """Copies that backward asked for after they had left."""
    stats = context.stats()
    return stats.prefetch_hits + stats.prefetch_misses


def living_devices() -> list[ActivationDevice]:
    """What every engine of the process has for each device."""
    engines = list(_activations._engines._live.values())
    return [device for engine in engines for device in engine.devices()]


def leaving_bytes() -> int:
    """Device memory that copies out hold, or are about to."""
    return sum(
        device.departures.pending_bytes + device.engine.stats().leaving_bytes
        for device in living_devices()
    )


def settle() -> None:
    """Have nothing under way, and nothing held by what is garbage."""
    torch.cuda.synchronize()
    gc.collect()
    for device in living_devices():
        device.departures.finish()
        device.engine.synchronize()


def device_of(context: OffloadedActivations) -> ActivationDevice:
    """The only device of which the context saved anything."""
    assert context._engine is not None
    (device,) = context._engine.devices()
    return device


def pack(context: OffloadedActivations, tensor: torch.Tensor) -> Any:
    """As autograd saves ``tensor`` in the context."""
    assert context._engine is not None
    return context._engine.pack(context._counters, tensor)


def assert_nothing_is_counted(device: ActivationDevice) -> None:
    """Where all graphs are gone."""
    gc.collect()
    settle()
    account = device.account
    account.remove_ended()
    assert account.waiting_bytes == account.kept_bytes == device.departures.leaving_bytes == 0

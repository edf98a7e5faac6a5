"""Activations many times larger than the device, and than the host's budget, spill to disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import Context, offloaded_bytes, offloading, on_host
from activation_models import assert_same, gradients, make_mlp
from test_activations_memory import MIB, memory_limit

from spillover._core import HostPool

DEVICE_BYTES = 24 * MIB
HOST_BYTES = 16 * MIB


@pytest.fixture
def model_and_input() -> tuple[torch.nn.Module, torch.Tensor]:
    """Saves two tensors of 2 MiB a layer: eight times what the device may take."""
    return make_mlp(depth=48), torch.randn(8 << 10, 64, device="cuda")


def train_step(model: torch.nn.Module, x: torch.Tensor, *contexts: Context) -> list[torch.Tensor]:
    """Makes a step of SGD; the gradients, and the weights after it."""
    model.zero_grad()
    found = gradients(model, x, *contexts)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found + on_host(*model.parameters())


@pytest.mark.soak
@pytest.mark.parametrize("tier", ["disk", "auto"])
def test_activations_of_eight_times_the_device(
    tier: str, tmp_path: Path, model_and_input: Any
) -> None:
    model, x = model_and_input
    twin = copy.deepcopy(model)
    expected = [train_step(twin, x) for _ in range(2)]
    pool = HostPool(limit_bytes=HOST_BYTES)
    options = {"tier": tier, "directory": tmp_path, "pool": pool}
    options |= {"in_flight_max": 4 * MIB, "prefetch": 4 * MIB}
    with memory_limit(DEVICE_BYTES):
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, x)
        context = offloading(**options)
        for each in expected:
            assert_same(train_step(model, x, context), each)
    assert offloaded_bytes(context) >= 2 * 8 * DEVICE_BYTES
    assert context.stats().disk_bytes_written > 8 * HOST_BYTES
    assert pool.stats().reserved_bytes_max <= HOST_BYTES
    assert list(tmp_path.iterdir()) == []

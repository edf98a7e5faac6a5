"""Activation offload where memory is short: nothing is lost, and what can be is given back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_models import SMALL, assert_same, gradients, make_mlp

from spillover import offload_activations
from spillover._core import HostPool
from spillover.hooks import _activations, _saved_transfers

MIB = 1 << 20


@contextlib.contextmanager
def memory_limit(free_bytes: int) -> Iterator[None]:
    """Let torch's allocator take this much more than what is in use."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + free_bytes
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def leaving_bytes() -> int:
    with _saved_transfers.lock:
        return _saved_transfers.transfers.leaving_bytes


def test_looking_ahead_does_not_run_backward_out_of_memory(
    run_emulated: Callable[..., object],
) -> None:
    """In a process of its own: what other tests left in torch's cache changes what fits."""
    run_emulated(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from activation_models import assert_same, gradients, make_mlp
from test_activations_memory import MIB, memory_limit
from spillover import offload_activations

model = make_mlp(depth=24)
x = torch.randn(8 << 10, 64, device="cuda")
expected = gradients(model, x)
before = torch.cuda.memory_stats()["num_ooms"]
with memory_limit(40 * MIB):
    context = offload_activations(min_bytes=1, inflight=1, prefetch="1GiB")
    assert_same(gradients(model, x, context), expected)
assert torch.cuda.memory_stats()["num_ooms"] > before
assert context.stats.reloads > 12
""",
        vram="2GiB",
    )


def test_a_small_prefetch_brings_one_tensor_ahead() -> None:
    model = make_mlp(depth=10)
    x = torch.randn(96, 64, device="cuda")
    context = offload_activations(min_bytes=1, inflight=1, prefetch=1)
    gradients(model, x, context)
    assert context.stats.reloads > 15
    assert context.stats.reloads_late <= 3


def test_default_budgets_follow_the_device() -> None:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory

    def budgets(**options: Any) -> tuple[int, int]:
        engine = offload_activations(**options)._engine
        assert engine is not None
        budget = engine._budget(device)
        return budget.prefetch_bytes, budget.inflight_bytes

    assert budgets() == (min(128 * MIB, total // 16), min(256 * MIB, total // 16))
    assert budgets(prefetch=5, inflight="3KiB") == (5, 3072)
    torch.cuda.set_per_process_memory_fraction(0.125)
    try:
        assert budgets() == (min(128 * MIB, total // 128), min(256 * MIB, total // 128))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_running_out_of_memory_in_forward_can_be_tried_again() -> None:
    model = make_mlp(depth=16)
    x = torch.randn(16 << 10, 64, device="cuda")
    half = torch.randn(2 << 10, 64, device="cuda")
    expected = gradients(model, half)
    context = offload_activations(min_bytes=1, inflight="1GiB")
    for _ in range(2):
        model.zero_grad()
        with memory_limit(30 * MIB):
            start = torch.cuda.memory_allocated()
            with pytest.raises(torch.OutOfMemoryError), context:
                model(x * 1)
            assert leaving_bytes() == 0
            gc.collect()
            assert torch.cuda.memory_allocated() <= start + MIB
            assert_same(gradients(model, half, context), expected)


@pytest.mark.parametrize("moment", ["enter", "exit", "backward"])
def test_what_has_left_is_given_back(moment: str) -> None:
    context = offload_activations(min_bytes=1)
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    if moment == "backward":
        # After the last saved tensor was asked for.
        x.register_hook(lambda gradient: torch.cuda.synchronize())
    with context:
        value = (x * 1).exp().sum()
        if moment == "exit":
            torch.cuda.synchronize()
        assert leaving_bytes() > 0
    if moment == "enter":
        torch.cuda.synchronize()
        with context:
            assert leaving_bytes() == 0
    if moment == "backward":
        value.backward()
    assert leaving_bytes() == 0


def test_contexts_with_ever_other_budgets_leave_no_pools_behind(tmp_path: Path) -> None:
    from spillover import emulator

    if not emulator.is_enabled():
        pytest.skip("counts the emulated device's resources")
    model = make_mlp(depth=2)
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(model, x)
    caches = (_activations._pools, _activations._stores)
    before = [len(cache._live) for cache in caches]
    counts = []
    for index in range(6):
        host = offload_activations(**SMALL, host=(8 << 20) + index)
        assert_same(gradients(model, x, host), expected)
        del host
        disk = {"tier": "disk", "directory": tmp_path / str(index)}
        assert_same(gradients(model, x, offload_activations(**SMALL, **disk)), expected)
        _saved_transfers.settle()
        gc.collect()
        counts.append(emulator.live().pinned_bytes)
    assert counts[-1] <= counts[3]
    assert all(len(cache._live) <= held + 2 for cache, held in zip(caches, before, strict=True))


def test_equal_budgets_share_a_pool_also_after_others() -> None:
    model = make_mlp(depth=2)
    x = torch.randn(96, 64, device="cuda")
    held = offload_activations(**SMALL, host="9MiB")
    gradients(model, x, held)
    for index in range(4):
        gradients(model, x, offload_activations(**SMALL, host=(10 << 20) + index))
    assert held._engine is not None
    twin = offload_activations(**SMALL, host="9MiB")
    assert twin._engine is not None
    assert twin._engine._pool_source() is held._engine._pool_source()
    own = HostPool(limit_bytes=9 << 20)
    other = offload_activations(host=own)
    assert other._engine is not None
    assert other._engine._pool_source() is own

"""Activation offload where memory is short: nothing is lost, and what can be is given back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from activation_contexts import leaving_bytes, offloading, on_disk, reloaded_tensors, settle
from activation_models import SMALL, assert_same, gradients, make_mlp

import spillover
from spillover import offload_activations
from spillover._core import HostPool
from spillover.hooks import _activation_order, _activations
from spillover.hooks._activation_budget import DeviceBudget

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


def test_looking_ahead_does_not_run_backward_out_of_memory(
    run_emulated: Callable[..., object],
) -> None:
    """In a process of its own: what other tests left in torch's cache changes what fits."""
    run_emulated(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from activation_contexts import offloading, reloaded_tensors
from activation_models import assert_same, gradients, make_mlp
from test_activations_memory import MIB, memory_limit

model = make_mlp(depth=24)
x = torch.randn(8 << 10, 64, device="cuda")
expected = gradients(model, x)
before = torch.cuda.memory_stats()["num_ooms"]
with memory_limit(40 * MIB):
    context = offloading(in_flight_max=1, prefetch="1GiB")
    assert_same(gradients(model, x, context), expected)
assert torch.cuda.memory_stats()["num_ooms"] > before
assert reloaded_tensors(context) > 12
""",
        vram="2GiB",
    )


def test_a_small_prefetch_brings_one_tensor_ahead() -> None:
    model = make_mlp(depth=10)
    x = torch.randn(96, 64, device="cuda")
    context = offloading(in_flight_max=1, prefetch=1)
    gradients(model, x, context)
    assert reloaded_tensors(context) > 15
    assert context.stats().prefetch_misses <= 3


def test_back_pressure_keeps_a_byte_budget() -> None:
    model, x = make_mlp(depth=12), torch.randn(96, 64, device="cuda", requires_grad=True)
    limit = 8 * x.nbytes

    def waits() -> int:
        stalls = spillover.stats().stalls
        return sum(each.count for each in stalls if each.what == "copies out (in_flight_max=)")

    context = offloading(timeline=True, in_flight_max=limit, prefetch=0)
    before = waits()
    gradients(model, x, context)
    assert context._engine is not None
    (device,) = context._engine.devices()
    assert device.timeline is not None
    most = max(point.leaving_bytes for point in device.timeline.last_rounds(1))
    # What waits to be sent together comes on top.
    assert limit - x.nbytes <= most <= limit + limit // 4
    assert waits() > before
    stats = context.stats()
    assert stats.offloaded_bytes > 2 * limit
    assert stats.stall_seconds.keys() == {"copy", "disk", "host_budget"}
    assert stats.stall_seconds["copy"] > 0


def test_default_budgets_follow_the_device() -> None:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory

    def budgets(in_flight: int | None = None, prefetch: int | None = None) -> tuple[int, int]:
        budget = DeviceBudget(device, keep=0, in_flight=in_flight, prefetch=prefetch)
        return budget.room_in_backward(0, 0, 0, 0, None)(0), -budget.excess_in_forward(0, 0, 0)

    assert budgets() == (min(128 * MIB, total // 16), min(256 * MIB, total // 16))
    assert budgets(prefetch=5, in_flight=3072) == (5, 3072)
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
    context = offloading(in_flight_max="1GiB")
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
    context = offloading()
    x = torch.randn(512, 256, device="cuda", requires_grad=True)  # Not sent with others.
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
    caches = (_activations._engines, _activations._stores)
    before = [len(cache._live) for cache in caches]
    counts = []
    for index in range(6):
        host = offload_activations(**SMALL, host_budget=(8 << 20) + index)
        assert_same(gradients(model, x, host), expected)
        del host
        disk = on_disk(tmp_path / str(index))
        assert_same(gradients(model, x, offload_activations(**SMALL, **disk)), expected)
        settle()
        gc.collect()
        counts.append(emulator.live().pinned_bytes)
    assert counts[-1] <= counts[3]
    assert all(len(cache._live) <= held + 2 for cache, held in zip(caches, before, strict=True))


def test_equal_options_share_what_they_learn() -> None:
    model = make_mlp(depth=2)
    x = torch.randn(96, 64, device="cuda")
    held = offload_activations(**SMALL, host_budget="9MiB")
    gradients(model, x, held)
    for index in range(4):
        gradients(model, x, offload_activations(**SMALL, host_budget=(10 << 20) + index))
    assert offload_activations(**SMALL, host_budget="9MiB")._engine is held._engine
    own = HostPool(limit_bytes=9 << 20)
    other = offload_activations(**SMALL, pool=own)
    gradients(model, x, other)
    assert own.stats().used_bytes_max > 0
    assert other._engine is not held._engine


def test_one_tensor_that_stays_does_not_keep_a_round_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_activation_order, "_VIEWS_MANY", 64)
    x = torch.rand(4096, device="cuda", requires_grad=True)
    with offloading() as context:
        graph_of_first = x.exp().sum()
        for _ in range(200):
            x.exp().sin().sum().backward()
    assert context._engine is not None
    (device,) = context._engine.devices()
    assert len(device._round.views) <= 256
    x.grad = None
    graph_of_first.backward()
    assert torch.equal(x.grad, x.detach().exp())

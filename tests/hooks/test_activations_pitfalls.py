"""What others' offloading of activations got wrong; each test is named after the pitfall."""

from __future__ import annotations

import contextlib
import gc
import re
from typing import Any

import pytest
import torch
from activation_contexts import (
    TIGHT,
    Context,
    check_equal,
    offloaded_bytes,
    offloading,
    on_host,
    settle,
)
from activation_models import assert_same, gradients, make_gpt, make_mlp
from torch import nn
from torch.nn import functional

from spillover import emulator
from spillover._core import HostPool

KIB = 1 << 10


def make_inputs(rows: int = 96) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(rows, 64, device="cuda")


# ---- streams ----


@pytest.mark.parametrize("more", [{}, TIGHT], ids=["ample", "tight"])
def test_current_stream_inside_a_with_block(more: dict[str, Any]) -> None:
    """The compute stream is that of each operation, not the one of the context's start."""
    layers = make_mlp(depth=3)
    inputs, side = make_inputs(), torch.cuda.Stream()
    held: list[torch.Tensor] = []  # What a stream uses that did not allocate it.

    def run(context: Context) -> list[torch.Tensor]:
        layers.zero_grad()
        x = inputs.clone().requires_grad_()
        main = torch.cuda.current_stream()
        with context:
            first = layers[:2](x * 1)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                second = layers[2:4](first)
                third = second * first
            main.wait_stream(side)
            value = layers[4:](third + second).square().mean()
        held.extend((first, second, third))
        value.backward()
        torch.cuda.synchronize()
        held.clear()
        return on_host(value, x.grad, *(p.grad for p in layers.parameters()))

    check_equal(run, steps=2, **more)


def test_a_stream_cached_at_construction() -> None:
    model, inputs = make_mlp(), make_inputs()
    expected = gradients(model, inputs)
    made_on, used_on = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(made_on):
        context = offloading(**TIGHT)
    for stream in (used_on, made_on, torch.cuda.default_stream()):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found = gradients(model, inputs, context)
        torch.cuda.synchronize()
        assert_same(found, expected)


def test_record_stream_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays behind for an unknown time: memory is the same after each step."""
    model, inputs = make_mlp(depth=6), make_inputs()

    def refuse(*arguments: object) -> None:
        raise AssertionError("record_stream was called")

    monkeypatch.setattr(torch.Tensor, "record_stream", refuse)
    context = offloading(**TIGHT)
    held = []
    for _ in range(4):
        gradients(model, inputs, context)
        settle()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3]


def test_a_reload_waits_for_its_own_copy_out() -> None:
    """Backward starts at once, while everything is still on its way out."""

    def run(context: Context) -> list[torch.Tensor]:
        x = make_inputs().requires_grad_()
        with context:
            y = x * 2
            for _ in range(4):
                y = y.exp().sigmoid()
        y.sum().backward()
        return on_host(x.grad)

    check_equal(run, steps=3, in_flight_max="1GiB", prefetch="1GiB")
    check_equal(run, steps=3, in_flight_max=1, prefetch=1)


@pytest.mark.parametrize("prefetch", [0, "1GiB"])
def test_pinned_memory_is_reused_only_after_its_copy_in(prefetch: int | str) -> None:
    """The host has room for one step, and the program never waits for the device."""
    model = make_mlp()
    batches = [make_inputs() + step for step in range(5)]

    def run(context: Context) -> list[torch.Tensor]:
        kept = []
        for batch in batches:
            model.zero_grad()
            with context:
                value = model(batch * 1).square().mean()
            value.backward()
            kept += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return on_host(*kept)

    check_equal(run, host_budget="256KiB", in_flight_max="64KiB", prefetch=prefetch)


def test_a_reload_is_allocated_on_the_compute_stream() -> None:
    """It goes back to that stream's pool, so that compute reuses it without any wait."""
    model, inputs = make_mlp(depth=8), make_inputs(512)
    context = offloading(in_flight_max="256KiB", prefetch="256KiB")
    for _ in range(2):
        gradients(model, inputs, context)
    settle()
    pools = {
        segment["stream"]
        for segment in torch.cuda.memory_snapshot()
        if any(block["state"] != "inactive" for block in segment["blocks"])
    }
    other = set(pools) - {torch.cuda.default_stream().cuda_stream}
    gradients(model, inputs, context)
    settle()
    after = {
        segment["stream"]
        for segment in torch.cuda.memory_snapshot()
        if any(block["state"] != "inactive" for block in segment["blocks"])
    }
    assert after - {torch.cuda.default_stream().cuda_stream} <= other


# ---- identity ----


def test_a_recycled_address_is_offloaded_again() -> None:
    leaves = [torch.full((128, 128), 1.0 + i, device="cuda").requires_grad_() for i in range(6)]
    context = offloading()
    outputs, addresses = [], set()
    for leaf in leaves:
        with context:
            hidden = leaf * 1
            addresses.add(hidden.data_ptr())
            outputs.append(hidden.square())
        del hidden
        settle()
    assert len(addresses) < len(leaves), "no address was recycled"
    assert offloaded_bytes(context) == sum(leaf.nbytes for leaf in leaves)
    for leaf, output in zip(leaves, outputs, strict=True):
        output.sum().backward()
        assert torch.equal(leaf.grad, 2 * leaf.detach())


def test_a_transpose_shares_the_copy_and_keeps_its_layout() -> None:
    x = torch.randn(64, 64, device="cuda", requires_grad=True)

    def run(context: Context) -> list[torch.Tensor]:
        x.grad = None
        with context:
            y = x * 1
            value = (y @ y.t() @ y).square().sum() + (y[8:40] @ y.t()[:, 3:30]).exp().sum()
        value.backward()
        return on_host(value, x.grad)

    check_equal(run)
    context = offloading()
    with context:
        y = x * 1
        _ = y @ y.t()
    assert offloaded_bytes(context) == y.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_an_offset_counts_elements_not_bytes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(400, dtype=dtype, device="cuda", requires_grad=True)

    def run(context: Context) -> list[torch.Tensor]:
        leaf.grad = None
        with context:
            base = leaf * 1
            value = (base[37:60] * base[301:324] * base[3:26]).sum().abs()
        value.backward()
        return on_host(value, leaf.grad)

    check_equal(run)


# ---- what must not leave ----


def test_tied_weights_stay_and_are_known_by_their_storage() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 64).cuda()
    head = nn.Linear(64, 50, bias=False).cuda()
    head.weight = embedding.weight
    tokens = torch.arange(24, device="cuda") % 50
    context = offloading(model=nn.ModuleList([embedding, head]))
    with context:
        hidden = embedding(tokens)
        value = head(hidden) + functional.linear(hidden, embedding.weight.detach())
    # The indices and the input of the two heads, which share it.
    assert offloaded_bytes(context) == hidden.nbytes + tokens.nbytes
    value.sum().backward()


def test_frozen_weights_stay_without_a_model() -> None:
    frozen = nn.Linear(64, 64).cuda().requires_grad_(False)
    x = make_inputs().requires_grad_()
    context = offloading()
    for _ in range(2):
        with context:
            value = frozen(frozen(x * 1))  # Saves nothing but the weight.
        value.sum().backward()
    assert offloaded_bytes(context) == 0
    assert context.stats().kept_tensors == 4


def test_weights_that_were_reallocated_stay() -> None:
    """As ``model.to()``, a sharded wrapper and a load of a state dict do."""
    model = nn.Linear(64, 64).cuda().requires_grad_(False)
    model.register_buffer("table", torch.randn(64, 64, device="cuda"))
    x = make_inputs().requires_grad_()
    context = offloading(model=model)
    for _ in range(3):
        model.weight.data = torch.randn(64, 64, device="cuda")
        model.table = torch.randn(64, 64, device="cuda")
        before = offloaded_bytes(context)
        with context:
            value = (x * 1) @ model.weight.detach() + x @ model.table
        assert offloaded_bytes(context) == before
        value.sum().backward()


@pytest.mark.parametrize("is_view", [False, True], ids=["FSDP2", "FSDP1"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_unsharded_weights_are_freed_and_gathered_again(is_view: bool, is_trained: bool) -> None:
    """A sharded wrapper empties their storage after forward and fills it before backward."""
    torch.manual_seed(0)
    shard = torch.randn(64 * 64, device="cuda")

    def run(context: Context) -> list[torch.Tensor]:
        gathered = nn.Parameter(shard.clone(), requires_grad=is_trained)
        if is_view:
            weight = gathered.split([64 * 64])[0].view(64, 64)
        else:
            weight = nn.Parameter(gathered.data.view(64, 64), requires_grad=is_trained)
        storage = weight.untyped_storage()
        x = make_inputs().requires_grad_()
        with context:
            value = functional.linear(x * 1, weight).exp().sum()
            before = torch.cuda.memory_allocated()
            storage.resize_(0)
            assert torch.cuda.memory_allocated() <= before - shard.nbytes
        storage.resize_(shard.nbytes)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(gathered):
            gathered.copy_(shard)
        value.backward()
        return on_host(x.grad, gathered.grad if is_view else weight.grad)

    check_equal(run)


# ---- in-place changes ----


def change_view(y: torch.Tensor) -> None:
    y[3].add_(1)


def change_whole(y: torch.Tensor) -> None:
    y.mul_(2)


def change_by_out(y: torch.Tensor) -> None:
    torch.add(torch.ones_like(y), 1, out=y)


@pytest.mark.parametrize("change", [change_view, change_whole, change_by_out])
def test_an_in_place_change_after_pack_raises_as_torch_does(change: Any) -> None:
    def message(context: Context) -> str:
        x = make_inputs().requires_grad_()
        with context:
            y = (x * 2).exp()
            value = y.sum()
        torch.cuda.synchronize()
        with torch.no_grad():
            change(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            value.backward()
        # Which node made it is torch's own to know.
        return re.sub(r", which is output .*?,", "", str(caught.value)).split("instead")[0]

    assert message(offloading()) == message(contextlib.nullcontext())


def test_an_optimizer_step_before_backward_raises() -> None:
    model = make_mlp(depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with offloading():
        first = model(make_inputs()).sum()
        second = model(make_inputs()).sum()
    first.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_an_in_place_change_of_what_backward_does_not_use() -> None:
    """Allowed, and nothing to report, though the copy out is under way."""

    def run(context: Context) -> list[torch.Tensor]:
        x = make_inputs().requires_grad_()
        with context:
            y = (x * 2).exp()
            _ = y.square()  # Saves y, and is never used.
            z = y.detach()
            z.add_(1)
            value = (x * z).sum()
        value.backward()
        return on_host(x.grad)

    check_equal(run)


# ---- lifetime ----


def test_a_saved_tensor_may_be_looked_at_before_and_after_backward() -> None:
    x = make_inputs().requires_grad_()
    context = offloading(**TIGHT)
    with context:
        value = (x * 2).exp()
    node = value.grad_fn
    assert node is not None
    expected = value.detach().clone()
    del value
    settle()
    for _ in range(2):
        assert torch.equal(node._saved_result, expected)
    gradient = torch.ones_like(expected)
    node(gradient)
    assert torch.equal(node._saved_result, expected)


def test_what_is_never_unpacked_dies_with_its_graph() -> None:
    pool = HostPool(limit_bytes=8 << 20)
    model, inputs = make_mlp(), make_inputs()
    gradients(model, inputs)
    settle()
    before = torch.cuda.memory_allocated()
    context = offloading(pool=pool)
    for _ in range(3):
        with context:
            value = model(inputs * 1)
        assert pool.stats().used_bytes > 0
        del value
        settle()
        assert pool.stats().used_bytes == 0
        assert torch.cuda.memory_allocated() == before


def test_a_dead_graph_needs_no_garbage_collector() -> None:
    """Outputs that are saved would else hold their own node, in a cycle."""
    pool = HostPool(limit_bytes=8 << 20)
    gc.collect()
    gc.disable()
    try:
        with offloading(pool=pool) as context:
            value = (make_inputs().requires_grad_() * 1).exp().sigmoid().tanh()
        assert offloaded_bytes(context) > 0
        del value
        torch.cuda.synchronize()
        with context:
            pass
        assert pool.stats().used_bytes == 0
    finally:
        gc.enable()


def test_an_optimizer_in_backward() -> None:
    """Weights change while the saved tensors of layers below are still off the device."""

    def run(context: Context) -> list[torch.Tensor]:
        model = make_gpt(depth=2)
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def update(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        for step in range(3):
            torch.manual_seed(step)
            with context:
                value = model(torch.randn(2, 8, 32, device="cuda")).square().mean()
            value.backward()
        return on_host(*model.parameters())

    check_equal(run, **TIGHT)


# ---- pinned memory ----


def pinning_calls(model: nn.Module, inputs: torch.Tensor, context: Context) -> int:
    """How often memory is pinned between the start of a step's forward and backward's end."""
    with context, emulator.faults():
        value = model(inputs * 1).square().mean()
        value.backward()
        calls = emulator.calls()
    return sum(calls.get(name, 0) for name in ("cuMemHostRegister", "cuMemHostAlloc"))


@pytest.mark.skipif(not emulator.is_enabled(), reason="counts the emulated device's calls")
def test_no_memory_is_pinned_in_hooks_after_the_first_step() -> None:
    """Pinning waits for the device and may deadlock a collective."""
    model, inputs = make_mlp(), make_inputs()
    context = offloading(host_budget=(4 << 20) + 4096)
    gradients(model, inputs, context)
    settle()
    assert [pinning_calls(model, inputs, context) for _ in range(3)] == [0, 0, 0]


@pytest.mark.skipif(not emulator.is_enabled(), reason="counts the emulated device's calls")
def test_a_budget_is_pinned_at_the_start() -> None:
    context = offloading(host_budget=(4 << 20) + 8192)
    assert pinning_calls(make_mlp(), make_inputs(), context) == 0

"""Offloaded activations give the bits of the plain run, and leave the device."""

from __future__ import annotations

import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import offloading, on_disk, reloaded_tensors
from activation_models import SMALL, assert_same, gradients, make_gpt, make_mlp
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spillover import offload_activations
from spillover.hooks import OffloadedActivations

MIB = 1 << 20


@pytest.fixture(params=["host", "disk", "ample"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Small budgets force every byte off and back; ample ones mostly use what has not left yet."""
    if request.param == "disk":
        return {**SMALL, **on_disk(tmp_path), "directory": [tmp_path / "a", tmp_path / "b"]}
    return dict(SMALL) if request.param == "host" else {"min_bytes": 1, "keep_on_device": 0}


def test_mlp(options: dict[str, Any]) -> None:
    model = make_mlp()
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(model, x)
    context = offload_activations(**options)
    for _ in range(3):
        assert_same(gradients(model, x, context), expected)
    stats = context.stats()
    assert stats.tensors > 0
    assert (stats.disk_bytes_written if "directory" in options else stats.bytes_out) > 0


@pytest.mark.parametrize("mode", ["plain", "non_reentrant", "reentrant"])
def test_transformer_with_dropout_and_checkpointing(options: dict[str, Any], mode: str) -> None:
    model = make_gpt(mode=mode)
    x = torch.randn(4, 24, 32, device="cuda")
    expected = gradients(model, x)
    for inside in (False, True):
        context = offload_activations(**options)
        assert_same(gradients(model, x, context, backward_inside=inside), expected)
        assert context.stats().tensors > 0


def test_autocast_gives_the_same_bits(options: dict[str, Any]) -> None:
    model = make_gpt(depth=2)
    x = torch.randn(4, 24, 32, device="cuda")

    def run(context: Any) -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return gradients(model, x, context)

    expected = run(None)
    assert_same(run(offload_activations(**options)), expected)


class Views(nn.Module):
    """Saves tensors in awkward layouts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        parts = y.chunk(3, dim=-1)
        total = (parts[0] * parts[1]).sum() + (parts[1].t() @ parts[2]).square().sum()
        total = total + (y.t()[3:7, ::2] ** 2).sum() * y[5, 1:4].sin().sum()
        wide = y.unsqueeze(1).expand(-1, 3, -1)
        total = total + (wide * wide.transpose(0, 2).permute(2, 1, 0)).sum()
        total = total + (y.view(-1)[7:50].as_strided((4, 5), (8, 1)) ** 3).sum()
        half = y.to(torch.bfloat16)
        total = total + (half[:, 1:] * half[:, :-1]).float().sum()
        channels_last = y.view(3, 4, 4, -1).to(memory_format=torch.channels_last)
        return total + (channels_last * channels_last).tanh().sum()


def test_views_aliases_and_strides(options: dict[str, Any]) -> None:
    x = torch.randn(24, 48, device="cuda") / 4
    expected = gradients(Views(), x, loss=lambda out: out)
    context = offload_activations(**options)
    assert_same(gradients(Views(), x, context, loss=lambda out: out), expected)
    assert context.stats().deduplicated_bytes > 0


def test_aliases_share_one_copy() -> None:
    context = offloading()
    base = torch.randn(64, 96, device="cuda", requires_grad=True)
    x = base * 2
    with context:
        q, k, v = x.chunk(3, dim=1)
        out = q * k + k * v + q * v + x.square().mean()
    assert context.stats().offloaded_bytes == x.nbytes
    assert context.stats().tensors == 7
    out.sum().backward()
    assert base.grad is not None


def test_a_changed_storage_is_copied_again() -> None:
    base = torch.randn(64, 64, device="cuda", requires_grad=True)
    with offloading() as context:
        x = base * 2
        first = x * x
        torch.cuda.synchronize()
        x.add_(1)
        second = x.exp() * x
    (second.sum()).backward()
    changed = (base.detach() * 2 + 1).requires_grad_()
    (changed.exp() * changed).sum().backward()
    assert base.grad is not None
    assert changed.grad is not None
    assert torch.equal(base.grad, changed.grad * 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
    assert context.stats().offloaded_bytes == 3 * x.nbytes


def test_a_recycled_address_is_another_tensor() -> None:
    context = offloading()
    expected: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    leaves = [torch.full((128, 128), float(i), device="cuda").requires_grad_() for i in range(6)]
    with context:
        for leaf in leaves:
            outputs.append((leaf * 1).square())
            torch.cuda.synchronize()
            gc.collect()
            expected.append(2 * leaf.detach())
    for output in outputs:
        output.sum().backward()
    assert_same([leaf.grad.cpu() for leaf in leaves], [item.cpu() for item in expected])


def test_retain_graph_and_an_unused_branch(options: dict[str, Any]) -> None:
    model = make_mlp()
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(model, x)[2:]
    with offload_activations(**options):
        hidden = model[0](x).exp()
        unused = (hidden * hidden).tanh()
        value = model(x).square().mean()
    model.zero_grad()
    value.backward(retain_graph=True)
    assert_same([p.grad.cpu() for p in model.parameters()], expected)
    model.zero_grad()
    value.backward()
    assert_same([p.grad.cpu() for p in model.parameters()], expected)
    del unused, hidden


def test_double_backward(options: dict[str, Any]) -> None:
    def run(context: Any) -> list[torch.Tensor]:
        model = make_mlp(depth=2)
        torch.manual_seed(1)
        x = torch.randn(40, 64, device="cuda", requires_grad=True)
        with context:
            value = model(x * 1).tanh().square().sum()
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            penalty = slope.square().sum()
        penalty.backward()
        return [penalty.detach().cpu(), x.grad.cpu()] + [
            p.grad.cpu() for p in model.parameters() if p.grad is not None
        ]

    expected = run(contextlib.nullcontext())
    assert_same(run(offload_activations(**options)), expected)


def test_compute_on_another_stream(options: dict[str, Any]) -> None:
    model = make_mlp()
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(model, x)
    side = torch.cuda.Stream()
    context = offload_activations(**options)
    for _ in range(2):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = gradients(model, x, context)
        torch.cuda.current_stream().wait_stream(side)
        assert_same(found, expected)


def test_threads_share_a_context(options: dict[str, Any]) -> None:
    models = [make_mlp() for _ in range(3)]
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(models[0], x)
    context = offload_activations(**options)
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(3):
                model.zero_grad()
                inputs = x.clone().requires_grad_()
                with context:
                    value = model(inputs * 1).square().mean()
                value.backward()
                found = [value.detach(), inputs.grad, *(p.grad for p in model.parameters())]
                assert_same([tensor.cpu() for tensor in found], expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_nested_contexts_and_the_decorator(options: dict[str, Any]) -> None:
    model = make_gpt(depth=2)
    x = torch.randn(4, 24, 32, device="cuda")
    expected = gradients(model, x)
    outer = offload_activations(**options)
    inner = offloading()
    first = model[0].run

    @inner
    def run(value: torch.Tensor) -> torch.Tensor:
        with inner:
            return first(value)

    model[0].run = run
    assert_same(gradients(model, x, outer), expected)
    assert inner.stats().tensors > 0
    assert outer.stats().tensors > 0
    with outer, torch.autograd.graph.save_on_cpu():
        value = model[1](x).sum()
    value.backward()


def test_selected_regions_of_a_checkpoint() -> None:
    model = make_mlp()
    x = torch.randn(96, 64, device="cuda")
    expected = gradients(model, x)

    def run(value: torch.Tensor) -> torch.Tensor:
        middle = checkpoint(model[:4], value, use_reentrant=False)
        return checkpoint(model[4:], middle, use_reentrant=False)

    wrapper = nn.Module()
    wrapper.inner = model
    wrapper.forward = run
    context = offload_activations(**SMALL)
    assert_same(gradients(wrapper, x, context), expected)
    # The inputs of the two regions and nothing else, but for the loss's own.
    assert context.stats().offloaded_bytes == 3 * x.nbytes


def peak_of(model: nn.Module, x: torch.Tensor, context: Any) -> int:
    model.zero_grad()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with context:
        value = model(x).square().mean()
    value.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_peak_memory_falls(tier: str, tmp_path: Path) -> None:
    model = make_mlp(depth=16)
    x = torch.randn(4096, 64, device="cuda")
    plain = peak_of(model, x, contextlib.nullcontext())
    assert plain > 30 * MIB
    budgets = {"prefetch": 2 * MIB, "in_flight_max": 2 * MIB}
    more = {"tier": "disk", "directory": tmp_path} if tier == "disk" else {}
    context: OffloadedActivations = offload_activations(**budgets, **more)
    for _ in range(2):
        offloaded = peak_of(model, x, context)
    assert offloaded < plain / 3, (offloaded, plain)
    if tier == "host":  # How fast a disk answers is not for a test to say.
        assert context.stats().prefetch_misses <= reloaded_tensors(context) / 4


def test_memory_is_given_back_when_a_graph_dies() -> None:
    context = offload_activations(**SMALL)
    x = torch.randn(96, 64, device="cuda")
    model = make_mlp()
    gradients(model, x, context)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with context:
        value = model(x * 1)
    parts = torch.autograd.grad(value.sum(), list(model[6:].parameters()))
    del value, parts
    gc.collect()
    functional.relu(x)
    torch.cuda.synchronize()
    with context:
        pass
    assert torch.cuda.memory_allocated() <= before + 64 * 1024

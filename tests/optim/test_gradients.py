"""Gradients off the device: a training with them learns what one without does."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_models import (
    Gpt,
    Twins,
    all_offloaded,
    assert_gradients_equal,
    is_offloaded,
    make_gpt,
)
from torch import nn

import spillover
from spillover import (
    ConfigError,
    HostOutOfMemory,
    HostPool,
    NonFiniteGradient,
    stream_parameters,
)
from spillover.optim import AdamW, clip_grad_norm_, offload_gradients

VIRTUAL_MEMORY = os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1"


@pytest.fixture
def twins() -> Iterator[Twins]:
    """A model, and one with its weights whose gradients are offloaded."""
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.named_parameters()) as handle:
        yield plain, offloaded, handle


def backward(*models: Gpt, seeds: tuple[int, ...] = (0,)) -> None:
    for model in models:
        for seed in seeds:
            model.loss(seed).backward()


# ---- training ----------------------------------------------------------------------------------


def train(
    model: Gpt,
    optimizer: torch.optim.Optimizer,
    clip: Callable[..., torch.Tensor],
    micro_steps: int,
    steps: int = 6,
) -> list[float]:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = []
    for step in range(steps):
        for micro_step in range(micro_steps):
            (model.loss(step * micro_steps + micro_step) / micro_steps).backward()
        found.append(clip(model.parameters(), 0.5).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(model.loss(0).item())
    return found


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("clip", [clip_grad_norm_, nn.utils.clip_grad_norm_], ids=["ours", "torch"])
def test_a_gpt_learns_the_same(clip: Callable[..., torch.Tensor], micro_steps: int) -> None:
    plain, offloaded = make_gpt(), make_gpt()
    expected = train(
        plain, AdamW(plain.parameters(), lr=1e-2, eps=1e-5), nn.utils.clip_grad_norm_, micro_steps
    )
    # Some gradients are zero but for rounding, which a smaller eps would make much of.
    optimizer = AdamW(offloaded.parameters(), lr=1e-2, eps=1e-5, offload_gradients=True)
    found = train(offloaded, optimizer, clip, micro_steps)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[1]
    for one, other in zip(offloaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert optimizer.gradients is not None
    stats = optimizer.gradients.stats()
    assert stats.left == 6 * micro_steps * len(list(offloaded.parameters()))
    # What is not asked for stays where it is.
    assert stats.fetched == 0


def test_without_clipping_weights_are_bitwise_the_same() -> None:
    plain, offloaded = make_gpt(torch.bfloat16), make_gpt(torch.bfloat16)
    optimizers = (
        AdamW(plain.parameters(), lr=1e-2),
        AdamW(offloaded.parameters(), lr=1e-2, offload_gradients=True),
    )
    for seed in range(4):
        for model, optimizer in zip((plain, offloaded), optimizers, strict=True):
            model.loss(seed).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, offloaded.parameters(), plain.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_micro_steps_add_up_in_float32(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3001, dtype=dtype, device="cuda"))
    handle = offload_gradients([parameter])
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(3001, generator=generator).to(dtype) for _ in range(step + 2)]
        for gradient in gradients:
            parameter.backward(gradient.cuda())
        expected = torch.zeros(3001)
        for gradient in gradients:
            expected += gradient.float()
        host = parameter.grad._host
        assert torch.equal(host.on_host(lambda flat: flat.float()), expected)
        assert torch.equal(parameter.grad.cpu(), expected.to(dtype))
        norm = clip_grad_norm_([parameter], 1e9)
        torch.testing.assert_close(
            norm.item(), expected.double().norm().item(), rtol=1e-6, atol=0.0
        )
        parameter.grad = None
    assert handle.stats().added_bytes == (1 + 2 + 3) * 3001 * dtype.itemsize


def test_large_gradients_pass_the_ring_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from spillover.optim import _gradient_memory, _gradient_worker, _host_gradient

    monkeypatch.setattr(_gradient_worker, "_RING_BYTES_MIN", 4096)
    monkeypatch.setattr(_gradient_worker, "_RING_BYTES_MAX", 4096)
    worker = _gradient_worker.GradientWorker()
    monkeypatch.setattr(_host_gradient, "PIECE_BYTES", 1536)
    monkeypatch.setattr(_gradient_memory, "_COPIED_ELEMENTS", 100)
    monkeypatch.setattr(_host_gradient, "worker", worker)
    parameter = nn.Parameter(torch.zeros(7777, dtype=torch.bfloat16, device="cuda"))
    offload = offload_gradients([parameter])
    expected = torch.zeros(7777)
    for seed in range(5):
        gradient = torch.randn(7777, generator=torch.Generator().manual_seed(seed)).bfloat16()
        expected += gradient.float()
        parameter.backward(gradient.cuda())
    assert torch.equal(parameter.grad._host.on_host(lambda flat: flat.float()), expected)
    assert clip_grad_norm_([parameter], 1e9).item() == pytest.approx(
        expected.double().norm().item(), rel=1e-6
    )
    worker.close()
    offload.remove()


# ---- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, float("inf"), 0.0])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one", "two"])
def test_clipping_by_any_norm(twins: Twins, order: float, seeds: tuple[int, ...]) -> None:
    plain, offloaded, _ = twins
    backward(plain, offloaded, seeds=seeds)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5, order)
    found = clip_grad_norm_(offloaded.parameters(), 0.5, order)
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert all_offloaded(offloaded)
    assert_gradients_equal(offloaded.parameters(), plain.parameters(), rtol=1e-5, atol=1e-9)


def test_clipping_costs_no_pass_over_memory(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    from spillover.optim import _gradient_math

    _, offloaded, _ = twins
    backward(offloaded, seeds=(0, 1))
    norm = clip_grad_norm_(offloaded.parameters(), 1e9)  # The host has added up by now.
    for name in ("sum_of_squares", "norm", "is_finite", "combine"):
        monkeypatch.setattr(_gradient_math, name, None)
    assert clip_grad_norm_(offloaded.parameters(), 0.25).item() == norm.item()
    assert clip_grad_norm_(offloaded.parameters(), 1.0).item() == pytest.approx(0.25, rel=1e-5)
    backward(offloaded)
    offloaded.zero_grad()
    backward(offloaded)
    assert nn.utils.clip_grad_norm_(offloaded.parameters(), 0.25).item() > 0.25


def test_clipping_what_is_partly_on_the_device(twins: Twins) -> None:
    plain, offloaded, _ = twins
    extra = [nn.Parameter(torch.ones(5, device=device)) for device in ("cuda", "cpu", "cuda")]
    for parameter in extra[:2]:
        parameter.grad = torch.full_like(parameter, 3.0)
    backward(plain, offloaded)
    squares = sum(float(one.grad.double().square().sum()) for one in plain.parameters()) + 90.0
    norm = clip_grad_norm_([*offloaded.parameters(), *extra], 1.0)
    assert norm.item() == pytest.approx(squares**0.5, rel=1e-6)
    assert extra[0].grad[0].item() == pytest.approx(3.0 / squares**0.5, rel=1e-5)
    assert extra[1].grad[0].item() == pytest.approx(3.0 / squares**0.5, rel=1e-5)
    assert clip_grad_norm_([extra[2]], 1.0).item() == 0.0
    assert clip_grad_norm_(extra[0], 10.0).item() == pytest.approx((45.0 / squares) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [clip_grad_norm_, nn.utils.clip_grad_norm_], ids=["ours", "torch"])
def test_clipping_gradients_that_are_not_finite(
    twins: Twins, clip: Callable[..., torch.Tensor], bad: float
) -> None:
    plain, offloaded, _ = twins
    for model in (plain, offloaded):
        (model.loss(0) * bad).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip(offloaded.parameters(), 1.0, error_if_nonfinite=True)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    torch.testing.assert_close(clip(offloaded.parameters(), 1.0), expected, equal_nan=True)
    for one, other in zip(offloaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad.cpu(), equal_nan=True)


def test_norm_of_bfloat16_is_exact() -> None:
    parameter = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16, device="cuda"))
    handle = offload_gradients([parameter])
    gradient = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter.backward(gradient.cuda())
    norm = clip_grad_norm_([parameter], 1.0)
    assert norm.dtype == torch.float32
    # The device sums in float32.
    assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-5)
    # Scaled in float32, and not rounded to bfloat16 in between.
    scaled = parameter.grad._host.on_host(lambda flat: flat)
    torch.testing.assert_close(scaled, gradient.float() / norm.item(), rtol=1e-6, atol=0.0)
    assert handle.stats().fetched == 0


# ---- names and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_anomalies_are_reported_with_names(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    model = make_gpt()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    for anomalies in ("raise", "warn"):
        with offload_gradients(model.named_parameters(), anomalies=anomalies) as handle:
            backward(model)
            handle.check()
            model.blocks[1].linear1.weight.grad.mul_(bad)
            kind = "NaN" if bad != bad else "infinity"
            expected = rf"blocks\.1\.linear1\.weight \(.*{kind}.*\)$"
            if anomalies == "raise":
                with pytest.raises(NonFiniteGradient, match=expected):
                    handle.check()
            else:
                with caplog.at_level(logging.WARNING, "spillover"):
                    handle.check()
                assert "blocks.1.linear1.weight" in caplog.text
        optimizer.zero_grad()


def test_a_step_refuses_anomalies_before_anything_changes() -> None:
    model = make_gpt()
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamW(model.named_parameters(), offload_gradients=True, gradient_anomalies="raise")
    (model.loss(0) * float("nan")).backward()
    with pytest.raises(NonFiniteGradient, match=r"embedding\.weight \(NaN\)"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_memory_that_is_not_there_is_an_error_at_construction() -> None:
    model = make_gpt()
    need = sum(one.numel() * 4 for one in model.parameters())
    with pytest.raises(HostOutOfMemory, match=r"gradients of \d+ parameters need"):
        offload_gradients(model.parameters(), pool=HostPool(limit=need // 2))
    backward(model)
    assert not any(is_offloaded(one.grad) for one in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anomalies": "ignore"}, "'raise', 'warn' or None"),
        ({"inflight": "many"}, "inflight"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offload_gradients(make_gpt().parameters(), **arguments)


def test_parameters_must_be_several_tensors() -> None:
    with pytest.raises(ConfigError, match=r"model\.parameters\(\)"):
        offload_gradients(torch.zeros(3))
    with pytest.raises(ConfigError, match="is a str"):
        offload_gradients(["weight"])


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    model = make_gpt()
    handle = offload_gradients(model.parameters())
    backward(model)
    assert not any(is_offloaded(one.grad) for one in model.parameters())
    assert clip_grad_norm_(model.parameters(), 1.0).item() > 0
    assert handle.stats().parameters == 0


# ---- the handle --------------------------------------------------------------------------------


def test_remove_ends_it_and_keeps_what_is_on_the_host(twins: Twins) -> None:
    plain, offloaded, handle = twins
    backward(plain, offloaded)
    handle.remove()
    assert_gradients_equal(offloaded.parameters(), plain.parameters())
    offloaded.zero_grad()
    backward(offloaded)
    assert not any(is_offloaded(one.grad) for one in offloaded.parameters())
    handle.remove()


def test_gradients_outlive_the_handle_and_the_model(twins: Twins) -> None:
    plain, _, _ = twins
    handle = offload_gradients(plain.parameters())
    backward(plain)
    kept = [one.grad for one in plain.parameters()]
    del handle, plain
    gc.collect()
    offloaded_gradient = torch.cat([one.cpu().flatten() for one in kept])
    assert float(offloaded_gradient.norm()) > 0


def test_figures() -> None:
    model = make_gpt(torch.bfloat16)
    with offload_gradients(model.parameters()) as handle:
        count = sum(one.numel() for one in model.parameters())
        assert handle.stats().host_bytes == 2 * count
        backward(model, seeds=(0, 1))
        handle.synchronize()
        assert handle.stats().host_bytes >= 4 * count
        model.zero_grad()
        backward(model)
        stats = handle.stats()
        # Note [Bytes per parameter]: never six.
        assert stats.host_bytes == 4 * count
        assert stats.left_bytes == 3 * 2 * count
        assert stats in spillover.stats().others["gradients"]


# ---- together with other parts -----------------------------------------------------------------


@pytest.mark.parametrize("scales", [False, True])
def test_streamed_weights_beside_weights_on_the_device(scales: bool) -> None:
    def run(offloads: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        first = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        last = nn.Linear(16, 4).cuda()
        stream_parameters(first)
        parameters = [*first.parameters(), *last.parameters()]
        optimizer = AdamW(parameters, lr=1e-2, eps=1e-5, offload_gradients=offloads)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, enabled=scales)
        for step in range(4):
            for _ in range(1 + step % 2):
                scaler.scale(
                    last(first(torch.ones(2, 16, device="cuda"))).square().sum()
                ).backward()
            assert is_offloaded(last.weight.grad) == offloads
            assert not is_offloaded(next(first.parameters()).grad)
            scaler.unscale_(optimizer)
            clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in parameters]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_offloaded_activations_and_gradients() -> None:
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.parameters()):
        for seed in range(2):
            plain.loss(seed).backward()
            with spillover.offload_activations(min_bytes=1, keep_on_device=0):
                loss = offloaded.loss(seed)
            loss.backward()
        assert all_offloaded(offloaded)
        assert_gradients_equal(offloaded.parameters(), plain.parameters())


def test_closures_and_groups() -> None:
    models = []
    for offloads in (False, True):
        model = make_gpt()
        optimizer = AdamW(model.blocks[0].parameters(), lr=1e-2, offload_gradients=offloads)
        optimizer.add_param_group({"params": model.blocks[1].parameters(), "lr": 1e-3})
        optimizer.add_param_group({"params": [model.embedding.weight]})
        for seed in range(3):

            def closure(model: Gpt = model, seed: int = seed) -> torch.Tensor:
                model.zero_grad()
                loss = model.loss(seed)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert is_offloaded(model.blocks[1].linear1.weight.grad) == offloads
        assert not is_offloaded(model.head.bias.grad)  # Of no optimizer.
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


SIMULATED = """
from spillover import emulator
emulator.enable(vram="1GiB", profile="h100-pcie", virtual_memory={virtual_memory})
import torch
from torch import nn
from spillover.optim import AdamW, clip_grad_norm_

torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)]).cuda()
optimizer = AdamW(model.parameters(), offload_gradients=True)
for _ in range(2):
    for _ in range(3):
        model(torch.ones(8, 256, device="cuda")).square().mean().backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
report = emulator.clock_report()
assert report.unseen_waits == 0
print(report.makespan_ns)
"""


@pytest.mark.soak
def test_a_simulated_training_takes_the_same_time_each_time() -> None:
    program = SIMULATED.format(virtual_memory=VIRTUAL_MEMORY)
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
        ).stdout
        for _ in range(2)
    )
    assert first == second
    assert int(first) > 0

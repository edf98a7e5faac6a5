"""AdamW refuses wrong options and can repeat a step that failed for want of memory."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from spillover import ConfigError, HostOutOfMemory, HostPool
from spillover.optim import AdamW, _staging


@pytest.mark.parametrize(
    "options",
    [
        {"lr": float("nan")},
        {"eps": float("nan")},
        {"weight_decay": float("nan")},
        {"betas": 0.9},
        {"lr": "x"},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(options))} must be"):
        AdamW([nn.Parameter(torch.zeros(3))], **options)


def test_a_step_without_staging_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    host = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight, host])
    weight.grad, host.grad = torch.ones_like(weight), torch.ones_like(host)

    def refuse(staging: _staging.Staging, wanted_bytes: int) -> None:
        raise HostOutOfMemory("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(_staging.Staging, "reserve", refuse)
        for _ in range(2):
            with pytest.raises(HostOutOfMemory):
                optimizer.step()
    assert [entry["step"].item() for entry in optimizer.state.values()] == [0, 0]
    optimizer.step()
    assert [entry["step"].item() for entry in optimizer.state.values()] == [1, 1]
    assert torch.equal(weight.cpu(), host)


def test_default_device() -> None:
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    torch.set_default_device("cuda")
    try:
        optimizer = AdamW([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(value.device.type == "cpu" for value in optimizer.state[weight].values())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (0.9, 1.0)),
        ("eps", -1e-8),
        ("weight_decay", "much"),
        ("capturable", True),
        ("differentiable", True),
    ],
)
def test_wrong_options_of_a_group(option: str, value: Any) -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = AdamW([first])
    with pytest.raises(ConfigError, match=f"^{option}"):
        optimizer.add_param_group({"params": [second], option: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match=f"^{option}"):
        AdamW([{"params": [first], option: value}])
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5


def fill(pool: HostPool) -> list[torch.Tensor]:
    """All that a pool has left."""
    held = []
    for size in (64 << 10, 32 << 10, 8 << 10, 1 << 10, 64):
        with contextlib.suppress(HostOutOfMemory):
            while True:
                held.append(pool.empty(size, torch.uint8))
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_without_memory_for_its_state_is_not_made(dtype: torch.dtype) -> None:
    pool = HostPool(limit=256 << 10)
    weights = [nn.Parameter(torch.ones(30_000, dtype=dtype, device="cuda")) for _ in range(2)]
    wanted_bytes = 60_000 * (8 if dtype == torch.float32 else 12)
    with pytest.raises(HostOutOfMemory, match=f"AdamW needs {wanted_bytes} bytes .* 2 parameters"):
        AdamW(weights, pool=pool, offload_gradients=True)
    gc.collect()
    assert pool.stats().used_bytes == 0
    for weight in weights:
        weight.square().sum().backward()
        assert type(weight.grad) is torch.Tensor
    optimizer = AdamW(weights[:1], pool=HostPool(limit=512 << 10))
    bytes_before = optimizer.stats().host_bytes
    large = nn.Parameter(torch.ones(200_000, dtype=dtype, device="cuda"))
    with pytest.raises(HostOutOfMemory):
        optimizer.add_param_group({"params": [large]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.stats().host_bytes == bytes_before
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_without_memory_for_its_state_changes_nothing(dtype: torch.dtype) -> None:
    def make(pool: HostPool) -> tuple[list[nn.Parameter], AdamW]:
        weights = [nn.Parameter(torch.full((40_000,), i, dtype=dtype).cuda()) for i in (1, 2)]
        weights[1].requires_grad_(False)  # So that it has no memory yet.
        optimizer = AdamW(weights, lr=0.1, pool=pool)
        weights[1].requires_grad_(True)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return weights, optimizer

    twins, twin = make(HostPool())
    twin.step()
    pool = HostPool(limit=1 << 20)
    weights, optimizer = make(pool)
    held = fill(pool)
    for _ in range(2):
        with pytest.raises(HostOutOfMemory, match="of 1 parameter,"):
            optimizer.step()
    assert [weight[0].item() for weight in weights] == [1.0, 2.0]
    # What a checkpoint taken now holds is whole.
    torch.optim.AdamW(weights).load_state_dict(optimizer.state_dict())
    assert all(len(entry) in (0, 3, 4) for entry in optimizer.state.values())
    held.clear()
    gc.collect()
    optimizer.step()
    assert all(map(torch.equal, weights, twins))


def test_a_checkpoint_of_adam_becomes_one_of_adamw() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    adam = torch.optim.Adam([weight], lr=0.25)
    adam.step()
    optimizer = AdamW([weight])
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("source", ["ours", "torch"])
def test_checkpoints_are_exchanged_after_each_kind_of_step(
    dtype: torch.dtype, options: dict[str, Any], source: str
) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, dtype=dtype, device="cuda"))
    makes: dict[str, Any] = {"ours": AdamW, "torch": torch.optim.AdamW}
    first = makes[source]([weight], lr=0.125, **options)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        first.step()
    twin = nn.Parameter(weight.detach().clone())
    second = makes["torch" if source == "ours" else "ours"]([twin], lr=9.0)
    # Torch's would share its step count with ours otherwise.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["amsgrad"] is options.get("amsgrad", False)
    assert second.param_groups[0]["maximize"] is options.get("maximize", False)
    weight.grad = torch.randn_like(weight)
    twin.grad = weight.grad.clone()
    first.step()
    second.step()
    # Torch rounds the moments to the weight's type.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(twin, weight, atol=tolerance, rtol=2 * tolerance)
    second.load_state_dict(second.state_dict())

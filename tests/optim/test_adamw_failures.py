"""AdamW refuses wrong options and can repeat a step that failed for want of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spillover import ConfigError, HostOutOfMemory
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

"""Memory of gradients that others hold, and may write to when backward is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_models import backward, make_gpt
from torch import nn

from spillover._transfer import TransferTicket
from spillover.optim import offload_gradients


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What streams were made to wait for."""
    found: list[object] = []
    wait = TransferTicket.stream_wait

    def stream_wait(ticket: TransferTicket, stream: Any = None) -> None:
        found.append(ticket)
        wait(ticket, stream)

    monkeypatch.setattr(TransferTicket, "stream_wait", stream_wait)
    return found


def test_backward_waits_for_no_copy(waits: list[object]) -> None:
    model = make_gpt()
    conv = nn.Conv2d(1, 2, 3).cuda()
    with offload_gradients([*model.parameters(), *conv.parameters()]) as handle:
        for mode in ("plain", "plain", "checkpoint"):
            model.mode = mode
            backward(model)
            conv(torch.ones(1, 1, 5, 5, device="cuda")).sum().backward()
        assert handle.stats().left == 3 * (2 + len(list(model.parameters())))
    assert not waits


@pytest.mark.parametrize("micro_step", [0, 1])
@pytest.mark.parametrize("holds", ["tensor", "view", "base", "alias", "argument", "grad"])
def test_what_a_program_writes_to_a_gradient_that_it_holds(
    waits: list[object], micro_step: int, holds: str
) -> None:
    layer = nn.Linear(300, 300, bias=False).cuda()
    weight = layer.weight
    value = torch.ones(2, 300, device="cuda")
    kept: list[torch.Tensor] = []
    take: dict[str, Callable[[torch.Tensor], object]] = {
        "tensor": kept.append,
        "view": lambda gradient: kept.append(gradient.view(-1)),
        "base": lambda gradient: kept.append(gradient._base),
        "alias": lambda gradient: kept.append(gradient.detach()),
    }
    with offload_gradients([weight]):
        for _ in range(micro_step):
            layer(value).sum().backward()
        assert not waits
        if holds == "argument":
            kept.append(torch.full_like(weight, 2.0))
            weight.backward(kept[0])
        elif holds == "grad" and micro_step == 0:
            kept.append(torch.zeros(90_000, device="cuda"))
            weight.grad = kept[0].view(300, 300)
            layer(value).sum().backward()
        elif holds != "grad":
            hook = weight.register_hook(lambda gradient: take[holds](gradient) and None)
            layer(value).sum().backward()
            hook.remove()
        for tensor in kept:
            tensor.fill_(77.0)
        torch.cuda.synchronize()
        expected = 2.0 * micro_step + 2.0 * bool(kept)
        assert torch.equal(weight.grad.cpu(), torch.full((300, 300), expected))


@pytest.mark.parametrize("how", ["clamp_", "another micro-step", "another step", "a side stream"])
def test_memory_that_a_fetch_still_reads_is_not_written_to(how: str) -> None:
    parameter = nn.Parameter(torch.ones(5000, device="cuda"))
    with offload_gradients([parameter]):
        (parameter * 3).sum().backward()
        (parameter * 4).sum().backward()
        fetched = parameter.grad.clone()  # Its copy has not run yet on a late schedule.
        if how == "clamp_":
            parameter.grad.clamp_(max=1.0)
        elif how == "another micro-step":
            (parameter * 5).sum().backward()
            parameter.grad._host.wait()
        elif how == "another step":
            parameter.grad = None
            (parameter * 5).sum().backward()
            parameter.grad._host.wait()
        else:
            parameter.grad = None
            with torch.cuda.stream(torch.cuda.Stream()):
                parameter.backward(torch.full((5000,), 9.0, device="cuda"))
                parameter.grad._host.wait()
        assert torch.equal(fetched.cpu(), torch.full((5000,), 7.0))

"""Paged optimizers whose gradients are off the device, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_models import Gpt, all_offloaded, make_gpt
from paging_programs import Lion
from torch import nn

from spillover.optim import OffloadedGradients, offload_gradients, page

KIB = 1 << 10
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "AdamW loop": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, centered=True, momentum=0.9),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, maximize=True),
    "whole": lambda params: Lion(params),
}


def train(
    make: Any, *, pages: bool, offloads: bool, scales: bool, micro_steps: int, clip: bool
) -> tuple[Gpt, OffloadedGradients]:
    model = make_gpt()
    optimizer = make(model.parameters())
    handle = offload_gradients(model.named_parameters() if offloads else [])
    if pages:
        page(optimizer, bucket_bytes=32 * KIB)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=scales)
    for step in range(4):
        for micro_step in range(micro_steps):
            loss = model.loss(step * micro_steps + micro_step) / micro_steps
            scaler.scale(loss * float("inf") if scales and step == 2 else loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        assert all_offloaded(model) == offloads
        optimizer.zero_grad()
    return model, handle


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scales", [False, True])
def test_gradients_off_the_device_are_those_on_it(name: str, scales: bool) -> None:
    options: Any = {"scales": scales, "micro_steps": 1, "clip": False}
    plain, _ = train(OPTIMIZERS[name], pages=False, offloads=False, **options)
    found, handle = train(OPTIMIZERS[name], pages=True, offloads=True, **options)
    assert all(map(torch.equal, found.parameters(), plain.parameters()))
    if name != "whole" and not scales:
        # Once each, however often the update reads it.
        assert handle.stats().fetched == handle.stats().left


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipped_sums_are_those_of_an_optimizer_that_is_not_paged(name: str) -> None:
    options: Any = {"scales": False, "micro_steps": 2, "clip": True, "offloads": True}
    expected, _ = train(OPTIMIZERS[name], pages=False, **options)
    found, _ = train(OPTIMIZERS[name], pages=True, **options)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_device_memory_holds_one_bucket_of_gradients() -> None:
    parameters = [nn.Parameter(torch.ones(64, KIB, device="cuda")) for _ in range(16)]
    size_bytes = parameters[0].nbytes
    optimizer = page(torch.optim.AdamW(parameters, fused=True), bucket_bytes=2 * size_bytes)
    with offload_gradients(parameters):
        for _ in range(3):
            sum(parameter.square().sum() for parameter in parameters).backward()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() <= before
            # Three buckets of state of one parameter each, and a gradient.
            assert torch.cuda.max_memory_allocated() - before <= 8 * size_bytes
            optimizer.zero_grad()


def test_a_gradient_that_does_not_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from spillover.optim._host_gradient import HostGradient

    model, twin = make_gpt(), make_gpt()
    optimizer = page(torch.optim.AdamW(model.parameters(), lr=1e-2), bucket_bytes=32 * KIB)
    expected = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    fetch = HostGradient.fetch
    calls = 0

    def fail(self: HostGradient) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise torch.OutOfMemoryError("no memory")
        return fetch(self)

    with offload_gradients(model.parameters()):
        model.loss(0).backward()
        twin.loss(0).backward()
        monkeypatch.setattr(HostGradient, "fetch", fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert all_offloaded(model)
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))

"""Streamed weights after forks, aborted steps, and moves that ran out of memory."""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from spillover import HostOutOfMemory, StateError, stream_parameters
from spillover.hooks import _parameters_block, _parameters_engine

MIB = 1 << 20


def make_model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Linear(width, width) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(width, width))


def gradients(model: nn.Module, width: int = 8) -> list[torch.Tensor]:
    model.zero_grad()
    model(torch.ones(2, width, device="cuda")).square().mean().backward()
    return [parameter.grad.clone().cpu() for parameter in model.parameters()]


def test_a_forked_child_drops_a_streamed_model_in_silence() -> None:
    model = make_model()
    handle = stream_parameters(model)
    model(torch.ones(2, 8, device="cuda"))
    child = os.fork()
    if child == 0:
        # Nothing may reach the parent's test runner, whatever happens.
        status = 3
        try:
            signal.alarm(60)
            errors: list[Any] = []
            sys.excepthook = lambda *error: errors.append(error)
            sys.unraisablehook = errors.append
            del handle, model
            gc.collect()
            status = len(errors)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert len(gradients(model)) == 8


def test_only_the_owner_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 0)
    _parameters_engine._synchronize(device, os.getpid() + 1)
    assert not waited
    _parameters_engine._synchronize(device, os.getpid())
    assert waited == [device]


def test_a_model_that_does_not_fit_keeps_its_gradients() -> None:
    width = 2048  # 16 MiB a weight, so that each has a segment of its own.
    model = make_model(width)
    model.append(nn.Linear(width, width))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + 20 * MIB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            stream_parameters(model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter.cpu(), value)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad.cpu(), torch.full_like(value, 2.0))
        assert parameter.grad.device == parameter.device
    with stream_parameters(model) as handle:
        assert handle.stats.blocks_streamed == 3
        assert handle.stats.resident_bytes > 32 * MIB


def test_a_host_without_memory_keeps_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().cuda()
    expected = gradients(model)
    before = [parameter.grad.clone().cpu() for parameter in model.parameters()]
    empty = _parameters_block.empty_pinned
    calls: list[Any] = []

    def refuse(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 2:
            raise HostOutOfMemory("on purpose")
        return empty(shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(_parameters_block, "empty_pinned", refuse)
        with pytest.raises(HostOutOfMemory):
            stream_parameters(model)
    after = [parameter.grad.cpu() for parameter in model.parameters()]
    assert all(map(torch.equal, after, before))
    with stream_parameters(model):
        assert all(map(torch.equal, gradients(model), expected))


def test_a_removed_handle_holds_no_blocks() -> None:
    model = make_model()
    handle = stream_parameters(model)
    gradients(model)
    model.zero_grad()
    streamer = handle._streamer
    assert streamer is not None
    blocks = [weakref.ref(block) for block in streamer.blocks]
    memory = weakref.ref(streamer.blocks[0].gradients)
    fetched = handle.stats.fetched_bytes
    handle.remove()
    gc.collect()
    assert memory() is None
    assert not any(reference() for reference in blocks)
    stats = handle.stats
    assert (stats.blocks_streamed, stats.streamed_bytes, stats.resident_bytes) == (0, 0, 0)
    assert stats.device_bytes == 0
    assert stats.fetched_bytes == fetched


class Block(nn.Linear):
    """Raises in the middle of forward when it is told to."""

    error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_that_is_aborted_can_be_repeated(kind: type[BaseException], place: str) -> None:
    model = make_model()
    torch.manual_seed(0)
    model[0] = nn.Sequential(*[Block(8, 8) for _ in range(3)])
    expected = gradients(model.cuda())
    with stream_parameters(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            if place == "forward":
                model[0][1].error = kind("on purpose")
                with pytest.raises(kind):
                    gradients(model)
                model[0][1].error = None
            else:
                model.zero_grad()

                def fail(gradient: torch.Tensor) -> None:
                    raise kind("on purpose")

                hidden: list[torch.Tensor] = []
                hook = model[0][1].register_forward_hook(
                    lambda block, args, output, hidden=hidden: hidden.append(output)
                )
                value = model(torch.ones(2, 8, device="cuda")).square().mean()
                hook.remove()
                hidden[0].register_hook(fail)
                with pytest.raises(kind):
                    value.backward()
                del value, hidden
            optimizer.step()
            assert all(map(torch.equal, gradients(model), expected))


def test_a_backward_after_remove_is_refused() -> None:
    model = make_model()
    handle = stream_parameters(model)
    value = model(torch.ones(2, 8, device="cuda")).square().mean()
    handle.remove()
    with pytest.raises(StateError, match=r"no longer streamed|ceased to be streamed"):
        value.backward()

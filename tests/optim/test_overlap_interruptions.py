"""Steps and waits that something breaks into: Ctrl-C, signals."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from overlap_models import set_ones
from torch import nn

from spillover.optim import SGD, _awaited, _overlap

pytestmark = pytest.mark.usefixtures("lazy_worker")


def make() -> tuple[nn.Sequential, SGD, list[torch.Tensor]]:
    """A model whose step subtracts 1, the optimizer, and weights as they are after it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    set_ones(model)
    return model, optimizer, [each.detach() - 1 for each in model.parameters()]


def break_into(
    patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, what: Callable[[], None]
) -> None:
    """Call ``what`` before the call of that number."""
    inner, calls = getattr(owner, name), iter(range(1_000))

    def replaced(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            what()
        return inner(*arguments, **options)

    patch.setattr(owner, name, replaced)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [0, 3, 7])
def test_an_interrupted_start_is_ended_by_who_waits(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, wanted = make()
    with monkeypatch.context() as patch:
        break_into(patch, _awaited, "begin", number, interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.synchronize()
    assert all(map(torch.equal, model.parameters(), wanted))
    optimizer.step()
    assert all(
        torch.equal(each, one - 1) for each, one in zip(model.parameters(), wanted, strict=True)
    )


@pytest.mark.parametrize("number", [3, 6])
def test_a_signal_handler_that_reads_weights_while_a_step_starts(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that saves a checkpoint when the job is about to be preempted."""
    model, optimizer, wanted = make()
    found: list[torch.Tensor] = []

    def handler(*_: Any) -> None:
        found.extend(each.clone() for each in model.state_dict().values())

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patch:
            break_into(
                patch, _awaited, "begin", number, lambda: signal.raise_signal(signal.SIGUSR1)
            )
            optimizer.step()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, model.parameters(), wanted))


def test_an_interrupted_wait_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, wanted = make()
    optimizer.step()
    with monkeypatch.context() as patch:
        break_into(patch, _overlap.PendingStep, "_wait_until", 0, interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(8, device="cuda"))
    assert all(map(torch.equal, model.parameters(), wanted))


def test_an_interrupted_step_leaves_nothing_under_way_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, wanted = make()
    kept = model[0].weight.data
    with monkeypatch.context() as patch:
        break_into(patch, _overlap.PendingStep, "_wait_until", 0, interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert torch.equal(kept, wanted[0])

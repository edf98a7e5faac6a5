"""Steps and waits that something breaks into: Ctrl-C, signals, garbage collection, forks."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from overlap_models import LazyWorker, set_ones
from torch import nn

from spillover import StateError
from spillover.optim import SGD, _awaited, _host_step, _overlap, _staging

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


class Trainer:
    """Garbage in a cycle whose end waits for updates, and notes what that raises."""

    def __init__(self, optimizer: SGD, errors: list[BaseException]) -> None:
        self.optimizer, self.errors = optimizer, errors
        self.itself = self

    def __del__(self) -> None:
        try:
            self.optimizer.synchronize()
        except BaseException as error:
            self.errors.append(error)


def test_garbage_that_the_worker_collects_cannot_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, wanted = make()
    errors: list[BaseException] = []
    gc.disable()
    try:
        Trainer(optimizer, errors)
        with monkeypatch.context() as patch:
            break_into(patch, _staging.Staging, "start_departure", 0, gc.collect)
            optimizer.step()
            optimizer.synchronize()
    finally:
        gc.enable()
    assert ["cannot wait for updates" in str(error) for error in errors] == [True]
    assert all(map(torch.equal, model.parameters(), wanted))


def test_garbage_that_another_step_collects_cannot_stop_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, wanted = make()
    other = nn.Linear(8, 8).cuda()
    set_ones(other)
    beside = SGD(other.parameters(), lr=1.0)
    errors: list[BaseException] = []
    optimizer.step()
    gc.disable()
    try:
        Trainer(optimizer, errors)
        with monkeypatch.context() as patch:
            break_into(patch, _host_step._Pipeline, "_update_batch", 0, gc.collect)
            beside.step()
    finally:
        gc.enable()
    assert ["cannot wait for updates" in str(error) for error in errors] == [True]
    assert all(map(torch.equal, model.parameters(), wanted))


def test_garbage_that_a_use_of_a_weight_collects_cannot_stop_the_worker() -> None:
    model, optimizer, wanted = make()
    optimizer.step()
    # As a __del__ would that is called within, which needs a collection at the right instant.
    with _awaited._lock, pytest.raises(StateError, match="cannot wait for updates"):
        model[0].weight.sum()
    assert all(map(torch.equal, model.parameters(), wanted))


def test_a_failure_is_not_lost_in_a_fork(
    monkeypatch: pytest.MonkeyPatch, lazy_worker: LazyWorker
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    model, optimizer, wanted = make()
    with monkeypatch.context() as patch:
        patch.setattr(_staging.Staging, "start_departure", fail)
        optimizer.step()
        _overlap._before_fork()
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.synchronize()
    assert all(map(torch.equal, model.parameters(), wanted))

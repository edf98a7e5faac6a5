"""Overlapped steps that fail: who hears of it, and that nothing is lost or done twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair
from overlap_models import LazyWorker, Net, loss_of
from test_host_failures import fail_at
from torch import nn

from spillover import ConfigError
from spillover.optim import SGD, AdamW, _awaited, _staging

pytestmark = pytest.mark.usefixtures("lazy_worker")


class Training:
    """Two steps with overlap, of which the second may fail."""

    def __init__(self, pair: Pair, dtype: torch.dtype, *, overlaps: bool, offloads: bool) -> None:
        self.model = Net(dtype)
        options: dict[str, Any] = {"overlap": self.model} if overlaps else {}
        self.optimizer = pair.ours(
            self.model.parameters(), **pair.options, offload_gradients=offloads, **options
        )
        for step in range(2):
            loss_of(self.model, step).backward()
            if step == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def end(self) -> list[torch.Tensor]:
        self.optimizer.synchronize()
        state = self.optimizer.state_dict()["state"]
        found = [each.detach().clone() for each in self.model.parameters()]
        return found + [each for entry in state.values() for each in entry.values()]


def call(function: Any) -> bool:
    """Whether it failed on purpose."""
    try:
        function()
    except RuntimeError as error:
        if str(error) != "on purpose":
            raise
        (note,) = error.__notes__
        assert "step() may be called again" in note or "goes on with it" in note
        return True
    return False


REMEDIES = {
    "the same step again": lambda one: one.optimizer.step(),
    "synchronize": lambda one: one.optimizer.synchronize(),
    "a forward": lambda one: loss_of(one.model, 2),
    "a read of each weight": lambda one: [each.sum() for each in one.model.parameters()],
    "state_dict": lambda one: one.optimizer.state_dict(),
    "a step without gradients": lambda one: (
        one.model.zero_grad(),
        one.optimizer.step(),
    ),
}


@pytest.mark.parametrize("pair", CLASSES[:1] + CLASSES[2:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["start_arrival", "start_departure"])
@pytest.mark.parametrize("offloads", [False, True])
def test_what_waits_next_hears_of_a_failure_and_what_waits_then_finishes_it(
    pair: Pair, dtype: torch.dtype, method: str, offloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Training(pair, dtype, overlaps=False, offloads=offloads)
    expected.optimizer.step()
    wanted = expected.end()
    remedies = itertools.cycle(REMEDIES.values())
    for number in itertools.count():
        found = Training(pair, dtype, overlaps=True, offloads=offloads)
        found.optimizer.synchronize()
        with monkeypatch.context() as patch:
            calls = fail_at(patch, method, number, before=number % 2 == 0)
            found.optimizer.step()
            has_failed = call(found.optimizer.synchronize)
            assert has_failed == (len(calls) > number)
        if not has_failed:
            break
        remedy = next(remedies)
        with monkeypatch.context() as patch:
            fail_at(patch, method, 0, before=True)
            has_failed_again = call(lambda: remedy(found))  # noqa: B023
        if has_failed_again:
            remedy(found)
        same = list(map(torch.equal, found.end(), wanted))
        assert all(same), (number, remedy, same)
    assert number > 2


def test_weights_that_had_left_when_it_failed_are_not_overtaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unrecordable:
        def record(self, stream: Any) -> None:
            raise RuntimeError("on purpose")

    inner: Any = _staging.Staging.start_departure

    def replaced(staging: _staging.Staging, slot: Any, batch: Any) -> None:
        event, slot.left = slot.left, Unrecordable()
        try:
            inner(staging, slot, batch)
        finally:
            slot.left = event

    runs = [
        Training(CLASSES[0], torch.float32, overlaps=overlaps, offloads=False)
        for overlaps in (True, False)
    ]
    runs[1].optimizer.step()
    runs[0].optimizer.synchronize()
    with monkeypatch.context() as patch:
        patch.setattr(_staging.Staging, "start_departure", replaced)
        runs[0].optimizer.step()
        assert call(runs[0].optimizer.synchronize)
    assert all(map(torch.equal, *(one.end() for one in runs)))


def test_a_failure_is_raised_by_the_forward_of_a_layer_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), overlap=model)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    with monkeypatch.context() as patch:
        fail_at(patch, "start_arrival", 4, before=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="on purpose"):
            loss_of(model, 1)
    # Whose updates were sent before are not touched by it.
    assert not _awaited.is_awaited(model.table.weight)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()
    optimizer.synchronize()
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {3.0}


def test_other_gradients_are_a_step_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    before = [each.detach().clone() for each in model.parameters()]
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    others = [torch.ones_like(each) for each in model.parameters()]
    with monkeypatch.context() as patch:
        fail_at(patch, "start_arrival", 2, before=True)
        optimizer.step()
        for each, gradient in zip(model.parameters(), others, strict=True):
            each.grad = gradient
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.step()
    optimizer.step()
    optimizer.step()  # With the same gradients, which is a third step.
    for each, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(each, old - 1 - 1 - 1)


def test_what_can_be_known_is_raised_by_the_step_itself(lazy_worker: LazyWorker) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, sparse=True)).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    model[0](torch.ones(4, device="cuda")).sum().backward()
    model[1](torch.tensor([1], device="cuda")).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()
    assert not _awaited.is_awaited(model[0].weight)
    model[1].weight.grad = None
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ConfigError, match="lr must be"):
        optimizer.step()
    assert lazy_worker.batches == 0

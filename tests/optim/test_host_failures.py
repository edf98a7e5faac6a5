"""Steps on the host that fail on the way: what is said, and that a repeated step ends right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair, make_weights, masters, recorded, step
from torch import nn

from spillover.optim import AdamW, _staging

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)

# Weights then pass in several slots, and large ones in pieces.
_SLOT_BYTES = 4 << 10


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", _SLOT_BYTES)
    monkeypatch.setattr(_staging, "_stagings", {})


def fail_at(patch: pytest.MonkeyPatch, method: str, call: int, *, before: bool) -> list[int]:
    """Have a call of the staging fail, before or after what it does."""
    inner: Any = getattr(_staging.Staging, method)
    calls: list[int] = []

    def replaced(staging: _staging.Staging, *arguments: Any) -> None:
        calls.append(len(calls))
        if before and calls[-1] == call:
            raise RuntimeError("on purpose")
        inner(staging, *arguments)
        if calls[-1] == call:
            raise RuntimeError("on purpose")

    patch.setattr(_staging.Staging, method, replaced)
    return calls


def failure_of(optimizer: torch.optim.Optimizer) -> RuntimeError | None:
    """What was raised on purpose by a step."""
    try:
        optimizer.step()
    except RuntimeError as error:
        if str(error) != "on purpose":
            raise
        return error
    return None


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["start_arrival", "start_departure"])
@pytest.mark.parametrize("before", [True, False])
def test_a_repeated_step_ends_as_if_it_had_not_failed(
    pair: Pair, dtype: torch.dtype, method: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = make_weights(dtype)
    twin = pair.ours(twins, **pair.options)
    for number in range(2):
        step(twin, twins, number, dtype)
    for call in itertools.count():
        weights = make_weights(dtype)
        optimizer = pair.ours(weights, **pair.options)
        step(optimizer, weights, 0, dtype)
        for weight, gradient in zip(weights, recorded(1, dtype), strict=True):
            weight.grad = gradient.to(weight)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, method, call, before=before)
            error = failure_of(optimizer)
            if error is None:
                assert len(calls) <= call
                break
            (note,) = error.__notes__
            assert "step() may be called again" in note or "finishes it" in note
            fail_at(patch, method, 0, before=before)
            has_failed_again = failure_of(optimizer) is not None
        if has_failed_again:
            optimizer.step()
        assert all(map(torch.equal, weights, twins))
        assert all(map(torch.equal, masters(optimizer, weights), masters(twin, twins)))
        for one, other in zip(optimizer.state.values(), twin.state.values(), strict=True):
            assert one.get("step") == other.get("step")
    assert call > 2


def test_other_gradients_are_a_step_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.ones(100, device="cuda")) for _ in range(20)]
    optimizer = AdamW(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with monkeypatch.context() as patch:
        fail_at(patch, "start_arrival", 4, before=True)
        with pytest.raises(RuntimeError, match="on purpose") as caught:
            optimizer.step()
    updated = [entry["step"].item() for entry in optimizer.state.values()]
    count = int(sum(updated))
    assert 0 < count < 20
    (note,) = caught.value.__notes__
    assert note.startswith(f"{count} of 20 parameters had been updated")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [entry["step"].item() for entry in optimizer.state.values()] == [n + 1 for n in updated]


def test_weights_that_could_not_be_sent_do_not_hide_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.ones(3000, device="cuda"))
    optimizer = AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    with monkeypatch.context() as patch:
        fail_at(patch, "start_departure", 1, before=True)
        with pytest.raises(RuntimeError, match="on purpose") as caught:
            optimizer.step()
    assert "the first" in caught.value.__notes__[0]
    with torch.no_grad():
        weight.fill_(7.0)
    weight.grad = None
    optimizer.step()
    assert (weight == 7.0).all()


def test_gradients_off_the_device_and_their_factors_outlive_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*, fails: bool) -> list[torch.Tensor]:
        weights = make_weights(torch.bfloat16)
        optimizer = AdamW(weights, lr=0.1, offload_gradients=True)
        for number in range(2):
            sum((weight.float() ** 2).sum() * (number + 1) for weight in weights).backward()
            nn.utils.clip_grad_norm_(weights, 0.5)
            with monkeypatch.context() as patch:
                if fails:
                    fail_at(patch, "start_departure", 1, before=True)
                    assert failure_of(optimizer) is not None
            optimizer.step()
            optimizer.zero_grad()
        return masters(optimizer, weights)

    assert all(map(torch.equal, run(fails=True), run(fails=False)))

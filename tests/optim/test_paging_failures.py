"""A step that fails loses nothing: its state is whole, it says what is updated, and can go on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_programs import (
    KIB,
    Lion,
    Net,
    assert_same,
    assert_same_entry,
    backward,
    failing,
    groups_of,
    train,
)
from torch import nn

from spillover import CorruptData, HostOutOfMemory, StorageError
from spillover.emulator import StorageFault, faults
from spillover.optim import _paging_transfer, page, unpage

BUCKET = 8 * KIB

#: torch.optim hides the module.
ADAM = importlib.import_module("torch.optim.adam")


def make(
    paging: dict[str, Any] | None, steps: int = 2, **options: Any
) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = torch.optim.Adam(groups_of(model), **options)
    if paging is not None:
        page(optimizer, bucket_bytes=BUCKET, **paging)
    train(model, optimizer, steps)
    return model, optimizer


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Weights and state as they are, without holding them."""
    weights = [weight.detach().clone() for weight in model.parameters()]
    entries = [
        {name: value.clone() for name, value in optimizer.state[weight].items()}
        if weight in optimizer.state
        else {}
        for weight in model.parameters()
    ]
    return [weights, entries]


def assert_unchanged(model: nn.Module, optimizer: torch.optim.Optimizer, before: list[Any]) -> None:
    weights, entries = before
    for weight, old, entry in zip(model.parameters(), weights, entries, strict=True):
        assert torch.equal(weight, old)
        if entry:
            assert_same_entry(optimizer.state[weight], entry)
        else:
            assert weight not in optimizer.state


def notes_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    return "\n".join(getattr(error.value, "__notes__", []))


@pytest.mark.parametrize("steps", [0, 2])
def test_no_device_memory_for_the_first_bucket(steps: int) -> None:
    model, optimizer = make({}, steps)
    backward(model, 7)
    before = copied(model, optimizer)
    error = torch.OutOfMemoryError("on purpose")
    owner, name = (_paging_transfer, "on_device") if steps else (torch, "zeros_like")
    with failing(owner, name, 1, error), pytest.raises(torch.OutOfMemoryError) as caught:
        optimizer.step()
    assert "No parameter's state has been changed" in notes_of(caught)
    assert_unchanged(model, optimizer, before)
    optimizer.step()
    other, reference = make(None, steps)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))


@pytest.mark.parametrize("call", range(5, 16, 2))
def test_want_of_device_memory_for_later_buckets_only_costs_overlap(call: int) -> None:
    model, optimizer = make({})
    backward(model, 7)
    with failing(_paging_transfer, "on_device", call, torch.OutOfMemoryError("on purpose")):
        optimizer.step()
    other, reference = make(None)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("call", [1, 3, 5])
def test_a_step_that_fails_between_buckets_is_finished_by_the_next(steps: int, call: int) -> None:
    model, optimizer = make({}, steps)
    backward(model, 7)
    with failing(ADAM, "adam", call, torch.OutOfMemoryError("on purpose")):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            optimizer.step()
        if call > 1:
            assert "had been updated by this step, with their state" in notes_of(caught)
            assert "Calling step() again with the same gradients" in notes_of(caught)
        assert "may have been changed in part" in notes_of(caught)
    optimizer.step()
    other, reference = make(None, steps)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))
    # And the step after it is one of all parameters again, also with the same gradients.
    optimizer.step()
    reference.step()
    assert_same((model, optimizer), (other, reference))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_new_gradients_make_a_new_step(set_to_none: bool) -> None:
    model, optimizer = make({})
    backward(model, 7)
    with failing(ADAM, "adam", 3, RuntimeError("on purpose")), pytest.raises(RuntimeError):
        optimizer.step()
    counts = [int(entry["step"]) for entry in optimizer.state.values()]
    assert set(counts) == {2, 3}
    optimizer.zero_grad(set_to_none=set_to_none)
    backward(model, 8)
    optimizer.step()
    after = [int(entry["step"]) for entry in optimizer.state.values()]
    assert after == [count + 1 for count in counts]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "_foreach_sqrt"),
        ({"capturable": True}, "_foreach_sqrt"),
        ({"fused": True}, "_fused_adam_"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*capturable=True:UserWarning")
def test_step_counts_are_put_back(options: dict[str, Any], name: str) -> None:
    model, optimizer = make({}, **options)
    backward(model, 7)
    before = copied(model, optimizer)
    error = torch.OutOfMemoryError("on purpose")
    with failing(torch, name, 1, error), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    optimizer.step()
    other, reference = make(None, **options)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))


def test_an_update_that_fails_half_way_says_so() -> None:
    model = Net()
    optimizer = page(torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    backward(model, 0)
    error = torch.OutOfMemoryError("on purpose")
    with failing(torch, "_foreach_sqrt", 1, error), pytest.raises(type(error)) as caught:
        optimizer.step()
    assert "may have been changed in part; their state is that before" in notes_of(caught)
    assert not optimizer.state


@pytest.mark.parametrize("whole", [False, True])
def test_hooks_and_closures_that_raise(whole: bool) -> None:
    model = Net()
    kind: Any = Lion if whole else torch.optim.Adam
    optimizer = page(kind(model.parameters()))
    train(model, optimizer, 2)
    backward(model, 7)
    before = copied(model, optimizer) if not whole else None

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        optimizer.step()
    handle.remove()
    with pytest.raises(ValueError, match="on purpose"):
        optimizer.step(fail)
    if before:
        assert_unchanged(model, optimizer, before)
    other = Net()
    reference = kind(other.parameters())
    train(other, reference, 2)
    backward(other, 7)
    for each in (optimizer, reference):
        each.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_unpaging_without_room_changes_nothing() -> None:
    model, optimizer = make({})
    before = copied(model, optimizer)
    error = torch.OutOfMemoryError("on purpose")
    with failing(_paging_transfer, "on_device", 3, error), pytest.raises(type(error)):
        unpage(optimizer)
    assert_unchanged(model, optimizer, before)
    train(model, optimizer, 1, first=2)
    other, reference = make(None)
    train(other, reference, 1, first=2)
    assert_same((model, optimizer), (other, reference))


def test_host_memory_that_runs_out_in_a_step() -> None:
    model = Net()
    # What it will make is not known before its first step.
    optimizer = page(Lion(model.parameters()), host_budget="16KiB")
    backward(model, 0)
    with pytest.raises(HostOutOfMemory) as caught:
        optimizer.step()
    assert "The step is done" in notes_of(caught)
    other = Net()
    reference = Lion(other.parameters())
    backward(other, 0)
    reference.step()
    for step in range(1, 3):
        for each, found in ((model, optimizer), (other, reference)):
            train(each, found, 1, first=step)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    assert optimizer.state[model.layers[1].weight]["momentum"].device.type == "cpu"


# ---- disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses_writes(error: Any, tmp_path: Path) -> None:
    model, optimizer = make({"tier": "disk", "directory": tmp_path})
    backward(model, 7)
    notes = []
    with faults(storage=[StorageFault("write", error=error, times=None)]):
        # As often as there are buckets, at most; what cannot be written stays in host memory.
        while len(notes) < 20:
            try:
                optimizer.step()
                break
            except StorageError as found:
                notes += found.__notes__
    assert notes
    other, reference = make(None)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))
    for each, found in ((model, optimizer), (other, reference)):
        train(each, found, 2, first=8)
    assert_same((model, optimizer), (other, reference))


@pytest.mark.parametrize("kind", ["flip", "error"])
def test_a_read_that_fails_can_be_repeated(kind: Any, tmp_path: Path) -> None:
    model, optimizer = make({"tier": "disk", "directory": tmp_path})
    backward(model, 7)
    torch.cuda.synchronize()
    expected = CorruptData if kind == "flip" else StorageError
    # Any one may be of a read ahead, or of a bit where a block is padded.
    plan = [StorageFault("read", kind, times=None)]
    with faults(storage=plan), pytest.raises(expected):
        optimizer.step()
    optimizer.step()
    other, reference = make(None)
    backward(other, 7)
    reference.step()
    assert_same((model, optimizer), (other, reference))

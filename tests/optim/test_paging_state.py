"""What a program sees of a paged optimizer: state, checkpoints, hooks, copies, and the way back."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_programs import (
    KIB,
    Lion,
    Net,
    assert_same,
    assert_same_bits,
    assert_same_entry,
    backward,
    groups_of,
    train,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import spillover
from spillover import StateError
from spillover._pinned import host_pool
from spillover.optim import page, unpage

TIERS = ["host", "auto", "disk"]


@pytest.fixture
def paging(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Options of page() for the tier that the test is parametrized with."""
    tier = request.param
    options: dict[str, Any] = {"tier": tier, "bucket_bytes": 8 * KIB}
    if tier != "host":
        options["directory"] = tmp_path
    if tier == "auto":
        options["host_budget"] = 16 * KIB
    return options


def pair(
    paging: dict[str, Any] | None, steps: int = 3, **options: Any
) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), **options)
    if paging is not None:
        page(optimizer, **paging)
    train(model, optimizer, steps)
    return model, optimizer


# ---- state between steps -------------------------------------------------------------------------


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_state_is_on_the_host_and_true_after_each_step(paging: dict[str, Any]) -> None:
    model, optimizer = pair(paging, 0)
    other, reference = pair(None, 0)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        train(other, reference, 1, first=step)
        for weight, wanted in zip(model.parameters(), other.parameters(), strict=True):
            if wanted in reference.state:
                assert_same_entry(optimizer.state[weight], reference.state[wanted])
                for value in optimizer.state[weight].values():
                    assert value.device.type == "cpu" or value.numel() == 1
    assert model.unused.weight not in optimizer.state
    assert model.frozen.weight not in optimizer.state


def test_host_state_is_pinned() -> None:
    model, optimizer = pair({})
    assert optimizer.state[model.layers[0].weight]["exp_avg"].is_pinned()


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_what_is_written_into_state_counts(paging: dict[str, Any]) -> None:
    def run(options: dict[str, Any] | None) -> tuple[Net, torch.optim.Optimizer]:
        model, optimizer = pair(options)
        entry = optimizer.state[model.layers[0].weight]
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"] *= 0.5
        entry = optimizer.state[model.layers[1].weight]
        entry["exp_avg"] = entry["exp_avg"] * 2
        optimizer.state[model.layers[2].weight].update(
            exp_avg=torch.ones_like(model.layers[2].weight)
        )
        train(model, optimizer, 3, first=3)
        return model, optimizer

    assert_same(run(paging), run(None))


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_held_tensors_change_with_the_state(paging: dict[str, Any]) -> None:
    model, optimizer = pair(paging)
    other, reference = pair(None)
    weight, wanted = model.layers[0].weight, other.layers[0].weight
    held = optimizer.state[weight]["exp_avg"]
    view = optimizer.state[weight]["exp_avg_sq"].view(-1)
    array = optimizer.state[model.layers[1].weight]["exp_avg"].numpy()
    assert optimizer.state[weight]["exp_avg"] is held
    for step in range(3, 5):
        train(model, optimizer, 1, first=step)
        train(other, reference, 1, first=step)
        # Without asking the optimizer, so that nobody would wait for a copy here.
        with_reference = reference.state[wanted]
        assert torch.equal(held, with_reference["exp_avg"].cpu())
        assert torch.equal(view, with_reference["exp_avg_sq"].cpu().view(-1))
        expected = reference.state[other.layers[1].weight]["exp_avg"].cpu()
        assert torch.equal(torch.from_numpy(array), expected)


def test_entries_are_dictionaries() -> None:
    model, optimizer = pair({})
    entry = optimizer.state[model.layers[0].weight]
    assert isinstance(entry, dict)
    names = ["step", "exp_avg", "exp_avg_sq"]
    assert list(entry) == list(entry.keys()) == list(dict(entry)) == names
    for found in (dict(entry), {**entry}, copy.copy(entry), entry.copy(), copy.deepcopy(entry)):
        assert type(found) is dict
        assert_same_entry(found, entry)
    assert entry.get("other", 7) == 7
    assert entry.get("exp_avg") is entry["exp_avg"]
    assert all(isinstance(value, torch.Tensor) for value in entry.values())
    assert [name for name, _ in entry.items()] == names
    assert entry.pop("exp_avg").device.type == "cpu"
    assert "exp_avg" not in entry
    assert "exp_avg_sq" in repr(entry)
    state = optimizer.state
    fresh = nn.Parameter(torch.zeros(3, device="cuda"))
    assert state.get(fresh) is None
    assert state.setdefault(fresh, {"count": 3}) == {"count": 3}
    del state[fresh]
    assert state[fresh] == {}
    state.clear()
    train(model, optimizer, 1)


# ---- checkpoints ---------------------------------------------------------------------------------


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file)
    return found


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_checkpoints_are_exchanged_with_torch(paging: dict[str, Any]) -> None:
    found, expected = pair(paging, amsgrad=True), pair(None, amsgrad=True)
    ours, theirs = saved(found[1]), saved(expected[1])
    assert list(ours) == list(theirs)
    assert list(ours["state"]) == list(theirs["state"])
    assert ours["param_groups"] == theirs["param_groups"]
    for key, entry in theirs["state"].items():
        assert type(ours["state"][key]) is dict
        assert_same_entry(ours["state"][key], entry)
    for checkpoint in (ours, theirs):
        for target in (paging, None):
            model, optimizer = pair(target, 1, amsgrad=True)
            model.load_state_dict(expected[0].state_dict())
            # torch's step counts are those of what it has loaded.
            optimizer.load_state_dict(copy.deepcopy(checkpoint))
            train(model, optimizer, 2, first=3)
            other, reference = pair(None, 1, amsgrad=True)
            other.load_state_dict(expected[0].state_dict())
            reference.load_state_dict(copy.deepcopy(theirs))
            train(other, reference, 2, first=3)
            assert_same((model, optimizer), (other, reference))


def test_loaded_state_is_a_copy_of_the_parameters_dtype() -> None:
    model = Net(torch.bfloat16)
    optimizer = page(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, 1)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for entry in checkpoint["state"].values():
        entry["exp_avg"] = entry["exp_avg"].float() + 1 / 3
    optimizer.load_state_dict(checkpoint)
    (key, weight), *_ = (
        (key, weight) for key, weight in enumerate(model.parameters()) if weight.numel() > 1
    )
    found = optimizer.state[weight]["exp_avg"]
    wanted = checkpoint["state"][key]["exp_avg"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    found.zero_()
    assert wanted.ne(0).any()


def test_users_hooks_of_checkpoints() -> None:
    model, optimizer = pair({})
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.append(type(state["state"][0]["exp_avg"]))
    )
    optimizer.register_load_state_dict_post_hook(
        lambda found: seen.append(found.state[model.layers[0].weight]["exp_avg"].device.type)
    )
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 3})
    found = optimizer.state_dict()
    assert found["mine"] == 3
    optimizer.load_state_dict(found)
    assert seen == [torch.Tensor, "cpu"]


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model, optimizer = pair({})
    before = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.AdamW([model.layers[0].weight])
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    for key, entry in before["state"].items():
        assert_same_entry(after["state"][key], entry)
    train(model, optimizer, 1)


# ---- the object ----------------------------------------------------------------------------------


def test_it_is_the_same_object_of_its_class() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    text = repr(optimizer)
    assert page(optimizer) is optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamW"
    assert repr(optimizer) == text
    with pytest.raises(StateError, match="paged already"):
        page(optimizer)


@pytest.mark.parametrize("whole", [False, True])
def test_hooks_fire_once_a_step(whole: bool) -> None:
    model = Net()
    weight = model.layers[0].weight
    optimizer = Lion(model.parameters()) if whole else torch.optim.AdamW(model.parameters())
    calls: list[str] = []

    def post(found: torch.optim.Optimizer, *_: Any) -> None:
        values = [each for each in found.state[weight].values() if isinstance(each, torch.Tensor)]
        assert all(each.device.type == "cpu" for each in values)
        calls.append("post")

    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    page(optimizer, bucket_bytes=1)
    optimizer.register_step_post_hook(post)
    optimizer.register_step_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "closure": lambda: 7})
    )
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        for _ in range(2):
            calls.clear()
            backward(model, 0)
            assert optimizer.step() == 7
            assert calls == ["pre", "post", "global"]
    finally:
        handle.remove()


def test_the_profiler_sees_one_step() -> None:
    model, optimizer = pair({"bucket_bytes": 1})
    backward(model, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert names == ["Optimizer.step#AdamW.step"]


@pytest.mark.parametrize("scheduled_first", [False, True])
@pytest.mark.filterwarnings("error")
def test_schedulers_made_before_and_after(scheduled_first: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)

    def schedule() -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    scheduler = schedule() if scheduled_first else None
    page(optimizer)
    scheduler = scheduler or schedule()
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state[model.layers[0].weight]["momentum_buffer"].device.type == "cpu"
    unpage(optimizer)
    optimizer.step()
    scheduler.step()
    assert optimizer.state[model.layers[0].weight]["momentum_buffer"].is_cuda


def test_a_step_that_was_taken_before_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    step = optimizer.step
    page(optimizer)
    backward(model, 0)
    with pytest.raises(StateError, match=r"before spillover\.optim\.page"):
        step()
    optimizer.step()


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_copies_and_pickles_are_paged(paging: dict[str, Any]) -> None:
    model, optimizer = pair(paging)
    twin_model, twin = copy.deepcopy((model, optimizer))
    again_model, again = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 2, first=3)
    for other, copied in ((twin_model, twin), (again_model, again)):
        assert type(copied) is type(optimizer)
        train(other, copied, 2, first=3)
        assert_same((other, copied), (model, optimizer))
        assert copied.state[other.layers[0].weight]["exp_avg"].device.type == "cpu"
        with pytest.raises(StateError, match="paged already"):
            page(copied)


def test_copies_of_an_optimizer_that_is_paged_whole() -> None:
    model = Net()
    optimizer = page(Lion(model.parameters()))
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for each, found in ((model, optimizer), (twin_model, twin)):
        train(each, found, 2, first=2)
    for one, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert twin.state[twin_model.layers[0].weight]["history"][0].device.type == "cpu"
    checkpoint = saved(optimizer)
    assert checkpoint["state"][0]["count"] == 4
    optimizer.load_state_dict(checkpoint)
    assert optimizer.state[model.layers[0].weight]["momentum"].device.type == "cpu"
    train(model, optimizer, 1)


def test_parameter_groups_that_are_added() -> None:
    def run(paged: bool) -> tuple[Net, torch.optim.Optimizer]:
        model = Net()
        parameters = list(model.parameters())
        optimizer = torch.optim.RMSprop(parameters[:4], momentum=0.9)
        if paged:
            page(optimizer, bucket_bytes=8 * KIB)
        train(model, optimizer, 2)
        optimizer.add_param_group({"params": parameters[4:], "lr": 0.1, "centered": True})
        train(model, optimizer, 2, first=2)
        return model, optimizer

    assert_same(run(True), run(False))


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_unpage_brings_the_state_back(paging: dict[str, Any]) -> None:
    model, optimizer = pair(paging)
    expected = pair(None)
    assert unpage(optimizer) is optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert_same((model, optimizer), expected)
    for entry in optimizer.state.values():
        assert type(entry) is dict
        assert entry["exp_avg"].is_cuda
    for each in ((model, optimizer), expected):
        train(*each, 2, first=3)
    assert_same((model, optimizer), expected)
    with pytest.raises(StateError, match="not paged"):
        unpage(optimizer)
    page(optimizer)
    train(model, optimizer, 1, first=5)
    train(*expected, 1, first=5)
    assert_same((model, optimizer), expected)


@pytest.mark.parametrize("paging", TIERS, indirect=True)
def test_state_that_is_there_moves_at_once(paging: dict[str, Any]) -> None:
    model, optimizer = pair(None)
    held = torch.cuda.memory_allocated()
    page(optimizer, **paging)
    assert torch.cuda.memory_allocated() < held - 30 * KIB
    train(model, optimizer, 2, first=3)
    expected = pair(None)
    train(*expected, 2, first=3)
    assert_same((model, optimizer), expected)


def test_a_model_that_is_moved_to_the_host_and_back() -> None:
    model, optimizer = pair({"bucket_bytes": 8 * KIB})
    expected = pair(None)
    model.cpu()
    model.cuda()
    train(model, optimizer, 2, first=3)
    train(*expected, 2, first=3)
    assert_same((model, optimizer), expected)


def test_an_optimizer_that_is_dropped_right_after_its_step() -> None:
    model, expected = Net(), Net()
    for each, paged in ((model, True), (expected, False)):
        backward(each, 0)
        optimizer = torch.optim.Adam(each.parameters())
        if paged:
            page(optimizer)
        optimizer.step()
        del optimizer
    filler = [host_pool().empty((4096,), torch.float32) for _ in range(8)]
    for each in filler:
        each.fill_(3.0)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(one, other)


def test_without_a_device() -> None:
    code = """
import pickle, torch
from spillover.optim import page, unpage
model = torch.nn.Linear(4, 4)
optimizer = page(torch.optim.AdamW(model.parameters()))
assert not torch.cuda.is_available()
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
again = pickle.loads(pickle.dumps(optimizer))
optimizer.load_state_dict(again.state_dict())
optimizer.step()
unpage(optimizer)
assert optimizer.state[model.weight]["step"] == 4
"""
    environment = {key: value for key, value in os.environ.items() if "SPILLOVER" not in key}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_a_compiled_step() -> None:
    model, optimizer = pair({"bucket_bytes": 8 * KIB}, 1)
    expected = pair(None, 2)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    optimizer.zero_grad(set_to_none=False)
    backward(model, 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    step()
    assert_same((model, optimizer), expected)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    optimizer = torch.optim.AdamW(Net().parameters())
    assert page(optimizer) is optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert unpage(optimizer) is optimizer


def test_figures() -> None:
    _, optimizer = pair({"bucket_bytes": 8 * KIB})
    (found,) = [
        each
        for each in spillover.stats().others["paging"]
        if each.optimizer == type(optimizer).__name__ and each.buckets
    ][-1:]
    sizes = [p.nbytes for p in Net().parameters() if p.requires_grad and p.numel() > 1]
    unused = Net().unused.weight.nbytes
    assert found.host_bytes == 2 * (sum(sizes) - unused)
    assert found.reserved_bytes == 2 * unused
    assert found.disk_bytes == 0
    assert found.in_buckets
    assert found.buckets > 2
    assert found.bucket_bytes_max <= 2 * max(sizes)

"""Optimizers on the host under what other tools do with optimizers."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair, copies, make_weights, masters, step
from torch import nn

from spillover import StateError
from spillover.optim import SGD, AdamW, Lion, page

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
each_moments = pytest.mark.parametrize("moments", ["float32", "bfloat16", "blockwise8"])


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    entries = optimizer.state_dict()["state"].values()
    return [torch.as_tensor(value).cpu() for entry in entries for value in entry.values()]


# ---- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["capturable", "differentiable", "fused"])
def test_a_checkpoint_of_a_run_with_other_ways_to_compute_loads(option: str) -> None:
    weights = make_weights()
    reference = torch.optim.AdamW(weights, lr=0.1, **{option: True})
    if option != "differentiable":
        step(reference, weights, 0, torch.float32)
    twins = copies(weights)
    optimizer = AdamW(twins)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    step(optimizer, twins, 1, torch.float32)
    again = torch.optim.AdamW(twins)
    again.load_state_dict(optimizer.state_dict())
    step(again, twins, 2, torch.float32)


@each_class
def test_a_checkpoint_loads_again_and_again(pair: Pair) -> None:
    weights = make_weights()
    optimizer = pair.ours(weights, **pair.options)
    step(optimizer, weights, 0, torch.float32)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, states(optimizer), states(optimizer)))


@each_class
@each_moments
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints(pair: Pair, moments: str, flatten: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def make(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(16, 8).to("cuda", torch.bfloat16)
        return model, pair.ours(model.parameters(), **pair.options, moments=moments)

    def train(model: nn.Module, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            value = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
            model(value.to("cuda", torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def parts(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }

    first, other = make(0), make(1)
    train(*first, range(3))
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(parts(*first), checkpoint_id=folder)
        loaded = parts(*other)
        dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(other[0], loaded["model"])
    set_optimizer_state_dict(*other, loaded["optimizer"], options=options)
    for each in (first, other):
        train(*each, range(3, 6))
    assert all(map(torch.equal, first[0].parameters(), other[0].parameters()))
    assert all(map(torch.equal, states(first[1]), states(other[1])))


# ---- state that others move --------------------------------------------------------------------


def move_state(optimizer: torch.optim.Optimizer) -> int:
    """What Lightning does when training begins and when it resumes; the peak of device memory."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if name != "step":
                if isinstance(value, torch.Tensor):
                    entry[name] = value.to("cuda", non_blocking=True)
                elif hasattr(value, "to"):
                    entry[name] = value.to("cuda")
    return torch.cuda.max_memory_allocated() - before


@each_class
@each_moments
def test_state_that_is_moved_to_the_device_stays_on_the_host(pair: Pair, moments: str) -> None:
    weights, twins = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    optimizer, twin = (
        pair.ours(each, **pair.options, moments=moments) for each in (weights, twins)
    )
    for number in range(4):
        peak = move_state(optimizer)
        assert peak <= 4 * 64 * 64 + 2048  # One state at a time.
        for entry in optimizer.state.values():
            assert not any(isinstance(v, torch.Tensor) and v.is_cuda for v in entry.values())
        if number == 2:
            optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))
        step(optimizer, weights, number, torch.bfloat16)
        step(twin, twins, number, torch.bfloat16)
    assert all(map(torch.equal, weights, twins))
    assert all(map(torch.equal, masters(optimizer, weights), masters(twin, twins)))


@pytest.mark.parametrize("way", ["disk", "auto", "overlap"])
@pytest.mark.filterwarnings("ignore")
def test_tools_with_state_on_disk_and_with_overlap(way: str, tmp_path: Path) -> None:
    weights, twins = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    options: dict[str, Any] = {
        "disk": {"tier": "disk", "directory": tmp_path},
        "auto": {"tier": "auto", "directory": tmp_path, "host_budget": "8KiB"},
        "overlap": {"overlap": nn.ParameterList(weights)},
    }[way]
    optimizer, twin = AdamW(weights, **options), AdamW(twins)

    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for number in range(4):
        move_state(optimizer)
        if number == 2:
            optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))
        step(twin, twins, number, torch.bfloat16)
        for weight, other in zip(weights, twins, strict=True):
            weight.grad = other.grad.clone()
        compiled() if number % 2 else optimizer.step()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(StateError, match="capture"):
            optimizer.step()
    optimizer.synchronize()
    assert all(map(torch.equal, weights, twins))
    assert all(map(torch.equal, masters(optimizer, weights), masters(twin, twins)))


def test_paged_state_that_is_moved_to_the_device_stays_on_the_host() -> None:
    weights, twins = make_weights(), make_weights()
    optimizer, twin = page(torch.optim.AdamW(weights)), torch.optim.AdamW(twins)
    for number in range(3):
        assert move_state(optimizer) <= 4 * 64 * 64 + 512
        step(optimizer, weights, number, torch.float32)
        step(twin, twins, number, torch.float32)
    assert all(map(torch.equal, weights, twins))


def test_state_that_is_assigned_counts() -> None:
    weights = make_weights()
    optimizer = AdamW(weights)
    step(optimizer, weights, 0, torch.float32)
    entry = optimizer.state[weights[1]]
    kept = entry["exp_avg"]
    entry["exp_avg"] = torch.full((300, 5), 2.0, device="cuda")
    assert entry["exp_avg"] is kept
    assert torch.equal(kept, torch.full((300, 5), 2.0))
    entry["exp_avg"] = torch.full((300, 5), 3.0, dtype=torch.float64, device="cuda")
    entry["mine"] = torch.ones(2, device="cuda")
    step(optimizer, weights, 0, torch.float32)
    assert (entry["exp_avg"] > 2.0).all()
    assert entry["mine"].tolist() == [1.0, 1.0]


# ---- torch.compile, CUDA graphs, groups --------------------------------------------------------


@each_class
@each_moments
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step(pair: Pair, moments: str) -> None:
    weights, twins = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    optimizer, twin = (
        pair.ours(each, **pair.options, moments=moments) for each in (weights, twins)
    )

    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for number in range(3):
        step(twin, twins, number, torch.bfloat16)
        for weight, other in zip(weights, twins, strict=True):
            weight.grad = other.grad.clone()
        compiled()
    assert all(map(torch.equal, weights, twins))


@each_class
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_with_a_hook_that_reads_the_groups(pair: Pair) -> None:
    weights, twins = make_weights(), make_weights()
    optimizer, twin = pair.ours(weights, **pair.options), pair.ours(twins, **pair.options)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda each, *_: seen.append(len(each.param_groups)))

    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for number in range(2):
        step(twin, twins, number, torch.float32)
        for weight, other in zip(weights, twins, strict=True):
            weight.grad = other.grad.clone()
        compiled()
    assert seen == [1, 1]
    assert all(map(torch.equal, weights, twins))


@each_class
def test_captures_are_refused(pair: Pair) -> None:
    weights = make_weights()
    optimizer = pair.ours(weights, **pair.options)
    step(optimizer, weights, 0, torch.float32)
    before = [*copies(weights), *copy.deepcopy(states(optimizer))]
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(StateError, match="CUDA graph"):
        optimizer.step()
    assert all(map(torch.equal, [*weights, *states(optimizer)], before))
    optimizer.step()


def test_parameters_in_no_order_are_refused() -> None:
    first, second = make_weights()[:2]
    optimizer = SGD([first])
    with pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": {second}})
    assert len(optimizer.param_groups) == 1


def test_lion_keeps_its_defaults_when_it_is_copied() -> None:
    weights = make_weights()
    copied = copy.deepcopy(Lion(weights))
    assert copied.param_groups[0].keys() == Lion(weights).param_groups[0].keys()

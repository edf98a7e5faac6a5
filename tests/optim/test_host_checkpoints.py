"""Checkpoints of optimizers on the host: in torch's format both ways, whatever form state has."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from host_cases import (
    CLASSES,
    TORCH_PAIRS,
    Pair,
    assert_close,
    copies,
    make_weights,
    masters,
    step,
)
from torch import nn

from spillover import ConfigError, HostOutOfMemory, HostPool
from spillover.optim import SGD, AdamW

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
each_moments = pytest.mark.parametrize("moments", ["float32", "bfloat16", "blockwise8"])


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state that went through a file, which holds plain tensors."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def run(
    optimizer: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    numbers: range,
    dtype: torch.dtype = torch.float32,
) -> None:
    for number in numbers:
        step(optimizer, weights, number, dtype)


@pytest.mark.parametrize("pair", TORCH_PAIRS, ids=str)
@pytest.mark.parametrize("source", ["ours", "reference"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_is_exchanged_with_torch(pair: Pair, source: str, steps: int) -> None:
    target = "reference" if source == "ours" else "ours"
    weights = make_weights()
    first = getattr(pair, source)(weights, **pair.options)
    run(first, weights, range(steps))
    twins = copies(weights)
    second = getattr(pair, target)(twins, **{**pair.options, "lr": 9.0})
    second.load_state_dict(saved(first))
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    assert set(second.param_groups[0]) == set(first.param_groups[0])
    for index, entry in first.state_dict()["state"].items():
        found = second.state_dict()["state"][index]
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value).cpu(), found[name].cpu())
    run(first, weights, range(steps, steps + 3))
    run(second, twins, range(steps, steps + 3))
    assert_close(twins, weights)
    second.load_state_dict(second.state_dict())


@each_class
@each_moments
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("master", ["float32", "split"])
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_resumed_run_is_the_same_bit_for_bit(
    pair: Pair, moments: str, device: str, master: str, weights_first: bool
) -> None:
    options = {**pair.options, "moments": moments, "master": master}
    weights = make_weights(torch.bfloat16, device)
    optimizer = pair.ours(weights, **options)
    run(optimizer, weights, range(3), torch.bfloat16)
    values, state = copies(weights), saved(optimizer)
    run(optimizer, weights, range(3, 6), torch.bfloat16)

    fresh = make_weights(torch.bfloat16, device, seed=1)
    resumed = pair.ours(fresh, **options)

    def load_weights() -> None:
        with torch.no_grad():
            for weight, value in zip(fresh, values, strict=True):
                weight.copy_(value)

    if weights_first:
        load_weights()
    resumed.load_state_dict(state)
    if not weights_first:
        load_weights()
    run(resumed, fresh, range(3, 6), torch.bfloat16)
    assert all(map(torch.equal, fresh, weights))
    assert all(map(torch.equal, masters(resumed, fresh), masters(optimizer, weights)))


@each_class
@each_moments
def test_copies_and_pickles(pair: Pair, moments: str) -> None:
    weights = make_weights(torch.bfloat16, "cpu")
    optimizer = pair.ours(weights, **pair.options, moments=moments, master="split")
    run(optimizer, weights, range(2), torch.bfloat16)
    twins = [copy.deepcopy((weights, optimizer))]
    twins.append(pickle.loads(pickle.dumps((weights, optimizer))))
    run(optimizer, weights, range(2, 4), torch.bfloat16)
    for twin_weights, twin in twins:
        assert twin.stats() == optimizer.stats()
        run(twin, twin_weights, range(2, 4), torch.bfloat16)
        assert all(map(torch.equal, twin_weights, weights))


@each_class
@pytest.mark.parametrize("source", ["float32", "split"])
def test_masters_go_from_one_form_to_the_other(pair: Pair, source: str) -> None:
    target = "split" if source == "float32" else "float32"
    weights = make_weights(torch.bfloat16, "cpu")
    first = pair.ours(weights, **pair.options, master=source)
    run(first, weights, range(3), torch.bfloat16)
    twins = copies(weights)
    second = pair.ours(twins, **pair.options, master=target)
    second.load_state_dict(saved(first))
    for number in (3, 4):
        run(first, weights, range(number, number + 1), torch.bfloat16)
        run(second, twins, range(number, number + 1), torch.bfloat16)
        assert all(map(torch.equal, masters(first, weights), masters(second, twins)))


def test_split_masters_follow_whole_ones_and_weights_that_others_write() -> None:
    weights, twins = make_weights(torch.bfloat16, "cpu"), make_weights(torch.bfloat16, "cpu")
    split, whole = AdamW(weights, lr=1e-3, master="split"), AdamW(twins, lr=1e-3)
    for number in range(20):
        step(split, weights, number, torch.bfloat16)
        step(whole, twins, number, torch.bfloat16)
    assert all(map(torch.equal, masters(split, weights), masters(whole, twins)))
    with torch.no_grad():
        weights[1][:100].zero_()
        weights[1][100:200].fill_(0.5)
    found = masters(split, weights)[1]
    assert torch.equal(found[:100], torch.zeros(100, 5))
    assert ((found[100:200] - 0.5).abs() <= 2**-9).all()  # Half a unit of bfloat16 there.
    step(split, weights, 20, torch.bfloat16)
    assert torch.isfinite(masters(split, weights)[1]).all()


def test_what_does_not_fit_is_refused_and_nothing_is_loaded() -> None:
    weights = make_weights()
    optimizer = AdamW(weights)
    run(optimizer, weights, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    sgd = SGD(make_weights(), momentum=0.9)
    with pytest.raises(ConfigError, match="no state of AdamW: its groups have no betas, eps"):
        optimizer.load_state_dict(sgd.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"'exp_avg' of a parameter of shape \(300, 5\)"):
        optimizer.load_state_dict(wrong)
    shared = optimizer.state_dict()
    shared["state"][1], shared["state"][3] = dict(shared["state"][1]), dict(shared["state"][3])
    other = nn.Parameter(torch.ones(300, 5))
    twin = AdamW([other, nn.Parameter(torch.ones(300, 5))])
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.ones(300, 5)
    twin.step()
    swapped = twin.state_dict()
    swapped["state"] = {0: swapped["state"][1], 1: swapped["state"][0]}
    with pytest.raises(ConfigError, match="shares memory"):
        twin.load_state_dict(swapped)
    twin.load_state_dict(copy.deepcopy(swapped))
    after = optimizer.state_dict()
    for index, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, after["state"][index][name])


def test_a_state_that_needs_more_memory_than_there_is() -> None:
    pool = HostPool(limit=64 << 10)
    weights = [nn.Parameter(torch.ones(6000, device="cuda"))]
    other = torch.optim.AdamW(copies(weights), amsgrad=True)
    other.param_groups[0]["params"][0].grad = torch.ones(6000, device="cuda")
    other.step()
    optimizer = AdamW(weights, pool=pool)
    with pytest.raises(HostOutOfMemory, match="24000 bytes"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.param_groups[0]["amsgrad"]
    assert not optimizer.state

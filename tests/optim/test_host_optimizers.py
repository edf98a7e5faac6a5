"""Each optimizer on the host beside torch's: steps, options, other tools, memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_cases import (
    CLASSES,
    PAIRS,
    TORCH_PAIRS,
    Pair,
    assert_close,
    copies,
    make_weights,
    masters,
    step,
)
from torch import nn

import spillover
from spillover import ConfigError, HostPool
from spillover.optim import SGD, AdamW, Lion, _staging, clip_grad_norm_

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)
each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@each_pair
@each_dtype
@pytest.mark.parametrize(("device", "steps"), [("cuda", 1), ("cpu", 1), ("cuda", 200)])
def test_recorded_gradients_end_where_torch_ends_in_float64(
    pair: Pair, dtype: torch.dtype, device: str, steps: int
) -> None:
    weights = make_weights(dtype, device)
    expected = copies(weights, device="cpu", dtype=torch.float64)
    optimizer = pair.ours(weights, **pair.options)
    reference = pair.reference(expected, **pair.options)
    for number in range(steps):
        step(optimizer, weights, number, dtype)
        step(reference, expected, number, dtype)
    found = masters(optimizer, weights)
    if steps == 1:
        assert_close(found, expected)
    # Lion's steps are all of one size, so that each rounds a float32 weight the same way.
    tolerance = 1e-6 if pair.ours is not Lion else steps * 2**-25 + 1e-6
    ends = [torch.cat([one.detach().double().flatten() for one in x]) for x in (found, expected)]
    assert (ends[0] - ends[1]).norm() <= tolerance * ends[1].norm()
    for weight, master in zip(weights, found, strict=True):
        assert torch.equal(weight.cpu(), master.to(dtype))


@each_class
def test_parameters_cut_in_pieces_are_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for moments in ("float32", "bfloat16", "blockwise8"):
        ends = []
        for slot_bytes in (32 << 20, 4 << 10):
            monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", slot_bytes)
            monkeypatch.setattr(_staging, "_stagings", {})
            weights = make_weights(torch.bfloat16)
            optimizer = pair.ours(weights, **pair.options, moments=moments)
            for number in range(3):
                step(optimizer, weights, number, torch.bfloat16)
            ends.append(masters(optimizer, weights))
        assert all(map(torch.equal, *ends))


# ---- options and tools -------------------------------------------------------------------------


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 5)).to(
        "cuda", dtype
    )


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(8, 32, generator=generator).cuda()
    target = torch.randint(0, 5, (8,), generator=generator).cuda()
    return F.cross_entropy(model(value).float(), target)


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    assert_close(list(one.parameters()), list(other.parameters()), tolerance)


@each_class
def test_groups_schedulers_and_closures(pair: Pair) -> None:
    def run(make: Any) -> nn.Module:
        model = make_model()
        optimizer = make([{"params": model[0].parameters(), "lr": 1e-2}], **pair.options)
        optimizer.add_param_group({"params": model[3].weight, "weight_decay": 0.2})
        optimizer.add_param_group({"params": [model[3].bias], "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        for seed in range(8):

            def closure(seed: int = seed) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                return loss

            if pair.ours is Lion:
                closure()
                optimizer.step()
            else:
                assert isinstance(optimizer.step(closure).item(), float)
            scheduler.step()
        return model

    assert_same(run(pair.ours), run(pair.reference))


@each_class
def test_the_learning_rate_may_be_a_tensor(pair: Pair) -> None:
    weights, twins = make_weights(), make_weights()
    optimizer = pair.ours(weights, **{**pair.options, "lr": torch.tensor(0.01)})
    twin = pair.ours(twins, **{**pair.options, "lr": 0.01})
    step(optimizer, weights, 0, torch.float32)
    step(twin, twins, 0, torch.float32)
    assert_close(weights, twins)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    twin.param_groups[0]["lr"] = 0.5
    step(optimizer, weights, 1, torch.float32)
    step(twin, twins, 1, torch.float32)
    assert_close(weights, twins)


@each_class
@pytest.mark.parametrize("offloads", [False, True])
def test_accumulation_clipping_and_grad_scaler(pair: Pair, offloads: bool) -> None:
    def run(make: Any, **options: Any) -> nn.Module:
        model = make_model()
        optimizer = make(model.parameters(), **pair.options, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        for seed in range(0, 10, 2):
            for micro_step in range(2):
                loss = loss_of(model, seed + micro_step) / 2
                scaler.scale(loss * float("inf") if seed == 4 else loss).backward()
            scaler.unscale_(optimizer)
            clip = clip_grad_norm_ if options else nn.utils.clip_grad_norm_
            clip(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    if pair.ours is Lion:
        # Signs of sums that are almost 0 are left to rounding.
        found, expected = run(Lion, offload_gradients=offloads), run(Lion)
        assert_same(found, expected, 1e-3)
    else:
        assert_same(run(pair.ours, offload_gradients=offloads), run(pair.reference), 2e-5)


def test_clipping_by_a_norm_that_is_not_finite_gives_what_torch_gives() -> None:
    def run(make: Any, **options: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(5, device="cuda"))
        optimizer = make([weight], lr=0.1, **options)
        (weight * torch.tensor([1.0, 2.0, float("inf"), 0.0, -1.0], device="cuda")).sum().backward()
        nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        return weight.detach().cpu()

    expected = run(torch.optim.AdamW)
    for offloads in (False, True):
        found = run(AdamW, offload_gradients=offloads)
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, equal_nan=True)


@each_class
def test_hooks_run_once(pair: Pair) -> None:
    weights = make_weights()
    optimizer = pair.ours(weights, **pair.options, moments="blockwise8")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(
        lambda _, state: seen.extend(
            type(value).__name__ for value in state["state"][1].values() if value.dim() > 0
        )
    )
    step(optimizer, weights, 0, torch.float32)
    assert seen == ["before", "after"]
    optimizer.state_dict()
    assert set(seen[2:]) == {"Tensor"}
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in weights)


def test_a_changed_host_weight_is_seen_by_autograd() -> None:
    for dtype, master in ((torch.float32, "float32"), (torch.bfloat16, "split")):
        weight = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = SGD([weight], lr=0.5, master=master)
        loss = (weight * weight).sum()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- memory ------------------------------------------------------------------------------------

# Of docs/optimizer.md: bytes a parameter in each form of moments, and how many each has.
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "blockwise8": 1.015625}
MOMENTS = {"AdamW": 2, "Adam": 2, "SGD": 1, "Lion": 1, "Adagrad": 1}


WEIGHTS = [
    (torch.float32, "cuda", "float32", 0),
    (torch.bfloat16, "cuda", "float32", 4),
    (torch.bfloat16, "cuda", "split", 4),
    (torch.bfloat16, "cpu", "split", 2),
    (torch.float16, "cpu", "split", 4),
    (torch.float32, "cpu", "split", 0),
]


def combinations() -> Iterator[Any]:
    """Every class with every form of moments; with other weights than one it is the soak's."""
    for i, pair in enumerate(CLASSES):
        for j, moments in enumerate(MOMENT_BYTES):
            for k, weight in enumerate(WEIGHTS):
                marks = [] if k == (3 * i + j) % len(WEIGHTS) else [pytest.mark.soak]
                yield pytest.param(pair, moments, *weight, marks=marks)


@pytest.mark.parametrize(
    ("pair", "moments", "dtype", "device", "master", "master_bytes"), combinations(), ids=str
)
def test_bytes_per_parameter_are_those_of_the_documentation(
    pair: Pair, moments: str, dtype: torch.dtype, device: str, master: str, master_bytes: int
) -> None:
    pool = HostPool()
    weights = [nn.Parameter(torch.zeros(256, 64, dtype=dtype, device=device)) for _ in range(3)]
    frozen = nn.Parameter(torch.zeros(1000, dtype=dtype, device=device), requires_grad=False)
    optimizer = pair.ours(
        [*weights, frozen], **pair.options, moments=moments, master=master, pool=pool
    )
    count = 3 * 256 * 64
    wanted = count * (MOMENTS[pair.ours.__name__] * MOMENT_BYTES[moments] + master_bytes)
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        stats = optimizer.stats()
        assert stats.host_bytes == wanted
        assert (stats.parameters, stats.elements) == (3, count)
        assert wanted <= pool.stats().used_bytes < wanted + 4096
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert stats in spillover.stats().others["optimizer"]
    del optimizer
    gc.collect()
    assert pool.stats().used_bytes == 0


def test_sgd_without_momentum_has_no_state() -> None:
    weights = make_weights()
    optimizer = SGD(weights, lr=0.1)
    step(optimizer, weights, 0, torch.float32)
    assert optimizer.stats().host_bytes == 0
    assert not optimizer.state


def test_saving_one_array_saves_that_one() -> None:
    weights = make_weights()
    optimizer = AdamW(weights)
    step(optimizer, weights, 0, torch.float32)
    for weight in weights:
        assert optimizer.state[weight]["exp_avg"].untyped_storage().nbytes() == 4 * weight.numel()


# ---- errors ------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "^lr must be"),
        ({"weight_decay": float("nan")}, "^weight_decay must be"),
        ({"tier": "disk"}, "needs directory"),
        ({"moments": "int4"}, "moments='int4' is not known"),
        ({"master": "none"}, "master='none' is not known"),
        ({"gradient_anomalies": "raise"}, "offload_gradients=True"),
    ],
    ids=str,
)
def test_wrong_options(pair: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair.ours(make_weights(), **{**pair.options, **options})


def test_wrong_options_of_sgd() -> None:
    for options in ({"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ConfigError, match="nesterov=True needs"):
            SGD(make_weights(), **options)
    with pytest.raises(ConfigError, match="dampening"):
        SGD(make_weights(), dampening=float("inf"))
    optimizer = SGD(make_weights())
    with pytest.raises(ConfigError, match="nesterov=True needs"):
        optimizer.add_param_group({"params": make_weights(), "nesterov": True})
    assert len(optimizer.param_groups) == 1


@each_class
def test_parameters_and_gradients_that_are_refused(pair: Pair) -> None:
    def make(*weights: torch.Tensor) -> Any:
        return pair.ours(list(weights), **pair.options)

    with pytest.raises(ConfigError, match="complex64"):
        make(nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="twice in one group"):
        make(weight, weight)
    dense = nn.Parameter(torch.ones(3))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = make(dense, table.weight)
    before = [dense.detach().clone(), table.weight.detach().clone()]
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    with pytest.raises(ConfigError, match=f"{pair.ours.__name__} .*sparse=False"):
        optimizer.step()
    assert all(map(torch.equal, [dense, table.weight], before))


def test_distributed_tensors_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh))
        with pytest.raises(ConfigError, match="is a DTensor"):
            AdamW([weight])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("pair", TORCH_PAIRS, ids=str)
def test_switched_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    optimizer = pair.ours(make_weights(), tier="host", moments="bfloat16", **pair.options)
    assert type(optimizer) is pair.reference
    for name, value in pair.options.items():
        assert optimizer.param_groups[0][name] == value


def test_frozen_weights_that_are_trained_later_and_empty_ones() -> None:
    frozen, empty = nn.Parameter(torch.ones(4), requires_grad=False), nn.Parameter(torch.empty(0))
    optimizer = AdamW([frozen, empty])
    assert optimizer.stats().host_bytes == 0
    frozen.requires_grad_(True)
    frozen.grad, empty.grad = torch.ones(4), torch.empty(0)
    optimizer.step()
    assert optimizer.stats().host_bytes == 4 * 8
    assert set(optimizer.state) == {frozen}


def test_a_weight_that_changes_its_order_in_memory() -> None:
    def run(make: Any) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 5, 5, device="cuda"))
        optimizer = make([weight])
        for number in range(4):
            weight.grad = torch.full_like(weight, 1.0) * torch.arange(5, device="cuda")
            optimizer.step()
            if number == 1:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return weight.detach().cpu()

    assert_close([run(AdamW)], [run(torch.optim.AdamW)])
    assert_close([run(lambda params: AdamW(params, moments="blockwise8"))], [run(AdamW)], 1e-2)


@pytest.mark.parametrize("elements", [1 << 20, 3 << 20])
def test_large_arrays_of_a_parameter_have_no_addresses_alike(elements: int) -> None:
    weight = nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16, device="cpu"))
    optimizer = AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    places = [v.data_ptr() % (1 << 20) for k, v in optimizer.state[weight].items() if k != "step"]
    assert len(places) == 3
    assert all(abs(a - b) >= 4096 for a, b in itertools.combinations(places, 2))

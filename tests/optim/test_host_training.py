"""Training with each optimizer on the host, gradients on the device or off it, as torch trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_models import Gpt, is_offloaded, make_gpt
from host_cases import CLASSES, SHAPES, Pair, assert_close, copies, make_weights, masters, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint

from spillover.optim import AdamW, Lion, _staging, clip_grad_norm_

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
both_ways = pytest.mark.parametrize("offloads", [False, True], ids=["here", "offloaded"])


def assert_trains_alike(
    pair: Pair,
    offloads: bool,
    train: Callable[[Any], list[torch.Tensor]],
    tolerance: float = 2e-5,
) -> None:
    """``train(make)`` ends at the same weights with ours as with the reference."""
    found = train(lambda params: pair.ours(params, **pair.options, offload_gradients=offloads))
    expected = train(lambda params: pair.reference(params, **pair.options))
    # Lion takes the sign of sums that are almost 0, which is left to rounding.
    assert_close(found, expected, 1e-3 if pair.ours is Lion else tolerance)


def ends(*models: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


# ---- exactness ---------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_accumulated_clipped_scheduled_steps_end_where_float64_ends(
    pair: Pair, micro_steps: int, tmp_path: Path
) -> None:
    """And repeated, on disk and with overlap at the same bits."""
    weights = make_weights(torch.bfloat16)
    expected = copies(weights, device="cpu", dtype=torch.float64)

    def run(parameters: list[nn.Parameter], optimizer: Any, clip: Any) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for number in range(20):
            for micro_step in range(micro_steps):
                gradients = recorded(micro_steps * number + micro_step, torch.bfloat16)
                arrived = [
                    gradient.to(one.device, one.dtype)
                    for one, gradient in zip(parameters, gradients, strict=True)
                ]
                torch.autograd.backward(parameters, arrived)
            clip(parameters, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    found = []
    for way in ("host", "again", "disk", "overlap"):
        each = copies(weights)
        options: dict[str, Any] = {
            "disk": {"tier": "disk", "directory": tmp_path},
            "overlap": {"overlap": nn.ParameterList(each)},
        }.get(way, {})
        optimizer = pair.ours(each, **pair.options, offload_gradients=True, **options)
        run(each, optimizer, clip_grad_norm_)
        found.append([*masters(optimizer, each), *each])
        assert all(map(torch.equal, found[0], found[-1])), way
    run(expected, pair.reference(expected, **pair.options), nn.utils.clip_grad_norm_)
    one, other = (
        torch.cat([part.detach().double().cpu().flatten() for part in parts])
        for parts in (found[0][: len(SHAPES)], expected)
    )
    assert (one - other).norm() <= 1e-6 * other.norm()


# ---- what models do ----------------------------------------------------------------------------


@each_class
@both_ways
def test_tied_weights(pair: Pair, offloads: bool) -> None:
    def train(make: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        table, head = nn.Embedding(11, 8).cuda(), nn.Linear(8, 11).cuda()
        head.weight = table.weight
        model = nn.ModuleList([table, head])
        optimizer = make(model.parameters())
        for seed in range(4):
            tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(seed)).cuda()
            head(table(tokens)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer.param_groups[0]["params"]) == 2
        assert head.weight is table.weight
        return ends(model)

    assert_trains_alike(pair, offloads, train)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.base(value) + self.up(self.down(value))


@each_class
@both_ways
def test_frozen_weights_have_no_state_and_no_traffic(
    pair: Pair, offloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: set[int] = set()
    start_arrival = _staging.Staging.start_arrival

    def watch(self: Any, slot: Any, batch: Any) -> None:
        moved.update(piece.weight.data_ptr() for piece in batch)
        start_arrival(self, slot, batch)

    monkeypatch.setattr(_staging.Staging, "start_arrival", watch)

    def train(make: Any) -> list[torch.Tensor]:
        model = nn.Sequential(Adapted(), nn.Tanh(), Adapted()).cuda()
        optimizer = make(model.parameters())
        for seed in range(3):
            value = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).cuda()
            model(value).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = [one for one in model.parameters() if one.requires_grad]
        if isinstance(optimizer, pair.ours):
            assert set(optimizer.state) == set(trained)
            assert optimizer.stats().parameters == len(trained) == 4
            assert moved == {one.data_ptr() for one in trained}
            if optimizer.gradients is not None:
                assert optimizer.gradients.stats().parameters == 4
                assert optimizer.gradients.stats().left == 12
        return ends(model)

    assert_trains_alike(pair, offloads, train)


@each_class
@both_ways
def test_gradients_that_come_and_go(pair: Pair, offloads: bool) -> None:
    def train(make: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).cuda()
        optimizer = make(parts.parameters())
        for number in range(8):
            # The first one always, one of two others by turns, and the last one once thawed.
            parts[3].requires_grad_(number >= 3 and number != 5)
            value = torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).cuda()
            (parts[3](parts[1 + number % 2](parts[0](value))).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=number != 4)
        return ends(parts)

    assert_trains_alike(pair, offloads, train)


@each_class
@both_ways
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "compiled"])
def test_other_ways_through_the_model(pair: Pair, offloads: bool, kind: str) -> None:
    def train(make: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).cuda()
        run: Any = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
        optimizer = make(model.parameters())
        for seed in range(4):
            value = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).cuda()
            value.requires_grad_()
            if kind == "compiled":
                found = run(value)
            else:
                found = checkpoint(model, value, use_reentrant=kind == "reentrant")
            found.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return ends(model)

    assert_trains_alike(pair, offloads, train)


# ---- gradients of many kinds -------------------------------------------------------------------


@each_class
@both_ways
def test_a_step_with_infinity_is_skipped_and_changes_nothing(pair: Pair, offloads: bool) -> None:
    weights = make_weights(torch.float32)
    optimizer = pair.ours(weights, **pair.options, offload_gradients=offloads)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)

    def everything() -> list[torch.Tensor]:
        state = optimizer.state_dict()["state"]
        tensors = [torch.as_tensor(v) for entry in state.values() for v in entry.values()]
        return [one.detach().cpu().clone() for one in (*weights, *tensors)]

    for number in range(4):
        before = everything()
        loss = sum((weight * weight).sum() for weight in weights)
        scaler.scale(loss * float("inf") if number == 2 else loss).backward()
        assert is_offloaded(weights[0].grad) == offloads
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = everything()
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert same == (number == 2)


@each_class
def test_anomalies_are_reported_with_the_name(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    from spillover import NonFiniteGradient

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).cuda()
    optimizer = pair.ours(
        model.named_parameters(), **pair.options, offload_gradients=True, gradient_anomalies="raise"
    )
    for _ in range(2):  # The second one is added on the host.
        model(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    before = ends(model)
    state = {key: dict(value) for key, value in optimizer.state.items()}
    optimizer.zero_grad()
    model[1].bias.register_hook(lambda gradient: gradient * float("nan"))
    model(torch.ones(2, 4, device="cuda")).sum().backward()
    with pytest.raises(NonFiniteGradient, match=r"1\.bias \(NaN\)"):
        optimizer.step()
    assert all(map(torch.equal, ends(model), before))
    assert {key: dict(value) for key, value in optimizer.state.items()}.keys() == state.keys()


@both_ways
def test_gradients_of_another_type_than_the_weight(offloads: bool) -> None:
    weight = nn.Parameter(torch.ones(300, dtype=torch.bfloat16, device="cuda"))
    weight.grad_dtype = torch.float32
    optimizer = AdamW([weight], lr=0.1, offload_gradients=offloads)
    for _ in range(2):
        (weight.float() * 0.25).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert is_offloaded(weight.grad) == offloads
    assert torch.equal(weight.grad.cpu(), torch.full((300,), 0.5))
    optimizer.step()
    assert_close([optimizer.state[weight]["exp_avg"]], [torch.full((300,), 0.05)])


SEVERAL_DEVICES = """
import sys
import torch
from torch import nn
from spillover.optim import SGD, Adagrad, Adam, AdamW, Lion, clip_grad_norm_

OPTIONS = {SGD: {"momentum": 0.9}}


def train(make, offloads, scales, **options):
    torch.manual_seed(0)
    parts = [nn.Linear(8, 8).to(f"cuda:{index}") for index in (1, 0, 1)]
    parameters = [each for part in parts for each in part.parameters()]
    optimizer = make(parameters, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0, enabled=scales)
    for step in range(4):
        for _ in range(1 + step % 2):
            value = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            for part in parts:
                value = part(value.to(part.weight.device))
            scaler.scale(value.square().mean()).backward()
        scaler.unscale_(optimizer)
        clip = clip_grad_norm_ if step % 2 else nn.utils.clip_grad_norm_
        clip(parameters, 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return torch.cat([each.detach().cpu().flatten() for each in parameters])


for ours in (AdamW, Adam, SGD, Adagrad, Lion):
    options = {"lr": 1e-2, **OPTIONS.get(ours, {})}
    for scales in (False, True):
        found = [train(ours, o, scales, offload_gradients=o, **options) for o in (False, True)]
        if ours is not Lion:
            found.append(train(getattr(torch.optim, ours.__name__), False, scales, **options))
        for other in found[1:]:
            tolerance = 1e-3 if ours is Lion else 2e-5
            torch.testing.assert_close(found[0], other, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.parametrize("schedule", [pytest.param("late", marks=pytest.mark.soak), "threaded"])
def test_parameters_on_several_devices(run_emulated: Callable[..., Any], schedule: str) -> None:
    run_emulated(SEVERAL_DEVICES, devices=2, schedule=schedule)


def test_a_gpt_has_one_state_for_tied_weights() -> None:
    model: Gpt = make_gpt()
    optimizer = AdamW(model.named_parameters(), offload_gradients=True)
    model.loss(0).backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))
    assert optimizer.stats().host_bytes == 8 * sum(one.numel() for one in model.parameters())

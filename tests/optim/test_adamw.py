"""spillover.optim.AdamW computes what torch.optim.AdamW computes, with its state on the host."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spillover import ConfigError, stream_parameters
from spillover.optim import AdamW, _staging

Make = Callable[[Any], torch.optim.Optimizer]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(32, 5)).to(dtype)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    value = torch.randn(8, 32, generator=generator).to("cuda", dtype)
    target = torch.randint(0, 5, (8,), generator=generator).cuda()
    return F.cross_entropy(model(value).float(), target)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, first: int = 0
) -> list[float]:
    losses = []
    for seed in range(first, first + steps):
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_close(one: nn.Module, other: nn.Module, rtol: float = 1e-5) -> None:
    for found, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=rtol, atol=1e-6)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True, "lr": 1e-4},
    {"betas": (0.7, 0.9), "eps": 1e-6, "weight_decay": 0.0},
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_follows_torch(options: dict[str, Any], streamed: bool) -> None:
    expected = make_model().cuda()
    losses = train(expected, torch.optim.AdamW(expected.parameters(), fused=True, **options))
    model = make_model()
    if streamed:
        stream_parameters(model, resident=1)
    else:
        model.cuda()
    found = train(model, AdamW(model.parameters(), **options))
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(model, expected)


@pytest.mark.parametrize("slot_bytes", [1 << 12, 1 << 14])
def test_large_parameters_pass_in_pieces(slot_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", slot_bytes)
    monkeypatch.setattr(_staging, "_stagings", {})
    expected, model = make_model().cuda(), make_model().cuda()
    train(expected, torch.optim.AdamW(expected.parameters(), fused=True), steps=5)
    train(model, AdamW(model.parameters()), steps=5)
    assert_close(model, expected, rtol=1e-6)
    (staging,) = _staging._stagings.values()
    assert staging.slot_bytes == slot_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_low_precision_weights_have_float32_masters(dtype: torch.dtype, streamed: bool) -> None:
    model = make_model(dtype)
    if streamed:
        stream_parameters(model)
    else:
        model.cuda()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    masters = [nn.Parameter(parameter.detach().float().cpu()) for parameter in model.parameters()]
    reference = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    for seed in range(6):
        loss_of(model, seed).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float().cpu()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        found = optimizer.state[parameter]["master"]
        assert torch.equal(parameter.cpu(), found.to(dtype))
        torch.testing.assert_close(found, master.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("settled_memory")
def test_state_is_float32_pinned_and_on_the_host() -> None:
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, steps=1)
    held = torch.cuda.memory_allocated()
    train(model, optimizer, steps=2)
    assert torch.cuda.memory_allocated() <= held
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master"}
        for name in ("exp_avg", "exp_avg_sq", "master"):
            assert state[name].dtype == torch.float32
            assert state[name].is_pinned()
            assert state[name].shape == parameter.shape


def test_groups_schedulers_and_closures() -> None:
    def run(make: Callable[..., torch.optim.Optimizer]) -> nn.Module:
        model = make_model().cuda()
        optimizer = make([{"params": model[0].parameters(), "lr": 1e-2}], weight_decay=0.2)
        optimizer.add_param_group({"params": model[1].weight, "betas": (0.5, 0.9)})
        optimizer.add_param_group({"params": [model[1].bias], "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        for seed in range(8):

            def closure(seed: int = seed) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                return loss

            assert isinstance(optimizer.step(closure).item(), float)
            scheduler.step()
        return model

    assert_close(
        run(AdamW), run(lambda *args, **kwargs: torch.optim.AdamW(*args, fused=True, **kwargs))
    )


def test_tensor_learning_rate_and_parameter_names() -> None:
    model, expected = make_model().cuda(), make_model().cuda()
    rate = torch.tensor(3e-3)
    train(model, AdamW(list(model.named_parameters()), lr=rate), steps=3)
    train(expected, torch.optim.AdamW(expected.parameters(), lr=3e-3, fused=True), steps=3)
    assert_close(model, expected)


def test_parameters_without_gradients_are_left_alone() -> None:
    model = make_model().cuda()
    optimizer = AdamW([*model.parameters(), nn.Parameter(torch.empty(0, device="cuda"))])
    optimizer.step()
    assert not optimizer.state
    before = model[1].weight.detach().clone()
    model[1].requires_grad_(False)
    train(model, optimizer, steps=1)
    assert torch.equal(model[1].weight, before)
    assert model[1].weight not in optimizer.state


def test_other_memory_formats() -> None:
    def run(make: Make) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).cuda().to(memory_format=torch.channels_last)
        optimizer = make(layer.parameters())
        for seed in range(3):
            torch.manual_seed(seed)
            layer(torch.randn(2, 3, 5, 5).cuda()).square().sum().backward()
            # A gradient whose elements lie in another order than the weight's.
            layer.weight.grad = layer.weight.grad.contiguous()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach().cpu()

    found, expected = run(AdamW), run(lambda params: torch.optim.AdamW(params, foreach=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


# ---- checkpoints -------------------------------------------------------------------------------


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state that went through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


@pytest.mark.parametrize("source", ["ours", "torch"])
@pytest.mark.parametrize("target", ["ours", "torch"])
def test_checkpoints_are_exchanged_with_torch(source: str, target: str) -> None:
    makes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ours": AdamW,
        "torch": lambda params, **kwargs: torch.optim.AdamW(params, fused=True, **kwargs),
    }
    model = make_model().cuda()
    first = makes[source](model.parameters(), lr=2e-3)
    train(model, first, steps=5)
    twin = copy.deepcopy(model)
    second = makes[target](twin.parameters(), lr=9.0)
    second.load_state_dict(saved(first))
    assert second.param_groups[0]["lr"] == 2e-3
    assert train(twin, second, steps=5, first=5) == pytest.approx(
        train(model, first, steps=5, first=5), rel=1e-5
    )
    assert_close(twin, model)


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_resumed_run_keeps_the_low_bits_of_its_masters(weights_first: bool) -> None:
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    train(model, optimizer, steps=3)
    weights, state = copy.deepcopy(model.state_dict()), saved(optimizer)
    expected = train(model, optimizer, steps=5, first=3)

    fresh = make_model(torch.bfloat16).cuda()
    resumed = AdamW(fresh.parameters(), lr=1e-4)
    if weights_first:
        fresh.load_state_dict(weights)
    resumed.load_state_dict(state)
    if not weights_first:
        fresh.load_state_dict(weights)
    assert train(fresh, resumed, steps=5, first=3) == expected
    for parameter, twin in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[parameter]["master"], resumed.state[twin]["master"])


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_written_by_others_become_the_masters(streamed: bool) -> None:
    model = make_model(torch.bfloat16)
    if streamed:
        stream_parameters(model)
    else:
        model.cuda()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    train(model, optimizer, steps=2)
    weight = model[0][0][0].weight
    with torch.no_grad():
        weight[0].fill_(0.5)
    train(model, optimizer, steps=1)
    torch.testing.assert_close(weight[0].float().cpu(), torch.full((32,), 0.5), atol=2e-3, rtol=0)


def test_users_hooks_see_the_loaded_tensors() -> None:
    model = make_model().cuda()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, steps=1)
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.append(state["state"][0]["exp_avg"])
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert isinstance(seen[0], torch.Tensor)
    with pytest.raises(ValueError, match="parameter group"):
        AdamW([model[1].weight]).load_state_dict(optimizer.state_dict())


def test_copies_of_the_optimizer() -> None:
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, steps=1)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert train(twin_model, twin, steps=3, first=1) == train(model, optimizer, steps=3, first=1)


# ---- together with other tools -----------------------------------------------------------------


def test_grad_scaler() -> None:
    def run(make: Make) -> nn.Module:
        model = make_model().cuda()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        for seed in range(5):
            loss = loss_of(model, seed)
            scaler.scale(loss * float("inf") if seed == 3 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    assert_close(run(AdamW), run(lambda params: torch.optim.AdamW(params, foreach=False)))


def test_weights_are_right_for_work_on_the_current_stream() -> None:
    model, expected = make_model().cuda(), make_model().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(model, AdamW(model.parameters()), steps=3)
    torch.cuda.current_stream().wait_stream(side)
    train(expected, AdamW(expected.parameters()), steps=3)
    assert_close(model, expected, rtol=0)


def test_an_optimizer_dropped_right_after_its_step() -> None:
    model, expected = make_model().cuda(), make_model().cuda()
    loss_of(model, 0).backward()
    AdamW(model.parameters()).step()
    filler = [torch.full((4096,), 3.0, pin_memory=True) for _ in range(8)]
    loss_of(expected, 0).backward()
    optimizer = AdamW(expected.parameters())
    optimizer.step()
    assert_close(model, expected, rtol=0)
    assert filler


def test_all_weights_on_the_host() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(10))
    expected = nn.Parameter(weight.detach().clone())
    for parameter, make in ((weight, AdamW), (expected, torch.optim.AdamW)):
        optimizer = make([parameter])
        for _ in range(3):
            parameter.grad = parameter.detach() * 2
            optimizer.step()
    torch.testing.assert_close(weight, expected)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "device"}, r"torch\.optim\.AdamW"),
        ({"tier": "disk"}, "needs directory"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW(make_model().parameters(), **options)


def test_parameters_that_cannot_be_updated() -> None:
    for tensor, message in (
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(4, 4)[:, :2], "gaps"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdamW([nn.Parameter(tensor)])


def test_sparse_gradients_raise_before_anything_changes() -> None:
    dense = nn.Parameter(torch.ones(3))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = AdamW([dense, table.weight])
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    optimizer = AdamW(make_model().parameters(), lr=0.5, tier="host")
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.5

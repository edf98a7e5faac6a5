"""Models, optimizers and training loops for tests of paging: the same with and without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spillover.optim import page

KIB = 1 << 10

#: Classes that are updated in buckets, with their variants. "loop" is foreach=False.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "Adadelta": {"foreach": {}, "loop": {}, "capturable": {}, "options": {"weight_decay": 0.1}},
    "Adafactor": {"foreach": {}, "loop": {}, "options": {"weight_decay": 0.1, "maximize": True}},
    "Adagrad": {
        "foreach": {},
        "loop": {},
        "fused": {},
        "options": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    },
    "Adam": {
        "foreach": {},
        "loop": {},
        "fused": {},
        "capturable": {},
        "options": {"amsgrad": True, "weight_decay": 0.1},
    },
    "AdamW": {
        "foreach": {},
        "loop": {},
        "fused": {"amsgrad": True},
        "capturable": {},
        "options": {"amsgrad": True, "maximize": True},
    },
    "Adamax": {"foreach": {}, "loop": {}, "capturable": {}, "options": {"weight_decay": 0.1}},
    "ASGD": {"foreach": {}, "loop": {}, "capturable": {}, "options": {"t0": 2, "lambd": 0.1}},
    "Muon": {"options": {"weight_decay": 0.1}},
    "NAdam": {
        "foreach": {},
        "loop": {},
        "capturable": {},
        "options": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    "RAdam": {"foreach": {}, "loop": {}, "capturable": {}, "options": {"weight_decay": 0.1}},
    "RMSprop": {
        "foreach": {},
        "loop": {},
        "capturable": {},
        "options": {"momentum": 0.9, "centered": True},
    },
    "Rprop": {"foreach": {}, "loop": {}, "capturable": {}, "options": {"etas": (0.4, 1.3)}},
    "SGD": {
        "foreach": {"momentum": 0.9},
        "loop": {"momentum": 0.9},
        "fused": {"momentum": 0.9},
        "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "stateless": {},
    },
}

_SWITCHES: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}

CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def options_of(name: str, variant: str) -> dict[str, Any]:
    """Keyword arguments of ``torch.optim.NAME`` for one of its variants."""
    return {"lr": 0.01, **_SWITCHES.get(variant, {}), **VARIANTS[name][variant]}


class Net(nn.Module):
    """Layers of several sizes, a vector and a scalar, one that is frozen and one never used."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, matrices_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=not matrices_only)
            for a, b in ((24, 32), (32, 48), (48, 32), (32, 16))
        )
        self.frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.unused = nn.Linear(16, 16, bias=False)
        if not matrices_only:
            self.scale = nn.Parameter(torch.ones(()))
            self.one = nn.Parameter(torch.ones(1))
        self.to("cuda", dtype)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            value = torch.tanh(layer(value))
        value = self.frozen(value)
        return value * self.scale * self.one if hasattr(self, "scale") else value


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters in groups with options of their own."""
    parameters = list(model.parameters())
    return [
        {"params": parameters[:3]},
        {"params": parameters[3:6], "lr": 0.02},
        {"params": parameters[6:]},
    ]


def backward(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of a batch that ``step`` decides, and its gradients."""
    generator = torch.Generator().manual_seed(step)
    parameter = next(model.parameters())
    value = torch.randn(8, 24, generator=generator).to("cuda", parameter.dtype)
    loss: torch.Tensor = model(value).float().square().mean() * 100
    loss.backward()
    return loss


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 6,
    *,
    first: int = 0,
    clip: bool = True,
    scheduler: Any = None,
) -> list[float]:
    """Steps with clipping; the losses."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        losses.append(backward(model, step).detach())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [float(loss) for loss in losses]


def trained(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    paging: dict[str, Any] | None,
    *,
    dtype: torch.dtype = torch.float32,
    matrices_only: bool = False,
    steps: int = 6,
) -> tuple[Net, torch.optim.Optimizer]:
    """A model after some steps with a scheduler; ``paging`` has options of page(), if any."""
    model = Net(dtype, matrices_only=matrices_only)
    optimizer = make(groups_of(model))
    if paging is not None:
        optimizer = page(optimizer, **paging)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    train(model, optimizer, steps, scheduler=scheduler)
    return model, optimizer


def assert_same(
    found: tuple[nn.Module, torch.optim.Optimizer],
    expected: tuple[nn.Module, torch.optim.Optimizer],
) -> None:
    """Weights, state and groups are equal to the last bit."""
    (model, optimizer), (other, reference) = found, expected
    for weight, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(weight, wanted)
        assert (weight in optimizer.state) == (wanted in reference.state)
        if wanted in reference.state:
            assert_same_entry(optimizer.state[weight], reference.state[wanted])
    for group, wanted in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == {
            key: value for key, value in wanted.items() if key != "params"
        }


def assert_same_entry(entry: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The state of one parameter is the same, wherever it is."""
    assert set(entry) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(entry[name], value)
        else:
            assert entry[name] == value


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the last bit, NaNs too, wherever they are."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    bits = [each.detach().cpu().reshape(-1).view(torch.uint8) for each in (found, wanted)]
    assert torch.equal(*bits)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as users write it: a class of its own, with an int in its state."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["count"] = 0
                    state["momentum"] = torch.zeros_like(parameter)
                    state["history"] = [torch.zeros_like(parameter)]
                state["count"] += 1
                state["history"][0].copy_(state["momentum"])
                update = state["momentum"].lerp(parameter.grad, 1 - group["beta"]).sign_()
                parameter.add_(update, alpha=-group["lr"])
                # A new tensor in place of the old one.
                state["momentum"] = state["momentum"].lerp(parameter.grad, 0.01)
        return loss


@contextlib.contextmanager
def failing(owner: Any, name: str, call: int, error: BaseException) -> Any:
    """Have the ``call``-th call of a function raise ``error`` instead, counted from 1."""
    original = getattr(owner, name)
    count = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, original)

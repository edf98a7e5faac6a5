"""Algorithms with options, their states, and torch's own step in float64, for tests of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from spillover._core import BLOCK_ELEMENTS
from spillover.optim import _kernels
from spillover.optim._kernels import Blockwise, Moment


@dataclass(frozen=True)
class Case:
    """An algorithm: our kernel, torch's class, and how torch calls each moment."""

    name: str
    kernel: Callable[..., None]
    reference: Any
    options: dict[str, Any]
    moments: dict[str, str]
    reference_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


class ReferenceLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., 2023, operation by operation."""

    def __init__(self, params: Any, lr: float, betas: Any, weight_decay: float, maximize: bool):
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = -weight.grad if group["maximize"] else weight.grad
                mean = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                beta1, beta2 = group["betas"]
                direction = (beta1 * mean + (1 - beta1) * gradient).sign()
                weight *= 1 - group["lr"] * group["weight_decay"]
                weight -= group["lr"] * direction
                mean.copy_(beta2 * mean + (1 - beta2) * gradient)


def adam_case(name: str, *, decoupled: bool, **options: Any) -> Case:
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **options}
    moments = {"first": "exp_avg", "second": "exp_avg_sq"}
    if options.get("amsgrad"):
        moments["second_max"] = "max_exp_avg_sq"
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    return Case(
        name, _kernels.adam, reference, {**options, "decoupled": decoupled}, moments, options
    )


def sgd_case(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, **options}
    moments = {"first": "momentum_buffer"} if options.get("momentum") else {}
    return Case(name, _kernels.sgd, torch.optim.SGD, options, moments, options)


def lion_case(name: str, **options: Any) -> Case:
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": False, **options}
    return Case(name, _kernels.lion, ReferenceLion, options, {"first": "exp_avg"}, options)


def adagrad_case(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, **options}
    return Case(name, _kernels.adagrad, torch.optim.Adagrad, options, {"second": "sum"}, options)


CASES = [
    adam_case("adamw", decoupled=True),
    adam_case("adamw_amsgrad", decoupled=True, amsgrad=True, maximize=True),
    adam_case("adam_l2", decoupled=False),
    adam_case("adam_plain", decoupled=False, weight_decay=0.0, betas=(0.0, 0.5), maximize=True),
    sgd_case("sgd"),
    sgd_case("sgd_momentum", momentum=0.9, dampening=0.1, weight_decay=0.1),
    sgd_case("sgd_nesterov", momentum=0.9, nesterov=True, maximize=True),
    lion_case("lion"),
    lion_case("lion_maximize", maximize=True, weight_decay=0.0),
    adagrad_case("adagrad", lr_decay=0.1, weight_decay=0.1),
    adagrad_case("adagrad_maximize", maximize=True),
]


def blockwise(count: int) -> Blockwise:
    """A moment of zeros in 8 bits."""
    return Blockwise(
        torch.zeros(count, dtype=torch.uint8), torch.zeros(-(-count // BLOCK_ELEMENTS))
    )


def zeros_of(count: int, moment_format: str) -> Moment:
    if moment_format == "blockwise8":
        return blockwise(count)
    return torch.zeros(count, dtype=getattr(torch, moment_format))


def values_of(moment: Moment, *, signed: bool) -> torch.Tensor:
    """The moment in float32."""
    if isinstance(moment, Blockwise):
        values = torch.empty(moment.codes.numel())
        _kernels.decode_blockwise(moment, signed=signed, into=values)
        return values
    return moment.float()


@dataclass
class State:
    """A parameter of ``count`` elements with all that a step of ours changes."""

    weight: torch.Tensor
    moments: dict[str, Moment]
    low_weight: torch.Tensor | None = None
    remainder: torch.Tensor | None = None

    def clone(self) -> State:
        def copy(value: Any) -> Any:
            if isinstance(value, Blockwise):
                return Blockwise(value.codes.clone(), value.scales.clone())
            return None if value is None else value.clone()

        moments = {name: copy(moment) for name, moment in self.moments.items()}
        return State(self.weight.clone(), moments, copy(self.low_weight), copy(self.remainder))

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"weight": self.weight, "low_weight": self.low_weight, "remainder": self.remainder}
        for name, moment in self.moments.items():
            if isinstance(moment, Blockwise):
                found |= {f"{name}.codes": moment.codes, f"{name}.scales": moment.scales}
            else:
                found[name] = moment
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def master(self) -> torch.Tensor:
        """The fp32 weight, from wherever it is."""
        if self.remainder is None:
            return self.weight
        assert self.low_weight is not None
        joined = torch.empty(self.low_weight.numel())
        _kernels.join_weights(self.low_weight, self.remainder, joined)
        return joined

    def range(
        self, gradient: torch.Tensor, step: int, start: int = 0, count: int | None = None
    ) -> _kernels.Range:
        """The range of some elements; ``gradient`` is that of all."""
        total = gradient.numel()
        count = total - start if count is None else count

        def part(value: Any) -> Any:
            if isinstance(value, Blockwise):
                return value.part(start, count)
            return None if value is None else value[start : start + count]

        return _kernels.make_range(
            gradient=part(gradient),
            weight=None if self.remainder is not None else part(self.weight),
            low_weight=part(self.low_weight),
            remainder=part(self.remainder),
            step=step,
            first_index=start,
            **{name: part(moment) for name, moment in self.moments.items()},
        )


def make_state(
    case: Case,
    count: int,
    *,
    moment_format: str = "float32",
    low: torch.dtype | None = None,
    split: bool = False,
    seed: int = 0,
) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator)
    state = State(weight, {name: zeros_of(count, moment_format) for name in case.moments})
    if low is not None or split:
        state.low_weight = weight.to(low or torch.bfloat16)
    if split:
        state.remainder = torch.empty(count, dtype=torch.int16)
        _kernels.split_weights(weight, state.low_weight, state.remainder)
    return state


def gradient_of(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gradients over some orders of magnitude, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(count, generator=generator) * torch.logspace(-4, 0, count)
    return torch.where(torch.rand(count, generator=generator) < 0.05, 0.0, size).to(dtype)


class Reference:
    """torch's optimizer in float64 on the same weights and gradients."""

    def __init__(self, case: Case, weight: torch.Tensor) -> None:
        self.case = case
        self.weight = torch.nn.Parameter(weight.double())
        self.optimizer = case.reference([self.weight], **case.reference_options)

    def step(self, gradient: torch.Tensor, scale: float) -> None:
        self.weight.grad = gradient.double() * scale
        self.optimizer.step()

    def moment(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.optimizer.state[self.weight][self.case.moments[name]]
        return found

    @property
    def values(self) -> torch.Tensor:
        return self.weight.detach()

"""Our optimizers beside the reference that each has, for tests of what all of them do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import CASES, ReferenceLion, gradient_of
from torch import nn

from spillover.optim import SGD, Adagrad, Adam, AdamW, Lion

OURS: dict[Any, Any] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
    torch.optim.SGD: SGD,
    torch.optim.Adagrad: Adagrad,
    ReferenceLion: Lion,
}

SHAPES = [(7,), (300, 5), (1,), (64, 64)]


@dataclass(frozen=True)
class Pair:
    """A class of ours with options, and the reference with the same ones."""

    name: str
    ours: Any
    reference: Any
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name


PAIRS = [
    Pair(case.name, OURS[case.reference], case.reference, case.reference_options) for case in CASES
]
PAIRS.append(
    Pair("adagrad_initial", Adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.25})
)
#: One of each class.
CLASSES = [
    next(pair for pair in PAIRS if pair.name == name)
    for name in ("adamw", "adam_l2", "sgd_momentum", "lion", "adagrad")
]
TORCH_PAIRS = [pair for pair in PAIRS if pair.reference is not ReferenceLion]


def make_weights(
    dtype: torch.dtype = torch.float32, device: str = "cuda", seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES
    ]


def copies(weights: list[nn.Parameter], **to: Any) -> list[nn.Parameter]:
    return [nn.Parameter(weight.detach().clone().to(**to)) for weight in weights]


def recorded(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradients of a step, on the CPU."""
    return [
        gradient_of(torch.Size(shape).numel(), dtype, 100 * step + index).reshape(shape)
        for index, shape in enumerate(SHAPES)
    ]


def step(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], number: int, dtype: torch.dtype
) -> None:
    """A step with the recorded gradients of ``number``, which come in ``dtype``."""
    for weight, gradient in zip(weights, recorded(number, dtype), strict=True):
        weight.grad = gradient.to(weight.device, weight.dtype)
    optimizer.step()


def masters(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> list[torch.Tensor]:
    """What is updated, in float32, on the CPU."""
    state = optimizer.state_dict()["state"]
    return [
        state.get(index, {}).get("master", weight.detach().float().cpu())
        for index, weight in enumerate(weights)
    ]


def assert_close(
    found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6
) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.detach().double().cpu(),
            other.detach().double().cpu(),
            rtol=tolerance,
            atol=tolerance,
        )

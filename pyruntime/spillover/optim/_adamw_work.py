"""What one optimizer step works on: checked parameters, their flat views, and the fused update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from spillover._core import begin_work, end_work
from spillover._errors import ConfigError
from spillover._layout import flat_view, is_dense
from spillover._stalls import Timed
from spillover.optim._host_gradient import PendingGradient
from spillover.optim._staging import Piece, cut, end_of

_UPDATE = Timed("optimizer", "update")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Work:
    """One parameter to update: flat views, its state, and its group's options.

    Where the gradient is off the device, ``pending`` is there and ``gradient`` its flat bytes.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    pending: PendingGradient | None = None

    def gradient_of_host(self, start: int, count: int) -> torch.Tensor:
        """Elements of a pending gradient that has arrived, in float32 and with its factor."""
        assert self.pending is not None
        part = self.pending.flat[start : start + count].float()
        return part if self.pending.factor == 1.0 else part * self.pending.factor

    def of_state(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements of a state tensor, in the memory order of the parameter."""
        return flat_view(self.state[name])[start : start + count]


def update(
    group: dict[str, Any],
    ranges: list[tuple[Work, int, int]],
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> None:
    """One AdamW step of flat float32 ``weights``, in place, with torch's fused CPU kernel."""
    _UPDATE.call(lambda: _update(group, ranges, weights, gradients))


def _update(
    group: dict[str, Any],
    ranges: list[tuple[Work, int, int]],
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> None:
    amsgrad = bool(group["amsgrad"])
    # Weights and moments are read and written, gradients read.
    passes = 9 if amsgrad else 7
    count = sum(weight.numel() for weight in weights)
    reported = begin_work("cpu-optimizer", passes * count * torch.float32.itemsize)
    try:
        torch._fused_adamw_(
            weights,
            gradients,
            [work.of_state("exp_avg", start, count) for work, start, count in ranges],
            [work.of_state("exp_avg_sq", start, count) for work, start, count in ranges],
            [work.of_state("max_exp_avg_sq", start, count) for work, start, count in ranges]
            if amsgrad
            else [],
            [work.state["step"] for work, _, _ in ranges],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            amsgrad=amsgrad,
            maximize=bool(group["maximize"]),
            grad_scale=None,
            found_inf=None,
        )
    finally:
        end_work(reported)


def batches(groups: Iterable[list[Work]], slot_bytes: int) -> Iterator[list[tuple[Work, Piece]]]:
    """Pieces packed into slots; a batch has parameters of one group, so of one learning rate."""
    for works in groups:
        batch: list[tuple[Work, Piece]] = []
        used = 0
        for work in works:
            weight = flat_view(work.parameter)
            gradient = work.gradient if work.pending is not None else flat_view(work.gradient)
            start = 0
            while start < weight.numel():
                piece = cut(
                    weight,
                    gradient,
                    reads_weight="master" not in work.state,
                    slot_bytes=slot_bytes,
                    used_bytes=used,
                    start=start,
                )
                if piece is None:
                    yield batch
                    batch, used = [], 0
                    continue
                batch.append((work, piece))
                used = end_of(piece)
                start += piece.count
        if batch:
            yield batch


def is_plain(work: Work) -> bool:
    """Whether weight and gradient can be given to the kernel as they are."""
    return work.parameter.dtype == work.gradient.dtype == torch.float32


def check_parameter(parameter: torch.Tensor) -> None:
    """Raise ConfigError, saying why, for a parameter that cannot be updated."""
    if parameter.dtype not in _DTYPES:
        _refuse(parameter, f"is {parameter.dtype}; it must be float32, bfloat16 or float16")
    if parameter.layout is not torch.strided or parameter.device.type not in ("cpu", "cuda"):
        _refuse(parameter, f"is {parameter.layout} on {parameter.device}; it must be dense on CUDA")
    if not is_dense(parameter):
        _refuse(parameter, "has gaps in memory; make it contiguous")


def _refuse(parameter: torch.Tensor, what: str) -> NoReturn:
    shape = tuple(parameter.shape)
    raise ConfigError(f"AdamW cannot update a parameter of shape {shape}: it {what}")

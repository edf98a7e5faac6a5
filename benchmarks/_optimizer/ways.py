"""Ways to make one AdamW step of a window: ours, torch's fused kernel and DeepSpeed's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._optimizer.arrays import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Arrays, Piece

Step = Callable[[], None]


def ours(arrays: Arrays, window: list[Piece], *, threads: int) -> dict[str, Step]:
    """Our kernels: fp32, mixed, and mixed with moments in 8 bits."""
    from spillover.optim import _kernels

    options: dict[str, Any] = {
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "decoupled": True,
        "threads": threads,
    }

    def step_of(ranges: list[Any]) -> Step:
        return lambda: _kernels.adam(ranges, **options)

    full = [
        _kernels.make_range(
            gradient=piece.of(arrays.gradient),
            weight=piece.of(arrays.weight),
            first=piece.of(arrays.first),
            second=piece.of(arrays.second),
            step=STEP,
        )
        for piece in window
    ]
    mixed = [
        _kernels.make_range(
            gradient=piece.of(arrays.low_gradient),
            weight=piece.of(arrays.weight),
            low_weight=piece.of(arrays.low_weight),
            first=piece.of(arrays.first),
            second=piece.of(arrays.second),
            step=STEP,
        )
        for piece in window
    ]
    small = [
        _kernels.make_range(
            gradient=piece.of(arrays.low_gradient),
            weight=piece.of(arrays.weight),
            low_weight=piece.of(arrays.low_weight),
            first=arrays.first_codes.part(piece.start, piece.count),
            second=arrays.second_codes.part(piece.start, piece.count),
            step=STEP,
        )
        for piece in window
    ]
    return {"ours_fp32": step_of(full), "ours_mixed": step_of(mixed), "ours_8bit": step_of(small)}


def torch_fused(arrays: Arrays, window: list[Piece]) -> Step:
    """The operator behind ``torch.optim.AdamW(fused=True)``, without the optimizer's Python."""
    lists = [[piece.of(array) for piece in window] for array in arrays.streams]
    gradients, weights, firsts, seconds = lists
    steps = [torch.tensor(float(STEP)) for _ in window]

    def step() -> None:
        torch._fused_adamw_(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            steps,
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    return step


class DeepSpeedError(Exception):
    """It is not there, or does not build; the message says why."""


class DeepSpeed:
    """DeepSpeedCPUAdam's extension, built at first use as its own code does."""

    def __init__(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise DeepSpeedError("deepspeed is not installed ('pip install deepspeed')")
        try:
            from deepspeed.ops.op_builder import CPUAdamBuilder

            self._adam = CPUAdamBuilder().load()
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["it said nothing"])[-1]
            raise DeepSpeedError(f"DeepSpeed's cpu_adam does not build here: {reason}") from error
        self._adam.create_adam(0, LR, *BETAS, EPS, WEIGHT_DECAY, True, False)

    def fp32(self, arrays: Arrays, window: list[Piece]) -> Step:
        """One call a tensor, as its optimizer makes."""
        tensors = [
            (
                piece.of(arrays.weight),
                piece.of(arrays.gradient),
                piece.of(arrays.first),
                piece.of(arrays.second),
            )
            for piece in window
        ]

        def step() -> None:
            for each in tensors:
                self._adam.adam_update(0, STEP, LR, *BETAS, EPS, WEIGHT_DECAY, True, *each)

        return step

    def mixed(self, arrays: Arrays, window: list[Piece]) -> Step:
        """The same with the bf16 gradient cast before and the bf16 weight after."""
        fp32 = self.fp32(arrays, window)
        casts_in = [(piece.of(arrays.gradient), piece.of(arrays.low_gradient)) for piece in window]
        casts_out = [(piece.of(arrays.low_weight), piece.of(arrays.weight)) for piece in window]

        def step() -> None:
            for to, origin in casts_in:
                to.copy_(origin)
            fp32()
            for to, origin in casts_out:
                to.copy_(origin)

        return step


def streams(arrays: Arrays, window: list[Piece], *, threads: int) -> dict[str, Step]:
    """The physical limit: an in-place scale of the four arrays of an fp32 step, two ways.

    The factor is 1, so that nothing that is checked changes.
    """
    from spillover.optim import _kernels

    end = window[-1].start + window[-1].count
    parts = [array[:end] for array in arrays.streams]

    def torch_scale() -> None:
        for each in parts:
            each.mul_(1.0)

    return {
        "stream.torch": torch_scale,
        "stream.ours": lambda: _kernels.scale(parts, 1.0, threads=threads),
    }

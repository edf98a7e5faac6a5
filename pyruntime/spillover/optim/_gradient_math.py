"""What the host does with gradients: passes over flat CPU tensors, a bounded piece at a time.

Sums of squares are taken in float32 over runs of 1024 elements and in float64 over those, so that
their error does not grow with the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from spillover._core import begin_work, end_work

_Result = TypeVar("_Result")

_RUN = 1024
# Elements of a piece: the temporaries of a pass should not grow with the gradient.
_PIECE = 1 << 20


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of gradients of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def combine(
    target: torch.Tensor,
    base: torch.Tensor | None,
    factor: float,
    addend: torch.Tensor | None,
) -> float:
    """``target = base * factor + addend``; gives the sum of the squares of what is written.

    Flat tensors of one length; ``target`` is wide. ``base`` is ``target`` itself or apart from it;
    None for either of the others counts as zeros.
    """
    traffic_bytes = target.nbytes + sum(part.nbytes for part in (base, addend) if part is not None)

    def run() -> float:
        return sum(
            _combine(
                target[piece],
                target[piece] if base is target else None if base is None else base[piece],
                factor,
                None if addend is None else addend[piece],
            )
            for piece in _pieces(target)
        )

    return _reported(traffic_bytes, run)


def _combine(
    target: torch.Tensor, base: torch.Tensor | None, factor: float, addend: torch.Tensor | None
) -> float:
    if base is None:
        target.zero_()
    else:
        if base.data_ptr() != target.data_ptr() or base.dtype != target.dtype:
            target.copy_(base)
        if factor != 1.0:
            target.mul_(factor)
    if addend is not None:
        target.add_(addend)
    return _sum_of_squares(target)


def sum_of_squares(values: torch.Tensor) -> float:
    """Of a flat tensor."""
    return _reported(
        values.nbytes, lambda: sum(_sum_of_squares(values[piece]) for piece in _pieces(values))
    )


def norm(values: torch.Tensor, order: float) -> float:
    """The vector norm of a flat tensor, of any order that torch knows."""
    if order == 2.0:
        return math.sqrt(sum_of_squares(values))

    def run() -> float:
        parts = torch.stack(
            [
                torch.linalg.vector_norm(values[piece], order, dtype=wide_dtype(values.dtype))
                for piece in _pieces(values)
            ]
        ).double()
        return float(parts.sum() if order == 0.0 else torch.linalg.vector_norm(parts, order))

    return _reported(values.nbytes, run)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element of a flat tensor is infinite or NaN."""
    return _reported(
        values.nbytes,
        lambda: all(bool(torch.isfinite(values[piece]).all()) for piece in _pieces(values)),
    )


def _sum_of_squares(values: torch.Tensor) -> float:
    wide = wide_dtype(values.dtype)
    whole = values.numel() // _RUN * _RUN
    squares = 0.0
    if whole:
        rows = torch.linalg.vector_norm(values[:whole].view(-1, _RUN), dim=1, dtype=wide)
        squares += float(rows.double().square_().sum())
    if whole < values.numel():
        squares += float(torch.linalg.vector_norm(values[whole:], dtype=wide)) ** 2
    return squares


def _pieces(values: torch.Tensor) -> Iterator[slice]:
    for start in range(0, values.numel(), _PIECE):
        yield slice(start, min(start + _PIECE, values.numel()))


def _reported(traffic_bytes: int, run: Callable[[], _Result]) -> _Result:
    reported = begin_work("cpu-optimizer", traffic_bytes)
    try:
        return run()
    finally:
        end_work(reported)

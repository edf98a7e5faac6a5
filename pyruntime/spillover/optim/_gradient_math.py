"""What the host does with gradients: passes over flat CPU tensors.

The kernels of this package do them; float64, which those do not take, is left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from spillover.optim import _kernels

# Elements of a piece: what is read twice should be in a cache the second time, and temporaries
# should not grow with the gradient. A multiple of the kernels' blocks.
_PIECE = 1 << 20


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of gradients of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def combine(
    target: torch.Tensor, base: torch.Tensor, factor: float, addend: torch.Tensor | None
) -> float:
    """``target = base * factor + addend``; gives the sum of the squares of what is written.

    Flat tensors of one length; ``target`` is wide. ``base`` is ``target`` itself or apart from it;
    without an addend nothing is added.
    """
    # The kernels take no factor that is infinite or NaN, which scaling by a norm may make.
    by_torch = target.dtype == torch.float64 or not math.isfinite(factor)
    one = _combine_by_torch if by_torch else _combine
    is_same = base is target
    squares = 0.0
    for piece in _pieces(target):
        part = target[piece]
        squares += one(
            part,
            part if is_same else base[piece],
            factor,
            None if addend is None else addend[piece],
        )
    return squares


def _combine(
    target: torch.Tensor, base: torch.Tensor, factor: float, addend: torch.Tensor | None
) -> float:
    if base is not target:
        squares = _kernels.accumulate([target], [base], scale=factor, add=False)
    elif factor != 1.0:
        _kernels.scale([target], factor)
    if addend is not None:
        squares = _kernels.accumulate([target], [addend], is_cached=base is not target)
    elif base is target:
        squares = _kernels.sum_of_squares([target])
    return squares.value


def _combine_by_torch(
    target: torch.Tensor, base: torch.Tensor, factor: float, addend: torch.Tensor | None
) -> float:
    if base is not target:
        target.copy_(base)
    if factor != 1.0:
        target.mul_(factor)
    if addend is not None:
        target.add_(addend)
    return float(target.double().square().sum())


def sum_of_squares(values: torch.Tensor) -> float:
    """Of a flat tensor."""
    if values.dtype != torch.float64:
        return _kernels.sum_of_squares([values]).value
    return sum(float(values[piece].square().sum()) for piece in _pieces(values))


def norm(values: torch.Tensor, order: float) -> float:
    """The vector norm of a flat tensor, of any order that torch knows."""
    if order == 2.0:
        return math.sqrt(sum_of_squares(values))
    parts = torch.stack(
        [
            torch.linalg.vector_norm(values[piece], order, dtype=wide_dtype(values.dtype))
            for piece in _pieces(values)
        ]
    ).double()
    return float(parts.sum() if order == 0.0 else torch.linalg.vector_norm(parts, order))


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element of a flat tensor is infinite or NaN."""
    if values.dtype != torch.float64:
        return _kernels.find_non_finite([values]) is None
    return all(bool(torch.isfinite(values[piece]).all()) for piece in _pieces(values))


def _pieces(values: torch.Tensor) -> Iterator[slice]:
    for start in range(0, values.numel(), _PIECE):
        yield slice(start, min(start + _PIECE, values.numel()))

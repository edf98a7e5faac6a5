"""Compares random operators: the same distribution as on the CPU, and CUDA's rules for its seeds.

The CPU draws other numbers than a GPU, so values cannot be compared one by one. Results of many
seeds are pooled, outputs and gradients alike, and the two pools must come from one distribution
(two-sample Kolmogorov-Smirnov test). On the device alone: the same seed or a restored state gives
the same numbers, another seed gives others, and the generator's offset moves on by multiples of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks._opdb._compare import Outcome

#: Draws an operator. Fewer where its tensors are large enough to compare distributions by.
_DRAWS_MAX = 64
_DRAWS_MIN = 8
_ELEMENTS_WANTED = 4096
#: A true match is refused with this probability (elements of one draw need not be independent).
_REFUSAL = 1e-9


def check(execute: Callable[[str, int], Outcome]) -> None:
    """Raise AssertionError where the device's results are not like the CPU's.

    ``execute(device, seed)`` calls the operator on copies of its arguments.
    """

    def draw(device: str, seed: int) -> list[Tensor]:
        return _values(execute(device, seed))

    _check_generator(lambda seed: draw("cuda", seed))
    first = draw("cpu", 0)
    elements = min((value.numel() for value in first if value.numel()), default=1)
    draws = max(_DRAWS_MIN, min(_DRAWS_MAX, _ELEMENTS_WANTED // elements))
    expected = [draw("cpu", 1000 + seed) for seed in range(draws)]
    actual = [draw("cuda", 5000 + seed) for seed in range(draws)]
    for index in range(len(first)):
        ours = _pool([values[index] for values in actual])
        theirs = _pool([values[index] for values in expected])
        _check_same_distribution(index, ours, theirs)


def _values(outcome: Outcome) -> list[Tensor]:
    from benchmarks._opdb._compare import tensors_in

    values = tensors_in(outcome.outputs)
    values += [gradient for gradient in outcome.gradients or [] if gradient is not None]
    return [v.detach() if v.layout == torch.strided else v.detach().to_dense() for v in values]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(
        torch.allclose(one.cpu(), other.cpu(), equal_nan=True)
        if one.is_floating_point()
        else torch.equal(one, other)
        for one, other in zip(first, second, strict=True)
    )


def _check_generator(draw: Callable[[int], list[Tensor]]) -> None:
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    first = draw(1)
    offset = generator.get_offset()
    assert offset > 0, "the generator's offset did not move"
    assert offset % 4 == 0, f"the generator's offset moved to {offset}, no multiple of 4"
    assert all(value.is_cuda for value in first), "a result is not on the device"
    assert _equal(first, draw(1)), "the same seed gave other numbers"
    assert any(not _equal(first, draw(seed)) for seed in range(2, 12)), "every seed gives the same"


def _pool(values: list[Tensor]) -> Tensor:
    flat = torch.cat([value.cpu().reshape(-1) for value in values])
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).double()


def _check_same_distribution(index: int, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, f"shape {ours.shape} is not {theirs.shape}"
    assert torch.equal(ours.isnan().any(), theirs.isnan().any()), "only one of them has NaN"
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if ours.numel() == 0:
        return
    distance = _kolmogorov_smirnov(ours.sort().values, theirs.sort().values)
    limit = math.sqrt(-math.log(_REFUSAL / 2) / ours.numel())
    assert distance <= limit, (
        f"result {index} has another distribution: distance {distance:.3f} over "
        f"{ours.numel()} elements, at most {limit:.3f} expected"
    )


def _kolmogorov_smirnov(first: Tensor, second: Tensor) -> float:
    points = torch.cat([first, second])
    below_first = torch.searchsorted(first, points, right=True).double() / first.numel()
    below_second = torch.searchsorted(second, points, right=True).double() / second.numel()
    return float((below_first - below_second).abs().max())

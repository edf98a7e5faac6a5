"""Accumulation, exact sums of squares, scaling and the search for values that are not finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spillover import _core
from spillover._core import BLOCK_ELEMENTS
from spillover.optim import _kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_core._instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core._instruction_set()
    _core._set_instruction_set(request.param)
    yield request.param
    _core._set_instruction_set(before)


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 3, count)
    return (torch.randn(count, generator=generator) * spread).to(dtype)


def exact_squares(tensor: torch.Tensor) -> float:
    return float(sum((Fraction(value) ** 2 for value in tensor.tolist()), Fraction(0)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulation(dtype: torch.dtype, instruction_set: str) -> None:
    for count in (1, 15, 16, 17, 255, 256, 257, 1000, 5000):
        gradient = values(count, dtype)
        accumulator = torch.full((count,), float("nan"))
        total = _kernels.accumulate([accumulator], [gradient], scale=0.5, add=False)
        assert torch.equal(accumulator, gradient.float() * 0.5)
        assert total.value == pytest.approx(accumulator.double().square().sum().item(), rel=1e-14)
        before = accumulator.clone()
        total = _kernels.accumulate([accumulator], [gradient], scale=0.1)
        wanted = before.double() + gradient.double() * float(torch.tensor(0.1))
        assert torch.equal(accumulator, wanted.float())  # One rounding.
        assert total.value == pytest.approx(exact_squares(accumulator), rel=1e-14)


def test_scaled_half_precision_does_not_overflow() -> None:
    accumulator = torch.zeros(3)
    gradient = torch.tensor([6e4, -6e4, 1.0], dtype=torch.float16)
    for _ in range(3):
        _kernels.accumulate([accumulator], [gradient])
    assert accumulator.tolist() == [float(gradient[0]) * 3, float(gradient[1]) * 3, 3.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_depend_on_nothing_but_the_elements(dtype: torch.dtype) -> None:
    count = 150_000
    tensor = values(count, dtype)
    results = set()
    for name in _core._instruction_sets():
        _core._set_instruction_set(name)
        for threads in (1, 2, 5):
            results.add(_kernels.sum_of_squares([tensor], threads=threads).value)
        cuts = [0, 256, 90 * 256, 91 * 256, count]
        parts = [tensor[begin:end] for begin, end in itertools.pairwise(cuts)]
        results.add(_kernels.sum_of_squares(parts[::-1]).value)
        total = _core.SquareSum()
        for part in parts[2:] + parts[:2]:
            accumulator = torch.zeros(part.numel())
            total.add(_kernels.accumulate([accumulator], [part]))
        results.add(total.value)
    assert len(results) == 1
    assert results.pop() == pytest.approx(tensor.double().square().sum().item(), rel=1e-13)


@given(
    exponents=st.lists(st.integers(-149, 127), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sums_of_all_magnitudes_are_exact(exponents: list[int], order: object) -> None:
    tensors = [torch.tensor([2.0**exponent, -(2.0**exponent)]) for exponent in exponents]
    total = _core.SquareSum()
    for tensor in tensors:
        total.add(_kernels.sum_of_squares([tensor]))
    wanted = sum(Fraction(2) ** (2 * exponent + 1) for exponent in exponents)
    assert total.value == float(wanted)
    order.shuffle(tensors)  # type: ignore[attr-defined]
    assert _kernels.sum_of_squares(tensors).value == float(wanted)


def test_sums_of_what_is_not_finite() -> None:
    assert _kernels.sum_of_squares([torch.tensor([1.0, float("inf")])]).value == math.inf
    assert math.isnan(_kernels.sum_of_squares([torch.tensor([1.0, float("nan")])]).value)
    both = _kernels.sum_of_squares([torch.tensor([float("inf")]), torch.tensor([float("nan")])])
    assert math.isnan(both.value)
    assert _kernels.sum_of_squares([torch.zeros(1000)]).value == 0
    assert _kernels.sum_of_squares([]).value == 0
    assert _kernels.sum_of_squares([torch.empty(0)]).value == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scaling(dtype: torch.dtype, instruction_set: str) -> None:
    for count in (1, 17, 1000):
        tensor = values(count, dtype)
        wanted = (tensor.float() * torch.tensor(0.3)).to(dtype)
        _kernels.scale([tensor], 0.3)
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_value_of_sixteen_bits_is_converted(dtype: torch.dtype, instruction_set: str) -> None:
    if dtype == torch.float32:
        return
    tensor = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    accumulator = torch.zeros(2**16)
    _kernels.accumulate([accumulator], [tensor], add=False)
    wide = tensor.float()
    assert torch.equal(accumulator.isnan(), wide.isnan())
    assert torch.equal(accumulator.nan_to_num(), wide.nan_to_num())
    # Back again, and between two neighbours: ties to even.
    for factor in (1.0, 1 + 2**-9, 1 + 2**-12, 2**-14):
        scaled = tensor.clone()
        _kernels.scale([scaled], factor)
        wanted = (wide * factor).to(dtype)
        assert torch.equal(scaled.isnan(), wanted.isnan())
        assert torch.equal(scaled.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_found(dtype: torch.dtype, instruction_set: str) -> None:
    tensors = [torch.ones(100_000, dtype=dtype), torch.ones(5, dtype=dtype)]
    assert _kernels.find_non_finite(tensors) is None
    tensors[1][4] = float("nan")
    assert _kernels.find_non_finite(tensors) == (1, 1, 4)
    tensors[0][99_999] = -float("inf")
    tensors[0][70_001] = float("inf")
    assert _kernels.find_non_finite(tensors) == (3, 0, 70_001)
    tensors[0][:] = torch.finfo(dtype).max
    assert _kernels.find_non_finite(tensors) == (1, 1, 4)


def test_gradients_of_any_alignment() -> None:
    memory = torch.zeros(3000, dtype=torch.uint8)
    for offset in range(5):
        pieces = torch.arange(500, dtype=torch.float32)
        memory[offset : offset + 2000] = pieces.view(torch.uint8)
        accumulator = torch.zeros(500)
        array = (memory.data_ptr() + offset, "float32", 500)
        _core.accumulate([(accumulator.data_ptr(), array)], scale=1.0, add=True, threads=1)
        assert torch.equal(accumulator, pieces)


def test_blocks_are_those_of_moments() -> None:
    assert BLOCK_ELEMENTS == 256

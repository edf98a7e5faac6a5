"""What one AdamW step works on, over the same memory for ours and for the peers.

A shape list is stepped in windows of whole tensors. The tensors of a window lie one after the other
in arrays that every window shares, so a model's shapes can be timed on a machine that could not
hold the model's state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

#: Elements whose results are compared with float64 in every window.
SAMPLES = 4096
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
#: Of all windows' steps: the same amount of work whichever it is.
STEP = 10


class Arrays:
    """Arrays of as many elements as the largest window has.

    They begin at addresses that are not alike, as the optimizer's own do and torch's happen to:
    every way, the peers' too, is slower by up to half where they are.
    """

    def __init__(self, count: int) -> None:
        from spillover._core import HostPool
        from spillover.optim._host_state import STAGGER_BYTES
        from spillover.optim._kernels import BLOCK_ELEMENTS, Blockwise

        pool = HostPool(pinned=False, numa_node=None)
        turns = itertools.count()

        def empty(pool: Any, count: int, dtype: torch.dtype) -> torch.Tensor:
            """Pageable memory on huge pages where the kernel has them."""
            lead = next(turns) * STAGGER_BYTES
            buffer = pool.allocate(lead + count * dtype.itemsize)
            return torch.frombuffer(buffer, dtype=dtype, count=count, offset=lead)

        self.gradient = empty(pool, count, torch.float32).uniform_(-1e-2, 1e-2)
        self.low_gradient = empty(pool, count, torch.bfloat16).copy_(self.gradient)
        self.weight = empty(pool, count, torch.float32).uniform_(-1, 1)
        self.low_weight = empty(pool, count, torch.bfloat16).copy_(self.weight)
        self.first = empty(pool, count, torch.float32).zero_()
        self.second = empty(pool, count, torch.float32).fill_(1e-6)
        blocks = -(-count // BLOCK_ELEMENTS)
        self.first_codes = Blockwise(
            empty(pool, count, torch.uint8).zero_(), empty(pool, blocks, torch.float32).zero_()
        )
        self.second_codes = Blockwise(
            empty(pool, count, torch.uint8).zero_(), empty(pool, blocks, torch.float32).zero_()
        )

    @property
    def streams(self) -> list[torch.Tensor]:
        """The four arrays of an fp32 step."""
        return [self.gradient, self.weight, self.first, self.second]


@dataclass(frozen=True)
class Piece:
    """One tensor of a window, as elements of the arrays."""

    start: int
    count: int

    def of(self, array: torch.Tensor) -> torch.Tensor:
        return array[self.start : self.start + self.count]


def windows_of(counts: list[int]) -> list[list[Piece]]:
    """Tensors in their order, packed to the size of the largest one.

    Every tensor begins at a block of 8-bit moments.
    """
    room = max(counts)
    windows: list[list[Piece]] = [[]]
    start = 0
    for count in counts:
        if start + count > room and windows[-1]:
            windows.append([])
            start = 0
        windows[-1].append(Piece(start, count))
        start = -(-(start + count) // 256) * 256
    return windows


class Check:
    """Compares some elements of a window with float64: what was there before with what is now."""

    def __init__(self, arrays: Arrays, window: list[Piece], seed: int) -> None:
        largest = max(window, key=lambda piece: piece.count)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(largest.count, (SAMPLES,), generator=generator)
        self._index = index + largest.start
        self._arrays = arrays
        self._before = [
            each[self._index].double() for each in (arrays.weight, arrays.first, arrays.second)
        ]

    def verify(self, gradient: torch.Tensor, *, writes_low: bool) -> None:
        """Raise AssertionError where a result is not the float64 one, rounded."""
        weight, first, second = self._before
        g = gradient[self._index].double()
        first = first + (1 - BETAS[0]) * (g - first)
        second = BETAS[1] * second + (1 - BETAS[1]) * g * g
        denominator = (second / (1 - BETAS[1] ** STEP)).sqrt() + EPS
        step = LR / (1 - BETAS[0] ** STEP) * first / denominator
        wanted = weight * (1 - LR * WEIGHT_DECAY) - step
        found = self._arrays.weight[self._index]
        error = (found.double() - wanted).abs()
        assert (error <= 3e-7 * wanted.abs() + 1e-5 * step.abs() + 1e-9).all(), "wrong weights"
        assert torch.allclose(
            self._arrays.second[self._index].double(), second, rtol=1e-5, atol=1e-20
        ), "wrong moments"
        if writes_low:
            low = self._arrays.low_weight[self._index]
            assert torch.equal(low, found.bfloat16()), "wrong low-precision weights"

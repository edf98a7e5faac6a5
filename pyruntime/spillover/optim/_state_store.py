"""Where the state of parameters is while a step updates it: the seam between the step and tiers.

A step works on *parts*, runs of elements of one parameter, in batches. It asks a store for the
arrays of each batch's parts, updates them in place, and gives them back. State in host memory is
there all the time; state on disk comes into memory and leaves it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from spillover.optim._kernels import Blockwise, Moment

if TYPE_CHECKING:
    from spillover.optim._host_work import Work


@dataclass(frozen=True, eq=False)
class StateArrays:
    """Flat arrays of the state of a parameter, or of a part of it, for the kernels.

    ``moments`` are by the kernels' names of them.
    """

    moments: dict[str, Moment]
    master: torch.Tensor | None = None
    remainder: torch.Tensor | None = None

    def part(self, start: int, count: int) -> StateArrays:
        """Of elements ``start`` to ``start + count``, over the same memory."""
        return StateArrays(
            {slot: _moment_part(moment, start, count) for slot, moment in self.moments.items()},
            _part(self.master, start, count),
            _part(self.remainder, start, count),
        )


@dataclass(frozen=True, eq=False)
class Part:
    """Elements ``start`` to ``start + count`` of the parameter of ``work``.

    ``weight`` is flat and on the host. It has the weight's values where ``work.reads_weight``, or
    where the parameter is on the host; otherwise it is memory for the new ones.
    """

    work: Work
    start: int
    count: int
    weight: torch.Tensor


class StateStore(Protocol):
    """What a step asks for state. One step at a time, which may be run by another thread.

    ``begin``, then ``acquire`` and ``release`` of one batch after the other, then ``end``. A step
    that fails ends without ``end``, and perhaps without a ``release``: what was acquired may then
    have been updated in part, as ``Work.done`` says.
    """

    def begin(self, groups: Sequence[list[Work]]) -> None:
        """Prepare for a step on ``groups``, in the order in which they will be acquired."""
        ...

    def unit(self, work: Work, start: int) -> tuple[int, int]:
        """To what unit element ``start`` belongs, and the end of the unit's run of elements there.

        A batch has parts of one unit only.
        """
        ...

    def acquire(self, parts: Sequence[Part]) -> list[StateArrays]:
        """The arrays of each part, up to date. Blocks until they are there."""
        ...

    def release(self, parts: Sequence[Part]) -> None:
        """Take back what was acquired, updated up to each part's end."""
        ...

    def end(self) -> None:
        """All parts have been released."""
        ...


class HostStore:
    """State that is in host memory between steps, too: ``Work.arrays``."""

    def begin(self, groups: Sequence[list[Work]]) -> None:
        """Nothing to prepare."""

    def unit(self, work: Work, start: int) -> tuple[int, int]:
        """All is one unit."""
        return 0, work.parameter.numel()

    def acquire(self, parts: Sequence[Part]) -> list[StateArrays]:
        """Views."""
        found = []
        for part in parts:
            assert part.work.arrays is not None
            found.append(part.work.arrays.part(part.start, part.count))
        return found

    def release(self, parts: Sequence[Part]) -> None:
        """It stays where it is."""

    def end(self) -> None:
        """Nothing to do."""


def _part(array: torch.Tensor | None, start: int, count: int) -> torch.Tensor | None:
    return None if array is None else array[start : start + count]


def _moment_part(moment: Moment, start: int, count: int) -> Moment:
    if isinstance(moment, Blockwise):
        return moment.part(start, count)
    return moment[start : start + count]

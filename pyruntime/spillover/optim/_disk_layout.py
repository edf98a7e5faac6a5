"""How the state of parameters is laid out in units, which go to disk and come back whole.

Note [Units]
------------
A unit holds the state of runs of elements of one or several parameters of one group, in the
parameters' order: for each run its arrays, one behind the other. A large parameter is cut at
multiples of 256 elements, where the scales of 8-bit moments begin, so that a step on its parts
gives the same bits as one on the whole. What comes later, a group or weights that were frozen, has
units of its own behind those that are there. What lies where follows from that order, which a
commit has, so a process that resumes finds it.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from spillover._core import BLOCK_ELEMENTS
from spillover.optim._host_state import Array, Wanted, shaped
from spillover.optim._kernels import Blockwise, Moment

#: Of a unit. Large enough for a disk's full speed with two reads and three writes under way.
UNIT_BYTES_MAX = 16 << 20
_ALIGNMENT = 64


@dataclass(eq=False)
class Place:
    """Where the state of a run of elements of a parameter lies.

    ``offsets`` are bytes in the unit, by name of the array; ``valid`` are the names of those that
    have contents.
    """

    parameter: torch.Tensor
    wanted: dict[str, Wanted]
    unit: int
    start: int
    count: int
    offsets: dict[str, int]
    valid: set[str] = field(default_factory=set)

    @property
    def end(self) -> int:
        """The first element of the parameter behind it."""
        return self.start + self.count

    def moment(self, memory: torch.Tensor, name: str, first: int, count: int) -> Moment:
        """Flat elements of an array; ``first`` is counted from the parameter's start."""
        wanted = self.wanted[name]
        offset = self.offsets[name]
        whole = memory[offset : offset + wanted.size_bytes(self.count)]
        array = shaped(whole, wanted, torch.Size((self.count,)), (1,))
        begin = first - self.start
        if isinstance(array, torch.Tensor):
            return array[begin : begin + count]
        moment: Blockwise = array.moment
        return moment.part(begin, count)

    def array(self, memory: torch.Tensor, name: str) -> Array:
        """All elements of an array, as a flat one."""
        wanted, offset = self.wanted[name], self.offsets[name]
        whole = memory[offset : offset + wanted.size_bytes(self.count)]
        return shaped(whole, wanted, torch.Size((self.count,)), (1,))


#: Parameters of one group, with the arrays of each.
Batch = Sequence[tuple[torch.Tensor, dict[str, Wanted]]]


class Layout:
    """The units of one optimizer. Immutable, but for what is valid.

    Parameters
    ----------
    batches
        Parameters in the order in which they came; those of two batches share no unit.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.sizes: list[int] = []
        self.batches: list[list[torch.Tensor]] = []
        self._places: dict[torch.Tensor, list[Place]] = {}
        self._starts: dict[torch.Tensor, list[int]] = {}
        self._append(batches)

    def _append(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            used = UNIT_BYTES_MAX
            for parameter, wanted in batch:
                used = self._add(parameter, wanted, used)
            if batch:
                self.batches.append([parameter for parameter, _ in batch])

    def with_more(self, batches: Iterable[Batch]) -> Layout:
        """One that has these behind, and shares all places of this one."""
        made = Layout(())
        made.sizes = list(self.sizes)
        made.batches = list(self.batches)
        made._places = dict(self._places)
        made._starts = dict(self._starts)
        made._append(batches)
        return made

    def without(self, parameters: Collection[torch.Tensor]) -> Layout:
        """One that does not have those batches at its end of which none is in ``parameters``."""
        made = self.with_more(())
        while made.batches and not any(each in parameters for each in made.batches[-1]):
            for parameter in made.batches.pop():
                del made.sizes[made._places[parameter][0].unit :]
                del made._places[parameter], made._starts[parameter]
        return made

    def _add(self, parameter: torch.Tensor, wanted: dict[str, Wanted], used: int) -> int:
        places: list[Place] = []
        start, total = 0, parameter.numel()
        while start < total:
            count = _fitting(wanted, total - start, UNIT_BYTES_MAX - used)
            # A sliver of a large parameter is not worth its kernel call.
            is_sliver = count < total - start and used > 0 and count * 8 < total - start
            if used >= UNIT_BYTES_MAX or count == 0 or is_sliver:
                self.sizes.append(0)
                used = 0
                continue
            offsets = {}
            for name, each in wanted.items():
                offsets[name] = used
                used = _aligned(used + each.size_bytes(count))
            self.sizes[-1] = max(used, _ALIGNMENT)
            places.append(Place(parameter, wanted, len(self.sizes) - 1, start, count, offsets))
            start += count
        self._places[parameter] = places
        self._starts[parameter] = [place.start for place in places]
        return used

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return parameter in self._places

    @property
    def parameters(self) -> Iterable[torch.Tensor]:
        """All that have state."""
        return self._places.keys()

    def places(self, parameter: torch.Tensor) -> list[Place]:
        """Of all elements of a parameter, in their order."""
        return self._places[parameter]

    def place(self, parameter: torch.Tensor, element: int) -> Place:
        """Where an element's state lies."""
        index = bisect.bisect_right(self._starts[parameter], element) - 1
        return self._places[parameter][index]


def _fitting(wanted: dict[str, Wanted], remaining: int, room: int) -> int:
    """How many elements fit: all, or a multiple of what may be cut."""

    def size(count: int) -> int:
        return sum(_aligned(each.size_bytes(count)) for each in wanted.values())

    if size(remaining) <= room:
        return remaining
    per_block = sum(each.size_bytes(BLOCK_ELEMENTS) for each in wanted.values())
    blocks = max(0, room - _ALIGNMENT * len(wanted)) // per_block
    return min(remaining, blocks * BLOCK_ELEMENTS)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT

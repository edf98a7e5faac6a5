"""State on disk: units come into a ring of pinned memory, are updated there, and go back.

Note [The ring]
---------------
A slot of the ring has one unit, which is *clean* (as on disk), *reading*, *dirty* (changed and not
on its way) or *writing*. While one is updated the next two are read and those before are written.
Writes go to the slot of the durable store that is not committed, so the last commit stays what it
was. What could not be written stays dirty in memory: nothing is lost, the error is raised, and the
next step or commit writes it again.

With ``tier="auto"`` units up to the host's budget have memory of their own, and go to disk when
they are committed.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from typing import Any

import torch

from spillover import _core
from spillover._core import HostPool
from spillover._durable import DurableStore
from spillover._pinned import host_pool
from spillover._stalls import Stall
from spillover.optim._algorithms import Algorithm
from spillover.optim._disk_layout import Layout, Place
from spillover.optim._host_state import MASTER, REMAINDER, fill
from spillover.optim._host_work import Work
from spillover.optim._kernels import Moment
from spillover.optim._masters import drop_odd_remainders, refresh_master, split_master
from spillover.optim._state_store import Part, StateArrays

#: One in use, two that are read, three that are written.
RING_SLOTS = 6
_AHEAD = 2

_READ = Stall("optimizer", "state to come from disk")
_WRITE = Stall("optimizer", "state to go to disk")


class _Phase(enum.Enum):
    CLEAN = enum.auto()
    READING = enum.auto()
    DIRTY = enum.auto()
    WRITING = enum.auto()


class Slot:
    """Memory for one unit; Note [The ring]."""

    def __init__(self, size_bytes: int, pool: HostPool | None) -> None:
        self.buffer: Any
        if torch.cuda.is_available():
            self.buffer = (pool or host_pool()).allocate(size_bytes)
        else:
            self.buffer = torch.empty(size_bytes, dtype=torch.uint8, device="cpu").numpy()
        self.memory = torch.frombuffer(self.buffer, dtype=torch.uint8, count=size_bytes)
        self.unit: int | None = None
        self.phase = _Phase.CLEAN
        self.ticket: _core.Ticket | None = None

    def bytes(self, size_bytes: int) -> memoryview:
        """Its first bytes."""
        return memoryview(self.buffer).cast("B")[:size_bytes]

    def start(self, ticket: _core.Ticket) -> None:
        """Note that a write is under way."""
        self.ticket, self.phase = ticket, _Phase.WRITING

    def give_up(self) -> None:
        """Wait, and forget what is in it."""
        with contextlib.suppress(OSError):
            self.wait()
        self.unit, self.phase = None, _Phase.CLEAN

    def wait(self) -> None:
        """Until it is neither read nor written. Raises what went wrong; a write's data stays."""
        ticket, self.ticket = self.ticket, None
        if ticket is None:
            return
        phase = self.phase
        try:
            (_READ if phase is _Phase.READING else _WRITE).wait(ticket.wait)
        except BaseException:
            if phase is _Phase.READING:
                self.unit, self.phase = None, _Phase.CLEAN
            else:
                self.phase = _Phase.DIRTY
            raise
        self.phase = _Phase.CLEAN


class DiskStateStore:
    """The state of one optimizer in a durable store; a :class:`StateStore`.

    Not thread-safe: one step, read or commit at a time. ``homes`` have memory of their own.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        layout: Layout,
        disk: DurableStore,
        ring: Sequence[Slot],
        homes: Sequence[Slot],
    ) -> None:
        self.layout = layout
        self.disk = disk
        self._algorithm = algorithm
        self._set_memory(ring, homes)
        # Units with contents, in memory or on disk.
        self._written: set[int] = set()
        self._left: dict[int, int] = {}
        self._order: list[int] = []
        self._at: dict[int, int] = {}

    def _set_memory(self, ring: Sequence[Slot], homes: Sequence[Slot]) -> None:
        self._ring = list(ring)
        self._homes = list(homes)
        for unit, slot in enumerate(self._homes):
            slot.unit = unit

    # ---- steps ---------------------------------------------------------------------------------

    def begin(self, groups: Sequence[list[Work]]) -> None:
        """Write again what an earlier step could not; know what is to come."""
        self._retry()
        self._left = {}
        for works in groups:
            for work in works:
                for place in self.layout.places(work.parameter):
                    if place.end > work.done:
                        count = place.end - max(place.start, work.done)
                        self._left[place.unit] = self._left.get(place.unit, 0) + count
        self._order = list(self._left)
        self._at = {unit: index for index, unit in enumerate(self._order)}
        for unit in self._order[:_AHEAD]:
            self._prefetch(unit)

    def unit(self, work: Work, start: int) -> tuple[int, int]:
        """By the layout."""
        place = self.layout.place(work.parameter, start)
        return place.unit, place.end

    def acquire(self, parts: Sequence[Part]) -> list[StateArrays]:
        """In the ring. Raises StorageError, with nothing changed, where it cannot be read."""
        unit = self.layout.place(parts[0].work.parameter, parts[0].start).unit
        slot = self._loaded(unit)
        next_at = self._at[unit] + 1
        for following in self._order[next_at : next_at + _AHEAD]:
            self._prefetch(following, keep=unit)
        slot.phase = _Phase.DIRTY
        self._written.add(unit)
        return [self._arrays(part, slot.memory) for part in parts]

    def release(self, parts: Sequence[Part]) -> None:
        """Start to write the unit when all of its parts that this step updates are updated."""
        unit = self.layout.place(parts[0].work.parameter, parts[0].start).unit
        self._left[unit] -= sum(part.count for part in parts)
        slot = self._slot_of(unit)
        assert slot is not None
        if self._left[unit] <= 0 and slot not in self._homes:
            self._write(slot)

    def end(self) -> None:
        """Writes go on under whatever comes next."""

    def _arrays(self, part: Part, memory: torch.Tensor) -> StateArrays:
        work = part.work
        place = self.layout.place(work.parameter, part.start)
        self._make_valid(place, work, memory)
        moments: dict[str, Moment] = {
            spec.slot: place.moment(memory, spec.name, part.start, part.count)
            for spec in self._algorithm.moments(work.group)
        }
        low: dict[str, torch.Tensor] = {}
        for name in (MASTER, REMAINDER):
            if name in place.wanted:
                array = place.moment(memory, name, part.start, part.count)
                assert isinstance(array, torch.Tensor)
                low[name] = array
                self._make_low(place, name, array, part)
        return StateArrays(moments, low.get(MASTER), low.get(REMAINDER))

    def _make_valid(self, place: Place, work: Work, memory: torch.Tensor) -> None:
        """Give moments that have no contents yet their first ones."""
        for spec in self._algorithm.moments(work.group):
            if spec.name not in place.valid:
                fill(place.array(memory, spec.name), self._algorithm.initial_value(work.group))
                place.valid.add(spec.name)

    def _make_low(self, place: Place, name: str, array: torch.Tensor, part: Part) -> None:
        """Have a master, or a remainder, be up to date with the weight."""
        work, weight = part.work, part.weight
        whole = work.loaded_master
        if name == REMAINDER and whole is not None:
            split_master(weight, whole[part.start : part.start + part.count], array)
        elif name not in place.valid:
            if name == MASTER:
                array.copy_(weight)
            else:
                array.zero_()
        elif work.needs_weight:
            if name == MASTER:
                refresh_master(weight, array)
            else:
                drop_odd_remainders(weight, array)
        if part.start + part.count == place.end:
            place.valid.add(name)

    # ---- the ring ------------------------------------------------------------------------------

    def _slot_of(self, unit: int) -> Slot | None:
        if unit < len(self._homes):
            return self._homes[unit]
        return next((slot for slot in self._ring if slot.unit == unit), None)

    def _loaded(self, unit: int) -> Slot:
        """The unit's slot, with its contents; neither read nor written."""
        slot = self._slot_of(unit)
        if slot is None:
            slot = self._free_slot()
            self._read(slot, unit)
        slot.wait()
        if slot in self._ring:  # Least recently used first.
            self._ring.remove(slot)
            self._ring.append(slot)
        return slot

    def _read(self, slot: Slot, unit: int) -> None:
        if unit in self._written:
            size = self.layout.sizes[unit]
            slot.ticket = self.disk.read(_name(unit), slot.bytes(size))
            slot.phase = _Phase.READING
        slot.unit = unit

    def _prefetch(self, unit: int, keep: int | None = None) -> None:
        if unit not in self._written or self._slot_of(unit) is not None:
            return
        for slot in self._ring:
            is_written = slot.phase is _Phase.WRITING and slot.ticket and slot.ticket.is_done()
            if is_written:
                slot.wait()
            if slot.phase is _Phase.CLEAN and not self._is_wanted_soon(slot.unit, keep):
                self._read(slot, unit)
                return

    def _is_wanted_soon(self, unit: int | None, keep: int | None) -> bool:
        if unit is None:
            return False
        now = self._at.get(keep, -1) if keep is not None else -1
        return unit == keep or 0 <= self._at.get(unit, -1) - now <= _AHEAD

    def _free_slot(self) -> Slot:
        """One whose unit is on disk too. Blocks until the oldest write is over."""
        for slot in self._ring:
            if slot.phase is _Phase.CLEAN:
                slot.unit = None
                return slot
        for phase in (_Phase.WRITING, _Phase.READING):
            for slot in self._ring:
                if slot.phase is phase:
                    slot.wait()
                    slot.unit = None
                    return slot
        # Parts of several units were updated, as in another order than theirs.
        slot = self._ring[0]
        self._write(slot)
        slot.wait()
        slot.unit = None
        return slot

    def _write(self, slot: Slot) -> None:
        assert slot.unit is not None
        slot.start(self.disk.write(_name(slot.unit), slot.bytes(self.layout.sizes[slot.unit])))

    def _retry(self) -> None:
        for slot in self._ring:
            if slot.phase is _Phase.WRITING and slot.ticket and slot.ticket.is_done():
                try:
                    slot.wait()
                except OSError:
                    self._write(slot)
                    slot.wait()
            elif slot.phase is _Phase.DIRTY:
                self._write(slot)

    # ---- beside steps --------------------------------------------------------------------------

    def flush(self) -> None:
        """Have everything on disk. Blocks. Raises StorageError; what is not there stays here."""
        slots = [*self._homes, *self._ring]
        for slot in slots:
            if slot.phase is _Phase.DIRTY:
                self._write(slot)
        errors: list[OSError] = []
        for slot in slots:
            try:
                slot.wait()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def scratch(self) -> list[Slot]:
        """Two slots of the ring for other data; everything is on disk, see :meth:`flush`."""
        for slot in self._ring[:2]:
            slot.wait()
            slot.unit = None
        return self._ring[:2]

    def read(self, place: Place) -> torch.Tensor:
        """The memory of the unit of ``place``, with its contents. Blocks; good until the next call.

        Raises CorruptData and StorageError.
        """
        return self._loaded(place.unit).memory

    def change(self, place: Place) -> torch.Tensor:
        """As :meth:`read`, to be written to."""
        slot = self._loaded(place.unit)
        slot.phase = _Phase.DIRTY
        self._written.add(place.unit)
        return slot.memory

    def copy_to(self, other: DurableStore) -> None:
        """Have another store, which has these units too, hold what they have now. Blocks.

        Raises CorruptData and StorageError; the units are where they were.
        """
        self.flush()
        slot = self.scratch()[0]
        try:
            for unit in sorted(self._written):
                buffer = slot.bytes(self.layout.sizes[unit])
                slot.ticket, slot.phase = self.disk.read(_name(unit), buffer), _Phase.READING
                slot.wait()
                slot.start(other.write(_name(unit), buffer))
                slot.wait()
        except BaseException:
            slot.give_up()
            raise

    def move_to(self, disk: DurableStore, layout: Layout, ring: Sequence[Slot] | None) -> None:
        """Go on there, where everything is, with a ring of larger slots where one is given."""
        self.disk, self.layout = disk, layout
        self._left, self._order, self._at = {}, [], {}
        if ring is not None:
            self._ring = list(ring)

    def start_over(self, layout: Layout, ring: Sequence[Slot], homes: Sequence[Slot]) -> None:
        """Have other units, in other memory; :meth:`go_back` finds their contents."""
        self.layout = layout
        self._set_memory(ring, homes)

    def give_up_memory(self) -> None:
        """Let go of it, before :meth:`start_over` gets other."""
        for slot in (*self._homes, *self._ring):
            slot.give_up()
        self._set_memory((), ())

    def go_back(self, valid: dict[torch.Tensor, set[str]]) -> None:
        """Forget what is not committed. ``valid``: names of arrays with committed contents."""
        for slot in (*self._homes, *self._ring):
            slot.give_up()
        self.disk.rollback()
        self._left, self._order, self._at = {}, [], {}
        self._written = {
            unit for unit in range(len(self.layout.sizes)) if self.disk.is_committed(_name(unit))
        }
        for parameter in self.layout.parameters:
            for place in self.layout.places(parameter):
                names = valid.get(parameter, set()) if place.unit in self._written else set()
                place.valid = set(names)
        for unit, slot in enumerate(self._homes):
            self._read(slot, unit)
            slot.wait()
            slot.unit = unit

    @property
    def host_bytes(self) -> int:
        """Of state in host memory, between steps."""
        return sum(self.layout.sizes[: len(self._homes)])

    @property
    def slot_bytes(self) -> int:
        """Of each slot of the ring."""
        return self._ring[0].memory.nbytes if self._ring else 0

    @property
    def ring_slots(self) -> int:
        """How many."""
        return len(self._ring)

    @property
    def ring_bytes(self) -> int:
        """Of the ring."""
        return sum(slot.memory.nbytes for slot in self._ring)

    def close(self) -> None:
        """Let others open the store."""
        self.disk.close()


def _name(unit: int) -> str:
    return f"state/{unit}"


def unit_entries(layout: Layout) -> dict[str, int]:
    """Name and size of each unit in the durable store."""
    return {_name(unit): size for unit, size in enumerate(layout.sizes)}

"""The entries of ``optimizer.state`` where state is on disk: what stands for it, and reads it."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spillover._core import HostPool
from spillover._errors import ConfigError, DiskFull, StateError
from spillover._layout import dense_stride, flat_view
from spillover.optim import _kernels
from spillover.optim._algorithms import Algorithm, Group
from spillover.optim._disk_layout import Place
from spillover.optim._disk_store import DiskStateStore
from spillover.optim._host_entries import Entries, Entry
from spillover.optim._host_state import (
    MASTER,
    REMAINDER,
    Array,
    BlockwiseState,
    StateOptions,
    Wanted,
    assign,
)
from spillover.optim._masters import whole_master

#: Gives places to parameters that have none.
Grow = Callable[[Mapping[torch.Tensor, Group]], None]

# Of a copy of an array; a smaller one is in ordinary memory.
_MAPPED_BYTES_MIN = 1 << 20


@dataclass(frozen=True, eq=False)
class StateOnDisk:
    """Stands in ``optimizer.state`` for an array that is on disk; ``read()`` gives a copy."""

    name: str
    shape: torch.Size
    _parameter: torch.Tensor = field(repr=False)
    _entries: DiskEntries = field(repr=False)

    def read(self) -> torch.Tensor:
        """A copy of the parameter's shape, 8-bit moments as float32. Blocks.

        A large one is in memory that is mapped from an unnamed file beside the state, so that the
        system can do without it. Raises CorruptData, StorageError and DiskFull.
        """
        return self._entries.read(self._parameter, self.name)


class DiskEntries(Entries):
    """As its base, over a :class:`DiskStateStore`, which is there from :meth:`attach` on."""

    def __init__(
        self,
        algorithm: Algorithm,
        options: StateOptions,
        pool: HostPool | None,
        name: str,
        synchronize: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        # Waits for a step that is under way; the optimizer's.
        self._synchronize = synchronize
        super().__init__(algorithm, options, pool, name)
        self.disk: DiskStateStore | None = None
        #: For copies of state.
        self.folder: str | None = None
        self._initial: dict[torch.Tensor, float] = {}
        self._grow: weakref.WeakMethod[Grow] | None = None

    def attach(self, store: DiskStateStore, grow: weakref.WeakMethod[Grow]) -> None:
        """Have state lie there; ``grow`` gives places to what has none."""
        self.disk = self.store = store
        self._grow = grow

    def _store(self) -> DiskStateStore:
        assert self.disk is not None
        return self.disk

    def reserve(self, parameters: Iterable[tuple[torch.Tensor, Group]]) -> None:
        """Have a place for each. Blocks where some have none yet, as all is copied then.

        Raises
        ------
        ConfigError
            One has a place, for state of another form.
        HostOutOfMemory, DiskFull, StorageError
            There is no room for more; nothing has changed.
        """
        parameters = list(parameters)
        layout = self._store().layout
        missing = {each: group for each, group in parameters if each not in layout}
        if missing:
            grow = self._grow() if self._grow is not None else None
            assert grow is not None
            grow(missing)
        layout = self._store().layout
        for parameter, group in parameters:
            shape = tuple(parameter.shape)
            place = layout.places(parameter)[0]
            size = layout.places(parameter)[-1].end
            if place.wanted != self.wanted(parameter, group) or size != parameter.numel():
                raise ConfigError(
                    f"the state of a parameter of shape {shape} has another form than when the "
                    f"optimizer was made ({', '.join(place.wanted) or 'none'}); on disk it stays "
                    "as it was: options such as amsgrad and momentum, and the parameter's type and "
                    "device, must not change"
                )

    # ---- for a step ----------------------------------------------------------------------------

    def complete_moments(self, parameter: torch.Tensor, group: Group, entry: Entry) -> Entry:
        """As the base's; the arrays get their contents when they come to memory."""
        if self.counts_steps and "step" not in entry:
            entry["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        late: Entry = {}
        if self.algorithm.has_initial_state:
            self._initial[parameter] = self.algorithm.initial_value(group)
        for spec in self.algorithm.moments(group):
            if spec.name not in entry:
                target = entry if self.algorithm.first_step_reads else late
                target[spec.name] = self.stand_in(parameter, spec.name)
        return late

    def complete_master(self, parameter: torch.Tensor, group: Group, entry: Entry) -> None:
        """Nothing yet: :meth:`needs_weight` says what is to be done with each part."""
        for name in (MASTER, REMAINDER):
            is_loaded = name == REMAINDER and isinstance(entry.get(MASTER), torch.Tensor)
            if name in self.wanted(parameter, group) and not is_loaded:
                entry[name] = self.stand_in(parameter, name)

    def needs_weight(self, parameter: torch.Tensor) -> bool:
        """Whether the master must be made from the weight, or compared with it."""
        places = self._store().layout.places(parameter)
        if not any(name in places[0].wanted for name in (MASTER, REMAINDER)):
            return False
        return not self.was_ours(parameter) or any(
            MASTER in place.wanted and MASTER not in place.valid for place in places
        )

    def loaded_master(self, parameter: torch.Tensor, entry: Entry) -> torch.Tensor | None:
        """One that was loaded, where a remainder is wanted."""
        master = entry.get(MASTER)
        return _ordered(master, parameter) if isinstance(master, torch.Tensor) else None

    def stand_in(self, parameter: torch.Tensor, name: str) -> StateOnDisk:
        """What ``optimizer.state`` has of an array."""
        return StateOnDisk(name, parameter.shape, parameter, self)

    def stored_names(self, parameter: torch.Tensor, entry: Entry) -> list[str]:
        """The arrays of ``entry`` that have contents.

        Raises
        ------
        StateError
            A master that was loaded is not split yet.
        """
        if isinstance(entry.get(MASTER), torch.Tensor):
            raise StateError("what was loaded is complete after the next step; commit then")
        return [
            name
            for name, value in entry.items()
            if isinstance(value, StateOnDisk)
            and all(name in place.valid for place in self._store().layout.places(parameter))
        ]

    # ---- for checkpoints -----------------------------------------------------------------------

    def read(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """A copy of an array; see :meth:`StateOnDisk.read`."""
        synchronize = self._synchronize()
        if synchronize is not None:
            synchronize()
        store = self._store()
        found: torch.Tensor | None = None
        for place in store.layout.places(parameter):
            array = place.array(store.read(place), name)
            if found is None:
                dtype = torch.float32 if isinstance(array, BlockwiseState) else array.dtype
                stride = dense_stride(parameter)
                found = self._empty(parameter.numel(), dtype).as_strided(parameter.shape, stride)
            part = flat_view(found)[place.start : place.end]
            if name not in place.valid:
                part.fill_(self._initial.get(parameter, 0.0))
            elif isinstance(array, BlockwiseState):
                _kernels.decode_blockwise(array.moment, signed=array.is_signed, into=part)
            else:
                part.copy_(array)
        assert found is not None
        return found

    def unpacked(self, parameter: torch.Tensor, entry: Entry) -> Entry:
        """As torch has it, in pageable memory."""
        found = {
            name: value.read() if isinstance(value, StateOnDisk) else value
            for name, value in entry.items()
        }
        remainder = found.pop(REMAINDER, None)
        if remainder is not None and MASTER not in found:
            self._drop_odd_remainders(parameter, remainder)
            whole = whole_master(parameter, remainder)
            flat = self._empty(whole.numel(), whole.dtype)
            found[MASTER] = flat.as_strided(whole.shape, whole.stride()).copy_(whole)
        return found

    def _empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host; much of it is a file's without a name, which the system may evict.

        Raises DiskFull.
        """
        size_bytes = count * dtype.itemsize
        if size_bytes < _MAPPED_BYTES_MIN:
            return torch.empty(count, dtype=dtype, device="cpu")
        folder = self.folder
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                # Now: a page that has no room when it is written to would end the process.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError as error:
                raise DiskFull(
                    error.errno,
                    f"a copy of the state needs {size_bytes} bytes beside it in {folder}: "
                    f"{error.strerror}",
                    folder,
                ) from error
            memory = mmap.mmap(file.fileno(), size_bytes)
        # The tensor's storage holds the mapping.
        return torch.frombuffer(memory, dtype=dtype, count=count)

    def take_over(self, loaded: Sequence[tuple[torch.Tensor, Group, Entry]]) -> list[Entry]:
        """As the base's. What is loaded is read unit by unit, so that files may be mapped.

        Where the disk fails, a part has been loaded: load again.
        """
        self._check_shapes(loaded)
        self.reserve(
            (parameter, group)
            for parameter, group, entry in loaded
            if parameter.numel() > 0 and (parameter.requires_grad or entry)
        )
        found = [
            self._loaded(parameter, self.wanted(parameter, group), entry)
            for parameter, group, entry in loaded
        ]
        self._versions.clear()
        return found

    def _loaded(self, parameter: torch.Tensor, wanted: dict[str, Wanted], entry: Entry) -> Entry:
        if parameter.numel() == 0:
            return dict(entry)
        on_disk = {
            name: value
            for name, value in entry.items()
            if name in wanted and isinstance(value, torch.Tensor)
        }
        rest = {name: value for name, value in entry.items() if name not in on_disk}
        found = self._placed(parameter, {}, rest)
        found.update({name: self.stand_in(parameter, name) for name in on_disk})
        if parameter not in self._store().layout:
            return found
        ordered = {name: _ordered(value, parameter) for name, value in on_disk.items()}
        for place in self._store().layout.places(parameter):
            self._load_place(place, ordered)
        return found

    def _load_place(self, place: Place, values: dict[str, torch.Tensor]) -> None:
        place.valid.clear()
        if not values:
            return
        memory = self._store().change(place)
        for name, value in values.items():
            array: Array = place.array(memory, name)
            assign(array, value[place.start : place.end])
            place.valid.add(name)


def _ordered(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``value``, flat in the parameter's order in memory; a copy only where it must be."""
    stride = dense_stride(parameter)
    if tuple(value.stride()) != stride:
        value = torch.empty_strided(
            parameter.shape, stride, dtype=value.dtype, device=value.device
        ).copy_(value)
    return flat_view(value.detach())

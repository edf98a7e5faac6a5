"""The disk tier of one optimizer: its store, its commits, and how it resumes.

Note [What a commit holds]
--------------------------
All state, the weights of the optimizer's parameters, the other parameters and the buffers of
``module``, the options of groups, step counts, the states of random number generators, and what the
user adds. It is one commit of the durable store, so all of it or nothing. A unit that no step has
changed since the last commit stays where it is. Frozen weights are written each time, as nothing
tells who writes them through ``weight.data``.

What comes after ``step()`` in the user's loop, such as ``scheduler.step()``, has not happened when
``step()`` commits by itself; who has such things commits where his iteration ends.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spillover._core import HostPool
from spillover._durable import DurableStore
from spillover._durable_generations import folders_of, generations, newest, remove_others
from spillover._errors import ConfigError, DiskFull, HostOutOfMemory, StateError, StorageError
from spillover._units import format_bytes
from spillover.optim import _disk_layout, _disk_store
from spillover.optim._algorithms import Group
from spillover.optim._commit_values import dumps, loads, random_states, restore_random_states
from spillover.optim._disk_documents import Identity, numbered, options_of, parameters_of
from spillover.optim._disk_entries import DiskEntries
from spillover.optim._disk_layout import Layout
from spillover.optim._disk_store import DiskStateStore, Slot, unit_entries
from spillover.optim._disk_tensors import read_tensor, write_tensors
from spillover.optim._failures import note
from spillover.optim._tiers import TierOptions

if TYPE_CHECKING:
    from spillover.optim._host_base import HostBase
    from spillover.optim._host_optimizer import HostOptimizer

_EXTENT_BYTES_MAX = 8 << 20
_BLOCK_BYTES = 4096
_EXTRA_BYTES = 4 << 20
_EXTRA_BYTES_PER_TENSOR = 1024
_WEIGHT = "weight/"
# Of the host's memory, left for staging and others where tier="auto" has no budget.
_ROOM_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What :func:`resume` found.

    Attributes
    ----------
    step
        How many steps the optimizer had made.
    extra
        What the commit was given; None where ``step()`` committed by itself.
    """

    step: int
    extra: Any


class DiskTier:
    """See the notes; what one optimizer has on disk. Not thread-safe, as optimizers are not."""

    def __init__(
        self,
        options: TierOptions,
        entries: DiskEntries,
        name: str,
        optimizer: weakref.ref[HostBase],
    ) -> None:
        self.options = options
        self.entries = entries
        self.steps = 0
        self._optimizer = optimizer
        self._name = name
        self._pool: HostPool | None = None
        self._generation = 0
        # The one whose commit counts until the present one has one, if that has not.
        self._before: tuple[int, DurableStore] | None = None
        self._has_tried_commit = False
        # In stores before the present one.
        self._commits_before = 0
        self._written_before = 0
        self._committed_steps = 0
        self._must_resume = False
        self._is_closed = False
        self._sizes: dict[str, int] = {}
        self._extent_bytes = 0
        self._extra_bytes = 0

    # ---- when it is made -----------------------------------------------------------------------

    def open(self, groups: list[Group], pool: HostPool | None) -> None:
        """Have all memory and disk space that training will need; or find what was committed.

        Raises
        ------
        HostOutOfMemory, DiskFull
            There is no room; the message has the bytes of each tier. Nothing is left behind.
        ConfigError
            What is in the directory is of other parameters.
        """
        self._pool = pool
        layout = Layout(self._trained(group) for group in groups)
        slot_bytes = self._measure(layout, groups)
        if not self._sizes:
            raise ConfigError(f"{self._name} has no parameters to keep state of")
        ring, homes = self._memory(layout, slot_bytes)
        host_bytes = sum(slot.memory.nbytes for slot in (*ring, *homes))
        disk = self._open_committed(layout, groups)
        if disk is None:
            with self._explained(f"{host_bytes} bytes of pinned host memory, which are there, and"):
                disk = self._open_store()
        self._must_resume = disk.sequence > 0
        self.entries.folder = self.options.folders[0]
        store = DiskStateStore(self.entries.algorithm, layout, disk, ring, homes)
        self.entries.attach(store, weakref.WeakMethod(self._grow))

    def _measure(self, layout: Layout, groups: list[Group], least_bytes: int = 0) -> int:
        """Note what the store is to have; gives the size of a slot, which is at least that."""
        tensors = self._tensors(groups)
        largest = max((each.nbytes for _, each in tensors), default=1)
        slot_bytes = max(
            [*layout.sizes, min(largest, _disk_layout.UNIT_BYTES_MAX), least_bytes],
        )
        slot_bytes = _rounded(slot_bytes, _BLOCK_BYTES)
        self._extent_bytes = min(slot_bytes, _EXTENT_BYTES_MAX)
        self._sizes = unit_entries(layout) | {key: each.nbytes for key, each in tensors}
        self._extra_bytes = _EXTRA_BYTES + _EXTRA_BYTES_PER_TENSOR * len(self._sizes)
        return _rounded(slot_bytes, self._extent_bytes)

    @contextlib.contextmanager
    def _explained(self, beside: str) -> Iterator[None]:
        """Say in errors of a store that is made or opened what it is for."""
        try:
            yield
        except DiskFull as error:
            raise DiskFull(
                error.errno,
                f"{self._name} needs {beside} {self.disk_bytes} bytes "
                f"({format_bytes(self.disk_bytes)}) on disk for two slots of state and weights, "
                f"which are not there: {error.strerror}",
                error.filename,
            ) from error
        except ConfigError as error:
            raise self._of_others(str(error)) from error

    def _of_others(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what}. It is what an optimizer of other parameters or options left there: "
            "choose another directory, or remove it with 'spillover store delete'"
        )

    def _open_committed(self, layout: Layout, groups: list[Group]) -> DurableStore | None:
        """The store that is there, if it has a commit.

        Raises ConfigError where that cannot become this optimizer's, if more parameters come.
        """
        self._generation, disk, others = newest(self.options.folders, self._write_limit)
        if disk is not None and not self._sizes.items() <= disk.entries.items():
            try:
                self._check_more(disk, layout, groups)
            except BaseException:
                disk.close()
                raise
        remove_others(self.options.folders, others)
        return disk

    def _check_more(self, disk: DurableStore, layout: Layout, groups: list[Group]) -> None:
        """Raise ConfigError where more parameters would not make the commit this optimizer's."""
        where = ", ".join(self.options.folders)
        try:
            document = loads(disk.extra)
            saved, batches = document["signature"], document["layout"]
        except (ConfigError, KeyError, TypeError, ValueError):
            raise self._of_others(f"the durable store in {where} has other entries") from None
        mine = self._signature(groups, with_module=False)
        try:
            self._identity(groups).check_kind(document, where)
            if saved[: len(mine)] != mine:
                self._identity(groups).check(document, where)
        except ConfigError as error:
            raise self._of_others(str(error)) from None
        if saved == self._signature(groups) and batches == numbered(layout, groups):
            raise self._of_others(f"the commit in {where} has state of another form")

    def _trained(self, group: Group) -> list[tuple[torch.Tensor, Any]]:
        return [
            (each, self.entries.wanted(each, group))
            for each in group["params"]
            if _is_trained(each)
        ]

    def _ring(self, layout: Layout, slot_bytes: int) -> list[Slot]:
        count = _ring_slots(layout)
        try:
            return [Slot(slot_bytes, self._pool) for _ in range(count)]
        except HostOutOfMemory as error:
            raise HostOutOfMemory(
                f"{self._name} needs {count * slot_bytes} bytes "
                f"({format_bytes(count * slot_bytes)}) of pinned host memory, through which its "
                f"state passes, and {self.disk_bytes} bytes on disk; nothing was made: {error}"
            ) from error

    def _memory(self, layout: Layout, slot_bytes: int) -> tuple[list[Slot], list[Slot]]:
        ring = self._ring(layout, slot_bytes)
        homes: list[Slot] = []
        if self.options.tier == "auto":
            left = self.options.host_budget
            for size in layout.sizes:
                if left is not None and size > left:
                    break
                try:
                    homes.append(Slot(size, self._pool))
                except HostOutOfMemory:
                    # The rest of the program needs some, too.
                    del homes[max(0, len(homes) - -(-_ROOM_BYTES // slot_bytes)) :]
                    break
                left = None if left is None else left - size
        return ring, homes

    def _open_store(self) -> DurableStore:
        return DurableStore(
            self._folders,
            self._sizes,
            extra_limit=self._extra_bytes,
            extent_bytes=self._extent_bytes,
            write_limit=self._write_limit,
        )

    @property
    def _write_limit(self) -> int | None:
        """What the present store may write yet."""
        limit = self.options.write_limit
        return None if limit is None else max(1, limit - self._written_before)

    @property
    def _folders(self) -> list[str]:
        return folders_of(self.options.folders, self._generation)

    @property
    def host_bytes(self) -> int:
        """In memory of the host, between steps."""
        return 0 if self.entries.disk is None else self.entries.disk.host_bytes

    @property
    def disk_bytes(self) -> int:
        """On disk: two slots of state, weights and buffers; of all that is there."""
        before = 0 if self._before is None else sum(self._before[1].entries.values())
        return 2 * (sum(self._sizes.values()) + before)

    @property
    def store(self) -> DiskStateStore:
        """Of the state."""
        assert self.entries.disk is not None
        return self.entries.disk

    # ---- when parameters become more -----------------------------------------------------------

    def cover(self, groups: list[Group]) -> None:
        """Have a place for each weight, of those too that are not trained. As :meth:`_grow`."""
        sizes = {key: each.nbytes for key, each in self._tensors(groups)}
        if not sizes.items() <= self._sizes.items():
            self._grow({})

    def _grow(self, parameters: Mapping[torch.Tensor, Group]) -> None:
        """Give places to them, and to whatever else is trained by now; Note [Generations].

        Blocks until all is copied. Raises HostOutOfMemory, DiskFull, CorruptData and StorageError;
        nothing has changed then.
        """
        self._check_open()
        store = self.store
        optimizer = self._optimizer()
        assert optimizer is not None
        layout = store.layout.with_more(
            [
                (each, self.entries.wanted(each, parameters.get(each, group)))
                for each in group["params"]
                if each not in store.layout and (each in parameters or _is_trained(each))
            ]
            for group in optimizer.param_groups
        )
        before = self._generation, self._sizes, self._extent_bytes, self._extra_bytes
        written = self._written_before
        old = disk = store.disk
        made: DurableStore | None = None
        try:
            slot_bytes = self._measure(layout, optimizer.param_groups, store.slot_bytes)
            fits = slot_bytes <= store.slot_bytes and _ring_slots(layout) <= store.ring_slots
            ring = None if fits else self._ring(layout, slot_bytes)
            if not self._must_resume:  # Which finds where they are.
                self._generation = 1 + max(self._generation, *generations(self.options.folders))
                self._written_before += old.stats().written_bytes
                with self._explained("room for more parameters:"):
                    disk = made = self._open_store()
                store.copy_to(made)
        except BaseException:
            self._written_before = written
            if made is not None:
                self._written_before += made.stats().written_bytes
                made.close()
            if self._generation != before[0]:
                remove_others(self.options.folders, [self._generation])
            self._generation, self._sizes, self._extent_bytes, self._extra_bytes = before
            raise
        counts = made is not None and old.sequence > 0
        if counts:
            self._has_tried_commit = False
            self._commits_before += old.sequence
            self._before = before[0], old
        store.move_to(disk, layout, ring)
        if made is not None and not counts:
            old.close()
            remove_others(self.options.folders, [before[0]])

    def _remove_before(self) -> None:
        if self._before is not None:
            generation, store = self._before
            self._before = None
            store.close()
            remove_others(self.options.folders, [generation])

    def forget_all_but(self, groups: list[Group]) -> None:
        """Let go of places that were given last, to parameters that were then not added."""
        store = self.store
        store.layout = store.layout.without(set(parameters_of(groups)))
        self._measure(store.layout, groups, store.slot_bytes)

    # ---- commits -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise StateError where nothing can be kept, or what is committed would be lost."""
        self._check_open()
        if self._must_resume:
            folders = ", ".join(self.options.folders)
            raise StateError(
                f"{folders} holds a commit of {self._name} that was not resumed: call "
                "spillover.optim.resume(directory) after making the optimizer, or choose another "
                "directory, or remove it with 'spillover store delete'"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise StateError(f"this {self._name} is closed; make another one to go on")

    def close(self) -> None:
        """Let go of the folders; again does nothing."""
        self._is_closed = True
        try:
            self.store.close()
        finally:
            if self._before is not None:
                self._before[1].close()

    def step_is_over(self, optimizer: HostOptimizer, *, counts: bool) -> None:
        """Count it, unless it was counted when it was begun, and commit where it is time."""
        self.steps += counts
        every = self.options.commit_every
        if every is None or self.steps - self._committed_steps < every:
            return
        optimizer.synchronize()  # What fails there is the step itself.
        try:
            optimizer.commit()
        except StorageError as error:
            note(
                error,
                "The step itself is done, and must not be repeated; what failed is the commit "
                "after it. commit() tries again, as the next step does.",
            )
            raise

    def commit(self, groups: list[Group], state: dict[Any, Any], extra: Any) -> int:
        """Note [What a commit holds]. Blocks."""
        self.check()
        tensors = self._tensors(groups)
        self._check_places(tensors)
        document = dumps(self._document(groups, state, extra))
        if len(document) > self._extra_bytes:
            raise ConfigError(
                f"extra is too large: the commit would have {len(document)} bytes beside state and "
                f"weights, and there is room for {self._extra_bytes}"
            )
        self.store.flush()
        write_tensors(self.store, tensors)
        self._has_tried_commit = True
        sequence = self.store.disk.commit(document)
        self._committed_steps = self.steps
        self._remove_before()
        return self._commits_before + sequence

    def _check_places(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for key, tensor in tensors:
            size = self._sizes.get(key)
            if size != tensor.nbytes:
                had = "was not there" if size is None else f"had {size}"
                raise ConfigError(
                    f"{key} has {tensor.nbytes} bytes and {had} when the optimizer was made, or a "
                    "group was added, which is when weights and buffers get their places on disk; "
                    "nothing is committed"
                )

    def _document(self, groups: list[Group], state: dict[Any, Any], extra: Any) -> dict[str, Any]:
        parameters = parameters_of(groups)
        entries = []
        for parameter in parameters:
            entry = state.get(parameter, {})
            step = entry.get("step")
            names = self.entries.stored_names(parameter, entry)
            is_ours = self.entries.was_ours(parameter)
            entries.append([None if step is None else float(step), names, is_ours])
        return {
            **self._identity(groups).document(),
            "steps": self.steps,
            "commits_before": self._commits_before,
            "groups": [options_of(group) for group in groups],
            "layout": numbered(self.store.layout, groups),
            "entries": entries,
            "random": random_states(),
            "extra": extra,
        }

    def _identity(self, groups: list[Group]) -> Identity:
        return Identity.of(self._name, groups, self._signature(groups))

    def _signature(self, groups: list[Group], *, with_module: bool = True) -> list[Any]:
        """What must be the same in a process that resumes."""
        options = self.entries.options
        return [
            [options.moments, options.master],
            *(
                [key, str(each.dtype), list(each.shape), list(each.stride())]
                for key, each in self._tensors(groups)
                if with_module or key.startswith(_WEIGHT)
            ),
        ]

    def _tensors(self, groups: list[Group]) -> list[tuple[str, torch.Tensor]]:
        """Weights and buffers, by their names on disk."""
        parameters = parameters_of(groups)
        found = [(f"{_WEIGHT}{index}", each) for index, each in enumerate(parameters)]
        if self.options.module is not None:
            known = set(map(id, parameters))
            module = self.options.module
            named: Iterable[tuple[str, torch.Tensor]] = (
                *module.named_parameters(),
                *module.named_buffers(),
            )
            found += [(f"module/{name}", each) for name, each in named if id(each) not in known]
        return [(key, each.detach()) for key, each in found if each.numel() > 0]

    # ---- resuming ------------------------------------------------------------------------------

    def resume(self, optimizer: HostOptimizer) -> Resumed | None:
        """Take everything back to the last commit; None where there is none."""
        self._check_open()
        store = self.store
        groups = optimizer.param_groups
        is_new = not self._must_resume and store.disk.sequence == 0
        if is_new and self._before is None:
            if self.steps:
                raise StateError("nothing was committed yet, so there is nothing to go back to")
            return None
        if not self._must_resume:
            self._check_last(groups)
            self._written_before += store.disk.stats().written_bytes
            self._must_resume = True
        # Opened again, since a store whose commit failed takes no more writes.
        store.disk.close()
        if self._before is not None:
            self._before[1].close()
            self._before = None
        self._generation, found, others = newest(self.options.folders, self._write_limit)
        if found is None:
            where = ", ".join(self.options.folders)
            raise StorageError(errno.ENOENT, "the commit is not there any more", where)
        store.disk = found
        store.layout = store.layout.without(set(parameters_of(groups)))
        document = loads(store.disk.extra)
        self._identity(groups).check(document, ", ".join(self.options.folders))
        remove_others(self.options.folders, others)
        self._lay_out(document["layout"], groups)
        parameters = parameters_of(groups)
        entries = document["entries"]
        store.go_back(
            {each: set(saved[1]) for each, saved in zip(parameters, entries, strict=True)}
        )
        with torch.no_grad():
            for key, tensor in self._tensors(groups):
                read_tensor(self.store, key, tensor)
        for group, saved in zip(groups, document["groups"], strict=True):
            group.update(saved)
        self._resume_entries(optimizer, entries)
        self.steps = self._committed_steps = int(document["steps"])
        self._commits_before = int(document["commits_before"])
        self._must_resume = False
        restore_random_states(document["random"])
        return Resumed(step=self.steps, extra=document["extra"])

    def _check_last(self, groups: list[Group]) -> None:
        """Raise ConfigError where the last commit is of others, before what is not committed goes.

        That of a commit that failed may be on the disk or not.
        """
        last = self.store.disk
        if last.sequence == 0:
            if self._before is None or self._has_tried_commit:
                return
            last = self._before[1]
        self._identity(groups).check(loads(last.extra), ", ".join(self.options.folders))

    def _lay_out(self, batches: list[list[int]], groups: list[Group]) -> None:
        """Have the layout that a commit has, and memory for it."""
        store = self.store
        layout = store.layout
        is_same = batches == numbered(layout, groups)
        if not is_same:
            all_of = [(each, group) for group in groups for each in group["params"]]
            chosen = [[all_of[number] for number in batch] for batch in batches]
            layout = Layout(
                [(each, self.entries.wanted(each, group)) for each, group in batch]
                for batch in chosen
            )
        extent_bytes = store.disk.extent_bytes
        slot_bytes = _rounded(self._measure(layout, groups), extent_bytes)
        fits = (
            slot_bytes <= store.slot_bytes
            and store.slot_bytes % extent_bytes == 0
            and _ring_slots(layout) <= store.ring_slots
        )
        if not is_same or not fits:
            store.give_up_memory()
            store.start_over(layout, *self._memory(layout, slot_bytes))
        if not self._sizes.items() <= store.disk.entries.items():
            raise self._of_others(
                f"the commit in {', '.join(self.options.folders)} has state of another form"
            )

    def _resume_entries(self, optimizer: HostOptimizer, saved: list[Any]) -> None:
        optimizer.state.clear()
        all_of = [(each, group) for group in optimizer.param_groups for each in group["params"]]
        for (parameter, group), (step, names, is_ours) in zip(all_of, saved, strict=True):
            entry: dict[str, Any] = {}
            if step is not None:
                entry["step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
            entry.update({name: self.entries.stand_in(parameter, name) for name in names})
            if self.entries.algorithm.has_initial_state and parameter in self.store.layout:
                self.entries.complete_moments(parameter, group, entry)
            if entry:
                optimizer.state[parameter] = entry
            if is_ours:
                self.entries.has_written(parameter)


def _ring_slots(layout: Layout) -> int:
    return min(_disk_store.RING_SLOTS, max(2, len(layout.sizes)))


def _is_trained(parameter: torch.Tensor) -> bool:
    return parameter.requires_grad and parameter.numel() > 0


def _rounded(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes

"""Runs one step on the host: weights of devices through staging, those of the host where they lie.

Note [Failed updates]
---------------------
Everything that can be known is checked, and all memory is there, before the first element changes.
What still can fail are calls of the driver on the way. ``Work.done`` says how far each parameter
came. New weights whose copy to the device could not be launched are kept and go there first in the
next step, so state and weights never come apart. A step that is repeated with the same gradients,
known by identity and version (``_progress``), goes on where the
failed one stopped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from spillover._layout import flat_view
from spillover._stalls import Stall
from spillover.optim._algorithms import Algorithm
from spillover.optim._failures import note
from spillover.optim._host_work import Work, batches, host_batches, update
from spillover.optim._progress import Position, position_of
from spillover.optim._staging import Piece, Slot, Staging, piece_bytes, staging_of
from spillover.optim._state_store import Part, StateStore

_ARRIVAL = Stall("optimizer", "gradients to arrive")
_OTHER_STEP = Stall("optimizer", "another optimizer's step")

_thread = threading.local()


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """Have :func:`is_stepping` be true meanwhile."""
    before = is_stepping()
    _thread.is_stepping = True
    try:
        yield
    finally:
        _thread.is_stepping = before


def is_stepping() -> bool:
    """Whether this thread has what updates need, so that to wait for one would be forever."""
    return getattr(_thread, "is_stepping", False)


class Observer(Protocol):
    """Hears of a step that runs beside the program, on the thread that runs it."""

    def sent(self, work: Work, event: torch.cuda.Event) -> None:
        """The new weight is on the device after ``event``."""
        ...


@dataclass(eq=False)
class _UnsentWeight:
    target: torch.Tensor
    weight: torch.Tensor
    version: int


class Unsent:
    """New weights that could not be sent to their device."""

    def __init__(self) -> None:
        self._weights: list[_UnsentWeight] = []

    def keep(self, slot: Slot, batch: Sequence[tuple[Work, Piece]]) -> None:
        """Copies of what the slot has for ``batch``."""
        for _, piece in batch:
            weight = slot.view(piece.weight_offset, piece.count, piece.weight.dtype).clone()
            self._weights.append(_UnsentWeight(piece.weight, weight, piece.weight._version))

    def forget(self) -> None:
        """Something else has written all weights."""
        self._weights.clear()

    def send(self) -> None:
        """Send them now, on the current streams, but for those that something else has written."""
        self._weights = [one for one in self._weights if one.version == one.target._version]
        while self._weights:
            one = self._weights[0]
            one.target.copy_(one.weight)
            del self._weights[0]
            for other in self._weights:  # Parts of one parameter share the counter.
                other.version = other.target._version


def taken_by(works: Sequence[Work]) -> dict[int, Position]:
    """The gradients of ``works``, as what a step knows when all of them are updated."""
    found = {id(one.parameter): position_of(one.parameter, one.parameter.numel()) for one in works}
    return {key: position for key, position in found.items() if position is not None}


def reserve_staging(works: Sequence[Work]) -> None:
    """Have the staging that :func:`run` wants for ``works``. Raises HostOutOfMemory."""
    for device, groups in _by_device([list(works)]).items():
        staging = staging_of(device)
        wanted_bytes = _wanted_bytes(groups)
        if not staging.has(wanted_bytes):
            with staging.lock:
                staging.reserve(wanted_bytes)


def order_after_compute(works: Sequence[Work]) -> None:
    """Have copies of an observed :func:`run` come after what is on the current streams now."""
    for device in _by_device([list(works)]):
        streams = staging_of(device).streams
        streams.copy_out.wait_stream(torch.cuda.current_stream(device))


def run(
    algorithm: Algorithm,
    groups: Sequence[list[Work]],
    unsent: Unsent,
    finish: Callable[[Work], None],
    store: StateStore,
    observer: Observer | None = None,
) -> None:
    """Update all parameters; ``finish`` is called for each when it is.

    Blocks the host until the last gradient has arrived and been applied; kernels launched on the
    current streams from then on see the new weights. With an ``observer`` no current stream waits,
    or is waited for: see :func:`order_after_compute`.
    """
    by_device = _by_device(groups)
    # Now, since weights may move when they are updated.
    on_host = [[w for w in works if w.parameter.device.type == "cpu"] for works in groups]
    store.begin([works for device in by_device.values() for works in device] + on_host)
    with contextlib.ExitStack() as held:
        held.enter_context(stepping())
        # Every step takes the locks in one order.
        for device in sorted(by_device, key=str):
            staging = staging_of(device)
            if not staging.lock.acquire(blocking=False):
                _OTHER_STEP.wait(staging.lock.acquire)
            held.callback(staging.lock.release)
            staging.reserve(_wanted_bytes(by_device[device]))
        for device, device_groups in by_device.items():
            with torch.cuda.device(device):
                pipeline = _Pipeline(algorithm, staging_of(device), unsent, finish, store, observer)
                pipeline.run(device_groups)
    for works in on_host:
        _update_host(algorithm, works, finish, store)
    store.end()


def explain(
    error: BaseException,
    works: Sequence[Work],
    skipped: int,
    remedy: str = "Calling step() again with the same gradients finishes it.",
) -> None:
    """Say in ``error`` what has been updated. ``skipped``: parameters that were before the step."""
    whole = skipped + sum(work.done == work.parameter.numel() for work in works)
    partial = [work for work in works if 0 < work.done < work.parameter.numel()]
    if not whole and not partial:
        note(error, "No parameter has been changed; step() may be called again.")
        return
    text = f"{whole} of {skipped + len(works)} parameters had been updated, with their state"
    for work in partial:
        text += (
            f", and the first {work.done} elements of one of shape {tuple(work.parameter.shape)}"
        )
    note(error, f"{text}, before it failed. {remedy}")


def _update_host(
    algorithm: Algorithm, works: list[Work], finish: Callable[[Work], None], store: StateStore
) -> None:
    """Update weights that lie on the host, all of one group."""
    for parts in host_batches(works, store):
        gradients = []
        for part in parts:
            if part.work.pending is not None:
                part.work.pending.wait()
            gradient = part.work.gradient
            flat = gradient if part.work.pending is not None else flat_view(gradient)
            gradients.append(flat[part.start : part.start + part.count])
        try:
            update(algorithm, store, parts, gradients)
        finally:
            for part in parts:
                if part.work.done == part.start + part.count:
                    # Kernels do not tell autograd, nor those who watch for changed weights.
                    torch.autograd.graph.increment_version(part.work.parameter)
                if part.work.done == part.work.parameter.numel():
                    finish(part.work)


class _Pipeline:
    """The weights of one device; Note [Optimizer pipeline]."""

    def __init__(
        self,
        algorithm: Algorithm,
        staging: Staging,
        unsent: Unsent,
        finish: Callable[[Work], None],
        store: StateStore,
        observer: Observer | None,
    ) -> None:
        self._store = store
        self._observer = observer
        self._algorithm = algorithm
        self._staging = staging
        self._unsent = unsent
        self._finish = finish

    def run(self, groups: Sequence[list[Work]]) -> None:
        staging = self._staging
        compute = torch.cuda.current_stream(staging.device)
        if self._observer is None:
            staging.streams.copy_out.wait_stream(compute)
        try:
            self._run_batches(groups)
        except BaseException:
            # The caller may free gradients and weights now, so nothing may copy them any more.
            staging.drain()
            raise
        finally:
            if self._observer is None:
                compute.wait_stream(staging.streams.copy_in)

    def _run_batches(self, groups: Sequence[list[Work]]) -> None:
        waiting: tuple[Slot, list[tuple[Work, Piece]]] | None = None
        for batch in batches(groups, self._store, self._staging.slot_bytes):
            slot = self._staging.next_slot()
            self._staging.start_arrival(slot, [piece for _, piece in batch])
            if waiting is not None:
                self._update_batch(*waiting)
            waiting = (slot, batch)
        if waiting is not None:
            self._update_batch(*waiting)

    def _update_batch(self, slot: Slot, batch: list[tuple[Work, Piece]]) -> None:
        _ARRIVAL.wait(slot.arrived.synchronize)
        parts, gradients = [], []
        for work, piece in batch:
            weight = slot.view(piece.weight_offset, piece.count, piece.weight.dtype)
            if work.pending is not None:
                work.pending.wait()
                gradient = work.gradient[piece.start : piece.start + piece.count]
            else:
                gradient = slot.view(piece.gradient_offset, piece.count, piece.gradient.dtype)
            parts.append(Part(work, piece.start, piece.count, weight))
            gradients.append(gradient)
        try:
            update(self._algorithm, self._store, parts, gradients)
        finally:
            # Also where what has been updated cannot be stored.
            if all(part.work.done == part.start + part.count for part in parts):
                self._send(slot, batch)

    def _send(self, slot: Slot, batch: list[tuple[Work, Piece]]) -> None:
        try:
            self._staging.start_departure(slot, [piece for _, piece in batch])
        except BaseException:
            self._unsent.keep(slot, batch)
            raise
        finally:
            for work, _ in batch:
                if work.done == work.parameter.numel():
                    self._finish(work)
        if self._observer is not None:
            for work, _ in batch:
                if work.done == work.parameter.numel():
                    self._observer.sent(work, slot.left)


def _by_device(groups: Sequence[list[Work]]) -> dict[torch.device, list[list[Work]]]:
    """The work on CUDA devices, by device; still one list a parameter group."""
    found: dict[torch.device, list[list[Work]]] = {}
    for works in groups:
        for device in dict.fromkeys(work.parameter.device for work in works):
            if device.type == "cuda":
                chosen = [work for work in works if work.parameter.device == device]
                found.setdefault(device, []).append(chosen)
    return found


def _wanted_bytes(groups: Sequence[list[Work]]) -> int:
    return sum(piece_bytes(work.parameter, work.gradient) for works in groups for work in works)

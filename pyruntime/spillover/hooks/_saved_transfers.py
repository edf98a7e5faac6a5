"""Copies of saved tensors under way, for all contexts of the process.

Note [Ordering of saved-tensor copies]
--------------------------------------
Copy-out: an event on the compute stream after the bytes were produced, waited for by the copy-out
stream; the device bytes are held here until the *host* has seen the copy's event, so whichever
stream's pool they return to, no copy reads them any more. Copy-in: the buffer is allocated on the
compute stream, whose work up to then the copy-in stream waits for (its last user may still be
queued); the copy-in stream also waits for the copy-out of the same bytes; the compute stream waits
for the copy-in's event at each use, so the buffer can go back to its pool at any time after that.
Pinned memory is held here until the host has seen the last event of a copy on it. ``record_stream``
is not used: it would keep memory for an unknown time.

Everything here is guarded by ``lock``. It is never held while a thread waits for the device or the
disk: that could wait for another thread, which wants the lock.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass

import torch

from spillover._core import DiskPayload, Ticket, TraceLabel
from spillover._settings import logger
from spillover._stalls import Stall
from spillover._streams import copy_streams, new_event
from spillover.hooks._saved_storage import HostBlock, SavedCopy

#: Reentrant, since Python's collector may run a destructor on a thread that holds it.
lock = threading.RLock()

_DEPARTURE = TraceLabel("activations: saved tensor", "copy")
_ARRIVAL = TraceLabel("activations: reload", "copy")
_DEPARTURES = Stall("activations", "device memory to be given up")
_SETTLE = Stall("activations", "copies and writes to end")


@dataclass(eq=False, slots=True)
class _Departure:
    """A copy to the host. ``source`` and ``block`` live until it is complete."""

    event: torch.cuda.Event
    source: torch.Tensor
    block: HostBlock
    copy: weakref.ref[SavedCopy]


@dataclass(eq=False, slots=True)
class _Arrival:
    """A copy to the device. ``block`` lives until it is complete."""

    event: torch.cuda.Event
    block: HostBlock


@dataclass(eq=False, slots=True)
class _Write:
    """A write to disk. ``block`` lives until it is over; errors go to the context's list."""

    ticket: Ticket
    block: HostBlock
    payload: DiskPayload
    copy: weakref.ref[SavedCopy]
    errors: deque[BaseException]


@dataclass(eq=False, slots=True)
class _DeviceQueues:
    departures: deque[_Departure]
    arrivals: deque[_Arrival]


class Transfers:
    """The copies and writes of the process; one instance, ``transfers``."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, _DeviceQueues] = {}
        self._writes: deque[_Write] = deque()
        #: Device bytes that are held only until their copy-out is complete.
        self.leaving_bytes = 0
        #: Pinned bytes that wait for the disk.
        self.writing_bytes = 0

    def _queues(self, device: torch.device) -> _DeviceQueues:
        queues = self._devices.get(device)
        if queues is None:
            queues = self._devices[device] = _DeviceQueues(deque(), deque())
        return queues

    def send(
        self, copy: SavedCopy, source: torch.Tensor, block: HostBlock, flow_id: int = 0
    ) -> None:
        """Start the copy of ``source``, which was produced on the copy's home stream.

        ``flow_id`` numbers the arrow that leads on from it in a trace, 0 for none.
        """
        streams = copy_streams(copy.device)
        streams.copy_out.wait_event(copy.produced)
        with streams.copying_out(_DEPARTURE, source.nbytes, flow_id):
            block.tensor.copy_(source, non_blocking=True)
        copy.left.record(streams.copy_out)
        copy.source = source
        copy.block = block
        self._queues(copy.device).departures.append(
            _Departure(copy.left, source, block, weakref.ref(copy))
        )
        self.leaving_bytes += source.nbytes

    def bring(
        self, copy: SavedCopy, block: HostBlock, flat: torch.Tensor, compute: torch.cuda.Stream
    ) -> None:
        """Start the copy of ``block`` to ``flat``, just allocated on ``compute``."""
        streams = copy_streams(copy.device)
        streams.copy_in.wait_stream(compute)
        streams.copy_in.wait_event(copy.left)
        with streams.copying_in(_ARRIVAL, flat.nbytes):
            flat.copy_(block.tensor, non_blocking=True)
        arrived = new_event()
        arrived.record(streams.copy_in)
        copy.flat, copy.flat_home, copy.arrived = flat, compute, arrived
        self._queues(copy.device).arrivals.append(_Arrival(arrived, block))

    def track_write(
        self,
        copy: SavedCopy,
        ticket: Ticket,
        block: HostBlock,
        payload: DiskPayload,
        errors: deque[BaseException],
    ) -> None:
        """Hold ``block`` until the write is over; ``errors`` gets its error."""
        copy.payload, copy.writing = payload, ticket
        self._writes.append(_Write(ticket, block, payload, weakref.ref(copy), errors))
        self.writing_bytes += block.buffer.size_bytes

    def collect(self) -> None:
        """Let go of what completed copies and writes held. Does not block."""
        for queues in self._devices.values():
            while queues.departures and _is_over(queues.departures[0].event):
                self._departed(queues.departures.popleft())
            while queues.arrivals and _is_over(queues.arrivals[0].event):
                queues.arrivals.popleft()
        for _ in range(len(self._writes)):
            write = self._writes.popleft()
            if write.ticket.is_done():
                self._written(write)
            else:
                self._writes.append(write)

    def _departed(self, departure: _Departure) -> None:
        self.leaving_bytes -= departure.source.nbytes
        copy = departure.copy()
        if copy is not None:
            copy.source = None

    def _written(self, write: _Write) -> None:
        self.writing_bytes -= write.block.buffer.size_bytes
        copy = write.copy()
        try:
            write.ticket.wait()
        except BaseException as error:
            if copy is None:
                logger.warning("a write of saved tensors that are not needed failed: %s", error)
                return
            # The pinned copy stays and is as good as the file would have been.
            copy.payload = copy.writing = None
            write.errors.append(error)
            return
        if copy is not None:
            copy.block = copy.writing = None

    def order_writes(self) -> None:
        """Have what the current streams do from now on wait for the copies out.

        The program may write in place to what was saved once the graph is gone.
        """
        for device, queues in self._devices.items():
            if queues.departures:
                torch.cuda.current_stream(device).wait_event(queues.departures[-1].event)

    def leaving_bytes_of(self, device: torch.device) -> int:
        """Bytes of one device that are held only until their copy-out is complete."""
        queues = self._devices.get(device)
        return sum(item.source.nbytes for item in queues.departures) if queues is not None else 0

    def newest_departures(self) -> list[torch.cuda.Event]:
        """For each device, the event of the copy-out that started last."""
        return [item.departures[-1].event for item in self._devices.values() if item.departures]

    def oldest_departure(self) -> torch.cuda.Event | None:
        """Event of the copy-out that started first on the device with the most of them."""
        queues = max(self._devices.values(), key=lambda item: len(item.departures), default=None)
        return queues.departures[0].event if queues is not None and queues.departures else None

    def oldest_arrival(self) -> torch.cuda.Event | None:
        """The same for copies to the device."""
        queues = max(self._devices.values(), key=lambda item: len(item.arrivals), default=None)
        return queues.arrivals[0].event if queues is not None and queues.arrivals else None

    def oldest_write(self) -> Ticket | None:
        """Ticket of the write that started first."""
        return self._writes[0].ticket if self._writes else None


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


transfers = Transfers()


_owner = os.getpid()


def finish_departures() -> None:
    """Block until the copies out that are under way are over; let go of their device memory."""
    with lock:
        events = transfers.newest_departures() if os.getpid() == _owner else []
    for event in events:
        _DEPARTURES.wait(event.synchronize)
    with lock:
        transfers.collect()


def settle() -> None:
    """Block until no copy or write is under way, and let go of what they held."""
    # A forked child has the parent's bookkeeping, but neither its device nor its threads.
    while os.getpid() == _owner:
        with lock:
            transfers.collect()
            event = transfers.oldest_departure() or transfers.oldest_arrival()
            ticket = transfers.oldest_write() if event is None else None
        if event is not None:
            _SETTLE.wait(event.synchronize)
        elif ticket is not None:
            _SETTLE.wait(functools.partial(wait_quietly, ticket))
        else:
            return


def wait_quietly(ticket: Ticket) -> None:
    """Block until a request is over; its error is found by ``collect()``."""
    try:
        ticket.wait()
    except BaseException as error:
        logger.debug("a disk request failed: %s", error)


# Before the interpreter takes torch apart: memory must not go while a copy works on it.
atexit.register(settle)

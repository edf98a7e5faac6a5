"""Copies optimizer state between its place off the device and the device.

Note [Paging pipeline]
----------------------
State comes in buckets of consecutive parameters. While the device updates one, the next bucket
arrives and the last one leaves, so at most three are there. Compute waits for each bucket's
arrival, and copies out wait for its update. The tensors of a bucket come from the compute stream's
memory: a copy in waits for what compute was doing when it got the memory, and before compute lets
go of it, it waits for the copy out. That orders every use of the memory on the device, so the host
waits for nothing, and no memory is held when the step is over. Compute pays for it with a wait for
the last bucket's copy out.

What is on disk goes through a transfer engine, which holds device memory until the host has seen
that a copy is over; there the host does wait, for the disk above all.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from spillover._core import TraceLabel
from spillover._errors import SpilloverError
from spillover._layout import is_dense
from spillover._stalls import Stall
from spillover._streams import copy_streams, new_event
from spillover._transfer import TransferTicket
from spillover.optim._paging_state import Parked
from spillover.optim._paging_store import OnDisk, StateStore, host_memory, on_device

_STATE_IN = TraceLabel("optimizer paging: state in", "copy")
_STATE_OUT = TraceLabel("optimizer paging: state out", "copy")
_ARRIVAL = TraceLabel("optimizer paging: state", "stall")
_DEPARTURE = TraceLabel("optimizer paging: state to leave", "stall")
_HELD = Stall("optimizer paging", "state that the program holds")
_DISK = Stall("optimizer paging", "state to leave for the disk")

# One bucket is updated, one arrives, one leaves.
_BUCKETS_MAX = 3

Pair = tuple[torch.Tensor, Parked]


class Transit:
    """The state of one bucket on one device: arriving, there, or leaving.

    It holds the device's tensors until :class:`Transfers` retires it.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self.device = device
        self.size_bytes = size_bytes
        # On the device, by the identity of what they are copies of.
        self.tensors: dict[int, torch.Tensor] = {}
        self.event: torch.cuda.Event | None = None
        self.tickets: list[TransferTicket] = []
        self.leaving: list[torch.Tensor] = []


class Transfers:
    """What is under way within one step of one optimizer; see Note [Paging pipeline]."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._limit = _BUCKETS_MAX * store.options.bucket_bytes
        self._there: list[Transit] = []
        self._leaving: defaultdict[torch.device, list[Transit]] = defaultdict(list)
        self._held: dict[int, torch.cuda.Event] = {}

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around a step: at its end nothing of it is on the device, also after an error."""
        try:
            yield
        except BaseException:
            # Tensors must not go while copies work on them. What fails now has failed before.
            for transit in self._there:
                with contextlib.suppress(Exception):
                    for ticket in transit.tickets:
                        ticket.cancel()
                    self._retire(transit)
            with contextlib.suppress(Exception):
                self._finish()
            raise
        else:
            self._finish()
        finally:
            self._there.clear()
            self._leaving.clear()
            self._held.clear()

    def expect(self, order: Iterable[Parked]) -> None:
        """Tell in which order state will be wanted, so that disks read ahead."""
        stored = [each.stored for each in order if each.host is None]
        found = [each for each in stored if isinstance(each, OnDisk)]
        for engine in {id(each.engine): each.engine for each in found}.values():
            engine.expect([each.payload for each in found if each.engine is engine])

    def has_room(self, device: torch.device, size_bytes: int) -> bool:
        """Whether so many bytes may come; has what leaves make room for them."""
        while self._bytes_on(device) + size_bytes > self._limit:
            if not self._leaving[device]:
                return False
            self._retire(self._leaving[device].pop(0))
        return True

    # ---- in ------------------------------------------------------------------------------------

    def bring(self, device: torch.device, wanted: Sequence[Parked], size_bytes: int) -> Transit:
        """Start to copy state to a device, after the work of its current stream.

        ``size_bytes`` is what the bucket will have there, with state that is still to be made. The
        state lies off the device as before.
        """
        transit = Transit(device, size_bytes)
        if device.type != "cuda":
            # Parameters that are left alone; if they have been moved, their state goes on there.
            transit.tensors = {id(parked): parked.tensor() for parked in wanted}
            return transit
        self.has_room(device, size_bytes)
        with torch.cuda.device(device):
            tensors = self._allocate(device, wanted)
            self._there.append(transit)
            transit.tensors = tensors
            pairs = [(tensors[id(parked)], parked) for parked in wanted]
            self._copy_in(transit, [pair for pair in pairs if pair[1].host is not None])
            self._fetch(transit, [pair for pair in pairs if pair[1].host is None])
        return transit

    def _allocate(self, device: torch.device, wanted: Sequence[Parked]) -> dict[int, torch.Tensor]:
        try:
            return {id(parked): on_device(parked, device) for parked in wanted}
        except torch.OutOfMemoryError:
            if not self._leaving[device]:
                raise
        # There is more once what leaves has left.
        while self._leaving[device]:
            self._retire(self._leaving[device].pop(0))
        return {id(parked): on_device(parked, device) for parked in wanted}

    def await_arrival(self, transit: Transit) -> None:
        """Have what compute does next wait for the state. Blocks for reads from disk."""
        if transit.device.type != "cuda":
            return
        compute = torch.cuda.current_stream(transit.device)
        if transit.event is not None:
            copy_streams(transit.device).wait(compute, transit.event, _ARRIVAL)
        for ticket in transit.tickets:
            ticket.stream_wait(compute)

    def _copy_in(self, transit: Transit, pairs: list[Pair]) -> None:
        if not pairs:
            return
        streams = copy_streams(transit.device)
        streams.copy_in.wait_stream(torch.cuda.current_stream(transit.device))
        # The last step's copies out may have been ordered with another stream than this one.
        for event in {id(each.ready): each.ready for _, each in pairs}.values():
            if event is not None:
                streams.copy_in.wait_event(event)
        transit.event = event = new_event()
        try:
            with streams.copying_in(_STATE_IN, sum(tensor.nbytes for tensor, _ in pairs)):
                for tensor, parked in pairs:
                    assert parked.host is not None
                    tensor.copy_(parked.host, non_blocking=True)
        finally:
            event.record(streams.copy_in)
            for _, parked in pairs:
                parked.ready = event

    def _fetch(self, transit: Transit, pairs: list[Pair]) -> None:
        by_engine: dict[int, list[tuple[torch.Tensor, OnDisk]]] = {}
        for tensor, parked in pairs:
            assert isinstance(parked.stored, OnDisk)
            by_engine.setdefault(id(parked.stored.engine), []).append((tensor, parked.stored))
        for wanted in by_engine.values():
            engine = wanted[0][1].engine
            if engine.device == transit.device:
                ticket = engine.fetch_all([(each.payload, tensor) for tensor, each in wanted])
                transit.tickets.append(ticket)
                continue
            for tensor, each in wanted:  # Parameters that are on another device since.
                tensor.copy_(each.read_like(tensor))

    # ---- out -----------------------------------------------------------------------------------

    def send(self, transit: Transit, pairs: list[Pair]) -> None:
        """Start to copy tensors to their places off the device, after the current stream's work.

        The transit is leaving from then on. Where a place cannot be had, the tensor goes to
        pageable memory, so that it is not lost.

        Raises
        ------
        HostOutOfMemory, StorageError
            Of such a place, when all tensors have another one.
        """
        failures: list[SpilloverError] = []
        to_host: list[Pair] = []
        to_disk: list[Pair] = []
        for tensor, parked in pairs:
            try:
                (to_host if self._lives_on_host(parked) else to_disk).append((tensor, parked))
            except SpilloverError as error:
                failures.append(error)
                to_host.append((tensor, _without_a_place(parked)))
        if transit in self._there:
            self._there.remove(transit)
        arrived, transit.tickets = transit.tickets, []
        transit.event = None
        transit.tensors = {}
        transit.leaving = [tensor for tensor, _ in pairs]
        self._leaving[transit.device].append(transit)
        with torch.cuda.device(transit.device):
            if to_disk:
                try:
                    transit.tickets = [self._put(transit, to_disk)]
                except SpilloverError as error:
                    failures.append(error)
                    to_host += [(tensor, _without_a_place(each)) for tensor, each in to_disk]
            self._copy_out(transit, to_host)
        if not transit.tickets:
            transit.tickets = arrived
        if failures:
            try:
                raise failures[0]
            finally:
                # The error knows this frame, whose tensors it would keep for the garbage collector.
                failures.clear()

    def _lives_on_host(self, parked: Parked) -> bool:
        """Whether it goes to host memory, and has some then."""
        if parked.host is not None and (parked.memory is not None or parked.is_held()):
            return True
        memory = None if parked.is_for_disk else self._store.take(parked.size_bytes)
        if memory is None:
            parked.is_for_disk = True
            return False
        parked.settle()
        parked.live_in(memory)
        return True

    def _copy_out(self, transit: Transit, pairs: list[Pair]) -> None:
        if not pairs:
            return
        streams = copy_streams(transit.device)
        streams.copy_out.wait_stream(torch.cuda.current_stream(transit.device))
        transit.event = event = new_event()
        try:
            with streams.copying_out(_STATE_OUT, sum(tensor.nbytes for tensor, _ in pairs)):
                for tensor, parked in pairs:
                    assert parked.host is not None
                    parked.host.copy_(tensor, non_blocking=True)
        finally:
            event.record(streams.copy_out)
            for _, parked in pairs:
                parked.ready = event
                if parked.is_held():
                    self._held[id(event)] = event

    def _put(self, transit: Transit, pairs: list[Pair]) -> TransferTicket:
        for _, parked in pairs:
            # Of the step before: the disk need not have room for both.
            if parked.stored is not None:
                parked.stored.drop()
                parked.stored = None
        tensors = [tensor if is_dense(tensor) else tensor.contiguous() for tensor, _ in pairs]
        stored, ticket = self._store.put(transit.device, tensors)
        for (_, parked), each in zip(pairs, stored, strict=True):
            parked.leave_host()
            parked.stored = each
        return ticket

    # ---- device memory -------------------------------------------------------------------------

    def _bytes_on(self, device: torch.device) -> int:
        there = sum(each.size_bytes for each in self._there if each.device == device)
        return there + sum(each.size_bytes for each in self._leaving[device])

    def _retire(self, transit: Transit) -> None:
        """Let go of the tensors, for what compute allocates from now on."""
        compute = torch.cuda.current_stream(transit.device)
        if transit.event is not None:
            copy_streams(transit.device).wait(compute, transit.event, _DEPARTURE)
        for ticket in transit.tickets:
            if not ticket.is_cancelled:
                _DISK.wait(ticket.wait)
        transit.leaving.clear()
        transit.tensors.clear()
        if transit.tickets:
            self._store.collect()

    def _finish(self) -> None:
        for leaving in self._leaving.values():
            while leaving:
                self._retire(leaving.pop(0))
        for event in self._held.values():
            _HELD.wait(event.synchronize)


def _without_a_place(parked: Parked) -> Parked:
    parked.settle()
    parked.live_in(host_memory(parked.size_bytes))
    return parked

"""Bounded pinned memory through which a host optimizer's gradients and weights pass.

Note [Optimizer pipeline]
-------------------------
Device parameters are cut into pieces and packed into batches that fit one slot. There are two
slots: while the CPU updates the batch in one, the next batch's gradients arrive in the other and
the last batch's new weights leave from it. The device orders the copies of a slot among themselves
(a copy-out waits for the slot's last copy-in), and the host waits only for a batch's arrival, which
therefore also tells it that the slot's old weights have left. Copies out wait for the compute
stream as it was when the step began, so a batch's arrival also tells the host that no kernel reads
its old weights any more, and copies in need not wait. The compute stream waits for the last copy in
before it goes on, so kernels launched after ``step()`` read the new weights.

The staging of a device is made at the first step that needs it and lives as long as the process, so
that no copy can outlive its memory. A lock gives it to one optimizer's step at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from spillover._core import BLOCK_ELEMENTS, TraceLabel
from spillover._pinned import empty_pinned
from spillover._stalls import Stall
from spillover._streams import CopyStreams, copy_streams, new_event

# Pinned bytes of one slot. Large enough that a copy reaches the link's speed, small enough that two
# of them do not count beside the state of a model that needs them.
_SLOT_BYTES_MAX = 32 << 20
_ALIGNMENT = 64
# Pieces end where the scales of 8-bit moments do, which is also on whole vectors.
_CUT_ELEMENTS = BLOCK_ELEMENTS

_GRADIENTS = TraceLabel("optimizer: gradients", "copy")
_WEIGHTS = TraceLabel("optimizer: new weights", "copy")
_DRAIN = Stall("optimizer", "staging to be free")


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of elements of one device parameter that is updated in one go.

    ``gradient`` and ``weight`` are flat device tensors, but for a gradient that is on the host
    already, which passes through no slot. ``reads_weight`` tells that the weight
    comes to the host too (there is no master of it). Offsets are bytes in the slot.
    """

    parameter: torch.Tensor
    start: int
    count: int
    gradient: torch.Tensor
    weight: torch.Tensor
    reads_weight: bool
    gradient_offset: int
    weight_offset: int


class Slot:
    """One pinned buffer with the events of its copies."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = empty_pinned((size_bytes,), torch.uint8)
        self.arrived = new_event()
        self.left = new_event()

    def view(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """``count`` elements at byte ``offset``."""
        part: torch.Tensor = self.memory[offset : offset + count * dtype.itemsize].view(dtype)
        return part


class Staging:
    """The two slots of one device; hold ``lock`` while using them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.streams: CopyStreams = copy_streams(device)
        self._slots: list[Slot] = []
        self._turn = 0

    def has(self, wanted_bytes: int) -> bool:
        """Whether slots of ``wanted_bytes``, or of the limit, are there. Needs no lock."""
        slots = self._slots
        size_bytes = min(wanted_bytes, _SLOT_BYTES_MAX)
        return bool(slots) and slots[0].memory.nbytes >= size_bytes

    def reserve(self, wanted_bytes: int) -> None:
        """Have slots of ``wanted_bytes``, at most the limit; waits for copies before it grows."""
        if self.has(wanted_bytes):
            return
        size_bytes = min(wanted_bytes, _SLOT_BYTES_MAX)
        self.drain()
        self._slots = []
        self._slots = [Slot(size_bytes) for _ in range(2)]

    def drain(self) -> None:
        """Block the host until no copy reads or writes the slots, also after an aborted step.

        It waits for all of both streams: copies of a batch that failed midway have no event.
        """
        for stream in (self.streams.copy_out, self.streams.copy_in):
            _DRAIN.wait(stream.synchronize)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return int(self._slots[0].memory.nbytes)

    def next_slot(self) -> Slot:
        """The slot whose turn it is."""
        self._turn = 1 - self._turn
        return self._slots[self._turn]

    def start_arrival(self, slot: Slot, batch: list[Piece]) -> None:
        """Copy the gradients (and weights) of ``batch`` to the slot, asynchronously."""
        copy_out = self.streams.copy_out
        copy_out.wait_event(slot.left)
        with self.streams.copying_out(_GRADIENTS, arrival_bytes(batch)):
            for piece in batch:
                if piece.gradient.is_cuda:
                    gradient = slot.view(piece.gradient_offset, piece.count, piece.gradient.dtype)
                    gradient.copy_(piece.gradient, non_blocking=True)
                if piece.reads_weight:
                    weight = slot.view(piece.weight_offset, piece.count, piece.weight.dtype)
                    weight.copy_(piece.weight, non_blocking=True)
        slot.arrived.record(copy_out)

    def start_departure(self, slot: Slot, batch: list[Piece]) -> None:
        """Copy the new weights of ``batch`` from the slot to the device, asynchronously."""
        with self.streams.copying_in(_WEIGHTS, sum(piece.weight.nbytes for piece in batch)):
            for piece in batch:
                weight = slot.view(piece.weight_offset, piece.count, piece.weight.dtype)
                piece.weight.copy_(weight, non_blocking=True)
        slot.left.record(self.streams.copy_in)


_stagings_lock = threading.Lock()
_stagings: dict[torch.device, Staging] = {}


def staging_of(device: torch.device) -> Staging:
    """The process's staging of ``device``, a CUDA device with an index."""
    with _stagings_lock:
        if device not in _stagings:
            _stagings[device] = Staging(device)
        return _stagings[device]


def cut(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    *,
    reads_weight: bool,
    slot_bytes: int,
    used_bytes: int,
    start: int,
    end: int,
) -> Piece | None:
    """The next piece of ``parameter``, up to ``end``, that fits behind ``used_bytes`` of a slot.

    ``parameter`` and ``gradient`` are flat. None: start a new batch.
    """
    gradient_bytes = _slot_bytes(gradient) // max(1, gradient.numel())
    per_element = gradient_bytes + parameter.element_size()
    remaining = end - start
    count, room = remaining, (slot_bytes - used_bytes - 2 * _ALIGNMENT) // per_element
    if count > room:
        # In pieces of about one size. A sliver would not be worth its two copies at the end of a
        # slot, and at the beginning of the next it would have the weight come one batch later.
        whole = (slot_bytes - 2 * _ALIGNMENT) // per_element
        fits_elsewhere = remaining <= whole and used_bytes * 8 > slot_bytes
        if used_bytes * 2 > slot_bytes or fits_elsewhere:
            return None
        pieces = max(2, -(-remaining // max(1, whole)))
        count = min(_up_to_cut(-(-remaining // pieces)), room // _CUT_ELEMENTS * _CUT_ELEMENTS)
    if count <= 0:
        return None
    gradient_offset = _align(used_bytes)
    weight_offset = _align(gradient_offset + count * gradient_bytes)
    return Piece(
        parameter=parameter,
        start=start,
        count=count,
        gradient=gradient[start : start + count],
        weight=parameter[start : start + count],
        reads_weight=reads_weight,
        gradient_offset=gradient_offset,
        weight_offset=weight_offset,
    )


def arrival_bytes(batch: list[Piece]) -> int:
    """What comes to the host of ``batch``."""
    return sum(
        _slot_bytes(piece.gradient) + (piece.weight.nbytes if piece.reads_weight else 0)
        for piece in batch
    )


def end_of(piece: Piece) -> int:
    """First byte of the slot after ``piece``."""
    return piece.weight_offset + piece.count * piece.weight.element_size()


def piece_bytes(parameter: torch.Tensor, gradient: torch.Tensor) -> int:
    """Bytes of a slot that all of ``parameter`` takes."""
    return _slot_bytes(gradient) + parameter.nbytes + 3 * _ALIGNMENT


def _slot_bytes(gradient: torch.Tensor) -> int:
    return int(gradient.nbytes) if gradient.is_cuda else 0


def _up_to_cut(count: int) -> int:
    return -(-count // _CUT_ELEMENTS) * _CUT_ELEMENTS


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT

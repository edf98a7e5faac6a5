"""The gradient of one parameter while it is off the device: its bytes, its factor, its norm.

Note [Where a gradient is]
--------------------------
*zero*: nobody has memory for it. *narrow*: as one micro-step brought it, in its own type. *wide*:
a sum of several, or something that the host computed. *device*: a program wanted a tensor that it
may write to or make views of (``.grad.view(-1)``, an all-reduce of ``.grad``), so from then on that
tensor is the gradient, until it is zeroed or another takes its place.

On the host the gradient is ``factor`` times the bytes: scaling, as by clipping and GradScaler,
touches no memory. The norm comes from the device, taken as the gradient left, or from the pass that
added up; it scales with the factor.

Note [Ordering of gradients]
----------------------------
A copy out comes after what is on the stream that is current when the gradient is ready: autograd's
for that parameter. The engine holds the device memory until the copy is over, and no
``record_stream`` is needed. Where somebody besides autograd holds that memory (a bucket of DDP, a
tensor that the program assigned), it may be written to after backward, so that stream is made to
wait for the copy. Copies in are ordered by the engine, and host memory is written to only when no
copy works on it (``HostMemory.settle``). Norms on the device are read on the current stream, as
gradients are.

One thread at a time works on one gradient, as autograd and optimizers do; only the worker and those
who have leased it run beside it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from spillover._errors import StateError
from spillover._layout import dense_stride, flat_view
from spillover._stalls import Stall
from spillover._transfer import TransferEngine, TransferTicket
from spillover.optim import _gradient_math
from spillover.optim._gradient_math import combine, wide_dtype
from spillover.optim._gradient_memory import Hold, MemoryOfParameter, widening_ranges
from spillover.optim._gradient_worker import PIECE_BYTES, Room, worker

#: Of gradients that leave.
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ARRIVAL = Stall("gradients", "copies out to end")


class Owner(Protocol):
    """Of whose parameter the gradient is, and what it may use."""

    name: str
    memory: MemoryOfParameter

    def engine(self, device: torch.device) -> TransferEngine:
        """Moves bytes of that device."""
        ...

    def stays_in_backward(self) -> bool:
        """Whether somebody needs the gradient on the device before backward ends."""
        ...

    def was_read_in_backward(self) -> None:
        """Note that somebody did."""
        ...

    def count(self, *, left_bytes: int = 0, added_bytes: int = 0, fetched_bytes: int = 0) -> None:
        """For statistics."""
        ...


class Place(enum.Enum):
    """Note [Where a gradient is]."""

    ZERO = enum.auto()
    NARROW = enum.auto()
    WIDE = enum.auto()
    DEVICE = enum.auto()


class PendingGradient:
    """A gradient for an optimizer to read; what becomes of ``.grad`` meanwhile does not change it.

    ``flat`` is a pinned CPU tensor of one dimension, of the gradient's type or of float32, in the
    memory order of the parameter; to be read after ``wait()``, and until ``release()``. The
    gradient is ``factor`` times that. ``wait`` may be called from any thread, and by each that
    reads.
    """

    def __init__(
        self, flat: torch.Tensor, factor: float, hold: Hold, wait: Callable[[], None]
    ) -> None:
        self.flat = flat
        self.factor = factor
        self._hold: Hold | None = hold
        self._wait: Callable[[], None] | None = wait
        hold.leases.append(self)

    def wait(self) -> None:
        """Block the host until the bytes are there.

        Raises
        ------
        DriverError
            What went wrong on their way.
        StateError
            The gradient was released.
        """
        if self._wait is None:
            raise StateError("this gradient was released; ask for it again")
        self._wait()

    def release(self) -> None:
        """Have the memory used for other gradients. May be called again."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.leases.remove(self)
            self.flat = self.flat[:0].clone()
            self._wait = None  # It holds the memory, too.


class HostGradient:
    """See the notes. Shape, strides, type and device are those that the program sees; on the host
    the elements lie in the order of the strides, without gaps.
    """

    def __init__(
        self,
        owner: Owner,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.owner = owner
        self.shape = shape
        self.stride = stride
        self.dtype = dtype
        self.device = device
        self.count = math.prod(shape)
        self.factor = 1.0
        self.place = Place.ZERO
        self.on_device: torch.Tensor | None = None  # Where the place is DEVICE.
        self._hold: Hold | None = None  # Where it is NARROW or WIDE.
        self._arrival: TransferTicket | None = None
        self._job = 0
        # Of the bytes, without the factor: the norm on the device, its square on the host; neither
        # where nobody has computed it.
        self._norm: torch.Tensor | None = None
        self._squares: float | None = 0.0
        self._is_modified = False  # Since then.
        self._sum: _Sum | None = None  # The last pass over the bytes; it knows their square.

    # ---- what comes ----------------------------------------------------------------------------

    def add(self, gradient: torch.Tensor, *, is_shared: bool = False) -> None:
        """Add a gradient of the device. Waits for room, not for the copy.

        ``is_shared``: somebody else may write to its memory later. Raises HostOutOfMemory, with
        nothing changed.
        """
        if self.place is not Place.DEVICE and self.owner.stays_in_backward():
            self._become(self.fetch())
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            self.on_device.add_(gradient)
            return
        gradient = self._in_order(gradient)
        receive = self._land if self.place is Place.ZERO else self._accumulate
        last = receive(gradient)
        if is_shared:
            last.stream_wait()
        self.owner.count(left_bytes=gradient.nbytes)

    def assign(self, value: torch.Tensor, *, is_shared: bool = False) -> None:
        """Become a tensor of any strides, type or device."""
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            self.on_device.copy_(value)
            return
        ordered = self._in_order(value)
        self.set_to_zero()
        last = self._land(ordered)
        if is_shared and ordered is value:
            last.stream_wait()
        self.owner.count(left_bytes=ordered.nbytes)

    def replaced_by(self, value: torch.Tensor) -> HostGradient:
        """A gradient of the same parameter that is ``value``, of whatever type and device."""
        stride = dense_stride(value)
        made = HostGradient(self.owner, value.shape, stride, value.dtype, value.device)
        if value.is_cuda and value.dtype in GRADIENT_DTYPES:
            made.assign(value, is_shared=True)
        else:
            made._become(value.detach())
        return made

    def set_to_zero(self) -> None:
        """Become zeros, at no cost."""
        self._forget()
        self._squares = 0.0
        self.on_device = None
        self.place = Place.ZERO

    def scale(self, number: float) -> None:
        """Multiply by a number; the bytes stay as they are."""
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            self.on_device.mul_(number)
            return
        if self.place is Place.ZERO:
            if math.isfinite(number):
                return
            self._fill_with_zeros()
        self.factor *= number

    def modify(self, change: Callable[[torch.Tensor], object]) -> None:
        """Have ``change`` write to the elements, in one dimension, on the host."""
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            change(self.on_device)
            return
        if self.place is Place.ZERO:
            self._fill_with_zeros()
        self.wait()
        assert self._hold is not None
        if self.factor != 1.0 or self._hold.leases:
            self._widen()
        self._hold.memory.settle()
        change(self._bytes())
        self._norm, self._squares = None, None
        self._is_modified = True

    # ---- what is read --------------------------------------------------------------------------

    def wait(self) -> None:
        """Block until the bytes are there and added up. Raises what went wrong."""
        if self._arrival is not None:
            _ARRIVAL.wait(self._arrival.wait)
        worker.wait(self._job)
        if self._sum is not None:
            self._sum.check()

    def fetch(self) -> torch.Tensor:
        """A tensor on the device that has the gradient, for the current stream."""
        value = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            return value.copy_(self.on_device)
        if self.place is Place.ZERO:
            return value.zero_()
        self.wait()
        assert self._hold is not None
        source, flat = self._bytes(), flat_view(value)
        arrived = (
            flat if source.dtype == self.dtype else torch.empty_like(source, device=self.device)
        )
        ticket = self.owner.engine(self.device).copy(arrived, source)
        self._hold.memory.add_copy(ticket)
        ticket.stream_wait()
        if self.factor != 1.0:
            arrived.mul_(self.factor)
        if arrived is not flat:
            flat.copy_(arrived)
        self.owner.count(fetched_bytes=source.nbytes)
        return value

    def to_device(self) -> torch.Tensor:
        """The gradient as a tensor that stays the gradient; Note [Where a gradient is]."""
        if self.place is not Place.DEVICE:
            self._become(self.fetch())
        assert self.on_device is not None
        return self.on_device

    def to_host(self) -> torch.Tensor:
        """A copy on the host, in ordinary memory and of the gradient's type."""
        return self.on_host(lambda flat: flat.to(self.dtype))

    def on_host(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What ``function`` makes of a flat copy of the elements, in the shape of the gradient."""
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            flat = flat_view(self._in_order(self.on_device)).cpu()
        elif self.place is Place.ZERO:
            flat = torch.zeros(self.count, dtype=self.dtype, device="cpu")
        else:
            self.wait()
            bytes_ = self._bytes()
            if self.factor == 1.0:
                flat = bytes_.clone()
            else:
                flat = bytes_.to(wide_dtype(self.dtype)) * self.factor
        return function(flat).as_strided(self.shape, self.stride)

    def lease(self) -> PendingGradient:
        """For an optimizer; see there. Raises HostOutOfMemory."""
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            hold = self.owner.memory.take(self.count, self.dtype)
            ticket, flat = self._copy_out(self._in_order(self.on_device), hold)
            ticket.stream_wait()  # The program has the tensor, and may write to it.
            return PendingGradient(flat, 1.0, hold, ticket.wait)
        if self.place is Place.ZERO:
            self._fill_with_zeros()
        assert self._hold is not None
        arrival, job, sum_ = self._arrival, self._job, self._sum

        def wait() -> None:
            if arrival is not None:
                _ARRIVAL.wait(arrival.wait)
            worker.wait(job)
            if sum_ is not None:
                sum_.check()

        return PendingGradient(self._bytes(), self.factor, self._hold, wait)

    def norm(self, order: float = 2.0) -> float:
        """The vector norm. Waits for what it is made of."""
        if order == 2.0:
            return norms_of([self])[0]
        if self.place is Place.DEVICE:
            assert self.on_device is not None
            norm = torch.linalg.vector_norm(self.on_device, order, dtype=wide_dtype(self.dtype))
            return float(norm)
        if self.place is Place.ZERO:
            return 0.0
        self.wait()
        norm_of_bytes = _gradient_math.norm(self._bytes(), order)
        if order == 0.0:
            return norm_of_bytes if self.factor else 0.0
        return norm_of_bytes * abs(self.factor)

    def norm_on_device(self) -> torch.Tensor | None:
        """The norm of order 2 where the device has it, for the current stream; does not wait."""
        if self._norm is None or self.place is Place.DEVICE:
            return None
        return self._norm if self.factor == 1.0 else self._norm * abs(self.factor)

    def is_finite(self) -> bool:
        """Whether no element is infinite or NaN. The norm mostly tells."""
        return are_finite([self])[0]

    # ---- on the host ---------------------------------------------------------------------------

    def _forget(self) -> None:
        self._hold = None
        self._arrival = None
        self._norm = self._squares = None
        self._sum = None
        self._is_modified = False
        self.factor = 1.0

    def _become(self, value: torch.Tensor) -> None:
        self._forget()
        self.on_device = value
        self.place = Place.DEVICE

    def _bytes(self) -> torch.Tensor:
        assert self._hold is not None
        memory = self._hold.memory
        if self.place is Place.WIDE:
            return memory.wide(self.count, self.dtype)
        return memory.narrow(self.count, self.dtype)

    def _in_order(self, value: torch.Tensor) -> torch.Tensor:
        fits = value.dtype == self.dtype and value.device == self.device
        if fits and value.shape == self.shape and tuple(value.stride()) == self.stride:
            return value
        ordered = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return ordered.copy_(value)

    def _first_place(self) -> Place:
        return Place.WIDE if wide_dtype(self.dtype) == self.dtype else Place.NARROW

    def _fill_with_zeros(self) -> None:
        hold = self.owner.memory.take(self.count, self.dtype)
        hold.memory.narrow(self.count, self.dtype).zero_()
        self._forget()
        self._hold, self._squares, self.place = hold, 0.0, self._first_place()

    def _copy_out(self, value: torch.Tensor, hold: Hold) -> tuple[TransferTicket, torch.Tensor]:
        narrow = hold.memory.narrow(self.count, self.dtype)
        ticket = self.owner.engine(self.device).copy(narrow, flat_view(value))
        hold.memory.add_copy(ticket)
        return ticket, narrow

    def _land(self, gradient: torch.Tensor) -> TransferTicket:
        """The first of a step: straight to its place."""
        hold = self.owner.memory.take(self.count, self.dtype)
        ticket, _ = self._copy_out(gradient, hold)
        self._forget()
        self._hold, self._arrival, self.place = hold, ticket, self._first_place()
        self._norm = torch.linalg.vector_norm(gradient, dtype=wide_dtype(self.dtype))
        return ticket

    def _target(self) -> Hold:
        """Memory for a wide gradient: that which it has, where nobody reads it."""
        assert self._hold is not None
        wide_bytes = self.count * wide_dtype(self.dtype).itemsize
        if self._hold.memory.size_bytes == wide_bytes and not self._hold.leases:
            return self._hold
        return self.owner.memory.take_for_sum(self.count, self.dtype)

    def _accumulate(self, gradient: torch.Tensor) -> TransferTicket:
        """Through the ring; see Note [Adding up beside backward]."""
        sum_ = self._begin_sum()
        try:
            ticket = self._send_pieces(flat_view(gradient), sum_)
        except BaseException as error:
            sum_.failure = error  # Half of it is added.
            raise
        self.owner.count(added_bytes=gradient.nbytes)
        return ticket

    def _begin_sum(self) -> _Sum:
        target = self._target()
        assert self._hold is not None
        sum_ = _Sum(self, self._hold, target, self._arrival, self._sum)
        self._hold, self._arrival, self.place = target, None, Place.WIDE
        self._norm, self._squares, self.factor = None, None, 1.0
        self._sum, self._is_modified = sum_, False
        return sum_

    def _send_pieces(self, flat: torch.Tensor, sum_: _Sum) -> TransferTicket:
        engine = self.owner.engine(self.device)
        piece = PIECE_BYTES // self.dtype.itemsize
        ticket: TransferTicket | None = None
        memories = {sum_.base_hold.memory, sum_.target_hold.memory}
        for start in range(0, self.count, piece):
            stop = min(self.count, start + piece)
            room = worker.take((stop - start) * self.dtype.itemsize)
            try:
                addend = room.memory.view(self.dtype)
                ticket = engine.copy(addend, flat[start:stop])
            except BaseException:
                worker.give_back(room)
                raise

            def add(
                addend: torch.Tensor = addend,
                ticket: TransferTicket = ticket,
                start: int = start,
                stop: int = stop,
                room: Room = room,
            ) -> None:
                try:
                    ticket.wait()
                    sum_.add(addend, start, stop)
                except BaseException as error:
                    sum_.failure = error
                finally:
                    worker.give_back(room)

            self._job = worker.submit(add)
            for memory in memories:
                memory.job = self._job
        assert ticket is not None
        return ticket

    def _widen(self) -> None:
        """Have the bytes be wide and times the factor, in memory that may be written to."""
        self._begin_sum().add(None, 0, self.count)

    def _square(self) -> float:
        """Of the norm, without the factor."""
        if self._norm is not None:
            norm, self._norm = float(self._norm), None
            self._squares = norm * norm
        if self._squares is None:
            self.wait()
            if self._sum is None or self._is_modified:
                self._squares = _gradient_math.sum_of_squares(self._bytes())
            else:
                self._squares = self._sum.squares
        return self._squares


class _Sum:
    """A pass that makes the bytes of a gradient wide, times its factor, plus what comes.

    ``failure`` is what went wrong in it, or in those before it.
    """

    def __init__(
        self,
        gradient: HostGradient,
        base_hold: Hold,
        target_hold: Hold,
        arrival: TransferTicket | None,
        before: _Sum | None,
    ) -> None:
        self.base_hold = base_hold
        self.target_hold = target_hold
        self.squares = 0.0
        self.failure: BaseException | None = None
        self._count = gradient.count
        self._dtype = gradient.dtype
        self._factor = gradient.factor
        self._base = gradient._bytes()
        self._target = target_hold.memory.wide(gradient.count, gradient.dtype)
        self._arrival = arrival
        self._before = before
        self._is_wide = gradient.place is Place.WIDE
        self._in_place = base_hold is target_hold

    def check(self) -> None:
        """Raise what went wrong. The last job must be over."""
        if self.failure is not None:
            raise self.failure

    def add(self, addend: torch.Tensor | None, start: int, stop: int) -> None:
        """The elements from ``start`` to ``stop``, to be called in their order."""
        if self._before is not None:
            self._before.check()
            self._before = None
        if self._arrival is not None:
            self._arrival.wait()
        if self._in_place:
            self.target_hold.memory.wait_for_copies()
        if self._in_place and not self._is_wide:
            ranges = widening_ranges(start, stop, self._count, self._dtype)
        else:
            ranges = iter([(slice(start, stop), False)])
        for part, is_copied in ranges:
            target, base = self._target[part], self._base[part]
            if self._in_place and self._is_wide:
                base = target
            elif is_copied:
                base = base.clone()
            coming = None if addend is None else addend[part.start - start : part.stop - start]
            self.squares += combine(target, base, self._factor, coming)
        if stop == self._count:
            # Nothing reads the old bytes any more.
            self.base_hold, self._base = self.target_hold, self._target


def norms_of(gradients: Sequence[HostGradient]) -> list[float]:
    """The norms of order 2, with as few waits as there are devices. Blocks until they are known."""
    by_device: dict[torch.device, list[HostGradient]] = {}
    for gradient in gradients:
        if gradient.place is Place.DEVICE:
            assert gradient.on_device is not None
            gradient._norm = torch.linalg.vector_norm(
                gradient.on_device, dtype=wide_dtype(gradient.dtype)
            )
        if gradient._norm is not None:
            by_device.setdefault(gradient.device, []).append(gradient)
    for present in by_device.values():
        norms = torch.stack([one._norm.double() for one in present if one._norm is not None])
        for gradient, norm in zip(present, norms.tolist(), strict=True):
            gradient._squares, gradient._norm = norm**2, None
    found = []
    for gradient in gradients:
        square = gradient._squares if gradient.place is Place.DEVICE else gradient._square()
        found.append(math.sqrt(square or 0.0) * abs(gradient.factor))
    return found


def are_finite(gradients: Sequence[HostGradient]) -> list[bool]:
    """Whether no element of each is infinite or NaN; blocks until that is known.

    A finite norm tells that all elements are finite. One that is not may be a norm too large for
    its type, so then the elements are looked at.
    """
    found = []
    for gradient, norm in zip(gradients, norms_of(gradients), strict=True):
        if math.isfinite(norm):
            found.append(True)
        elif gradient.place is Place.DEVICE:
            assert gradient.on_device is not None
            found.append(bool(torch.isfinite(gradient.on_device).all()))
        elif gradient.place is Place.ZERO or not math.isfinite(gradient.factor):
            found.append(gradient.place is Place.ZERO)
        else:
            gradient.wait()
            found.append(_gradient_math.is_finite(gradient._bytes()))
    return found

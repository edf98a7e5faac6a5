"""The two copy streams of a device, shared by everything that moves bytes to and from the host.

They are the library's own (csrc/transfer/copy_streams.hpp), seen through torch: transfer engines
and sleeping memory use them too. They are made once a device and live as long as the process, so
that no training step creates a stream. Any thread may ask for them. The compute stream is never
kept here: callers ask torch for it at each call, since a training loop may switch streams at any
time.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch

from spillover import _core
from spillover._copy_times import StreamTimes, TimedStream


@dataclass(frozen=True, kw_only=True)
class CopyStreamStats:
    """What one copy stream of a device was given.

    Attributes
    ----------
    device
        Index of the device.
    direction
        ``"in"``: host to device; ``"out"``: device to host.
    copies, bytes
        Asked for so far, by transfer engines and sleeping memory too. A copy may be of several
        tensors.
    timed
        Of them, those of offloading that ran while tracing was on and are over; without tracing
        nobody knows when a copy ran. The times are estimates: each has what two events cost in it.
        ``timed.in_flight`` is how many were asked for and are not known to be over.
    """

    device: int
    direction: str
    copies: int
    bytes: int
    timed: StreamTimes

    @property
    def bandwidth_bytes_s(self) -> float | None:
        """Bytes a second while a timed copy ran, an estimate; None where none was timed."""
        return self.timed.bytes / self.timed.busy_s if self.timed.busy_s else None


@dataclass(frozen=True, kw_only=True)
class ComputeWaitStats:
    """Waits of compute streams for copies of ours that ran while tracing was on.

    Attributes
    ----------
    device
        Index of the device.
    count, seconds
        Waits of more than 3 microseconds, on the device's clock.
    """

    device: int
    count: int
    seconds: float


class _Direction:
    """One copy stream, and its figures."""

    def __init__(self, streams: _core.CopyStreams, device: torch.device, direction: str) -> None:
        self._streams = streams
        self._is_out = direction == "out"
        handle = streams.handle(is_out=self._is_out)
        self.stream = torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]
        self.times = TimedStream(device, f"copies {direction}")
        self._direction = direction
        self._device = device

    def copying(self, label: _core.TraceLabel, size_bytes: int, flow_id: int) -> _Copying:
        return _Copying(self, label, size_bytes, flow_id)

    def count(self, size_bytes: int) -> None:
        self._streams.count(size_bytes, is_out=self._is_out)

    def stats(self) -> CopyStreamStats:
        copies, size_bytes = self._streams.counts(is_out=self._is_out)
        return CopyStreamStats(
            device=self._device.index,
            direction=self._direction,
            copies=copies,
            bytes=size_bytes,
            timed=self.times.stats(),
        )

    def start_again(self) -> None:
        self.times.forget()


class _Copying(AbstractContextManager[None]):
    """Around one copy. A class, which costs less than a generator where each saved tensor pays."""

    __slots__ = ("_begun", "_current", "_direction", "_flow_id", "_label", "_size_bytes")

    def __init__(
        self, direction: _Direction, label: _core.TraceLabel, size_bytes: int, flow_id: int
    ) -> None:
        self._direction = direction
        self._label = label
        self._size_bytes = size_bytes
        self._flow_id = flow_id

    def __enter__(self) -> None:
        direction = self._direction
        self._current = torch.cuda.stream(direction.stream)
        self._current.__enter__()  # type: ignore[no-untyped-call]
        self._begun = direction.times.begin(direction.stream)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        direction = self._direction
        try:
            if kind is None:
                direction.times.end(
                    self._begun, direction.stream, self._label, self._size_bytes, self._flow_id
                )
                direction.count(self._size_bytes)
        finally:
            self._current.__exit__(kind, error, traceback)


class CopyStreams:
    """Streams of one device: ``copy_in`` host to device, ``copy_out`` device to host."""

    def __init__(self, index: int) -> None:
        device = torch.device("cuda", index)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        streams = _core.CopyStreams(index)
        self._index = index
        self._in = _Direction(streams, device, "in")
        self._out = _Direction(streams, device, "out")
        self._waits = TimedStream(device, "compute waits", ignores_short=True)

    @property
    def copy_in(self) -> torch.cuda.Stream:
        """Host to device."""
        return self._in.stream

    @property
    def copy_out(self) -> torch.cuda.Stream:
        """Device to host."""
        return self._out.stream

    def copying_in(self, what: _core.TraceLabel, size_bytes: int) -> AbstractContextManager[None]:
        """Have what is called within run on ``copy_in``, counted as one copy of ``what``."""
        return self._in.copying(what, size_bytes, 0)

    def copying_out(
        self, what: _core.TraceLabel, size_bytes: int, flow_id: int = 0
    ) -> AbstractContextManager[None]:
        """Have what is called within run on ``copy_out``, counted as one copy of ``what``.

        ``flow_id`` is the number of an arrow that leads from it to something else in a trace.
        """
        return self._out.copying(what, size_bytes, flow_id)

    def wait(
        self, compute: torch.cuda.Stream, event: torch.cuda.Event, cause: _core.TraceLabel
    ) -> None:
        """Have ``compute`` wait for ``event``; while somebody traces, how long is measured."""
        begun = self._waits.begin(compute)
        compute.wait_event(event)
        self._waits.end(begun, compute, cause)

    def collect(self, *, waits: bool = False) -> None:
        """Record the times of what is over; with ``waits``, after waiting for all of it."""
        for times in (self._in.times, self._out.times, self._waits):
            times.collect(waits=waits)

    def stats(self) -> tuple[CopyStreamStats, CopyStreamStats]:
        """Figures of this moment."""
        return self._in.stats(), self._out.stats()

    def compute_waits(self) -> ComputeWaitStats:
        """Figures of this moment."""
        waits = self._waits.stats()
        return ComputeWaitStats(device=self._index, count=waits.count, seconds=waits.busy_s)

    def start_again(self) -> None:
        """In a forked child."""
        self._in.start_again()
        self._out.start_again()
        self._waits.forget()


_lock = threading.RLock()
_streams: dict[int, CopyStreams] = {}


def copy_streams(device: torch.device) -> CopyStreams:
    """The copy streams of ``device``, a CUDA device with an index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        streams = _streams.get(index)
        if streams is None:
            streams = _streams[index] = CopyStreams(index)
        return streams


def all_copy_streams() -> list[CopyStreams]:
    """Those that were made so far, by device."""
    with _lock:
        return [streams for _, streams in sorted(_streams.items())]


def new_event() -> torch.cuda.Event:
    """An event that orders work and takes no times."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _start_again() -> None:
    global _lock
    _lock = threading.RLock()
    for streams in _streams.values():
        streams.start_again()


os.register_at_fork(after_in_child=_start_again)

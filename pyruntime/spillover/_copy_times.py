"""When copies ran on the device's streams, while somebody traces.

Note [Times of copies]
----------------------
The host knows when it asked for a copy, not when it ran. While tracing is on, two events with
timing are recorded around each copy, and around the compute stream's wait for one, and read once
they have happened; that costs about two microseconds of the host and one of the stream each, and
keeps the stream from running two copies without a gap. Their distance is the duration, on the
device's clock. To place it on the host's, an event on a stream that has nothing else to do is
recorded and waited for at once every few seconds; what the host's clock said around that bounds the
error, some ten microseconds. Nothing of this happens while tracing is off, so then there are bytes
and counts, and no times.

Everything here may be called from any thread. No lock of a caller's may be wanted by whoever the
idle stream waits for, which is nobody.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from spillover import _core

# How old the last look at both clocks may get; also keeps milliseconds in a float32 exact.
_ANCHOR_NS_MAX = 2_000_000_000
# Waits for events that never come are forgotten, the oldest first.
_PENDING_MAX = 4096
# A wait of the compute stream that is shorter is what two events cost.
_WAIT_NS_MIN = 3_000


@dataclass(frozen=True, kw_only=True)
class StreamTimes:
    """Operations of one stream that were timed."""

    count: int
    bytes: int
    busy_s: float
    in_flight: int
    in_flight_max: int


class TimedStream:
    """A row of the trace for one stream of a device, and the sums of what was timed on it."""

    def __init__(self, device: torch.device, name: str, *, ignores_short: bool = False) -> None:
        self._device = device
        self._name = name
        self._ignores_short = ignores_short
        self._track: int | None = None
        self._lock = threading.RLock()
        # Guarded by the lock.
        self._pending: deque[_Timed] = deque()
        self._in_flight_max = 0
        self._count = 0
        self._bytes = 0
        self._busy_ns = 0

    def begin(self, stream: torch.cuda.Stream) -> torch.cuda.Event | None:
        """Before the operation, if anybody traces; ``end`` gets what this gives."""
        if not _core.trace_is_on() or torch.cuda.is_current_stream_capturing():
            return None
        self.collect()
        return _record(stream)

    def end(
        self,
        begun: torch.cuda.Event | None,
        stream: torch.cuda.Stream,
        label: _core.TraceLabel,
        size_bytes: int = 0,
        flow_id: int = 0,
    ) -> None:
        """After the operation was asked for."""
        if begun is None:
            return
        timed = _Timed(_anchor_of(self._device), begun, _record(stream), label, size_bytes, flow_id)
        with self._lock:
            if len(self._pending) == _PENDING_MAX:
                self._pending.popleft()
            self._pending.append(timed)
            self._in_flight_max = max(self._in_flight_max, len(self._pending))

    def collect(self, *, waits: bool = False) -> None:
        """Record what is over; with ``waits``, after waiting for all of it."""
        while True:
            with self._lock:
                if not self._pending or not (waits or self._pending[0].is_over()):
                    return
                timed = self._pending.popleft()
            if waits:
                timed.ended.synchronize()
            self._note(timed)

    def _note(self, timed: _Timed) -> None:
        begin_ns, end_ns = timed.times()
        if self._ignores_short and end_ns - begin_ns < _WAIT_NS_MIN:
            return
        with self._lock:
            self._count += 1
            self._bytes += timed.size_bytes
            self._busy_ns += end_ns - begin_ns
        if self._track is None:
            self._track = _core.trace_lanes(f"device {self._device.index}: {self._name}")
        _core.trace_span(
            timed.label, begin_ns, end_ns, timed.size_bytes, self._track, timed.flow_id
        )

    def stats(self) -> StreamTimes:
        """Figures of this moment."""
        with self._lock:
            return StreamTimes(
                count=self._count,
                bytes=self._bytes,
                busy_s=self._busy_ns / 1e9,
                in_flight=len(self._pending),
                in_flight_max=self._in_flight_max,
            )

    def forget(self) -> None:
        """In a forked child, which has no device: leave the parent's events to the parent."""
        _inherited.append(self._pending)
        self._lock = threading.RLock()
        self._pending = deque()
        self._track = None
        self._in_flight_max = self._count = self._bytes = self._busy_ns = 0


@dataclass(eq=False, slots=True)
class _Anchor:
    """One moment on both clocks."""

    event: torch.cuda.Event
    host_ns: int


@dataclass(eq=False, slots=True)
class _Timed:
    anchor: _Anchor
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    label: _core.TraceLabel
    size_bytes: int
    flow_id: int

    def is_over(self) -> bool:
        return bool(self.ended.query())  # type: ignore[no-untyped-call]

    def times(self) -> tuple[int, int]:
        """Begin and end on the host's clock, in nanoseconds."""
        begin_ns = self.anchor.host_ns + _distance_ns(self.anchor.event, self.begun)
        return begin_ns, begin_ns + max(_distance_ns(self.begun, self.ended), 0)


_lock = threading.RLock()
# By the index of the device; guarded by the lock.
_anchors: dict[int, _Anchor] = {}
_idle_streams: dict[int, torch.cuda.Stream] = {}
# Destroying a CUDA event in a forked child ends the process.
_inherited: list[object] = []


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _distance_ns(first: torch.cuda.Event, second: torch.cuda.Event) -> int:
    return int(first.elapsed_time(second) * 1e6)


def _anchor_of(device: torch.device) -> _Anchor:
    index = device.index
    with _lock:
        anchor = _anchors.get(index)
        if anchor is not None and time.monotonic_ns() - anchor.host_ns < _ANCHOR_NS_MAX:
            return anchor
        stream = _idle_streams.get(index)
        if stream is None:
            stream = _idle_streams[index] = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
        before_ns = time.monotonic_ns()
        event = _record(stream)
        event.synchronize()
        after_ns = time.monotonic_ns()
        _anchors[index] = _Anchor(event, (before_ns + after_ns) // 2)
        return _anchors[index]


def _leave_to_parent() -> None:
    global _lock
    _inherited.extend([dict(_anchors), dict(_idle_streams)])
    _anchors.clear()
    _idle_streams.clear()
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_leave_to_parent)

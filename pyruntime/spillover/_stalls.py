"""Where host threads wait, by cause, and what they do: always counted, and spans of a trace while
there is one.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from spillover import _core

_Result = TypeVar("_Result")

_lock = threading.RLock()
_known: list[Timed] = []


@dataclass(frozen=True, kw_only=True)
class TimeStats:
    """What host threads did, or waited for.

    Attributes
    ----------
    part
        Of whom: ``"activations"``, ``"weights"``, ``"optimizer"``, ``"disk"``, ….
    what
        Why they waited, or what they did.
    count
        How often; a wait for what was over already counts as well.
    seconds
        How long, by the clock, summed over threads.
    """

    part: str
    what: str
    count: int
    seconds: float


class Timed:
    """Something that takes time. Made once, by the module that does it; any thread may.

    ``step.call(function)`` calls the function, counts its time, and records a span.
    """

    _category = "work"

    def __init__(self, part: str, what: str) -> None:
        self._part = part
        self._what = what
        self._label = _core.TraceLabel(f"{part}: {what}", self._category)
        self._count = 0  # Guarded by the module's lock, as is the time.
        self._nanoseconds = 0
        with _lock:
            _known.append(self)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Call ``function`` and give what it gives."""
        begin_ns = time.monotonic_ns()
        try:
            return function()
        finally:
            end_ns = time.monotonic_ns()
            with _lock:
                self._count += 1
                self._nanoseconds += end_ns - begin_ns
            if _core.trace_is_on():
                _core.trace_span(self._label, begin_ns, end_ns)

    def stats(self) -> TimeStats:
        """Figures of this moment."""
        with _lock:
            return TimeStats(
                part=self._part,
                what=self._what,
                count=self._count,
                seconds=self._nanoseconds / 1e9,
            )

    def start_again(self) -> None:
        """In a forked child."""
        self._count = self._nanoseconds = 0


class Stall(Timed):
    """One cause for which host threads wait: ``stall.wait(event.synchronize)``."""

    _category = "stall"
    wait = Timed.call


def stall_stats() -> tuple[TimeStats, ...]:
    """Every cause that this process has waited for, in the order in which their modules came."""
    return _stats_of(lambda timed: isinstance(timed, Stall))


def work_stats() -> tuple[TimeStats, ...]:
    """What this process has done, likewise."""
    return _stats_of(lambda timed: not isinstance(timed, Stall))


def _stats_of(is_wanted: Callable[[Timed], bool]) -> tuple[TimeStats, ...]:
    with _lock:
        known = list(_known)
    found = (timed.stats() for timed in known if is_wanted(timed))
    return tuple(stats for stats in found if stats.count)


def _start_again() -> None:
    """A forked child begins with nothing, and with a lock that nobody holds."""
    global _lock
    _lock = threading.RLock()
    for timed in _known:
        timed.start_again()


os.register_at_fork(after_in_child=_start_again)

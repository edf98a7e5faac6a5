"""The virtual clock: what a program would take on a profile's card. All times are simulated."""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spillover._errors import ConfigError, SpilloverError, StateError
from spillover._units import format_bytes
from spillover.emulator import _libraries, _options, _turns

HostResource = Literal["cpu-optimizer", "disk-read", "disk-write"]

#: The process whose trace has the name that was asked for; others put their number into it.
_OWNER_VARIABLE = "SPILLOVER_EMULATOR_TRACE_OWNER"


@dataclass(frozen=True, kw_only=True)
class ResourceUse:
    """How much of the time one resource worked."""

    name: str
    device: int
    busy_ns: int
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TimeShare:
    """Time under one name: an operation, a cause, a part of the critical path."""

    name: str
    ns: int
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Bytes in use from one moment on."""

    time_ns: int
    device: int
    #: Bytes in blocks of a caching allocator (with ``blocks=True``); otherwise the driver's.
    by_allocator: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ClockReport:
    """What the clock knows. Everything but ``memory`` and the critical path is exact for all of the
    run; those are made from the latest events, and the numbers of dropped ones say what is missing.

    Parameters
    ----------
    profile
        Name of the card.
    makespan_ns
        From the device's start to the end of the last operation or host thread.
    resources
        Busy time of each resource that did anything.
    operations
        Time on the resources by name of kernel or copy, longest first.
    host_waits
        Time in which threads of the host did nothing but wait, by the call.
    stalls
        Time in which the compute resource had nothing to run, by cause.
    critical_path
        The chain of operations, each of which could not start before the one before it ended, that
        ends with the last one; by name, longest first.
    critical_path_is_whole
        False where the chain's beginning was dropped.
    memory, memory_peaks
        Memory over time, and the moment of each peak.
    threads_ns
        The time that each followed thread of the host has reached.
    unseen_waits
        How often a thread waited for another in a way that the clock does not see: above 0, times
        of several threads may differ between runs.
    """

    profile: str
    makespan_ns: int
    resources: list[ResourceUse]
    operations: list[TimeShare]
    host_waits: list[TimeShare]
    stalls: list[TimeShare]
    critical_path: list[TimeShare]
    critical_path_is_whole: bool
    memory: list[MemoryPoint]
    memory_peaks: list[MemoryPoint]
    threads_ns: dict[str, int]
    unseen_waits: int
    spans_dropped: int
    waits_dropped: int
    samples_dropped: int

    def busy_ns(self, resource: str, device: int = 0) -> int:
        """Busy time of a resource such as ``"compute"`` or ``"copy-in"``; 0 for an idle one."""
        return sum(
            use.busy_ns for use in self.resources if (use.name, use.device) == (resource, device)
        )


def now_ns() -> int:
    """Virtual time of the calling thread in nanoseconds since the device's start."""
    return int(_library().spillover_emulator_now())


def advance(ns: int) -> None:
    """The calling thread does something for ``ns`` nanoseconds that the clock does not see."""
    if isinstance(ns, bool) or not isinstance(ns, int) or ns < 0:
        raise ConfigError(f"ns must be a number from 0 on, not {ns!r}")
    _library().spillover_emulator_advance(ns)


def busy(resource: HostResource, *, bytes: int = 0, ns: int | None = None) -> None:
    """The calling thread works on a resource of the host, which other threads may be using.

    Parameters
    ----------
    resource
        ``"cpu-optimizer"``, ``"disk-read"`` or ``"disk-write"``.
    bytes
        What is moved; without ``ns`` the profile says how long that takes.
    ns
        How long it takes where nothing else runs.
    """
    library = _library()
    size, duration = int(bytes), -1 if ns is None else int(ns)
    if size < 0 or (ns is not None and duration < 0):
        raise ConfigError("bytes and ns must not be negative")
    if resource not in get_args(HostResource):
        raise ConfigError(
            f"resource={resource!r} is not known; choose one of {', '.join(get_args(HostResource))}"
        )
    _start_device(library)
    library.spillover_emulator_work(resource.encode(), size, duration)


def clock_report() -> ClockReport:
    """What the clock knows now. Waits, in virtual time, for all that was launched."""
    library = _library()
    _start_device(library)
    length = library.spillover_emulator_clock_report(None, 0)
    buffer = ctypes.create_string_buffer(length + 1)
    library.spillover_emulator_clock_report(buffer, length + 1)
    return _parse(json.loads(buffer.value))


def write_trace(path: str | Path) -> None:
    """Write streams, resources, host waits and memory over virtual time for Chrome or Perfetto.

    Raises
    ------
    SpilloverError
        The file cannot be written.
    """
    library = _library()
    _start_device(library)
    code = library.spillover_emulator_clock_trace(os.fsencode(path))
    if code != 0:
        raise SpilloverError(
            f"the trace {os.fspath(path)!r} cannot be written: {os.strerror(code)}"
        )


def begin(trace: str) -> None:
    """Called once the libraries are loaded and their variables set."""
    if trace:
        _options.require_writable_place("trace", Path(trace))
        os.environ.setdefault(_OWNER_VARIABLE, str(os.getpid()))
        atexit.register(_write_at_exit, trace, os.getpid())


def watch_queries(torch: Any) -> None:
    """A thread that polls lets others go first that are behind in virtual time.

    The driver cannot do it: allocators poll under locks that other threads need.
    """
    for owner in (torch.cuda.Event, torch.cuda.Stream):
        query = owner.query

        @functools.wraps(query)
        def watched_query(self: Any, query: Any = query) -> bool:
            ready = bool(query(self))
            if not ready:
                _turns.give_way()
            return ready

        owner.query = watched_query


def print_summary() -> None:
    """The report in a few lines on stderr."""
    report = clock_report()
    total = report.makespan_ns

    def line(text: str) -> None:
        print(f"spillover emulator: {text}", file=sys.stderr)

    card = report.profile or "a made-up card"
    line(f"simulated time on {card}: {_milliseconds(total)}")
    for use in report.resources:
        share = 100 * use.busy_ns / total if total else 0.0
        place = f" of cuda:{use.device}" if use.name in _DEVICE_RESOURCES else ""
        line(
            f"  {use.name}{place}: busy {_milliseconds(use.busy_ns)} ({share:.1f} %), "
            f"{use.count} operations, {format_bytes(use.bytes)}"
        )
    for title, shares in (
        ("compute stalls", report.stalls),
        ("host waits", report.host_waits),
        ("critical path", report.critical_path),
    ):
        parts = ", ".join(f"{share.name} {_milliseconds(share.ns)}" for share in shares[:5])
        if parts:
            line(f"  {title}: {parts}")
    if report.spans_dropped:
        line(f"  the trace and critical path lack the first {report.spans_dropped} operations")
    if report.unseen_waits:
        line(
            f"  threads waited {report.unseen_waits} times in ways that the clock does not see; "
            "times may differ between runs"
        )


_DEVICE_RESOURCES = ("compute", "copy-in", "copy-out", "peer-link", "host-function")


def _milliseconds(ns: int) -> str:
    return f"{ns / 1e6:.3f} ms"


def _library() -> ctypes.CDLL:
    library = _libraries.driver()
    if not library.spillover_emulator_clock_enabled():
        raise StateError(
            "the virtual clock is off; call spillover.emulator.enable(clock=True), name a profile, "
            "or run under 'spillover emulate --clock'"
        )
    return library


def _has_started() -> bool:
    """Whether this process has used the device; one that has not leaves no trace of it."""
    return bool(_libraries.driver().spillover_emulator_clock_report(None, 0))


def _start_device(library: ctypes.CDLL) -> None:
    code = library.cuInit(0)
    if code != 0:
        raise SpilloverError(f"the emulated device does not start: cuInit returned {code}")


def _shares(entries: list[dict[str, Any]]) -> list[TimeShare]:
    found = [TimeShare(**entry) for entry in entries]
    return sorted(found, key=lambda share: (-share.ns, share.name))


def _points(entries: list[tuple[int, int, bool, int]]) -> list[MemoryPoint]:
    return [
        MemoryPoint(time_ns=time, device=device, by_allocator=by_allocator, bytes=count)
        for time, device, by_allocator, count in entries
    ]


def _parse(values: dict[str, Any]) -> ClockReport:
    converted: dict[str, Any] = dict(values)
    for name in ("operations", "host_waits", "stalls", "critical_path"):
        converted[name] = _shares(values[name])
    for name in ("memory", "memory_peaks"):
        converted[name] = _points(values[name])
    converted["resources"] = [ResourceUse(**entry) for entry in values["resources"]]
    threads = converted.pop("threads")
    converted["threads_ns"] = {
        f"{entry['id']} {entry['name']}": entry["now_ns"] for entry in threads
    }
    return ClockReport(**converted)


def _write_at_exit(trace: str, owner_pid: int) -> None:
    if os.getpid() != owner_pid or not _has_started():
        return
    path = Path(trace)
    if os.environ.get(_OWNER_VARIABLE) != str(owner_pid):
        path = path.with_name(f"{path.stem}.{owner_pid}{path.suffix}")
    try:
        write_trace(path)
    except SpilloverError as error:
        print(f"spillover emulator: {error}", file=sys.stderr)

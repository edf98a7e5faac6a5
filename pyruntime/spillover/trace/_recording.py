"""Starts, ends and writes a trace. What records is in C++ (`csrc/trace`) and in `_copy_times`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from spillover import _core
from spillover._errors import StateError
from spillover._settings import enabled, logger
from spillover.trace._files import require_place, write_file

#: 16 MiB of events.
EVENTS_MAX = 1 << 18

_lock = threading.RLock()
# How many want events recorded: each `record()`, and `start()` once. Guarded by the lock, as is
_users = 0
# whether start() is one of them.
_is_started = False


def start(*, events_max: int = EVENTS_MAX) -> None:
    """Record from now on.

    Parameters
    ----------
    events_max
        How many events are kept, 64 bytes each: the latest, rounded up to a power of two. Without
        effect within a :func:`record` or a recording of the whole run, which keep their own.

    Raises
    ------
    StateError
        :func:`start` was called before, without a :func:`stop`.
    ConfigError
        ``events_max`` is not between 16 and 2**26.

    Notes
    -----
    Recording costs some 50 ns a span of ours, and on each of our copies what two CUDA events with
    timing cost. While nobody records it costs nothing that can be measured. With ``SPILLOVER=0``
    this does nothing.
    """
    global _is_started
    if not enabled():
        return
    with _lock:
        if _is_started:
            raise StateError("tracing was started before; call spillover.trace.stop() first")
        _join(events_max)
        _is_started = True


def stop() -> None:
    """Record no more, and wait for the copies of ours that are under way.

    What was recorded stays until the next start, so that :func:`save` can write it.

    Raises
    ------
    StateError
        :func:`start` was not called.
    """
    global _is_started
    if not enabled():
        return
    with _lock:
        if not _is_started:
            raise StateError("tracing was not started; call spillover.trace.start() first")
        _is_started = False
    _leave()


def is_recording() -> bool:
    """Whether events are recorded, by whomever that was asked for."""
    return _core.trace_is_on()


def save(path: str | os.PathLike[str]) -> Path:
    """Write what was recorded since :func:`start`, before or after :func:`stop`.

    The file is JSON in Chrome's format, which https://ui.perfetto.dev and ``chrome://tracing``
    open; its times are those of a ``torch.profiler`` trace, see :func:`merge`. A name that ends in
    ``.gz`` compresses it. It is put into place when it is complete. May be called while recording
    goes on; copies of ours that are under way are waited for.

    Returns
    -------
    The path.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    _collect_copies()
    return _write(Path(path), None)


@contextmanager
def record(path: str | os.PathLike[str], *, events_max: int = EVENTS_MAX) -> Iterator[None]:
    """Record what happens within, and write it to ``path``; also where an exception ends it.

    May be entered anywhere, also within another one and by several threads: each file has what
    happened between its own beginning and end. See :func:`start` and :func:`save` for the
    parameters, the costs and the file.

    Raises
    ------
    ConfigError
        The file's folder does not exist or cannot be written to; ``events_max`` is out of bounds.
    OSError
        At the end: the file cannot be written. An exception from within goes on instead.
    """
    if not enabled():
        yield
        return
    place = require_place("path", path)
    with _lock:
        _join(events_max)
    from_ns = time.monotonic_ns()
    try:
        yield
    except BaseException:
        try:
            _end_record(place, from_ns)
        except Exception as error:
            logger.warning("the trace %s could not be written: %s", place, error)
        raise
    else:
        _end_record(place, from_ns)


def _end_record(place: Path, from_ns: int) -> None:
    try:
        _collect_copies()
        _write(place, (from_ns, time.monotonic_ns()))
    finally:
        _leave()


class _Span(AbstractContextManager[None]):
    """Made by :func:`span`; may be entered again."""

    def __init__(self, name: str) -> None:
        self._label = _core.TraceLabel(name, "user")
        self._begun_ns: list[int] = []

    def __enter__(self) -> None:
        self._begun_ns.append(time.monotonic_ns())

    def __exit__(self, *error: object) -> None:
        _core.trace_span(self._label, self._begun_ns.pop(), time.monotonic_ns())


def span(name: str) -> AbstractContextManager[None]:
    """A span of your own on this thread's row: ``with spillover.trace.span("step"): ...``.

    Costs a microsecond or two, while nobody records as well. Names are kept for as long as the
    process lives, so there should be few: at most 65,536 are told apart.
    """
    return _Span(name)


def _join(events_max: int) -> None:
    """Have events recorded; the caller holds the lock."""
    global _users
    _core.trace_start(events_max)
    _users += 1


def _leave() -> None:
    global _users
    _collect_copies()
    with _lock:
        _users -= 1
        if _users == 0:
            _core.trace_stop()


def _collect_copies() -> None:
    """Have copies that were timed recorded; waits for those under way."""
    streams = sys.modules.get("spillover._streams")
    if streams is None or not _core.trace_is_on() or _core.in_forked_child():
        return
    for one in streams.all_copy_streams():
        try:
            one.collect(waits=True)
        except RuntimeError as error:  # The device failed; what the host saw is worth writing.
            logger.warning("the times of copies are missing in the trace: %s", error)


def _write(path: Path, window: tuple[int, int] | None) -> Path:
    name = f"{Path(sys.argv[0]).name or 'python'} (spillover)" if sys.argv else "python"
    if window is None:
        data, _, dropped = _core.trace_export(process_name=name)
    else:
        data, _, dropped = _core.trace_export(
            from_ns=window[0], until_ns=window[1], process_name=name
        )
    if dropped:
        logger.warning(
            "%s has the latest events only: %d older ones were dropped; raise events_max "
            "(SPILLOVER_TRACE_EVENTS) or trace a shorter time",
            path,
            dropped,
        )
    write_file(path, data)
    return path


def _leave_to_parent() -> None:
    """A forked child records nothing before somebody asks for it there."""
    global _lock, _users, _is_started
    _lock = threading.RLock()
    _users, _is_started = 0, False


os.register_at_fork(after_in_child=_leave_to_parent)

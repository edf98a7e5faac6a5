"""Lets the checker follow how Python threads tell each other of the device's work.

A thread that Python starts knows of the device what it waited for itself and what reaches it
through Python's own synchronisation, which is watched here: the start and end of threads, the locks
of ``threading`` (and so its conditions, events, semaphores and barriers, ``queue.Queue`` and
``concurrent.futures``), ``queue.SimpleQueue`` and asyncio's ``call_soon_threadsafe``. Locks that
were made before ``watch()`` are not seen.
"""

from __future__ import annotations

import asyncio.base_events
import ctypes
import functools
import itertools
import multiprocessing.queues
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from spillover.emulator import _turns

#: Tokens of objects; the program's own tokens have the highest bit set (see ``_control.release``).
_numbers = itertools.count(1)


class _Edges:
    """The calls of the C interface, made without letting go of the interpreter's lock.

    They are short and take no lock that anybody holds while waiting for the interpreter.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.PyDLL(path)
        for name in ("release", "acquire", "forget"):
            function = getattr(library, f"spillover_emulator_{name}")
            function.restype, function.argtypes = None, [ctypes.c_uint64]
            setattr(self, name, function)
        self.begin = library.spillover_emulator_thread_begin
        self.end = library.spillover_emulator_thread_end
        self.begin.restype = self.end.restype = None

    release: Callable[[int], None]
    acquire: Callable[[int], None]
    forget: Callable[[int], None]


_edges: _Edges | None = None


def _calls() -> _Edges:
    assert _edges is not None
    return _edges


class _Token:
    """Identity of one synchronisation object; what it holds is freed with it."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = next(_numbers)

    def release(self) -> None:
        _calls().release(self.number)

    def acquire(self) -> None:
        _calls().acquire(self.number)

    def __del__(self) -> None:
        # None at the interpreter's end, which clears modules before their last objects.
        if _edges is not None:
            _edges.forget(self.number)


class Lock:
    """A ``threading.Lock`` whose owners come one after the other for the checker too."""

    __slots__ = ("__weakref__", "_lock", "_token")

    def __init__(self) -> None:
        self._lock = _allocate_lock()
        self._token = _Token()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = _turns.take(self._lock.acquire, self._token.number, blocking, timeout)
        if taken:
            self._token.acquire()
        return taken

    def release(self) -> None:
        self._token.release()
        self._lock.release()
        _turns.wake(self._token.number)

    def locked(self) -> bool:
        return self._lock.locked()

    acquire_lock, release_lock, locked_lock = acquire, release, locked

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self._lock._at_fork_reinit()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(self._lock)


class RLock:
    """The same for ``threading.RLock``."""

    __slots__ = ("__weakref__", "_lock", "_token")

    def __init__(self) -> None:
        self._lock: Any = _make_rlock()
        self._token = _Token()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = _turns.take(self._lock.acquire, self._token.number, blocking, timeout)
        if taken:
            self._token.acquire()
        return taken

    def release(self) -> None:
        self._token.release()
        self._lock.release()
        _turns.wake(self._token.number)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    # What threading.Condition asks of a lock that may be held more than once.
    def _release_save(self) -> Any:
        self._token.release()
        state = self._lock._release_save()
        _turns.wake(self._token.number)
        return state

    def _acquire_restore(self, state: Any) -> None:
        _turns.take(
            lambda blocking, _: self._restore(state, blocking), self._token.number, True, -1
        )
        self._token.acquire()

    def _restore(self, state: Any, blocking: bool) -> bool:
        """Take the lock as often as before; where that may not block, if it is free."""
        if not blocking:
            if not self._lock.acquire(False):
                return False
            self._lock.release()
        self._lock._acquire_restore(state)
        return True

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _recursion_count(self) -> int:
        return int(self._lock._recursion_count())

    def _at_fork_reinit(self) -> None:
        self._lock._at_fork_reinit()

    def __repr__(self) -> str:
        return repr(self._lock)


class SimpleQueue(queue.SimpleQueue):  # type: ignore[type-arg]
    """A ``queue.SimpleQueue`` whose consumers come after what its producers put."""

    def __init__(self) -> None:
        self._token = _Token()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._token.release()
        super().put(item, block, timeout)
        _turns.wake(self._token.number)

    def put_nowait(self, item: Any) -> None:
        self.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        found: list[Any] = []

        def take(blocking: bool, seconds: float) -> bool:
            try:
                found.append(
                    super(SimpleQueue, self).get(blocking, seconds if seconds >= 0 else None)
                )
            except queue.Empty:
                return False
            return True

        if not _turns.take(take, self._token.number, block, -1 if timeout is None else timeout):
            raise queue.Empty
        self._token.acquire()
        return found[0]

    def get_nowait(self) -> Any:
        return self.get(block=False)


_before_first_start: list[Callable[[], None]] = []


def before_first_start(function: Callable[[], None]) -> None:
    """Call ``function`` when Python starts a thread; at once where it has."""
    if threading.active_count() > 1:
        function()
    else:
        _before_first_start.append(function)


_allocate_lock = threading.Lock
_make_rlock = threading.RLock


def watch(library_path: str, *, takes_turns: bool = False) -> None:
    """Follow the calling thread and all that Python starts from here on.

    takes_turns lets them run one at a time, by virtual time (``_turns``).
    """
    global _edges
    if _edges is not None:
        return
    _edges = _Edges(library_path)
    _edges.begin()
    if takes_turns:
        _turns.begin(library_path)
    module: Any = threading
    module.Lock = module._allocate_lock = Lock
    module.RLock = RLock
    queue.SimpleQueue = SimpleQueue  # type: ignore[misc]
    _watch_threads()
    _watch_event_loops()
    if takes_turns:
        _free_feeders()


def _watch_threads() -> None:
    thread_class: Any = threading.Thread
    start, join = thread_class.start, thread_class.join
    bootstrap = thread_class._bootstrap_inner

    @functools.wraps(start)
    def watched_start(self: Any) -> None:
        if getattr(self, "_spillover_is_free", False):
            start(self)
            return
        while _before_first_start:
            _before_first_start.pop()()
        self._spillover_token = _Token()
        self._spillover_token.release()
        self._spillover_turn = _turns.announce(self.name)
        try:
            start(self)
        except BaseException:
            _turns.cancel(self._spillover_turn)
            raise

    @functools.wraps(bootstrap)
    def watched_bootstrap(self: Any) -> None:
        if getattr(self, "_spillover_is_free", False):
            bootstrap(self)
            return
        token = getattr(self, "_spillover_token", None)
        _calls().begin()
        _turns.attach(getattr(self, "_spillover_turn", 0))
        if token is not None:
            token.acquire()
        try:
            bootstrap(self)
        finally:
            if token is not None:
                token.release()
                self._spillover_ended = True
                _turns.wake(token.number)
            _turns.end()
            _calls().end()

    @functools.wraps(join)
    def watched_join(self: Any, timeout: float | None = None) -> None:
        token = getattr(self, "_spillover_token", None)
        if token is not None and self.is_alive() and self is not threading.current_thread():
            seconds = -1 if timeout is None else max(timeout, 0)
            ended = _turns.take(
                lambda *_: getattr(self, "_spillover_ended", False), token.number, True, seconds
            )
            if _turns.are_taken() and not ended:
                return
        join(self, timeout)
        if token is not None and not self.is_alive():
            token.acquire()

    thread_class.start, thread_class.join = watched_start, watched_join
    thread_class._bootstrap_inner = watched_bootstrap


def _free_feeders() -> None:
    """Let the threads that feed ``multiprocessing``'s queues run without turns.

    Such a thread only moves bytes to a pipe, and who waits for the process at its other end keeps
    the turn meanwhile: whatever the feeder's moment, the order of all others stays the same. What
    it shares with its queue is therefore locked unseen.
    """
    queue_class: Any = multiprocessing.queues.Queue
    reset = queue_class._reset

    @functools.wraps(reset)
    def free_reset(self: Any, *args: Any, **options: Any) -> None:
        reset(self, *args, **options)
        self._notempty = threading.Condition(_allocate_lock())

    class _FeederThread(threading.Thread):
        _spillover_is_free = True

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started: Any = threading.Event()
            started._cond = threading.Condition(_allocate_lock())
            self._started = started

    class _Threading:
        """``threading`` as ``multiprocessing.queues`` sees it."""

        Thread = _FeederThread

        def __getattr__(self, name: str) -> Any:
            return getattr(threading, name)

    queue_class._reset = free_reset
    module: Any = multiprocessing.queues
    module.threading = _Threading()


def _watch_event_loops() -> None:
    loop_class: Any = asyncio.base_events.BaseEventLoop
    original = loop_class.call_soon_threadsafe

    @functools.wraps(original)
    def call_soon_threadsafe(
        self: Any, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Any:
        token = _Token()
        token.release()

        @functools.wraps(callback)
        def after(*given: Any) -> Any:
            token.acquire()
            return callback(*given)

        return original(self, after, *args, context=context)

    loop_class.call_soon_threadsafe = call_soon_threadsafe

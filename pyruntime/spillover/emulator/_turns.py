"""Lets Python's threads run one at a time under the virtual clock, by virtual time.

``_threads`` calls in here wherever a thread may block or wake another. While the clock is off every
function does what would have happened without it. See ``core/clock/host_turns.hpp``, Note [Turns].
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

_NOT_FOLLOWED, _WOKEN, _TIMED_OUT, _PENDING = range(4)

_library: ctypes.CDLL | None = None


def begin(library_path: str) -> None:
    """Make the calling thread the first one."""
    global _library
    # Not PyDLL: a thread that waits for its turn lets go of the interpreter's lock.
    library = ctypes.CDLL(library_path)
    library.spillover_emulator_turn_begin.restype = None
    library.spillover_emulator_turn_begin.argtypes = [ctypes.c_char_p]
    library.spillover_emulator_turn_announce.restype = ctypes.c_uint32
    library.spillover_emulator_turn_announce.argtypes = [ctypes.c_char_p]
    for name, arguments in (
        ("attach", [ctypes.c_uint32]),
        ("cancel", [ctypes.c_uint32]),
        ("end", []),
        ("yield", []),
        ("resume", []),
        ("wake", [ctypes.c_uint64]),
    ):
        function = getattr(library, f"spillover_emulator_turn_{name}")
        function.restype, function.argtypes = None, arguments
    library.spillover_emulator_turn_block.restype = ctypes.c_int
    library.spillover_emulator_turn_block.argtypes = [ctypes.c_uint64, ctypes.c_int64]
    library.spillover_emulator_advance.restype = None
    library.spillover_emulator_advance.argtypes = [ctypes.c_int64]
    library.spillover_emulator_turn_begin(b"main")
    _library = library
    from spillover import _emulator_stacks

    function = library.spillover_emulator_set_interpreter
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    _emulator_stacks.install_interpreter(address)
    _watch_sleep(library)


def _watch_sleep(library: ctypes.CDLL) -> None:
    """A thread that sleeps is late by as much on the virtual clock; others go first meanwhile."""
    module: Any = time
    sleep = module.sleep

    def watched_sleep(seconds: float) -> None:
        sleep(seconds)
        library.spillover_emulator_advance(int(seconds * 1e9))

    module.sleep = watched_sleep


def are_taken() -> bool:
    """Whether threads take turns."""
    return _library is not None


def announce(name: str) -> int:
    """A thread is about to be started; its number."""
    return 0 if _library is None else int(_library.spillover_emulator_turn_announce(name.encode()))


def attach(number: int) -> None:
    """Called first in a new thread: waits for its first turn."""
    if _library is not None and number:
        _library.spillover_emulator_turn_attach(number)


def cancel(number: int) -> None:
    """The thread could not be started."""
    if _library is not None and number:
        _library.spillover_emulator_turn_cancel(number)


def end() -> None:
    """Called last in a thread."""
    if _library is not None:
        _library.spillover_emulator_turn_end()


def give_way() -> None:
    """Let threads that are behind in virtual time go first."""
    if _library is not None:
        _library.spillover_emulator_turn_yield()


def wake(token: int) -> None:
    """Let threads go on that wait for the token."""
    if _library is not None:
        _library.spillover_emulator_turn_wake(token)


def take(
    attempt: Callable[[bool, float], bool], token: int, blocking: bool, timeout: float
) -> bool:
    """Take something that another thread may have to give first.

    Parameters
    ----------
    attempt
        ``attempt(blocking, timeout)`` takes it, and says whether it could.
    token
        What ``wake()`` is called with when it may have become free.
    blocking
        Whether to wait where it is not free.
    timeout
        In seconds, virtual ones where threads take turns; negative: without end.
    """
    if _library is None:
        return bool(attempt(blocking, timeout))
    if attempt(False, -1):
        return True
    if not blocking:
        return False
    timeout_ns = int(min(timeout, 1e9) * 1e9) if timeout >= 0 else -1
    while True:
        outcome = _library.spillover_emulator_turn_block(token, timeout_ns)
        if outcome == _NOT_FOLLOWED:
            return bool(attempt(True, timeout))
        if attempt(False, -1):
            if outcome == _PENDING:  # it became free without a word
                _library.spillover_emulator_turn_resume()
            return True
        if outcome == _TIMED_OUT:
            return False

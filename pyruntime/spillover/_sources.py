"""Who else has figures for ``spillover.stats()``: held weakly, so that nothing lives for them.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

_Owner = TypeVar("_Owner")

_lock = threading.RLock()
# Name, owner, what reads its figures. Guarded by the lock.
_known: list[tuple[str, weakref.ref[object], Callable[[object], object]]] = []


class SourceHandle:
    """Made by :func:`register`."""

    def __init__(self, entry: tuple[str, weakref.ref[object], Callable[[object], object]]) -> None:
        self._entry = entry

    def remove(self) -> None:
        """Have the source asked no more. May be called again."""
        with _lock:
            _known[:] = [entry for entry in _known if entry is not self._entry]


def register(name: str, owner: _Owner, read: Callable[[_Owner], object]) -> SourceHandle:
    """Have ``spillover.stats()`` ask ``owner`` for its figures, as long as it lives.

    Parameters
    ----------
    name
        What it is, such as ``"activations"``; several may have one name.
    owner
        Held weakly.
    read
        Gives the figures of ``owner``, a frozen dataclass. Called in any thread; must not block,
        and must not hold ``owner`` itself.
    """
    entry = (name, weakref.ref(owner), read)
    with _lock:
        _known[:] = [one for one in _known if one[1]() is not None]
        _known.append(entry)  # type: ignore[arg-type]
    return SourceHandle(entry)  # type: ignore[arg-type]


def source_stats() -> dict[str, tuple[object, ...]]:
    """The figures of all that live, by name, in the order of their making."""
    with _lock:
        known = [(name, owner(), read) for name, owner, read in _known]
    found: dict[str, tuple[object, ...]] = {}
    for name, owner, read in known:
        if owner is not None:
            found[name] = (*found.get(name, ()), read(owner))
    return found


def _start_again() -> None:
    """What a forked child inherits is its parent's."""
    global _lock
    _lock = threading.RLock()
    _known.clear()


os.register_at_fork(after_in_child=_start_again)

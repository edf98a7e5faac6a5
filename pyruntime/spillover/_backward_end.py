"""Calls at the end of a backward that are safe at the end of the process.

Note [Callbacks outlive backward]: torch frees the callbacks of a backward in a thread of autograd,
which may come to it after ``backward()`` has returned. That takes the GIL; where the interpreter is
shutting down by then, the thread is ended inside of a destructor and the process aborts
("terminate called without an active exception"). So the process does not begin to shut down before
torch has freed what was queued here.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable

import torch

# Somebody else may hold a graph, and with it a callback, for good: the process ends all the same.
_EXIT_WAIT_S_MAX = 2.0
_EXIT_POLL_S = 0.0005


class _BackwardEnd:
    """What torch holds: one call, alive until torch has freed it."""

    __slots__ = ("__weakref__", "_call")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self) -> None:
        self._call()


_queued: weakref.WeakSet[_BackwardEnd] = weakref.WeakSet()


def queue_backward_end(call: Callable[[], None]) -> None:
    """Have ``call`` run before the present ``backward()`` returns, on the thread that ends it.

    To be called from within a backward, by any of its threads.
    """
    end = _BackwardEnd(call)
    _queued.add(end)
    torch.autograd.Variable._execution_engine.queue_callback(end)


def _wait_for_autograd() -> None:
    """Let autograd's threads free what is queued; Note [Callbacks outlive backward]."""
    give_up = time.monotonic() + _EXIT_WAIT_S_MAX
    while len(_queued) > 0 and time.monotonic() < give_up:
        time.sleep(_EXIT_POLL_S)


atexit.register(_wait_for_autograd)

"""Functions that are asked for memory before an allocation fails."""

from __future__ import annotations

from collections.abc import Callable

from spillover import _core
from spillover._errors import ConfigError
from spillover.allocator import _pool
from spillover.allocator._handle import Handle

Reclaimer = Callable[[int, int], int]


class ReclaimerHandle(Handle):
    """A reclaimer that was added; :meth:`remove`, or the end of a ``with`` block, takes it away."""

    def __init__(self, pool: _core.Pool, number: int) -> None:
        self._pool = pool
        self._number = number

    def remove(self) -> None:
        """Take it away. Waits until no thread is in it any more; further calls do nothing."""
        self._pool.remove_reclaimer(self._number)


def add_reclaimer(function: Reclaimer, *, device: int = 0) -> ReclaimerHandle:
    """Have a function free memory when an allocation on a device would fail.

    It is the last resort: everything that is free was looked through, and streams were waited for.
    Reclaimers are asked in the order in which they were added, until the request fits or none has
    anything more to give.

    Parameters
    ----------
    function
        Called as ``function(missing_bytes, stream)`` with the bytes of the request and the handle
        of its stream, by the thread that allocates; several threads may call it at once. It frees
        tensors or blocks of this device and returns about how many bytes they have, 0 for none.
        It may allocate, but such requests do not reclaim. What it raises is reported through
        ``sys.unraisablehook`` and counts as 0.
    device
        Index of the CUDA device.

    Returns
    -------
    ReclaimerHandle
        With ``remove()``; usable in a ``with`` block.

    Raises
    ------
    ConfigError
        There is no such device, or ``function`` cannot be called.
    """
    if not callable(function):
        raise ConfigError(f"a reclaimer is a function of two numbers, not {function!r}")
    pool = _core.Pool(_pool.device_index(device))
    return ReclaimerHandle(pool, pool.add_reclaimer(function))

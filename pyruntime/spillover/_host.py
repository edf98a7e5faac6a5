"""Pinned host memory under a byte budget.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, SupportsIndex, get_args

from spillover import _core
from spillover._errors import ConfigError
from spillover._settings import logger
from spillover._units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

    from spillover._core import HostBuffer, HostStats

HugePages = Literal["auto", "reserved", "never"]
_HUGE_PAGES = get_args(HugePages)
Progress = Callable[[int], object]

#: Of the machine's memory, or the control group's, that a pool without a limit may take.
_DEFAULT_SHARE = 0.9


class HostPool(_core.HostPool):
    """Pinned host memory under a byte budget: what the device copies from and to without staging.

    Buffers take their size rounded up to the page, from 32 KiB on; smaller ones share slabs. What
    is freed stays pinned, for the next buffer of that size, and goes back to the system when the
    budget or the machine asks for it. The memory is shared, not private, so that a fork does not
    take it from under a copy.

    Parameters
    ----------
    limit
        The most bytes that may be pinned, such as ``"48GiB"``. None: nine tenths of the machine's
        memory, or of the least limit of the process's memory control groups (of a container).
        Whatever the limit, no buffer is pinned that the machine or such a group has no room for at
        that moment.
    device
        The device whose context pins, by default the current one; the memory serves all of them.
    numa
        Where pages come from on a machine with several NUMA nodes: ``"nearest"`` to the device, the
        number of a node, or None for wherever the thread runs. A wish: where the node is full or
        the container forbids it, others serve, and ``stats().numa_note`` says why.
    huge_pages
        ``"auto"``: the kernel is advised to use them, and asked for them by :meth:`reserve`.
        ``"reserved"``: those that the administrator has set aside (``vm.nr_hugepages``), while
        there are any, for buffers that they make no more than 2 % larger. ``"never"``.
    reserve
        Bytes to pin now rather than at first use; see :meth:`reserve`.
    pinned
        False: memory that is not pinned, for staging between files on a machine without a device.

    Raises
    ------
    ConfigError
        An argument is wrong.
    HostOutOfMemory
        ``reserve`` is more than the limit or the machine allows.

    Notes
    -----
    Methods may be called from any thread. A pool lives until its last buffer is gone. In a forked
    child a pool of the parent's gives no memory and says nothing: calls raise :class:`StateError`,
    and :meth:`trim` finds nothing to give. What the parent's buffers hold can be read there.

    Examples
    --------
    >>> pool = HostPool(limit="48GiB", reserve="32GiB")
    >>> weights = pool.empty((4096, 4096), torch.bfloat16)
    >>> weights.copy_(parameter, non_blocking=True)
    """

    def __init__(
        self,
        limit: SupportsIndex | str | None = None,
        *,
        device: SupportsIndex | None = None,
        numa: Literal["nearest"] | int | None = "nearest",
        huge_pages: HugePages = "auto",
        reserve: SupportsIndex | str | None = None,
        pinned: bool = True,
    ) -> None:
        limit_bytes, source = _limit(limit)
        if not isinstance(pinned, bool):
            raise ConfigError(f"pinned={pinned!r} must be True or False")
        if huge_pages not in _HUGE_PAGES:
            raise ConfigError(
                f"huge_pages={huge_pages!r} is not known; choose auto, reserved or never"
            )
        reserve_bytes = None if reserve is None else _bytes(reserve, name="reserve")
        super().__init__(
            limit_bytes=limit_bytes,
            limit_source=source,
            device=_device(device, pinned=pinned),
            pinned=pinned,
            huge_pages=huge_pages,
            numa_node=_node(numa),
        )
        if reserve_bytes is not None:
            self.reserve(reserve_bytes)

    def allocate(self, size_bytes: SupportsIndex | str) -> HostBuffer:
        """A buffer of so many bytes (or a text such as ``"2MiB"``), with undefined contents.

        It has the buffer protocol (``memoryview(buffer)``, ``numpy.frombuffer``) and an
        ``address``: a multiple of 64, and of the page from 32 KiB on. Its memory goes back to the
        pool with the last reference to it, and may be given out again at once: keep it until the
        last copy on it is complete.

        Raises
        ------
        HostOutOfMemory
            The budget, the machine or a control group does not allow it; the message says which.
        ConfigError, DriverError, StateError
            The size is no number of bytes above 0; there is no driver to pin with; this is a forked
            child of the pool's process.
        """
        return super().allocate(_bytes(size_bytes, name="size_bytes"))

    def empty(
        self, shape: Sequence[SupportsIndex] | SupportsIndex, dtype: torch.dtype
    ) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor in memory of this pool.

        As :func:`torch.empty` with ``pin_memory=True``, but exact in size. Nothing here waits for
        copies on streams: keep the tensor until the last copy on it is complete. Raises what
        :meth:`allocate` does.
        """
        return empty_in(self, shape, dtype)

    def reserve(
        self, size: SupportsIndex | str, *, progress: bool | Progress | None = None
    ) -> None:
        """Pin so many bytes more, for buffers to come of whatever sizes, of up to 64 GiB each.

        Pinning takes about a second for some gigabytes, since the system has to zero them. Here
        several threads do it at once, and watch what the machine and its control groups have left
        meanwhile. What was reserved before stays.

        Parameters
        ----------
        size
            Bytes, or a text such as ``"32GiB"``.
        progress
            True shows a bar on standard error, None does where that is a terminal and the size is
            a GiB at least; a callable gets the bytes done.

        Raises
        ------
        HostOutOfMemory
            The budget, the machine or a control group does not allow it, from the start or once
            others have taken memory meanwhile; nothing is reserved then, nor is when Ctrl-C or
            ``progress`` ends it.
        ConfigError, DriverError, StateError
            As for :meth:`allocate`.
        """
        size_bytes = _bytes(size, name="size")
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise ConfigError(f"progress={progress!r} must be True, False, None or a function")
        if callable(progress):
            self._reserve(size_bytes, progress)
        elif progress or (progress is None and size_bytes >= 1 << 30 and sys.stderr.isatty()):
            self._reserve_with_bar(size_bytes)
        else:
            self._reserve(size_bytes, None)

    def _reserve_with_bar(self, size_bytes: int) -> None:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("pinning host memory"),
            bars.BarColumn(),
            bars.DownloadColumn(binary_units=True),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=size_bytes)
            self._reserve(size_bytes, lambda done: bar.update(task, completed=done))

    def trim(self) -> int:
        """Give the system what nobody uses, also what was reserved; its bytes. Blocks."""
        return super().trim()

    def stats(self) -> HostStats:
        """Bytes and buffers at this moment. Cheap; does not block."""
        return super().stats()


def empty_in(
    pool: _core.HostPool, shape: Sequence[SupportsIndex] | SupportsIndex, dtype: torch.dtype
) -> torch.Tensor:
    """:meth:`HostPool.empty` for any pool."""
    import torch

    sizes = _shape(shape)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is no torch.dtype, such as torch.float32")
    count = math.prod(sizes)
    if count == 0:
        return torch.empty(sizes, dtype=dtype, device="cpu")
    buffer = pool.allocate(_bytes(count * dtype.itemsize, name="the tensor"))
    # The tensor's storage holds the buffer.
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(sizes)


def _shape(shape: Sequence[SupportsIndex] | SupportsIndex) -> tuple[int, ...]:
    is_list = _index(shape) is None and isinstance(shape, Iterable)
    indices = [_index(size) for size in (shape if is_list else [shape])]  # type: ignore[union-attr]
    sizes = tuple(-1 if index is None else index for index in indices)
    if min(sizes, default=0) < 0:
        raise ConfigError(f"shape={shape!r} must be whole numbers from 0, such as (1024, 64)")
    return sizes


def _index(value: object) -> int | None:
    """The whole number that the value is, of Python's kind or another such as NumPy's."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # An array.
        return None


def _bytes(size: SupportsIndex | str, *, name: str) -> int:
    number = _index(size)
    return parse_bytes(size if number is None else number, name=name)  # type: ignore[arg-type]


def _limit(limit: SupportsIndex | str | None) -> tuple[int, str]:
    """Bytes, and what set them where that is not the caller."""
    if limit is not None:
        limit_bytes = _bytes(limit, name="limit")
        if limit_bytes == 0:
            raise ConfigError("limit must be at least a byte, such as '48GiB'")
        return limit_bytes, ""
    total_bytes, source = _core.total_host_memory()
    limit_bytes = int(total_bytes * _DEFAULT_SHARE)
    logger.info("pinned host memory: up to %s, most of %s", format_bytes(limit_bytes), source)
    return limit_bytes, source


def _node(numa: str | int | None) -> int | None:
    if numa is None:
        return None
    if numa == "nearest":
        return -1
    if isinstance(numa, bool) or not isinstance(numa, int) or not 0 <= numa < 1 << 31:
        raise ConfigError(f"numa={numa!r} is no node; write 'nearest', a number from 0, or None")
    return numa


def _device(device: SupportsIndex | None, *, pinned: bool) -> int:
    if device is not None:
        number = _index(device)
        if number is None or not 0 <= number < 1 << 31:
            raise ConfigError(f"device={device!r} must be the number of a device, from 0")
        return number
    # Pinning makes a CUDA context on the device that it goes through, so that must be the one that
    # this process computes on. Without torch it computes on whichever; in a forked child torch may
    # not be asked.
    torch = sys.modules.get("torch")
    if not pinned or torch is None or torch.cuda._is_in_bad_fork():
        return 0
    return torch.cuda.current_device() if torch.cuda.is_available() else 0

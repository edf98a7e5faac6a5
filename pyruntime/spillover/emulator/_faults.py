"""Faults on purpose: driver errors, a device that fills up, streams that hang, disks that fail.

The plan is read by the emulated driver itself, at the one place that every call goes through; the
disk tier asks its own table of file operations. Without a plan a call pays one predictable branch.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from spillover._errors import ConfigError, StateError
from spillover._units import parse_bytes
from spillover.emulator import _libraries

if TYPE_CHECKING:
    import torch

Timing = Literal["before", "after"]
StorageOperation = Literal[
    "make_folder",
    "open",
    "unlink",
    "list",
    "rename",
    "lock",
    "allocate",
    "truncate",
    "sync",
    "read",
    "write",
]
StorageFaultKind = Literal["error", "short", "flip", "torn", "delay"]

_TIMINGS = {None: 0, "before": 1, "after": 2}
_SIZE_MAX = ctypes.c_size_t(-1).value
_planning = threading.Lock()
_is_planned = False


@dataclass(frozen=True, kw_only=True)
class _When:
    """Which calls of a function or operation a fault strikes."""

    call: int = 1
    times: int | None = 1
    probability: float = 1.0

    def _check_when(self) -> None:
        for name, value in (("call", self.call), ("times", self.times)):
            if value is None and name == "times":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a number from 1, not {value!r}")
        if not isinstance(self.probability, int | float) or not 0 < self.probability <= 1:
            raise ConfigError(f"probability must be in (0, 1], not {self.probability!r}")


@dataclass(frozen=True)
class Fault(_When):
    """An error of the driver or the runtime at chosen calls of a function.

    Parameters
    ----------
    function
        ``"cuMemAlloc"``, ``"cudaMalloc"``, ...; ``"*"``: any function of the driver. Functions of
        the runtime call those of the driver, so that strikes them as well. A kernel is one
        ``cuLaunchKernel``; an operator of torch is one, or two where it allocates its results.
    call
        The first call that may fail, counted from 1 since the plan began.
    times
        How many calls fail at most; None: without end.
    probability
        Of each call from ``call`` on, decided by the plan's seed and the call's number alone.
    error
        CUDA's name for it, such as ``"CUDA_ERROR_ILLEGAL_ADDRESS"``. None: out of memory for
        functions that make something, else ``CUDA_ERROR_OPERATING_SYSTEM``, which any function may
        return and which says nothing of the arguments. After an error that CUDA calls sticky, such
        as an illegal address, the device refuses all further work of this process.
    timing
        ``"before"``: the call has no effect. ``"after"``: it does its work and returns the error
        all the same, as CUDA does with errors of earlier work. None: after for functions that
        release or wait, else before.
    """

    function: str = "*"
    error: str | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        self._check_when()
        if self.function != "*":
            _choose("function", self.function, function_names())
        if self.error is not None:
            _choose("error", self.error, tuple(_error_numbers()))
        if self.timing not in _TIMINGS:
            raise ConfigError(f"timing={self.timing!r} is not known; choose before or after")


@dataclass(frozen=True)
class StorageFault(_When):
    """A fault of a file operation of the disk tier.

    Parameters
    ----------
    operation
        ``make_folder``, ``open``, ``unlink``, ``list`` (a folder's names), ``rename``, ``lock``,
        ``allocate`` (space ahead of writing), ``truncate`` (which gives it back), ``sync`` (of a
        file or a folder), ``read`` or ``write``.
    kind
        ``error``: the operation has no effect and fails. ``short``: a transfer moves about half of
        its bytes and says so. ``flip``: a transfer flips one bit and reports success. ``torn``: a
        write reports success, but its second half never arrives. ``delay``: it takes longer.
    error
        For the kind ``error``: a name of the ``errno`` module.
    delay_us
        For the kind ``delay``: microseconds.
    folder
        Strike files in this folder only; for operations on files that are open.
    call, times, probability
        As of :class:`Fault`; operations are counted each by itself, over all files.
    """

    operation: StorageOperation
    kind: StorageFaultKind = "error"
    error: str = "EIO"
    delay_us: int = 1000
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        self._check_when()
        _choose("operation", self.operation, get_args(StorageOperation))
        _choose("kind", self.kind, get_args(StorageFaultKind))
        _choose("error", self.error, [name for name in dir(errno) if name.startswith("E")])
        if isinstance(self.delay_us, bool) or not isinstance(self.delay_us, int):
            raise ConfigError(f"delay_us must be a number, not {self.delay_us!r}")
        if self.delay_us < 0:
            raise ConfigError(f"delay_us must not be negative, got {self.delay_us}")
        on_files = ("allocate", "truncate", "read", "write")
        if self.folder is not None and self.operation not in on_files:
            raise ConfigError(f"folder is for {', '.join(on_files)}, not for {self.operation!r}")
        possible = {"read": ("short", "flip"), "write": ("short", "flip", "torn")}
        if self.kind not in ("error", "delay", *possible.get(self.operation, ())):
            raise ConfigError(f"the operation {self.operation!r} cannot have a {self.kind!r} fault")


class Injection:
    """What a plan has done so far; given by :func:`faults`."""

    def fired(self) -> list[str]:
        """The faults injected, driver first: ``"cuMemAlloc 3: CUDA_ERROR_OUT_OF_MEMORY"``."""
        from spillover import _core

        lines = _text("faults_fired").splitlines()
        driver = ["{} {}: {}".format(*line.split()) for line in lines]
        return driver + [_with_error_name(line) for line in _core.storage_faults_fired()]

    def occupy(self, size: int | str, *, device: int = 0) -> None:
        """Let another process hold ``size`` bytes of the device from now on, in place of before.

        ``cuMemGetInfo`` and allocations see it. What this process holds already stays.
        """
        _occupy(size, device)


@contextlib.contextmanager
def faults(
    *plan: Fault,
    storage: Sequence[StorageFault] = (),
    occupied: int | str = 0,
    pinned_limit: int | str | None = None,
    seed: int = 0,
) -> Iterator[Injection]:
    """Inject faults into the emulated device and the disk tier, for the length of a ``with`` block.

    Calls are counted from zero at its start (see :func:`calls`), with or without a plan.

    Parameters
    ----------
    plan
        Driver and runtime errors; the first that strikes a call decides.
    storage
        Faults of file operations; several may strike the same call.
    occupied
        Bytes of every device that another process holds; :meth:`Injection.occupy` changes it.
    pinned_limit
        The most bytes that this process may pin, allocated and registered together; more is
        refused with out of memory. None: no limit.
    seed
        Decides probabilities and which bits flip.

    Raises
    ------
    ConfigError
        An argument is wrong; where a name is unknown, the message gives the nearest.
    StateError
        A plan is in effect already, or the emulator is off.
    """
    global _is_planned
    library = _libraries.driver()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be a number from 0 to 2**63 - 1, not {seed!r}")
    occupied_bytes = parse_bytes(occupied, name="occupied")
    pinned_bytes = _SIZE_MAX if pinned_limit is None else parse_bytes(pinned_limit)
    rows = _driver_rows(plan)
    storage_rows = _storage_rows(storage)
    with _planning:
        if _is_planned:
            raise StateError("faults() is in effect already; end its block first, or extend it")
        _is_planned = True
    from spillover import _core

    try:
        if occupied_bytes or pinned_limit is not None:
            _set_limits(occupied_bytes, pinned_bytes)
        _core.storage_faults_begin(storage_rows, seed)
        library.spillover_emulator_plan_begin(rows, len(rows), seed)
        yield Injection()
    finally:
        library.spillover_emulator_plan_end()
        _core.storage_faults_end()
        _lift_limits()
        _is_planned = False


def calls() -> dict[str, int]:
    """Calls by function since the last :func:`faults` block began; they stand still after its end.

    Functions of the driver and the runtime by the names that CUDA documents, kernels and operators
    as ``cuLaunchKernel``, and the disk tier's operations as ``"storage.write"`` and the like.
    """
    from spillover import _core

    driver = _numbers("call_counts")
    storage = {f"storage.{name}": count for name, count in _core.storage_calls().items()}
    return {**driver, **storage}


def call_bytes() -> dict[str, int]:
    """Device memory that successful calls were about, by function, as :func:`calls` counts them.

    Covers ``cuMemAlloc``, ``cuMemFree``, ``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``,
    ``cuMemSetAccess``, ``cuMemUnmap`` and ``cuMemRelease``.
    """
    return _numbers("call_bytes")


def _numbers(name: str) -> dict[str, int]:
    lines = (line.split() for line in _text(name).splitlines())
    return {function: int(number) for function, number in lines}


@contextlib.contextmanager
def stuck(stream: torch.cuda.Stream, *, timeout_s: float = 10.0) -> Iterator[None]:
    """Put an operation on ``stream`` that does not end before the ``with`` block does.

    What is enqueued behind it waits. Queries say that the stream is not ready; a call that waits
    for it gives up after ``timeout_s`` with ``CUDA_ERROR_TIMEOUT`` and without an effect, where a
    GPU would hang.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be above 0, not {timeout_s!r}")
    library = _libraries.driver()
    held = ctypes.c_uint64()
    timeout_ms = max(1, round(timeout_s * 1000))
    handle = ctypes.c_void_p(stream.cuda_stream)
    _check(
        library.spillover_emulator_hold_stream(handle, timeout_ms, ctypes.byref(held)),
        "the stream cannot be held",
    )
    try:
        yield
    finally:
        library.spillover_emulator_release_stream(held)


@contextlib.contextmanager
def slow(stream: torch.cuda.Stream, *, delay_us: int) -> Iterator[None]:
    """Let every copy, memset and kernel on ``stream`` take ``delay_us`` longer.

    Operators of torch are not delayed: the calling thread runs them, whatever their stream.
    """
    if isinstance(delay_us, bool) or not isinstance(delay_us, int) or delay_us < 0:
        raise ConfigError(f"delay_us must be a number from 0, not {delay_us!r}")
    library = _libraries.driver()
    handle = ctypes.c_void_p(stream.cuda_stream)
    _check(
        library.spillover_emulator_slow_stream(handle, delay_us), "the stream cannot be slowed down"
    )
    try:
        yield
    finally:
        library.spillover_emulator_slow_stream(handle, 0)


@functools.lru_cache(maxsize=1)
def function_names() -> tuple[str, ...]:
    """Names that a :class:`Fault` may have: functions of the driver, then of the runtime."""
    names = _text("function_names").split()
    rows = _libraries.runtime().spillover_emulator_runtime_functions()
    index = 0
    while rows[index] is not None:
        names.append(rows[index].decode())
        index += 1
    return tuple(names)


@functools.lru_cache(maxsize=1)
def _error_numbers() -> dict[str, int]:
    pairs = (line.split() for line in _text("error_names").splitlines())
    return {name: int(number) for name, number in pairs}


def _text(what: str) -> str:
    """What ``spillover_emulator_<what>`` writes."""
    function = getattr(_libraries.driver(), f"spillover_emulator_{what}")
    length = function(None, 0)
    while True:
        buffer = ctypes.create_string_buffer(length + 1)
        needed = function(buffer, length + 1)
        if needed <= length:
            return buffer.value.decode()
        length = needed


def _choose(what: str, value: object, choices: Sequence[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
    raise ConfigError(f"{what}={value!r} is not known; the nearest is {near[0]!r}")


def _driver_rows(plan: Sequence[Fault]) -> Any:
    rows = (_libraries.FaultRow * len(plan))()
    for row, fault in zip(rows, plan, strict=True):
        if not isinstance(fault, Fault):
            raise ConfigError(f"faults() takes Fault objects, not {fault!r}")
        row.function = fault.function.encode()
        row.first_call = fault.call
        row.times = fault.times or 0
        row.probability = fault.probability
        row.error = _error_numbers()[fault.error] if fault.error is not None else 0
        row.timing = _TIMINGS[fault.timing]
    return rows


def _storage_rows(storage: Sequence[StorageFault]) -> list[tuple[Any, ...]]:
    from spillover import _core

    rows = []
    for fault in storage:
        if not isinstance(fault, StorageFault):
            raise ConfigError(f"storage= takes StorageFault objects, not {fault!r}")
        kind = getattr(_core.StorageFaultKind, fault.kind)
        number = getattr(errno, fault.error) if fault.kind == "error" else 0
        when = (fault.call, fault.times or 0, float(fault.probability))
        folder = "" if fault.folder is None else os.path.realpath(fault.folder)
        rows.append((fault.operation, kind, number, *when, fault.delay_us, folder))
    return rows


def _with_error_name(line: str) -> str:
    head, _, number = line.partition("errno ")
    return f"storage.{head}{errno.errorcode[int(number)]}" if number else f"storage.{head}"


def _check(status: int, what: str) -> None:
    if status != 0:
        names = {number: name for name, number in _error_numbers().items()}
        raise StateError(f"{what}: {names.get(status, status)}")


def _occupy(size: int | str, device: int) -> None:
    status = _libraries.driver().spillover_emulator_occupy(device, parse_bytes(size))
    _check(status, f"device {device} cannot be occupied")


def _device_count() -> int:
    from spillover.emulator._activation import active_options

    options = active_options()
    return options.devices if options is not None else 0


def _set_limits(occupied_bytes: int, pinned_bytes: int) -> None:
    library = _libraries.driver()
    _check(library.cuInit(0), "the emulated device does not start")
    for device in range(_device_count()):
        _occupy(occupied_bytes, device)
    _check(library.spillover_emulator_limit_pinned(pinned_bytes), "pinning cannot be limited")


def _lift_limits() -> None:
    """Does nothing where the device never started."""
    library = _libraries.driver()
    for device in range(_device_count()):
        library.spillover_emulator_occupy(device, 0)
    library.spillover_emulator_limit_pinned(_SIZE_MAX)

"""Calls of the pool's C interface (csrc/allocator/c_api.h) that need no torch."""

from __future__ import annotations

import ctypes
import functools
from typing import NoReturn

from spillover._errors import ConfigError, DriverError, HostOutOfMemory, StateError
from spillover._paths import library_path
from spillover._units import parse_bytes

_CLASSES = ("all", "small_pool", "large_pool")
_COUNTERS = (
    "allocation",
    "segment",
    "active",
    "inactive_split",
    "allocated_bytes",
    "reserved_bytes",
    "active_bytes",
    "inactive_split_bytes",
    "requested_bytes",
)

_ABI_VERSION = 6
_OK, _INVALID_ARGUMENT, _OUT_OF_MEMORY, _DRIVER_FAILURE = range(4)


class _Counter(ctypes.Structure):
    _fields_ = (
        ("current", ctypes.c_int64),
        ("peak", ctypes.c_int64),
        ("allocated", ctypes.c_int64),
        ("freed", ctypes.c_int64),
    )


class _Stats(ctypes.Structure):
    _fields_ = (
        *((name, _Counter * len(_CLASSES)) for name in _COUNTERS),
        ("alloc_retries", ctypes.c_int64),
        ("ooms", ctypes.c_int64),
    )


class _Interval(ctypes.Structure):
    _fields_ = (
        ("allocated_bytes", ctypes.c_int64),
        ("reserved_bytes", ctypes.c_int64),
        ("allocated_bytes_peak", ctypes.c_int64),
    )


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """``libspillover.so`` with the functions of this module declared."""
    # The adapter needs this library by its SONAME and finds it loaded.
    loaded = ctypes.CDLL(str(library_path("libspillover.so")))
    loaded.spillover_last_error.restype = ctypes.c_char_p
    loaded.spillover_stats.argtypes = [ctypes.c_int, ctypes.POINTER(_Stats)]
    loaded.spillover_take_interval.argtypes = [ctypes.c_int, ctypes.POINTER(_Interval)]
    loaded.spillover_trim.argtypes = [ctypes.c_int, ctypes.c_size_t]
    loaded.spillover_check_invariants.argtypes = [ctypes.c_int]
    version = loaded.spillover_abi_version()
    if version != _ABI_VERSION:
        raise StateError(
            f"libspillover.so has version {version} of its C interface where {_ABI_VERSION} is "
            "needed; reinstall spillover with 'pip install .'"
        )
    return loaded


def _raise(status: int) -> NoReturn:
    reason = library().spillover_last_error().decode(errors="replace")
    if status == _INVALID_ARGUMENT:
        raise ConfigError(reason)
    if status == _OUT_OF_MEMORY:
        raise HostOutOfMemory(reason)
    if status == _DRIVER_FAILURE:
        raise DriverError(reason)
    raise StateError(reason)


def device_index(device: int) -> int:
    """``device``, where C can count to it: ctypes would pass on another number in silence.

    Raises
    ------
    ConfigError
        It is no number of a device. Whether there is such a device is not asked here.
    """
    if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < 1 << 31:
        raise ConfigError(f"device={device!r} is not the index of a CUDA device, 0 or more")
    return device


def stats(device: int = 0) -> dict[str, int]:
    """Counters of the pool on one device.

    Parameters
    ----------
    device
        Index of the CUDA device.

    Returns
    -------
    dict
        Keys as in ``torch.cuda.memory_stats``, for example ``"allocated_bytes.all.peak"``: one of
        allocation, segment, active, inactive_split (numbers of blocks and segments) and
        allocated_bytes, reserved_bytes, active_bytes, inactive_split_bytes, requested_bytes; then
        all, small_pool or large_pool; then current, peak, allocated or freed. Also
        ``num_alloc_retries`` and ``num_ooms``.

    Raises
    ------
    ConfigError
        There is no such device.
    DriverError
        The CUDA driver is missing or failed.
    """
    counters = _Stats()
    status = library().spillover_stats(device_index(device), ctypes.byref(counters))
    if status != _OK:
        _raise(status)
    result = {
        f"{name}.{size_class}.{field}": int(getattr(getattr(counters, name)[index], field))
        for name in _COUNTERS
        for index, size_class in enumerate(_CLASSES)
        for field, _ in _Counter._fields_
    }
    result["num_alloc_retries"] = counters.alloc_retries
    result["num_ooms"] = counters.ooms
    return result


def take_interval(device: int) -> tuple[int, int, int]:
    """Bytes of live blocks, bytes held, and the most of the former since the last call.

    Peaks of others, as ``torch.cuda.max_memory_allocated``, are left as they are. One caller at a
    time for each device.
    """
    interval = _Interval()
    status = library().spillover_take_interval(device, ctypes.byref(interval))
    if status != _OK:
        _raise(status)
    return interval.allocated_bytes, interval.reserved_bytes, interval.allocated_bytes_peak


def trim(keep: int | str = 0, *, device: int = 0) -> None:
    """Give memory without a live block to the driver, and wait for the device's work first.

    Parameters
    ----------
    keep
        Bytes, or a text such as ``"2GiB"``, that the pool may go on holding.
    device
        Index of the CUDA device.

    Raises
    ------
    ConfigError
        There is no such device, or ``keep`` is not a size.
    DriverError
        The CUDA driver is missing or failed.
    """
    status = library().spillover_trim(device_index(device), parse_bytes(keep, name="keep"))
    if status != _OK:
        _raise(status)


def check_invariants(device: int = 0) -> None:
    """Walk every structure of the pool and compare it with its equations. Slow; for tests.

    Parameters
    ----------
    device
        Index of the CUDA device.

    Raises
    ------
    StateError
        An equation does not hold; the message has the first that fails.
    """
    status = library().spillover_check_invariants(device_index(device))
    if status != _OK:
        _raise(status)

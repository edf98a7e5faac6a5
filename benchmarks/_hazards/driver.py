"""A few calls of the emulated driver, for bugs that torch does not let a program make."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_uint64, c_void_p
from typing import Any

from spillover.emulator import _libraries

MIB = 1 << 20
SIZE = 1 << 16
NON_BLOCKING = 1
NO_TIMING = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", c_uint64),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


def call(name: str, *arguments: Any) -> int:
    """Call a function of the driver; whole numbers go as 64 bits."""
    converted = [c_uint64(a) if isinstance(a, int) else a for a in arguments]
    return int(getattr(_libraries.driver(), name)(*converted))


def made(name: str, *arguments: Any) -> int:
    """The handle or address that a call with an output as its first argument gives."""
    value = c_uint64()
    status = call(name, byref(value), *arguments)
    if status != 0:
        raise RuntimeError(f"{name} returned {status}")
    return value.value


def use_device(device: int) -> int:
    """Make a device's primary context current and return it."""
    context = made("cuDevicePrimaryCtxRetain", device)
    call("cuCtxSetCurrent", c_void_p(context))
    return context


def stream(flags: int = NON_BLOCKING) -> int:
    return made("cuStreamCreate", flags)


def event() -> int:
    return made("cuEventCreate", NO_TIMING)


def order(before: int, after: int) -> None:
    """Make stream ``after`` wait for what is on ``before`` now."""
    mark = event()
    call("cuEventRecord", mark, before)
    call("cuStreamWaitEvent", after, mark, 0)
    call("cuEventDestroy_v2", mark)


def operator(on: int, name: str, pointer: int, *, write: bool, size: int = SIZE) -> int:
    """Pretend to run an operator of this name on a range of memory; what the checker says."""
    touched = _libraries.Range(pointer, size, int(write))
    return call("spillover_emulator_operator_begin", on, name.encode(), byref(touched), 1)


def host_access(pointer: int, *, write: bool, size: int = SIZE) -> int:
    touched = _libraries.Range(pointer, size, int(write))
    return call("spillover_emulator_host_access", b"host code", byref(touched), 1)


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


def copy_batch(copies: list[tuple[int, int]], on: int, *, size: int = SIZE) -> int:
    """One call for copies of ``size`` bytes, each a target and a source."""
    targets, sources = ((c_uint64 * len(copies))(*column) for column in zip(*copies, strict=True))
    sizes = (ctypes.c_size_t * len(copies))(*[size] * len(copies))
    attributes, first = _CopyAttributes(source_order=1), ctypes.c_size_t(0)
    count = len(copies)
    shared = (byref(attributes), byref(first), 1)
    return call("cuMemcpyBatchAsync_v2", targets, sources, sizes, count, *shared, on)


def map_memory(address: int, size: int) -> int:
    """Map fresh memory of device 0 at a reserved address; its handle."""
    properties = _Properties(1, 0, _Location(1, 0), None, 0)
    handle = made("cuMemCreate", size, byref(properties), 0)
    show_memory(address, size, handle)
    return handle


def show_memory(address: int, size: int, handle: int) -> None:
    call("cuMemMap", address, size, 0, handle, 0)
    call("cuMemSetAccess", address, size, byref(_Access(_Location(1, 0), 3)), 1)

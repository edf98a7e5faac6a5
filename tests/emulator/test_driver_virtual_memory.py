"""CUDA's virtual memory functions on the emulated device."""

from __future__ import annotations

import os
from ctypes import byref, c_int, c_size_t, c_uint64, c_ulonglong
from typing import Any

from driver_ctypes import (
    GRANULARITY,
    ILLEGAL_ADDRESS,
    INVALID_DEVICE,
    INVALID_VALUE,
    MIB,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    SUCCESS,
    AccessDescriptor,
    AllocationProperties,
    Driver,
    Location,
    expect,
    properties,
    run_program,
)


def aliasing() -> None:
    """One handle mapped twice shows the same bytes."""
    cuda = Driver()
    handle, first, second = cuda.create(4 * MIB), cuda.reserve(4 * MIB), cuda.reserve(8 * MIB)
    cuda.map(first, 4 * MIB, handle)
    cuda.map(second + 4 * MIB, 4 * MIB, handle)
    assert cuda.fetch(first, 16) == b"\xff" * 16
    cuda("cuMemsetD32_v2", first, 0x01020304, MIB)
    assert cuda.fetch(second + 4 * MIB, 8) == b"\4\3\2\1" * 2
    cuda("cuMemRelease", handle)
    cuda("cuMemUnmap", first, 4 * MIB)
    assert cuda.fetch(second + 8 * MIB - 4, 4) == b"\4\3\2\1"  # a mapping keeps the memory
    assert cuda.free_bytes() == 60 * MIB
    expect(INVALID_VALUE, cuda.status("cuMemRelease", handle))
    cuda("cuMemUnmap", second + 4 * MIB, 4 * MIB)
    assert cuda.free_bytes() == 64 * MIB
    cuda("cuMemAddressFree", first, 4 * MIB)
    cuda("cuMemAddressFree", second, 8 * MIB)
    assert cuda.live()[:2] == (0, 0)


def fresh_memory_is_poison_again() -> None:
    cuda = Driver()
    pointer = cuda.reserve(2 * MIB)
    for _ in range(2):
        handle = cuda.create(2 * MIB)
        cuda.map(pointer, 2 * MIB, handle)
        assert cuda.fetch(pointer + MIB, 4) == b"\xff" * 4
        cuda("cuMemsetD8_v2", pointer, 0, 2 * MIB)
        cuda("cuCtxSynchronize")
        cuda("cuMemUnmap", pointer, 2 * MIB)
        cuda("cuMemRelease", handle)


def access() -> None:
    cuda = Driver()
    handle, pointer = cuda.create(2 * MIB), cuda.reserve(4 * MIB)
    stream = cuda.stream()
    cuda("cuMemMap", pointer, 2 * MIB, 0, handle, 0)
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemsetD8Async", pointer, 0, 10, stream))
    read_only = AccessDescriptor(Location(1, 0), 1)
    cuda("cuMemSetAccess", pointer, 2 * MIB, byref(read_only), 1)
    flags, location = c_ulonglong(), Location(1, 0)
    cuda("cuMemGetAccess", byref(flags), byref(location), pointer)
    assert flags.value == 1
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemsetD8Async", pointer, 0, 10, stream))
    cuda.fetch(pointer, 10)
    both = AccessDescriptor(Location(1, 0), 3)
    cuda("cuMemSetAccess", pointer, 2 * MIB, byref(both), 1)
    cuda.fill(pointer, 1, 2 * MIB, stream)
    # Half of the reservation is not mapped.
    expect(ILLEGAL_ADDRESS, cuda.status("cuMemsetD8Async", pointer, 0, 2 * MIB + 1, stream))
    expect(INVALID_VALUE, cuda.status("cuMemSetAccess", pointer, 4 * MIB, byref(both), 1))
    other_device = AccessDescriptor(Location(1, 1), 3)
    expect(INVALID_DEVICE, cuda.status("cuMemSetAccess", pointer, MIB, byref(other_device), 1))


def invalid_requests() -> None:
    cuda = Driver()
    handle, pointer = cuda.create(4 * MIB), cuda.reserve(8 * MIB)
    expect(
        INVALID_VALUE, cuda.status("cuMemCreate", byref(c_uint64()), MIB, byref(properties()), 0)
    )
    too_much = cuda.status("cuMemCreate", byref(c_uint64()), 62 * MIB, byref(properties()), 0)
    expect(OUT_OF_MEMORY, too_much)
    wrong = properties(device=1)
    expect(INVALID_DEVICE, cuda.status("cuMemCreate", byref(c_uint64()), 2 * MIB, byref(wrong), 0))
    on_host = AllocationProperties(1, 0, Location(2, 0), None, 0)
    result = cuda.status("cuMemCreate", byref(c_uint64()), 2 * MIB, byref(on_host), 0)
    expect(NOT_SUPPORTED, result)
    for arguments in (
        (pointer + MIB, 2 * MIB, 0, handle, 0),  # not aligned
        (pointer, 6 * MIB, 0, handle, 0),  # larger than the handle
        (pointer, 4 * MIB, 2 * MIB, handle, 0),  # past its end
        (pointer + 6 * MIB, 4 * MIB, 0, handle, 0),  # past the reservation's end
        (pointer, 2 * MIB, 0, 12345, 0),  # no handle
        (0x10000000, 2 * MIB, 0, handle, 0),  # no reservation
    ):
        expect(INVALID_VALUE, cuda.status("cuMemMap", *arguments))
    cuda.map(pointer, 4 * MIB, handle)
    expect(INVALID_VALUE, cuda.status("cuMemMap", pointer + 2 * MIB, 2 * MIB, 0, handle, 0))
    expect(INVALID_VALUE, cuda.status("cuMemUnmap", pointer, 2 * MIB))  # half a mapping
    expect(INVALID_VALUE, cuda.status("cuMemAddressFree", pointer, 8 * MIB))  # still mapped
    expect(INVALID_VALUE, cuda.status("cuMemAddressReserve", byref(c_uint64()), MIB, 0, 0, 0))
    expect(INVALID_VALUE, cuda.status("cuMemAddressReserve", byref(c_uint64()), 0, 0, 0, 0))


def granularity_and_hints() -> None:
    cuda = Driver()
    value = c_size_t()
    cuda("cuMemGetAllocationGranularity", byref(value), byref(properties()), 0)
    assert value.value == GRANULARITY
    first = cuda.reserve(16 * MIB)
    cuda("cuMemAddressFree", first, 16 * MIB)
    wanted, got = first + 4 * MIB, c_uint64()
    cuda("cuMemAddressReserve", byref(got), 4 * MIB, 0, wanted, 0)
    assert got.value == wanted
    cuda("cuMemAddressReserve", byref(got), 4 * MIB, 0, wanted, 0)  # taken: anywhere else
    assert got.value != wanted
    cuda("cuMemAddressReserve", byref(got), 4 * MIB, 64 * MIB, 0, 0)
    assert got.value % (64 * MIB) == 0


def handles() -> None:
    cuda = Driver()
    handle, pointer = cuda.create(2 * MIB, exportable=True), cuda.reserve(4 * MIB)
    cuda.map(pointer, 2 * MIB, handle)
    again, wanted = c_uint64(), AllocationProperties()
    cuda("cuMemRetainAllocationHandle", byref(again), pointer + 100)
    assert again.value == handle
    cuda("cuMemGetAllocationPropertiesFromHandle", byref(wanted), handle)
    assert (wanted.handle_types, wanted.location.type) == (1, 1)
    file, imported = c_int(), c_uint64()
    cuda("cuMemExportToShareableHandle", byref(file), handle, 1, 0)
    cuda("cuMemImportFromShareableHandle", byref(imported), file.value, 1)
    os.close(file.value)
    cuda.map(pointer + 2 * MIB, 2 * MIB, imported.value)
    cuda("cuMemsetD8_v2", pointer, 9, 100)
    assert cuda.fetch(pointer + 2 * MIB, 100) == b"\t" * 100
    assert cuda.free_bytes() == 62 * MIB  # paid for once
    plain = cuda.create(2 * MIB)
    expect(INVALID_VALUE, cuda.status("cuMemExportToShareableHandle", byref(file), plain, 1, 0))
    for live in (handle, again.value, imported.value, plain):
        expect(SUCCESS, cuda.status("cuMemRelease", live))


def many_handles() -> None:
    """A thousand small handles need no file descriptor each."""
    cuda = Driver()
    before = len(os.listdir("/proc/self/fd"))
    live = [cuda.create(2 * MIB) for _ in range(32)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    pointer = cuda.reserve(64 * MIB)
    for index, handle in enumerate(live):
        cuda.map(pointer + index * 2 * MIB, 2 * MIB, handle)
    cuda.fill(pointer, 4, 64 * MIB, 0)  # one operation across all mappings
    assert cuda.fetch(pointer + 63 * MIB, 10) == b"\4" * 10
    cuda("cuMemUnmap", pointer, 64 * MIB)  # in one call


def devices_without_it() -> None:
    """Each function says so, and nothing else of the driver is missing."""
    cuda = Driver()
    supported, out = c_int(7), c_uint64()
    for attribute in (102, 103):  # virtual memory management, its POSIX handles
        cuda("cuDeviceGetAttribute", byref(supported), attribute, 0)
        assert supported.value == 0
    calls: dict[str, tuple[Any, ...]] = {
        "cuMemGetAllocationGranularity": (byref(out), byref(properties()), 0),
        "cuMemAddressReserve": (byref(out), 2 * MIB, 0, 0, 0),
        "cuMemCreate": (byref(out), 2 * MIB, byref(properties()), 0),
        "cuMemMap": (2 * MIB, 2 * MIB, 0, 1, 0),
        "cuMemUnmap": (2 * MIB, 2 * MIB),
        "cuMemRelease": (1,),
    }
    for name, arguments in calls.items():
        expect(NOT_SUPPORTED, cuda.status(name, *arguments))
    pointer = cuda.alloc(4 * MIB)
    cuda.fill(pointer, 3, 4 * MIB, 0)
    assert cuda.fetch(pointer, 4) == b"\3" * 4
    cuda.free(pointer)


def test_aliasing() -> None:
    run_program(aliasing)


def test_fresh_memory_is_poison_again() -> None:
    run_program(fresh_memory_is_poison_again)


def test_access() -> None:
    run_program(access)


def test_invalid_requests() -> None:
    run_program(invalid_requests)


def test_granularity_and_hints() -> None:
    run_program(granularity_and_hints)


def test_handles() -> None:
    run_program(handles)


def test_many_handles() -> None:
    run_program(many_handles)


def test_devices_without_it() -> None:
    run_program(devices_without_it, virtual_memory=0)

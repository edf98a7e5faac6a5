"""Memory of the emulated driver, called rightly and wrongly. See :mod:`conformance_driver`."""

from __future__ import annotations

import ctypes
import os
import tempfile
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p

from conformance import Calls
from conformance_driver import INTERPROCESS_EVENT, NO_DEVICE, NO_HANDLE
from driver_ctypes import (
    ALREADY_REGISTERED,
    GRANULARITY,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    MIB,
    NOT_FOUND,
    NOT_REGISTERED,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    AccessDescriptor,
    Buffer,
    Driver,
    Location,
    properties,
)

#: More than any device has.
HUGE = 1 << 45


def device_memory(call: Calls, cuda: Driver) -> None:
    pointer, base, size, pitch = c_uint64(), c_uint64(), c_size_t(), c_size_t()
    call("cuMemGetInfo", byref(size), byref(pitch))
    assert size.value == pitch.value == 64 * MIB
    call("cuMemAlloc", byref(pointer), 1000)
    call.fails(INVALID_VALUE, "cuMemAlloc", None, 1000)
    call.fails(INVALID_VALUE, "cuMemAlloc", byref(base), 0)
    call.fails(OUT_OF_MEMORY, "cuMemAlloc", byref(base), HUGE)
    call("cuMemGetAddressRange", byref(base), byref(size), pointer.value + 999)
    assert (base.value, size.value) == (pointer.value, 1000)
    call.fails(NOT_FOUND, "cuMemGetAddressRange", byref(base), byref(size), NO_HANDLE)
    call.fails(INVALID_VALUE, "cuMemFree", pointer.value + 8)
    call("cuMemFree", pointer)
    call.fails(INVALID_VALUE, "cuMemFree", pointer)
    call("cuMemFree", 0)
    call("cuMemAllocPitch", byref(pointer), byref(pitch), 1000, 3, 4)
    assert pitch.value % 512 == 0
    assert pitch.value >= 1000
    call("cuMemFree", pointer)
    for code, arguments in (
        (INVALID_VALUE, (None, byref(pitch), 1000, 3, 4)),
        (INVALID_VALUE, (byref(pointer), None, 1000, 3, 4)),
        (INVALID_VALUE, (byref(pointer), byref(pitch), 0, 3, 4)),
        (INVALID_VALUE, (byref(pointer), byref(pitch), 1000, 0, 4)),
        (INVALID_VALUE, (byref(pointer), byref(pitch), 1000, 3, 5)),
        (OUT_OF_MEMORY, (byref(pointer), byref(pitch), HUGE, 3, 4)),
        (OUT_OF_MEMORY, (byref(pointer), byref(pitch), 1 << 40, 1 << 40, 4)),
    ):
        call.fails(code, "cuMemAllocPitch", *arguments)
    call("cuMemAllocManaged", byref(pointer), 1000, 1)
    call("cuMemFree", pointer)
    call.fails(INVALID_VALUE, "cuMemAllocManaged", byref(pointer), 1000, 3)
    call.fails(INVALID_VALUE, "cuMemAllocManaged", byref(pointer), 0, 1)
    call.fails(INVALID_VALUE, "cuMemAllocManaged", None, 1000, 1)


def host_memory(call: Calls, cuda: Driver) -> None:
    pinned, plain, own = c_void_p(), c_void_p(), Buffer.pageable(8192)
    flags, mapped = c_uint(), c_uint64()
    call("cuMemHostAlloc", byref(pinned), 4096, 5)
    for arguments in ((None, 4096, 0), (byref(plain), 0, 0), (byref(plain), 4096, 8)):
        call.fails(INVALID_VALUE, "cuMemHostAlloc", *arguments)
    call("cuMemAllocHost", byref(plain), 4096)
    for shorter in ((None, 4096), (byref(plain), 0)):
        call.fails(INVALID_VALUE, "cuMemAllocHost", *shorter)
    call("cuMemHostGetFlags", byref(flags), int(pinned.value or 0) + 4095)
    assert flags.value & 5 == 5
    call.fails(INVALID_VALUE, "cuMemHostGetFlags", None, pinned)
    call.fails(INVALID_VALUE, "cuMemHostGetFlags", byref(flags), own)
    call("cuMemHostRegister", own, 8192, 3)
    call.fails(INVALID_VALUE, "cuMemHostGetFlags", byref(flags), own)
    call.fails(ALREADY_REGISTERED, "cuMemHostRegister", own.address + 4096, 4096, 0)
    call.fails(ALREADY_REGISTERED, "cuMemHostRegister", pinned, 4096, 0)
    device = cuda.alloc(8192)
    for pointer, size, bits in ((None, 8192, 0), (own, 0, 0), (own, 8192, 0x10), (device, 8192, 0)):
        call.fails(INVALID_VALUE, "cuMemHostRegister", pointer, size, bits)
    call.fails(INVALID_VALUE, "cuMemHostRegister", own, 2**64 - 1, 0)
    call.fails(NOT_SUPPORTED, "cuMemHostRegister", own, 8192, 4)
    for pointer in (own, pinned):
        call("cuMemHostGetDevicePointer", byref(mapped), pointer, 0)
        assert mapped.value == (own.address if pointer is own else pinned.value)
    call.fails(INVALID_VALUE, "cuMemHostGetDevicePointer", byref(mapped), own, 1)
    call.fails(INVALID_VALUE, "cuMemHostGetDevicePointer", None, own, 0)
    call.fails(INVALID_VALUE, "cuMemHostGetDevicePointer", byref(mapped), NO_HANDLE, 0)
    call.fails(INVALID_VALUE, "cuMemFreeHost", own)
    call.fails(INVALID_VALUE, "cuMemFreeHost", int(pinned.value or 0) + 8)
    call.fails(NOT_REGISTERED, "cuMemHostUnregister", own.address + 4096)
    call.fails(NOT_REGISTERED, "cuMemHostUnregister", pinned)
    call.fails(INVALID_VALUE, "cuMemHostUnregister", None)
    call("cuMemHostUnregister", own)
    call.fails(NOT_REGISTERED, "cuMemHostUnregister", own)
    for memory in (pinned, plain):
        call("cuMemFreeHost", memory)
        call.fails(INVALID_VALUE, "cuMemFreeHost", memory)
    cuda.free(device)


def pointers(call: Calls, cuda: Driver) -> None:
    device, plain, value = cuda.alloc(512), Buffer.pageable(512), c_uint64()
    call("cuPointerGetAttribute", byref(value), 11, device + 7)
    assert value.value == device
    call.fails(INVALID_VALUE, "cuPointerGetAttribute", None, 11, device)
    call.fails(INVALID_VALUE, "cuPointerGetAttribute", byref(value), 2, plain)
    call.fails(INVALID_VALUE, "cuPointerGetAttribute", byref(value), 4, device)
    call.fails(INVALID_VALUE, "cuPointerGetAttribute", byref(value), 0, device)
    call.fails(INVALID_VALUE, "cuPointerGetAttribute", byref(value), 9999, device)
    kinds, outs = (c_int * 1)(9), (c_void_p * 1)(ctypes.addressof(value))
    call("cuPointerGetAttributes", 1, kinds, outs, plain)
    assert c_int(value.value).value == -2
    call.fails(INVALID_VALUE, "cuPointerGetAttributes", 1, None, outs, device)
    call.fails(INVALID_VALUE, "cuPointerGetAttributes", 1, kinds, None, device)
    call.fails(INVALID_VALUE, "cuPointerGetAttributes", 1, (c_int * 1)(9999), outs, device)
    call.fails(NOT_SUPPORTED, "cuPointerSetAttribute", byref(c_int(1)), 6, device)
    call.fails(INVALID_VALUE, "cuPointerSetAttribute", None, 6, device)
    call.fails(INVALID_VALUE, "cuPointerSetAttribute", byref(c_int(1)), 6, plain)
    call.fails(INVALID_VALUE, "cuPointerSetAttribute", byref(c_int(1)), 11, device)
    cuda.free(device)


def virtual_memory(call: Calls, cuda: Driver) -> None:
    size, whole, read_only = c_size_t(), properties(), AccessDescriptor(Location(1, 0), 1)
    reserved, physical, again = c_uint64(), c_uint64(), c_uint64()
    call("cuMemGetAllocationGranularity", byref(size), byref(whole), 0)
    assert size.value == GRANULARITY
    call.fails(INVALID_VALUE, "cuMemGetAllocationGranularity", None, byref(whole), 0)
    call.fails(INVALID_VALUE, "cuMemGetAllocationGranularity", byref(size), None, 0)
    call.fails(INVALID_VALUE, "cuMemGetAllocationGranularity", byref(size), byref(whole), 2)
    call("cuMemAddressReserve", byref(reserved), 2 * GRANULARITY, 0, 0, 0)
    for arguments in (
        (None, GRANULARITY, 0, 0, 0),
        (byref(again), 0, 0, 0, 0),
        (byref(again), 1000, 0, 0, 0),
        (byref(again), GRANULARITY, 3, 0, 0),
        (byref(again), GRANULARITY, 0, 0, 8),
    ):
        call.fails(INVALID_VALUE, "cuMemAddressReserve", *arguments)
    call.fails(OUT_OF_MEMORY, "cuMemAddressReserve", byref(again), 1 << 60, 0, 0, 0)
    call("cuMemCreate", byref(physical), GRANULARITY, byref(whole), 0)
    nowhere, on_host, untyped = properties(device=NO_DEVICE), properties(), properties()
    on_host.location.type, untyped.type = 2, 0
    for code, arguments in (
        (INVALID_VALUE, (None, GRANULARITY, byref(whole), 0)),
        (INVALID_VALUE, (byref(again), 0, byref(whole), 0)),
        (INVALID_VALUE, (byref(again), 1000, byref(whole), 0)),
        (INVALID_VALUE, (byref(again), GRANULARITY, None, 0)),
        (INVALID_VALUE, (byref(again), GRANULARITY, byref(whole), 1)),
        (INVALID_VALUE, (byref(again), GRANULARITY, byref(untyped), 0)),
        (INVALID_DEVICE, (byref(again), GRANULARITY, byref(nowhere), 0)),
        (NOT_SUPPORTED, (byref(again), GRANULARITY, byref(on_host), 0)),
        (OUT_OF_MEMORY, (byref(again), HUGE, byref(whole), 0)),
    ):
        call.fails(code, "cuMemCreate", *arguments)
    call("cuMemMap", reserved, GRANULARITY, 0, physical, 0)
    for target, length, offset, handle, flags in (
        (reserved.value, GRANULARITY, 0, physical, 0),  # mapped already
        (reserved.value + GRANULARITY, GRANULARITY, 0, NO_HANDLE, 0),
        (reserved.value + GRANULARITY, GRANULARITY, GRANULARITY, physical, 0),
        (reserved.value + GRANULARITY, 2 * GRANULARITY, 0, physical, 0),
        (reserved.value + GRANULARITY, 0, 0, physical, 0),
        (reserved.value + GRANULARITY, GRANULARITY, 0, physical, 1),
        (NO_HANDLE, GRANULARITY, 0, physical, 0),
    ):
        call.fails(INVALID_VALUE, "cuMemMap", target, length, offset, handle, flags)
    call("cuMemSetAccess", reserved, GRANULARITY, byref(read_only), 1)
    far, odd = AccessDescriptor(Location(1, NO_DEVICE), 3), AccessDescriptor(Location(1, 0), 2)
    call.fails(INVALID_VALUE, "cuMemSetAccess", reserved, GRANULARITY, None, 1)
    call.fails(INVALID_VALUE, "cuMemSetAccess", reserved, GRANULARITY, byref(read_only), 0)
    call.fails(INVALID_VALUE, "cuMemSetAccess", reserved, GRANULARITY, byref(odd), 1)
    call.fails(INVALID_VALUE, "cuMemSetAccess", reserved, 2 * GRANULARITY, byref(read_only), 1)
    call.fails(INVALID_DEVICE, "cuMemSetAccess", reserved, GRANULARITY, byref(far), 1)
    call("cuMemGetAccess", byref(again), byref(Location(1, 0)), reserved)
    assert again.value == 1
    call.fails(INVALID_VALUE, "cuMemGetAccess", None, byref(Location(1, 0)), reserved)
    call.fails(INVALID_DEVICE, "cuMemGetAccess", byref(again), byref(far.location), reserved)
    unmapped = reserved.value + GRANULARITY
    call.fails(INVALID_VALUE, "cuMemGetAccess", byref(again), byref(Location(1, 0)), unmapped)
    call("cuMemRetainAllocationHandle", byref(again), reserved)
    call.fails(INVALID_VALUE, "cuMemRetainAllocationHandle", None, reserved)
    call.fails(INVALID_VALUE, "cuMemRetainAllocationHandle", byref(again), unmapped)
    call("cuMemRelease", again)
    call("cuMemGetAllocationPropertiesFromHandle", byref(whole), physical)
    call.fails(INVALID_VALUE, "cuMemGetAllocationPropertiesFromHandle", None, physical)
    call.fails(INVALID_VALUE, "cuMemGetAllocationPropertiesFromHandle", byref(whole), NO_HANDLE)
    call.fails(INVALID_VALUE, "cuMemAddressFree", reserved, 2 * GRANULARITY)
    call("cuMemUnmap", reserved, GRANULARITY)
    call.fails(INVALID_VALUE, "cuMemUnmap", reserved, GRANULARITY)
    call.fails(INVALID_VALUE, "cuMemUnmap", NO_HANDLE, GRANULARITY)
    call("cuMemRelease", physical)
    call.fails(INVALID_VALUE, "cuMemRelease", physical)
    call.fails(INVALID_VALUE, "cuMemAddressFree", reserved, GRANULARITY)
    call("cuMemAddressFree", reserved, 2 * GRANULARITY)
    call.fails(INVALID_VALUE, "cuMemAddressFree", reserved, 2 * GRANULARITY)


def shared_memory(call: Calls, cuda: Driver) -> None:
    file, imported = c_int(-1), c_uint64()
    plain, exportable = cuda.create(GRANULARITY), cuda.create(GRANULARITY, exportable=True)
    call("cuMemExportToShareableHandle", byref(file), exportable, 1, 0)
    export = "cuMemExportToShareableHandle"
    call.fails(INVALID_VALUE, export, byref(file), plain, 1, 0)
    call.fails(INVALID_VALUE, export, byref(file), NO_HANDLE, 1, 0)
    call.fails(INVALID_VALUE, export, None, exportable, 1, 0)
    call.fails(INVALID_VALUE, export, byref(file), exportable, 1, 7)
    call.fails(NOT_SUPPORTED, export, byref(file), exportable, 8, 0)
    call("cuMemImportFromShareableHandle", byref(imported), file.value, 1)
    call.fails(INVALID_VALUE, "cuMemImportFromShareableHandle", None, file.value, 1)
    call.fails(NOT_SUPPORTED, "cuMemImportFromShareableHandle", byref(imported), file.value, 8)
    with tempfile.TemporaryFile() as other:
        wrong = other.fileno()
        call.fails(INVALID_VALUE, "cuMemImportFromShareableHandle", byref(imported), wrong, 1)
    os.close(file.value)
    for handle in (plain, exportable, imported.value):
        cuda("cuMemRelease", handle)


class HandleBytes(ctypes.Structure):
    """``CUipcMemHandle`` and ``CUipcEventHandle``."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


def between_processes(call: Calls, cuda: Driver) -> None:
    memory, of_event, opened = HandleBytes(), HandleBytes(), c_uint64()
    device, plain, shared = cuda.alloc(1000), cuda.event(), cuda.event(INTERPROCESS_EVENT | 2)
    call("cuIpcGetMemHandle", byref(memory), device)
    call.fails(INVALID_VALUE, "cuIpcGetMemHandle", None, device)
    call.fails(INVALID_VALUE, "cuIpcGetMemHandle", byref(memory), NO_HANDLE)
    call.fails(INVALID_VALUE, "cuIpcOpenMemHandle", None, memory, 1)
    call.fails(INVALID_VALUE, "cuIpcOpenMemHandle", byref(opened), memory, 0)
    call.fails(INVALID_HANDLE, "cuIpcOpenMemHandle", byref(opened), HandleBytes(), 1)
    call.fails(INVALID_CONTEXT, "cuIpcOpenMemHandle", byref(opened), memory, 1)
    call.fails(INVALID_VALUE, "cuIpcCloseMemHandle", device)
    call("cuIpcGetEventHandle", byref(of_event), shared)
    call.fails(INVALID_VALUE, "cuIpcGetEventHandle", None, shared)
    call.fails(INVALID_HANDLE, "cuIpcGetEventHandle", byref(of_event), plain)
    call.fails(INVALID_HANDLE, "cuIpcGetEventHandle", byref(of_event), NO_HANDLE)
    call.fails(INVALID_VALUE, "cuIpcOpenEventHandle", None, of_event)
    call.fails(INVALID_HANDLE, "cuIpcOpenEventHandle", byref(opened), HandleBytes())
    for event in (plain, shared):
        cuda("cuEventDestroy_v2", event)
    cuda.free(device)


class PoolProperties(ctypes.Structure):
    """``CUmemPoolProps``."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("security", c_void_p),
        ("size_max", c_size_t),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 54),
    )


def pools(call: Calls, cuda: Driver) -> None:
    default, pool, pointer, value = c_uint64(), c_uint64(), c_uint64(), c_uint64()
    stream, access = cuda.stream(), c_int(-1)
    for name in ("cuDeviceGetDefaultMemPool", "cuDeviceGetMemPool"):
        call(name, byref(default), 0)
        call.fails(INVALID_VALUE, name, None, 0)
    call.fails(INVALID_DEVICE, "cuDeviceGetDefaultMemPool", byref(default), NO_DEVICE)
    call.fails(INVALID_DEVICE, "cuDeviceGetMemPool", byref(default), NO_DEVICE)
    right = PoolProperties(1, 0, Location(1, 0))
    call("cuMemPoolCreate", byref(pool), byref(right))
    call.fails(INVALID_VALUE, "cuMemPoolCreate", None, byref(right))
    call.fails(INVALID_VALUE, "cuMemPoolCreate", byref(value), None)
    untyped, nowhere = PoolProperties(0, 0, Location(1, 0)), PoolProperties(1, 0, Location(1, 9))
    call.fails(INVALID_VALUE, "cuMemPoolCreate", byref(value), byref(untyped))
    call.fails(INVALID_VALUE, "cuMemPoolCreate", byref(value), byref(nowhere))
    shared = PoolProperties(1, 1, Location(1, 0))
    call.fails(NOT_SUPPORTED, "cuMemPoolCreate", byref(value), byref(shared))
    call("cuDeviceSetMemPool", 0, pool)
    call.fails(INVALID_VALUE, "cuDeviceSetMemPool", 1, pool)
    call.fails(INVALID_DEVICE, "cuDeviceSetMemPool", NO_DEVICE, pool)
    call.fails(INVALID_VALUE, "cuDeviceSetMemPool", 0, NO_HANDLE)
    call("cuMemAllocAsync", byref(pointer), 4 * MIB, stream)
    call.fails(INVALID_VALUE, "cuMemAllocAsync", None, 1000, stream)
    call.fails(INVALID_VALUE, "cuMemAllocAsync", byref(value), 0, stream)
    call.fails(OUT_OF_MEMORY, "cuMemAllocAsync", byref(value), HUGE, stream)
    call("cuMemPoolGetAttribute", pool, 7, byref(value))
    assert value.value == 4 * MIB
    call.fails(INVALID_VALUE, "cuMemPoolGetAttribute", pool, 99, byref(value))
    call.fails(INVALID_VALUE, "cuMemPoolGetAttribute", pool, 7, None)
    call.fails(INVALID_VALUE, "cuMemPoolGetAttribute", NO_HANDLE, 7, byref(value))
    call("cuMemPoolSetAttribute", pool, 4, byref(c_uint64(123)))
    call("cuMemPoolSetAttribute", pool, 8, byref(c_uint64(0)))
    call.fails(INVALID_VALUE, "cuMemPoolSetAttribute", pool, 8, byref(c_uint64(1)))
    call.fails(INVALID_VALUE, "cuMemPoolSetAttribute", pool, 7, byref(c_uint64(0)))
    call.fails(INVALID_VALUE, "cuMemPoolSetAttribute", pool, 4, None)
    call.fails(INVALID_VALUE, "cuMemPoolSetAttribute", NO_HANDLE, 4, byref(c_uint64(1)))
    call("cuMemPoolTrimTo", pool, 0)
    call.fails(INVALID_VALUE, "cuMemPoolTrimTo", NO_HANDLE, 0)
    call("cuMemPoolSetAccess", pool, byref(AccessDescriptor(Location(1, 1), 3)), 1)
    own, odd = AccessDescriptor(Location(1, 0), 0), AccessDescriptor(Location(1, 1), 2)
    call.fails(INVALID_DEVICE, "cuMemPoolSetAccess", pool, byref(own), 1)
    call.fails(INVALID_VALUE, "cuMemPoolSetAccess", pool, byref(odd), 1)
    call.fails(INVALID_VALUE, "cuMemPoolSetAccess", pool, None, 1)
    call("cuMemPoolGetAccess", byref(access), pool, byref(Location(1, 1)))
    assert access.value == 3
    call.fails(INVALID_VALUE, "cuMemPoolGetAccess", None, pool, byref(Location(1, 1)))
    call.fails(INVALID_VALUE, "cuMemPoolGetAccess", byref(access), NO_HANDLE, byref(Location(1, 1)))
    call("cuMemFreeAsync", pointer, stream)
    call.fails(INVALID_VALUE, "cuMemFreeAsync", pointer, stream)
    call.fails(INVALID_HANDLE, "cuMemFreeAsync", pointer, NO_HANDLE)
    call("cuMemAllocFromPoolAsync", byref(pointer), 1000, default, stream)
    call.fails(INVALID_VALUE, "cuMemAllocFromPoolAsync", byref(value), 1000, NO_HANDLE, stream)
    call.fails(INVALID_VALUE, "cuMemAllocFromPoolAsync", byref(value), 0, default, stream)
    cuda("cuMemFreeAsync", pointer, stream)
    cuda.sync(stream)
    call("cuMemPoolDestroy", pool)
    call.fails(INVALID_VALUE, "cuMemPoolDestroy", pool)
    call.fails(INVALID_VALUE, "cuMemPoolDestroy", default)
    cuda("cuStreamDestroy_v2", stream)


AREAS = (
    device_memory,
    host_memory,
    pointers,
    virtual_memory,
    shared_memory,
    between_processes,
    pools,
)

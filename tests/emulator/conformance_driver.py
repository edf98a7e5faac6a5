"""Every function of the emulated driver but those of graphs, called rightly and wrongly.

See :mod:`conformance`. Each area is called with the calls that are noted and a driver with two
devices, on the first one's primary context.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

from conformance import Calls
from driver_ctypes import (
    DISABLE_TIMING,
    HOST_FUNCTION,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    MIB,
    NON_BLOCKING,
    NOT_READY,
    Buffer,
    Driver,
)

NO_DEVICE = 9
NO_HANDLE = 0xDEAD0
UNSUPPORTED_LIMIT = 215
FILE_NOT_FOUND = 301
PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_NOT_ENABLED = 704, 705
UNKNOWN_ERROR_CODE = 54321
INTERPROCESS_EVENT = 4
HUGE = 1 << 45
STREAM_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_void_p)


def versions(call: Calls, cuda: Driver) -> None:
    text, number, function = c_char_p(), c_int(), c_void_p()
    call("cuInit", 0)
    call.fails(INVALID_VALUE, "cuInit", 1)
    call("cuDriverGetVersion", byref(number))
    assert number.value >= 12000
    call.fails(INVALID_VALUE, "cuDriverGetVersion", None)
    for name, expected in (
        ("cuGetErrorName", b"CUDA_ERROR_INVALID_VALUE"),
        ("cuGetErrorString", b"invalid argument"),
    ):
        call(name, INVALID_VALUE, byref(text))
        assert text.value == expected
        call.fails(INVALID_VALUE, name, UNKNOWN_ERROR_CODE, byref(text))
        call.fails(INVALID_VALUE, name, INVALID_VALUE, None)
    found = c_int(-1)
    arguments = (byref(function), 13000, 0, byref(found))
    call("cuGetProcAddress", b"cuMemAlloc", *arguments)
    assert function.value
    assert found.value == 0
    call("cuGetProcAddress", b"cuNoSuchFunction", *arguments)
    assert not function.value
    assert found.value == 1
    call("cuGetProcAddress", b"cuCtxCreate", byref(function), 1000, 0, byref(found))
    assert not function.value
    assert found.value == 2, "known, and younger than that version"
    call.fails(INVALID_VALUE, "cuGetProcAddress", None, *arguments)
    call.fails(INVALID_VALUE, "cuGetProcAddress", b"cuMemAlloc", None, 13000, 0, None)


def devices(call: Calls, cuda: Driver) -> None:
    number, second, size = c_int(-1), c_int(-1), c_size_t()
    text = ctypes.create_string_buffer(64)
    call("cuDeviceGetCount", byref(number))
    assert number.value == 2
    call.fails(INVALID_VALUE, "cuDeviceGetCount", None)
    call("cuDeviceGet", byref(number), 1)
    assert number.value == 1
    call.fails(INVALID_DEVICE, "cuDeviceGet", byref(number), 2)
    call.fails(INVALID_DEVICE, "cuDeviceGet", byref(number), -1)
    call.fails(INVALID_VALUE, "cuDeviceGet", None, 0)
    call("cuDeviceGetName", text, 8, 0)
    assert len(text.value) == 7, "a name is cut to the buffer and ended"
    call.fails(INVALID_VALUE, "cuDeviceGetName", text, 0, 0)
    call.fails(INVALID_DEVICE, "cuDeviceGetName", text, 64, NO_DEVICE)
    call("cuDeviceGetUuid", text, 0)
    call.fails(INVALID_VALUE, "cuDeviceGetUuid", None, 0)
    call.fails(INVALID_DEVICE, "cuDeviceGetUuid", text, NO_DEVICE)
    call("cuDeviceTotalMem", byref(size), 1)
    assert size.value == 64 * MIB
    call.fails(INVALID_VALUE, "cuDeviceTotalMem", None, 0)
    call.fails(INVALID_DEVICE, "cuDeviceTotalMem", byref(size), NO_DEVICE)
    call("cuDeviceGetAttribute", byref(number), 10, 0)
    assert number.value == 32, "a warp"
    call.fails(INVALID_VALUE, "cuDeviceGetAttribute", byref(number), 0, 0)
    call.fails(INVALID_VALUE, "cuDeviceGetAttribute", byref(number), 9999, 0)
    call.fails(INVALID_VALUE, "cuDeviceGetAttribute", None, 10, 0)
    call.fails(INVALID_DEVICE, "cuDeviceGetAttribute", byref(number), 10, NO_DEVICE)
    call("cuDeviceComputeCapability", byref(number), byref(second), 0)
    assert number.value >= 9
    call.fails(INVALID_VALUE, "cuDeviceComputeCapability", None, byref(second), 0)
    call.fails(INVALID_DEVICE, "cuDeviceComputeCapability", byref(number), byref(second), NO_DEVICE)
    call("cuDeviceGetPCIBusId", text, 13, 1)
    call.fails(INVALID_VALUE, "cuDeviceGetPCIBusId", text, 12, 1)
    call.fails(INVALID_DEVICE, "cuDeviceGetPCIBusId", text, 64, NO_DEVICE)
    for form in (text.value, text.value[:-2], text.value[5:]):
        call("cuDeviceGetByPCIBusId", byref(number), form)
        assert number.value == 1
    call.fails(INVALID_DEVICE, "cuDeviceGetByPCIBusId", byref(number), b"0000:ee:00.0")
    call.fails(INVALID_VALUE, "cuDeviceGetByPCIBusId", byref(number), b"nonsense")
    call.fails(INVALID_VALUE, "cuDeviceGetByPCIBusId", None, text)


def peers(call: Calls, cuda: Driver) -> None:
    number, own, other = c_int(-1), c_void_p(), c_void_p()
    for peer, expected in ((1, 1), (0, 0)):
        call("cuDeviceCanAccessPeer", byref(number), 0, peer)
        assert number.value == expected
    call.fails(INVALID_DEVICE, "cuDeviceCanAccessPeer", byref(number), 0, NO_DEVICE)
    call("cuDeviceGetP2PAttribute", byref(number), 2, 0, 1)
    assert number.value == 1
    call.fails(INVALID_VALUE, "cuDeviceGetP2PAttribute", byref(number), 99, 0, 1)
    call.fails(INVALID_VALUE, "cuDeviceGetP2PAttribute", None, 2, 0, 1)
    call.fails(INVALID_DEVICE, "cuDeviceGetP2PAttribute", byref(number), 2, 0, 0)
    call.fails(INVALID_DEVICE, "cuDeviceGetP2PAttribute", byref(number), 2, 0, NO_DEVICE)
    cuda("cuCtxGetCurrent", byref(own))
    cuda("cuDevicePrimaryCtxRetain", byref(other), 1)
    call.fails(PEER_ACCESS_NOT_ENABLED, "cuCtxDisablePeerAccess", other)
    call.fails(INVALID_VALUE, "cuCtxEnablePeerAccess", other, 1)
    call.fails(INVALID_CONTEXT, "cuCtxEnablePeerAccess", own, 0)
    call.fails(INVALID_CONTEXT, "cuCtxEnablePeerAccess", NO_HANDLE, 0)
    call("cuCtxEnablePeerAccess", other, 0)
    call.fails(PEER_ACCESS_ALREADY_ENABLED, "cuCtxEnablePeerAccess", other, 0)
    call("cuCtxDisablePeerAccess", other)
    call.fails(INVALID_CONTEXT, "cuCtxDisablePeerAccess", NO_HANDLE)
    cuda("cuDevicePrimaryCtxRelease_v2", 1)


def primary_contexts(call: Calls, cuda: Driver) -> None:
    context, flags, active = c_void_p(), c_uint(), c_int(-1)
    call("cuDevicePrimaryCtxRetain", byref(context), 1)
    call.fails(INVALID_DEVICE, "cuDevicePrimaryCtxRetain", byref(context), NO_DEVICE)
    call.fails(INVALID_VALUE, "cuDevicePrimaryCtxRetain", None, 1)
    call("cuDevicePrimaryCtxSetFlags", 1, 4)
    call.fails(INVALID_VALUE, "cuDevicePrimaryCtxSetFlags", 1, 0x6)
    call.fails(INVALID_VALUE, "cuDevicePrimaryCtxSetFlags", 1, 0x10000)
    call.fails(INVALID_DEVICE, "cuDevicePrimaryCtxSetFlags", NO_DEVICE, 0)
    call("cuDevicePrimaryCtxGetState", 1, byref(flags), byref(active))
    assert (flags.value, active.value) == (4, 1)
    call.fails(INVALID_DEVICE, "cuDevicePrimaryCtxGetState", NO_DEVICE, byref(flags), byref(active))
    call("cuDevicePrimaryCtxRelease", 1)
    call.fails(INVALID_CONTEXT, "cuDevicePrimaryCtxRelease", 1)
    call.fails(INVALID_DEVICE, "cuDevicePrimaryCtxRelease", NO_DEVICE)
    call("cuDevicePrimaryCtxReset", 1)
    call.fails(INVALID_DEVICE, "cuDevicePrimaryCtxReset", NO_DEVICE)


def contexts(call: Calls, cuda: Driver) -> None:
    primary, made, found = c_void_p(), c_void_p(), c_void_p()
    number, large = c_int(-1), c_uint64()
    call("cuCtxGetCurrent", byref(primary))
    call.fails(INVALID_VALUE, "cuCtxGetCurrent", None)
    call("cuCtxCreate", byref(made), None, 0, 1)
    call.fails(INVALID_VALUE, "cuCtxCreate", None, None, 0, 1)
    call.fails(INVALID_VALUE, "cuCtxCreate", byref(found), None, 0x10000, 1)
    call.fails(INVALID_DEVICE, "cuCtxCreate", byref(found), None, 0, NO_DEVICE)
    call("cuCtxGetDevice", byref(number), made)
    assert number.value == 1
    call.fails(INVALID_VALUE, "cuCtxGetDevice", None, made)
    call.fails(INVALID_CONTEXT, "cuCtxGetDevice", byref(number), NO_HANDLE)
    call("cuCtxGetId", made, byref(large))
    call.fails(INVALID_VALUE, "cuCtxGetId", made, None)
    call.fails(INVALID_CONTEXT, "cuCtxGetId", NO_HANDLE, byref(large))
    call("cuCtxGetApiVersion", made, byref(number))
    call.fails(INVALID_CONTEXT, "cuCtxGetApiVersion", NO_HANDLE, byref(number))
    call.fails(INVALID_VALUE, "cuCtxGetApiVersion", made, None)
    call("cuCtxPushCurrent", primary)
    call.fails(INVALID_CONTEXT, "cuCtxPushCurrent", NO_HANDLE)
    call("cuCtxPopCurrent", byref(found))
    assert found.value == primary.value
    call("cuCtxSynchronize", made)
    call.fails(INVALID_CONTEXT, "cuCtxSynchronize", NO_HANDLE)
    call("cuCtxDestroy", made)
    for name, rest in (
        ("cuCtxDestroy", ()),
        ("cuCtxSetCurrent", ()),
        ("cuCtxPushCurrent", ()),
        ("cuCtxSynchronize", ()),
        ("cuCtxGetApiVersion", (byref(number),)),
    ):
        call.fails(INVALID_CONTEXT, name, made, *rest)
    call.fails(INVALID_CONTEXT, "cuCtxDestroy", primary)
    call.fails(INVALID_CONTEXT, "cuCtxSetCurrent", NO_HANDLE)
    call("cuCtxSetCurrent", None)
    call.fails(INVALID_CONTEXT, "cuCtxPopCurrent", byref(found))
    call.fails(INVALID_CONTEXT, "cuCtxGetFlags", byref(large))
    call.fails(INVALID_CONTEXT, "cuCtxSynchronize", None)
    call.fails(INVALID_CONTEXT, "cuMemAlloc", byref(large), 8)
    call("cuCtxSetCurrent", primary)


def context_settings(call: Calls, cuda: Driver) -> None:
    number, second, size = c_int(-1), c_int(-1), c_size_t()
    call("cuCtxGetFlags", byref(number))
    call.fails(INVALID_VALUE, "cuCtxGetFlags", None)
    call("cuCtxGetStreamPriorityRange", byref(number), byref(second))
    assert second.value < number.value == 0
    call("cuCtxSetLimit", 2, 4 * MIB)
    call("cuCtxGetLimit", byref(size), 2)
    assert size.value == 4 * MIB
    for name, first in (("cuCtxGetLimit", (byref(size),)), ("cuCtxSetLimit", ())):
        last = () if first else (1,)
        call.fails(INVALID_VALUE, name, *first, 99, *last)
        call.fails(UNSUPPORTED_LIMIT, name, *first, 6, *last)
    call.fails(INVALID_VALUE, "cuCtxGetLimit", None, 2)
    call("cuCtxSetCacheConfig", 1)
    call.fails(INVALID_VALUE, "cuCtxSetCacheConfig", 4)
    call("cuCtxGetCacheConfig", byref(number))
    call.fails(INVALID_VALUE, "cuCtxGetCacheConfig", None)


def streams(call: Calls, cuda: Driver) -> None:
    plain, urgent, found = c_uint64(), c_uint64(), c_uint64()
    number = c_int(-1)
    call("cuStreamCreate", byref(plain), NON_BLOCKING)
    call.fails(INVALID_VALUE, "cuStreamCreate", None, 0)
    call.fails(INVALID_VALUE, "cuStreamCreate", byref(found), 2)
    call("cuStreamCreateWithPriority", byref(urgent), 0, -99)
    call.fails(INVALID_VALUE, "cuStreamCreateWithPriority", None, 0, 0)
    call.fails(INVALID_VALUE, "cuStreamCreateWithPriority", byref(found), 2, 0)
    for name, expected in (
        ("cuStreamGetFlags", 0),
        ("cuStreamGetPriority", -5),
        ("cuStreamGetDevice", 0),
        ("cuStreamGetId", None),
        ("cuStreamGetCtx", None),
    ):
        out = number if expected is not None else found
        call(name, urgent, byref(out))
        assert expected in (None, out.value), name
        call.fails(INVALID_HANDLE, name, NO_HANDLE, byref(out))
        call.fails(INVALID_VALUE, name, urgent, None)
    call("cuStreamQuery", plain)
    call.fails(INVALID_HANDLE, "cuStreamQuery", NO_HANDLE)
    call("cuStreamSynchronize", plain)
    call.fails(INVALID_HANDLE, "cuStreamSynchronize", NO_HANDLE)
    event = cuda.record(plain.value)
    call("cuStreamWaitEvent", urgent, event, 0)
    call.fails(INVALID_VALUE, "cuStreamWaitEvent", urgent, event, 2)
    call.fails(INVALID_HANDLE, "cuStreamWaitEvent", urgent, NO_HANDLE, 0)
    call.fails(INVALID_HANDLE, "cuStreamWaitEvent", NO_HANDLE, event, 0)
    cuda("cuEventDestroy_v2", event)
    ran: list[str] = []
    function = HOST_FUNCTION(lambda _: ran.append("function"))
    callback = STREAM_CALLBACK(lambda *_: ran.append("callback"))
    call("cuLaunchHostFunc", plain, function, None)
    call.fails(INVALID_VALUE, "cuLaunchHostFunc", plain, None, None)
    call.fails(INVALID_HANDLE, "cuLaunchHostFunc", NO_HANDLE, function, None)
    call("cuStreamAddCallback", plain, callback, None, 0)
    call.fails(INVALID_VALUE, "cuStreamAddCallback", plain, callback, None, 1)
    call.fails(INVALID_HANDLE, "cuStreamAddCallback", NO_HANDLE, callback, None, 0)
    call.fails(NOT_READY, "cuStreamQuery", plain)
    cuda.sync(plain.value)
    assert ran == ["function", "callback"]
    call("cuStreamDestroy", plain)
    call("cuStreamDestroy", urgent)
    for wrong in (plain, 0, NO_HANDLE):
        call.fails(INVALID_HANDLE, "cuStreamDestroy", wrong)


def stream_values(call: Calls, cuda: Driver) -> None:
    stream, device, plain = cuda.stream(), cuda.alloc(64), Buffer.pageable(64)
    for bits in (32, 64):
        write, wait = f"cuStreamWriteValue{bits}", f"cuStreamWaitValue{bits}"
        call(write, stream, device, 5, 0)
        call(wait, stream, device, 5, 1)
        for name, highest in ((write, 1), (wait, 3)):
            call.fails(INVALID_VALUE, name, stream, device + 2, 5, 0)
            call.fails(INVALID_VALUE, name, stream, 0, 5, 0)
            call.fails(INVALID_VALUE, name, stream, plain, 5, 0)
            call.fails(INVALID_VALUE, name, stream, device, 5, 0x100 + highest)
    cuda.sync(stream)
    cuda.free(device)
    cuda("cuStreamDestroy_v2", stream)


def events(call: Calls, cuda: Driver) -> None:
    start, end, untimed, milliseconds = c_uint64(), c_uint64(), c_uint64(), c_float(-1)
    stream = cuda.stream()
    call("cuEventCreate", byref(start), 0)
    call("cuEventCreate", byref(end), 1)
    call("cuEventCreate", byref(untimed), DISABLE_TIMING)
    call.fails(INVALID_VALUE, "cuEventCreate", None, 0)
    call.fails(INVALID_VALUE, "cuEventCreate", byref(c_uint64()), 8)
    call.fails(INVALID_VALUE, "cuEventCreate", byref(c_uint64()), INTERPROCESS_EVENT)
    call("cuEventRecord", start, stream)
    call.fails(INVALID_HANDLE, "cuEventRecord", NO_HANDLE, stream)
    call.fails(INVALID_HANDLE, "cuEventRecord", start, NO_HANDLE)
    elapsed = "cuEventElapsedTime"
    call.fails(INVALID_HANDLE, elapsed, byref(milliseconds), start, end)  # never recorded
    cuda("cuLaunchHostFunc", stream, HOST_NOTHING, None)
    call("cuEventRecordWithFlags", end, stream, 0)
    call.fails(INVALID_VALUE, "cuEventRecordWithFlags", end, stream, 2)
    call.fails(INVALID_HANDLE, "cuEventRecordWithFlags", NO_HANDLE, stream, 0)
    call.fails(NOT_READY, "cuEventQuery", end)
    call.fails(NOT_READY, elapsed, byref(milliseconds), start, end)
    call("cuEventSynchronize", end)
    call.fails(INVALID_HANDLE, "cuEventSynchronize", NO_HANDLE)
    call("cuEventQuery", end)
    call.fails(INVALID_HANDLE, "cuEventQuery", NO_HANDLE)
    call(elapsed, byref(milliseconds), start, end)
    assert milliseconds.value >= 0
    cuda("cuEventRecord", untimed, stream)
    call.fails(INVALID_HANDLE, elapsed, byref(milliseconds), start, untimed)
    call.fails(INVALID_HANDLE, elapsed, byref(milliseconds), start, NO_HANDLE)
    call.fails(INVALID_VALUE, elapsed, None, start, end)
    for event in (start, end, untimed):
        call("cuEventDestroy", event)
        call.fails(INVALID_HANDLE, "cuEventDestroy", event)
    cuda("cuStreamDestroy_v2", stream)


HOST_NOTHING = HOST_FUNCTION(lambda _: None)


def module_files(call: Calls, cuda: Driver) -> None:
    module = c_uint64()
    call("cuModuleLoad", byref(module), str(Path(__file__)).encode())
    call.fails(FILE_NOT_FOUND, "cuModuleLoad", byref(module), b"/no/such/file.cubin")
    call.fails(INVALID_VALUE, "cuModuleLoad", byref(module), None)
    call("cuModuleUnload", module)
    call.fails(INVALID_HANDLE, "cuModuleUnload", module)


AREAS = (
    versions,
    devices,
    peers,
    primary_contexts,
    contexts,
    context_settings,
    streams,
    stream_values,
    events,
    module_files,
)

"""Every function of the emulated CUDA runtime but those of graphs, called rightly and wrongly.

See :mod:`conformance`. Areas are called with device 0 current, once with the ordinary functions and
once with those that are compiled for per-thread default streams.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p

from conformance import Calls
from conformance_driver import (
    HOST_NOTHING,
    INTERPROCESS_EVENT,
    NO_DEVICE,
    NO_HANDLE,
    PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_NOT_ENABLED,
    STREAM_CALLBACK,
    UNSUPPORTED_LIMIT,
)
from conformance_memory import HUGE, HandleBytes, PoolProperties
from conformance_work import int_parameters, registered_kernel
from driver_ctypes import (
    ALREADY_REGISTERED,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    MIB,
    NON_BLOCKING,
    NOT_READY,
    NOT_REGISTERED,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    AccessDescriptor,
    Buffer,
    Driver,
    Location,
)
from runtime_library import DEFAULT, DEVICE_TO_HOST, HOST_TO_DEVICE

INVALID_CONFIGURATION, INVALID_PITCH, INVALID_SYMBOL, INVALID_DIRECTION = 9, 12, 13, 21
MISSING_CONFIGURATION, INVALID_FUNCTION = 52, 98
SIZE = 1024
NO_DIRECTION = 77


def one(call: Calls, name: str, *arguments: object) -> int:
    """What a function that makes one thing makes."""
    out = c_uint64()
    call(name, byref(out), *arguments)
    return out.value


def versions(call: Calls, cuda: Driver) -> None:
    number, function, found = c_int(), c_void_p(), c_int(-1)
    for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"):
        call(name, byref(number))
        assert number.value >= 12000
        call.fails(INVALID_VALUE, name, None)
    for name, version in (
        ("cudaGetDriverEntryPointByVersion", (13000,)),
        ("cudaGetDriverEntryPoint", ()),
    ):
        call(name, b"cuMemAlloc", byref(function), *version, 0, byref(found))
        assert function.value
        assert found.value == 0
        call(name, b"cuNothing", byref(function), *version, 0, byref(found))
        assert not function.value
        assert found.value == 1
        call(name, b"cuNothing", byref(function), *version, 0, None)
        call.fails(INVALID_VALUE, name, None, byref(function), *version, 0, None)
        call.fails(INVALID_VALUE, name, b"cuMemAlloc", None, *version, 0, None)
    call("cudaProfilerStart")
    call("cudaProfilerStop")


def devices(call: Calls, cuda: Driver) -> None:
    number, text = c_int(-1), ctypes.create_string_buffer(64)
    call("cudaGetDeviceCount", byref(number))
    assert number.value == 2
    call.fails(INVALID_VALUE, "cudaGetDeviceCount", None)
    call("cudaSetDevice", 1)
    call("cudaGetDevice", byref(number))
    assert number.value == 1
    call("cudaSetDevice", 0)
    call.fails(INVALID_DEVICE, "cudaSetDevice", NO_DEVICE)
    call.fails(INVALID_DEVICE, "cudaSetDevice", -1)
    call.fails(INVALID_VALUE, "cudaGetDevice", None)
    call("cudaInitDevice", 1, 4, 1)
    call.fails(INVALID_DEVICE, "cudaInitDevice", NO_DEVICE, 0, 0)
    call("cudaSetDeviceFlags", 4)
    call.fails(INVALID_VALUE, "cudaSetDeviceFlags", 6)
    call.fails(INVALID_VALUE, "cudaSetDeviceFlags", 0x10000)
    call("cudaGetDeviceFlags", byref(number))
    assert number.value & 7 == 4
    call.fails(INVALID_VALUE, "cudaGetDeviceFlags", None)
    call("cudaSetDeviceFlags", 0)
    call("cudaGetDeviceProperties", ctypes.create_string_buffer(4096), 1)
    call.fails(INVALID_DEVICE, "cudaGetDeviceProperties", ctypes.create_string_buffer(4096), 9)
    call("cudaDeviceGetAttribute", byref(number), 10, 0)
    assert number.value == 32
    call.fails(INVALID_VALUE, "cudaDeviceGetAttribute", byref(number), 9999, 0)
    call.fails(INVALID_VALUE, "cudaDeviceGetAttribute", None, 10, 0)
    call.fails(INVALID_DEVICE, "cudaDeviceGetAttribute", byref(number), 10, NO_DEVICE)
    call("cudaDeviceGetPCIBusId", text, 13, 1)
    call.fails(INVALID_VALUE, "cudaDeviceGetPCIBusId", text, 12, 1)
    call.fails(INVALID_DEVICE, "cudaDeviceGetPCIBusId", text, 64, NO_DEVICE)
    call("cudaDeviceGetByPCIBusId", byref(number), text.value)
    assert number.value == 1
    call.fails(INVALID_VALUE, "cudaDeviceGetByPCIBusId", byref(number), b"nonsense")
    call.fails(INVALID_DEVICE, "cudaDeviceGetByPCIBusId", byref(number), b"0000:ee:00.0")
    call("cudaDeviceGetStreamPriorityRange", byref(number), byref(c_int()))


def device_settings(call: Calls, cuda: Driver) -> None:
    size, number = c_size_t(), c_int(-1)
    call("cudaDeviceSetLimit", 2, 4 * MIB)
    call("cudaDeviceGetLimit", byref(size), 2)
    assert size.value == 4 * MIB
    call.fails(INVALID_VALUE, "cudaDeviceGetLimit", None, 2)
    call.fails(UNSUPPORTED_LIMIT, "cudaDeviceGetLimit", byref(size), 6)
    call.fails(UNSUPPORTED_LIMIT, "cudaDeviceSetLimit", 6, 1)
    call("cudaDeviceCanAccessPeer", byref(number), 0, 1)
    assert number.value == 1
    call.fails(INVALID_DEVICE, "cudaDeviceCanAccessPeer", byref(number), 0, NO_DEVICE)
    call("cudaDeviceGetP2PAttribute", byref(number), 2, 0, 1)
    call.fails(INVALID_DEVICE, "cudaDeviceGetP2PAttribute", byref(number), 2, 0, 0)
    call.fails(INVALID_VALUE, "cudaDeviceGetP2PAttribute", byref(number), 99, 0, 1)
    call.fails(PEER_ACCESS_NOT_ENABLED, "cudaDeviceDisablePeerAccess", 1)
    call("cudaDeviceEnablePeerAccess", 1, 0)
    call.fails(PEER_ACCESS_ALREADY_ENABLED, "cudaDeviceEnablePeerAccess", 1, 0)
    call.fails(INVALID_VALUE, "cudaDeviceEnablePeerAccess", 1, 1)
    call.fails(INVALID_DEVICE, "cudaDeviceEnablePeerAccess", 0, 0)
    call.fails(INVALID_DEVICE, "cudaDeviceEnablePeerAccess", NO_DEVICE, 0)
    call("cudaDeviceDisablePeerAccess", 1)
    call("cudaDeviceGraphMemTrim", 0)
    call.fails(INVALID_DEVICE, "cudaDeviceGraphMemTrim", NO_DEVICE)
    for name in ("cudaDeviceGetGraphMemAttribute", "cudaDeviceSetGraphMemAttribute"):
        call(name, 0, 1, byref(size := c_size_t()))
        assert size.value == 0
        call.fails(INVALID_VALUE, name, 0, 1, None)
        call.fails(INVALID_VALUE, name, 0, 99, byref(size))
        call.fails(INVALID_DEVICE, name, NO_DEVICE, 1, byref(size))
    call("cudaDeviceSynchronize")


def device_memory(call: Calls, cuda: Driver) -> None:
    size, pitch, pointer = c_size_t(), c_size_t(), c_uint64(1)
    call("cudaMemGetInfo", byref(size), byref(pitch))
    assert pitch.value == 64 * MIB
    first = one(call, "cudaMalloc", 1000)
    call.fails(OUT_OF_MEMORY, "cudaMalloc", byref(pointer), HUGE)
    assert not pointer.value
    call.fails(INVALID_VALUE, "cudaMalloc", None, 1000)
    call.fails(INVALID_VALUE, "cudaFree", first + 8)
    call("cudaFree", first)
    call.fails(INVALID_VALUE, "cudaFree", first)
    call("cudaFree", None)
    call("cudaMallocPitch", byref(pointer), byref(pitch), 1000, 3)
    assert pitch.value % 512 == 0
    assert pitch.value >= 1000
    call("cudaFree", pointer)
    call.fails(INVALID_VALUE, "cudaMallocPitch", None, byref(pitch), 1000, 3)
    call.fails(INVALID_VALUE, "cudaMallocPitch", byref(pointer), None, 1000, 3)
    for width, height in ((HUGE, 3), (1 << 40, 1 << 40), (2**64 - 1, 1)):
        call.fails(OUT_OF_MEMORY, "cudaMallocPitch", byref(pointer), byref(pitch), width, height)
    managed = one(call, "cudaMallocManaged", 8192, 1)
    call.fails(INVALID_VALUE, "cudaMallocManaged", byref(pointer), 8192, 3)
    call.fails(INVALID_VALUE, "cudaMallocManaged", None, 8192, 1)
    device, here = one(call, "cudaMalloc", 8192), Location(1, 0)
    call("cudaMemPrefetchAsync", managed, 8192, here, 0, None)
    call("cudaMemAdvise", managed, 8192, 1, here)
    for name, rest in (("cudaMemPrefetchAsync", (here, 0, None)), ("cudaMemAdvise", (1, here))):
        call.fails(INVALID_VALUE, name, managed, 0, *rest)
        call.fails(INVALID_VALUE, name, None, 8192, *rest)
        call.fails(INVALID_VALUE, name, device, 8192, *rest)
        call.fails(INVALID_VALUE, name, managed, 1 << 40, *rest)
    for pointer_ in (managed, device):
        call("cudaFree", pointer_)


def host_memory(call: Calls, cuda: Driver) -> None:
    own, out, flags = Buffer.pageable(8192), c_uint64(), c_uint()
    pinned, plain = one(call, "cudaHostAlloc", 4096, 4), one(call, "cudaMallocHost", 4096)
    call.fails(INVALID_VALUE, "cudaHostAlloc", None, 4096, 0)
    call.fails(INVALID_VALUE, "cudaHostAlloc", byref(out), 4096, 8)
    call.fails(INVALID_VALUE, "cudaMallocHost", None, 4096)
    call("cudaHostGetFlags", byref(flags), pinned)
    assert flags.value & 4
    call.fails(INVALID_VALUE, "cudaHostGetFlags", byref(flags), own)
    call.fails(INVALID_VALUE, "cudaHostGetFlags", None, pinned)
    call("cudaHostRegister", own, 8192, 0)
    call.fails(ALREADY_REGISTERED, "cudaHostRegister", own, 8192, 0)
    call.fails(INVALID_VALUE, "cudaHostRegister", None, 8192, 0)
    call.fails(INVALID_VALUE, "cudaHostRegister", own, 8192, 0x10)
    call("cudaHostGetDevicePointer", byref(out), own, 0)
    assert out.value == own.address
    call.fails(INVALID_VALUE, "cudaHostGetDevicePointer", byref(out), own, 1)
    call.fails(INVALID_VALUE, "cudaHostGetDevicePointer", None, own, 0)
    call("cudaHostUnregister", own)
    call.fails(NOT_REGISTERED, "cudaHostUnregister", own)
    call("cudaPointerGetAttributes", ctypes.create_string_buffer(256), pinned)
    call.fails(INVALID_VALUE, "cudaPointerGetAttributes", None, pinned)
    for pointer in (pinned, plain):
        call("cudaFreeHost", pointer)
        call.fails(INVALID_VALUE, "cudaFreeHost", pointer)


def copies(call: Calls, cuda: Driver) -> None:
    device, other = one(call, "cudaMalloc", SIZE), one(call, "cudaMalloc", SIZE)
    stream, host = one(call, "cudaStreamCreate"), Buffer.pageable(SIZE).fill(4)
    for name, rest in (("cudaMemcpy", ()), ("cudaMemcpyAsync", (stream,))):
        call(name, device, host, SIZE, HOST_TO_DEVICE, *rest)
        call("cudaDeviceSynchronize")
        call(name, 0, 0, 0, DEFAULT, *rest)
        call.fails(INVALID_DIRECTION, name, device, host, SIZE, NO_DIRECTION, *rest)
        call.fails(INVALID_VALUE, name, device, host, SIZE, DEVICE_TO_HOST, *rest)
        call.fails(INVALID_VALUE, name, 0, host, SIZE, DEFAULT, *rest)
    for name, rest in (("cudaMemcpy2D", ()), ("cudaMemcpy2DAsync", (stream,))):
        call(name, device, 64, host, 32, 16, 8, HOST_TO_DEVICE, *rest)
        call("cudaDeviceSynchronize")
        call.fails(INVALID_PITCH, name, device, 8, host, 32, 16, 8, HOST_TO_DEVICE, *rest)
        call.fails(INVALID_DIRECTION, name, device, 64, host, 32, 16, 8, NO_DIRECTION, *rest)
        call.fails(INVALID_VALUE, name, 0, 64, host, 32, 16, 8, DEFAULT, *rest)
    for name, rest in (("cudaMemcpyPeer", ()), ("cudaMemcpyPeerAsync", (stream,))):
        call(name, other, 0, device, 0, SIZE, *rest)
        call("cudaDeviceSynchronize")
        call.fails(INVALID_DEVICE, name, other, 0, device, NO_DEVICE, SIZE, *rest)
        call.fails(INVALID_VALUE, name, other, 1, device, 0, SIZE, *rest)
    for name, rest in (("cudaMemset", ()), ("cudaMemsetAsync", (stream,))):
        call(name, device, 5, SIZE, *rest)
        call("cudaDeviceSynchronize")
        call.fails(INVALID_VALUE, name, 0, 5, SIZE, *rest)
        call.fails(INVALID_VALUE, name, host, 5, SIZE, *rest)
    for name, rest in (("cudaMemset2D", ()), ("cudaMemset2DAsync", (stream,))):
        call(name, device, 64, 5, 32, 8, *rest)
        call("cudaDeviceSynchronize")
        call.fails(INVALID_VALUE, name, device, 16, 5, 32, 8, *rest)
        call.fails(INVALID_VALUE, name, 0, 64, 5, 32, 8, *rest)
    for pointer in (device, other):
        call("cudaFree", pointer)
    call("cudaStreamDestroy", stream)


def pools(call: Calls, cuda: Driver) -> None:
    value, access, stream = c_uint64(), c_int(-1), one(call, "cudaStreamCreate")
    default = one(call, "cudaDeviceGetDefaultMemPool", 0)
    call.fails(INVALID_DEVICE, "cudaDeviceGetDefaultMemPool", byref(value), NO_DEVICE)
    call.fails(INVALID_VALUE, "cudaDeviceGetDefaultMemPool", None, 0)
    assert one(call, "cudaDeviceGetMemPool", 0) == default
    call.fails(INVALID_VALUE, "cudaDeviceGetMemPool", None, 0)
    pool = one(call, "cudaMemPoolCreate", byref(PoolProperties(1, 0, Location(1, 0))))
    call.fails(INVALID_VALUE, "cudaMemPoolCreate", byref(value), None)
    shared = PoolProperties(1, 1, Location(1, 0))
    call.fails(NOT_SUPPORTED, "cudaMemPoolCreate", byref(value), byref(shared))
    call("cudaDeviceSetMemPool", 0, pool)
    call.fails(INVALID_VALUE, "cudaDeviceSetMemPool", 1, pool)
    call.fails(INVALID_DEVICE, "cudaDeviceSetMemPool", NO_DEVICE, pool)
    pointer = one(call, "cudaMallocAsync", 4 * MIB, stream)
    call.fails(OUT_OF_MEMORY, "cudaMallocAsync", byref(value), HUGE, stream)
    call.fails(INVALID_VALUE, "cudaMallocAsync", None, 1000, stream)
    call("cudaMemPoolGetAttribute", pool, 7, byref(value))
    assert value.value == 4 * MIB
    call.fails(INVALID_VALUE, "cudaMemPoolGetAttribute", pool, 99, byref(value))
    call("cudaMemPoolSetAttribute", pool, 4, byref(c_uint64(5)))
    call.fails(INVALID_VALUE, "cudaMemPoolSetAttribute", pool, 7, byref(c_uint64(5)))
    call("cudaMemPoolSetAccess", pool, byref(AccessDescriptor(Location(1, 1), 3)), 1)
    call.fails(INVALID_VALUE, "cudaMemPoolSetAccess", pool, None, 1)
    call("cudaMemPoolGetAccess", byref(access), pool, byref(Location(1, 1)))
    assert access.value == 3
    call.fails(INVALID_VALUE, "cudaMemPoolGetAccess", None, pool, byref(Location(1, 1)))
    call("cudaMemPoolTrimTo", pool, 0)
    call.fails(INVALID_VALUE, "cudaMemPoolTrimTo", NO_HANDLE, 0)
    call("cudaFreeAsync", pointer, stream)
    call.fails(INVALID_VALUE, "cudaFreeAsync", pointer, stream)
    pointer = one(call, "cudaMallocFromPoolAsync", 1000, default, stream)
    call.fails(INVALID_VALUE, "cudaMallocFromPoolAsync", byref(value), 1000, NO_HANDLE, stream)
    call("cudaFreeAsync", pointer, stream)
    call("cudaStreamSynchronize", stream)
    call("cudaMemPoolDestroy", pool)
    call.fails(INVALID_VALUE, "cudaMemPoolDestroy", pool)
    call("cudaStreamDestroy", stream)


def streams(call: Calls, cuda: Driver) -> None:
    number, large, out = c_int(-1), c_uint64(), c_uint64()
    stream = one(call, "cudaStreamCreate")
    call.fails(INVALID_VALUE, "cudaStreamCreate", None)
    side = one(call, "cudaStreamCreateWithFlags", NON_BLOCKING)
    call.fails(INVALID_VALUE, "cudaStreamCreateWithFlags", byref(out), 2)
    urgent = one(call, "cudaStreamCreateWithPriority", NON_BLOCKING, -3)
    call.fails(INVALID_VALUE, "cudaStreamCreateWithPriority", byref(out), 2, 0)
    for name, expected in (
        ("cudaStreamGetFlags", NON_BLOCKING),
        ("cudaStreamGetPriority", -3),
        ("cudaStreamGetDevice", 0),
        ("cudaStreamGetId", None),
    ):
        target = number if expected is not None else large
        call(name, urgent, byref(target))
        assert expected in (None, target.value), name
        call.fails(INVALID_VALUE, name, urgent, None)
    call("cudaStreamQuery", stream)
    event = one(call, "cudaEventCreate")
    call("cudaEventRecord", event, stream)
    call("cudaStreamWaitEvent", side, event, 0)
    call.fails(INVALID_VALUE, "cudaStreamWaitEvent", side, event, 2)
    call.fails(INVALID_HANDLE, "cudaStreamWaitEvent", side, NO_HANDLE, 0)
    call("cudaEventDestroy", event)
    callback = STREAM_CALLBACK(lambda *_: None)
    call("cudaLaunchHostFunc", stream, HOST_NOTHING, None)
    call.fails(INVALID_VALUE, "cudaLaunchHostFunc", stream, None, None)
    call("cudaStreamAddCallback", stream, callback, None, 0)
    call.fails(INVALID_VALUE, "cudaStreamAddCallback", stream, callback, None, 1)
    call.fails(INVALID_VALUE, "cudaStreamAddCallback", stream, None, None, 0)
    call.fails(NOT_READY, "cudaStreamQuery", stream)
    call("cudaStreamSynchronize", stream)
    call.fails(INVALID_HANDLE, "cudaStreamQuery", NO_HANDLE)
    call.fails(INVALID_HANDLE, "cudaStreamSynchronize", NO_HANDLE)
    for each in (stream, side, urgent):
        call("cudaStreamDestroy", each)
        call.fails(INVALID_HANDLE, "cudaStreamDestroy", each)


def events(call: Calls, cuda: Driver) -> None:
    milliseconds, out, stream = c_float(-1), c_uint64(), one(call, "cudaStreamCreate")
    start, end = one(call, "cudaEventCreate"), one(call, "cudaEventCreateWithFlags", 1)
    call.fails(INVALID_VALUE, "cudaEventCreate", None)
    call.fails(INVALID_VALUE, "cudaEventCreateWithFlags", byref(out), 8)
    call.fails(INVALID_VALUE, "cudaEventCreateWithFlags", byref(out), INTERPROCESS_EVENT)
    call("cudaEventRecord", start, stream)
    call.fails(INVALID_HANDLE, "cudaEventRecord", NO_HANDLE, stream)
    call("cudaLaunchHostFunc", stream, HOST_NOTHING, None)
    call("cudaEventRecordWithFlags", end, stream, 0)
    call.fails(INVALID_VALUE, "cudaEventRecordWithFlags", end, stream, 2)
    call.fails(NOT_READY, "cudaEventQuery", end)
    call("cudaEventSynchronize", end)
    call("cudaEventQuery", end)
    call.fails(INVALID_HANDLE, "cudaEventQuery", NO_HANDLE)
    call.fails(INVALID_HANDLE, "cudaEventSynchronize", NO_HANDLE)
    call("cudaEventElapsedTime", byref(milliseconds), start, end)
    call.fails(INVALID_VALUE, "cudaEventElapsedTime", None, start, end)
    call.fails(INVALID_HANDLE, "cudaEventElapsedTime", byref(milliseconds), start, NO_HANDLE)
    for event in (start, end):
        call("cudaEventDestroy", event)
        call.fails(INVALID_HANDLE, "cudaEventDestroy", event)
    call("cudaStreamDestroy", stream)


def between_processes(call: Calls, cuda: Driver) -> None:
    memory, of_event, out = HandleBytes(), HandleBytes(), c_uint64()
    device = one(call, "cudaMalloc", 1000)
    plain = one(call, "cudaEventCreate")
    shared = one(call, "cudaEventCreateWithFlags", INTERPROCESS_EVENT | 2)
    call("cudaIpcGetMemHandle", byref(memory), device)
    call.fails(INVALID_VALUE, "cudaIpcGetMemHandle", None, device)
    call.fails(INVALID_VALUE, "cudaIpcGetMemHandle", byref(memory), NO_HANDLE)
    call.fails(INVALID_VALUE, "cudaIpcOpenMemHandle", None, memory, 1)
    call.fails(INVALID_VALUE, "cudaIpcOpenMemHandle", byref(out), memory, 0)
    call.fails(INVALID_CONTEXT, "cudaIpcOpenMemHandle", byref(out), memory, 1)
    call.fails(INVALID_VALUE, "cudaIpcCloseMemHandle", device)
    call("cudaIpcGetEventHandle", byref(of_event), shared)
    call.fails(INVALID_HANDLE, "cudaIpcGetEventHandle", byref(of_event), plain)
    call.fails(INVALID_VALUE, "cudaIpcGetEventHandle", None, shared)
    call.fails(INVALID_VALUE, "cudaIpcOpenEventHandle", None, of_event)
    for event in (plain, shared):
        call("cudaEventDestroy", event)
    call("cudaFree", device)


class Dim3(ctypes.Structure):
    """``dim3``."""

    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


class LaunchConfiguration(ctypes.Structure):
    """``cudaLaunchConfig_t``."""

    _fields_ = (
        ("grid", Dim3),
        ("block", Dim3),
        ("shared_bytes", c_size_t),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


class CompiledProgram:
    """What a compiled program's static constructors register: a kernel and a variable."""

    def __init__(self, runtime: ctypes.CDLL, cuda: Driver, variable_bytes: int) -> None:
        register = runtime["__cudaRegisterFatBinary"]
        register.restype = c_void_p
        self.runtime, self.module = runtime, c_void_p(register(None))
        self._stub, self._name = ctypes.create_string_buffer(1), registered_kernel(cuda)
        self._variable = ctypes.create_string_buffer(variable_bytes)
        self.kernel, self.variable = map(ctypes.addressof, (self._stub, self._variable))
        runtime["__cudaRegisterFunction"](
            self.module, self._stub, self._stub, self._name, -1, *[None] * 5
        )
        runtime["__cudaRegisterVar"](
            self.module, self._variable, self._variable, b"v", 0, c_size_t(variable_bytes), 0, 0
        )
        runtime["__cudaRegisterFatBinaryEnd"](self.module)

    def unload(self) -> None:
        self.runtime["__cudaUnregisterFatBinary"](self.module)


def kernels(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    number, text, kernel = c_int(-1), c_char_p(), program.kernel
    handle = one(call, "cudaGetKernel", kernel)
    for name in ("cudaGetKernel", "__cudaGetKernel"):
        assert one(call, name, kernel) == handle
        call.fails(INVALID_FUNCTION, name, byref(c_uint64()), NO_HANDLE)
        call.fails(INVALID_VALUE, name, None, kernel)
    attributes = ctypes.create_string_buffer(512)
    call("cudaFuncGetAttributes", attributes, kernel)
    call.fails(INVALID_FUNCTION, "cudaFuncGetAttributes", attributes, NO_HANDLE)
    call.fails(INVALID_VALUE, "cudaFuncGetAttributes", None, kernel)
    call("cudaFuncGetName", byref(text), kernel)
    call.fails(INVALID_FUNCTION, "cudaFuncGetName", byref(text), NO_HANDLE)
    call.fails(INVALID_VALUE, "cudaFuncGetName", None, kernel)
    call("cudaFuncSetAttribute", kernel, 8, 100_000)
    call.fails(INVALID_VALUE, "cudaFuncSetAttribute", kernel, 8, 1 << 30)
    call.fails(INVALID_VALUE, "cudaFuncSetAttribute", kernel, 99, 1)
    call.fails(INVALID_FUNCTION, "cudaFuncSetAttribute", NO_HANDLE, 8, 1)
    call("cudaKernelSetAttributeForDevice", handle, 8, 100_000, 0)
    call.fails(INVALID_VALUE, "cudaKernelSetAttributeForDevice", handle, 8, 1 << 30, 0)
    call.fails(INVALID_FUNCTION, "cudaKernelSetAttributeForDevice", NO_HANDLE, 8, 1, 0)
    call("cudaFuncSetCacheConfig", kernel, 2)
    call.fails(INVALID_FUNCTION, "cudaFuncSetCacheConfig", NO_HANDLE, 2)
    occupancy = "cudaOccupancyMaxActiveBlocksPerMultiprocessor"
    for name, flags in ((occupancy, ()), (f"{occupancy}WithFlags", (0,))):
        call(name, byref(number), kernel, 256, 0, *flags)
        assert number.value == 8
        call.fails(INVALID_FUNCTION, name, byref(number), NO_HANDLE, 256, 0, *flags)
        call.fails(INVALID_VALUE, name, None, kernel, 256, 0, *flags)
        call.fails(INVALID_VALUE, name, byref(number), kernel, 0, 0, *flags)


def launches(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    kernel, parameters, small, warp = (
        program.kernel,
        int_parameters(),
        Dim3(1, 1, 1),
        Dim3(32, 1, 1),
    )
    handle, stream = one(call, "cudaGetKernel", kernel), one(call, "cudaStreamCreate")
    for name, function in (
        ("cudaLaunchKernel", kernel),
        ("cudaLaunchCooperativeKernel", kernel),
        ("__cudaLaunchKernel", handle),
    ):
        call(name, function, small, warp, parameters, 0, stream)
        call.fails(INVALID_FUNCTION, name, NO_HANDLE, small, warp, parameters, 0, stream)
        for grid, block in (
            (Dim3(0, 1, 1), warp),
            (small, Dim3(1024, 2, 1)),
            (Dim3(1, 65536, 1), warp),
            (small, Dim3(1, 1, 128)),
        ):
            wrong = (function, grid, block, parameters, 0, stream)
            call.fails(INVALID_CONFIGURATION, name, *wrong)
    right = LaunchConfiguration(small, warp, 0, stream, None, 0)
    call("cudaLaunchKernelExC", byref(right), kernel, parameters)
    call.fails(INVALID_FUNCTION, "cudaLaunchKernelExC", byref(right), NO_HANDLE, parameters)
    empty = LaunchConfiguration(Dim3(), warp, 0, stream, None, 0)
    call.fails(INVALID_CONFIGURATION, "cudaLaunchKernelExC", byref(empty), kernel, parameters)
    call.fails(INVALID_VALUE, "cudaLaunchKernelExC", None, kernel, parameters)
    popped = (byref(Dim3()), byref(Dim3()), byref(c_size_t()), byref(c_void_p()))
    call("__cudaPushCallConfiguration", small, warp, 0, stream)
    call("__cudaPopCallConfiguration", *popped)
    call.fails(MISSING_CONFIGURATION, "__cudaPopCallConfiguration", *popped)
    call("cudaStreamSynchronize", stream)
    call("cudaStreamDestroy", stream)


def variables(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    size, symbol, host = c_size_t(), program.variable, Buffer.pageable(64).fill(8)
    stream = one(call, "cudaStreamCreate")
    one(call, "cudaGetSymbolAddress", symbol)
    call.fails(INVALID_SYMBOL, "cudaGetSymbolAddress", byref(c_uint64()), NO_HANDLE)
    call.fails(INVALID_VALUE, "cudaGetSymbolAddress", None, symbol)
    call("cudaGetSymbolSize", byref(size), symbol)
    assert size.value == 64
    call.fails(INVALID_SYMBOL, "cudaGetSymbolSize", byref(size), NO_HANDLE)
    call.fails(INVALID_VALUE, "cudaGetSymbolSize", None, symbol)
    for stem, kind in (("To", HOST_TO_DEVICE), ("From", DEVICE_TO_HOST)):
        for name, rest in (
            (f"cudaMemcpy{stem}Symbol", ()),
            (f"cudaMemcpy{stem}SymbolAsync", (stream,)),
        ):

            def pair(which: object, stem: str = stem) -> tuple[object, object]:
                return (which, host) if stem == "To" else (host, which)

            call(name, *pair(symbol), 64, 0, kind, *rest)
            call("cudaStreamSynchronize", stream)
            call("cudaDeviceSynchronize")
            call.fails(INVALID_SYMBOL, name, *pair(NO_HANDLE), 64, 0, kind, *rest)
            call.fails(INVALID_VALUE, name, *pair(symbol), 64, 8, kind, *rest)
            call.fails(INVALID_DIRECTION, name, *pair(symbol), 64, 0, NO_DIRECTION, *rest)
    call("cudaStreamDestroy", stream)


AREAS = (
    versions,
    devices,
    device_settings,
    device_memory,
    host_memory,
    copies,
    pools,
    streams,
    events,
    between_processes,
)
PROGRAM_AREAS = (kernels, launches, variables)

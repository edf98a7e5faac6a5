"""Every function of the emulated NVML, called rightly and wrongly.

NVML's header is not among CUDA's packages, so its codes are written down here: NVML's reference.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

from conformance import Calls
from driver_ctypes import MIB

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED = 1, 2, 3
NOT_FOUND, TOO_SMALL, VERSION_MISMATCH = 6, 7, 25
NO_HANDLE = 0xDEAD0


class Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", c_size_t))


class Memory2(ctypes.Structure):
    """``nvmlMemory_v2_t``."""

    _fields_ = (
        ("version", c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def every_function(call: Calls, library: ctypes.CDLL) -> None:
    count, handle, other = c_uint(), c_void_p(), c_void_p()
    call.fails(UNINITIALIZED, "nvmlShutdown")
    call.fails(UNINITIALIZED, "nvmlDeviceGetCount_v2", byref(count))
    for name, flags in (("nvmlInit_v2", ()), ("nvmlInit", ()), ("nvmlInitWithFlags", (0,))):
        call(name, *flags)
        call("nvmlShutdown")
    call("nvmlInit_v2")
    versions(call)
    for name in ("nvmlDeviceGetCount", "nvmlDeviceGetCount_v2"):
        call(name, byref(count))
        assert count.value == 2
        call.fails(INVALID_ARGUMENT, name, None)
    for name in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByIndex_v2"):
        call(name, 0, byref(other))
        call(name, 1, byref(handle))
        call.fails(INVALID_ARGUMENT, name, 2, byref(handle))
        call.fails(INVALID_ARGUMENT, name, 0, None)
    identity(call, handle)
    memory(call, handle)
    links(call, handle, other)
    library.nvmlErrorString.restype = c_char_p
    assert library.nvmlErrorString(NOT_FOUND) == b"Not Found"
    call("nvmlShutdown")


def versions(call: Calls) -> None:
    number, text = c_int(), ctypes.create_string_buffer(80)
    for name in ("nvmlSystemGetCudaDriverVersion", "nvmlSystemGetCudaDriverVersion_v2"):
        call(name, byref(number))
        assert number.value >= 12000
        call.fails(INVALID_ARGUMENT, name, None)
    call("nvmlSystemGetDriverVersion", text, 80)
    call.fails(INVALID_ARGUMENT, "nvmlSystemGetDriverVersion", None, 80)
    call.fails(TOO_SMALL, "nvmlSystemGetDriverVersion", text, 3)


def identity(call: Calls, handle: c_void_p) -> None:
    found, index, minor = c_void_p(), c_uint(), c_int()
    text, info = ctypes.create_string_buffer(96), ctypes.create_string_buffer(256)
    call("nvmlDeviceGetIndex", handle, byref(index))
    assert index.value == 1
    for name, out in (
        ("nvmlDeviceGetIndex", (byref(index),)),
        ("nvmlDeviceGetName", (text, 96)),
        ("nvmlDeviceGetUUID", (text, 96)),
        ("nvmlDeviceGetPciInfo_v3", (info,)),
        ("nvmlDeviceGetCudaComputeCapability", (byref(index), byref(minor))),
    ):
        call(name, handle, *out)
        call.fails(INVALID_ARGUMENT, name, NO_HANDLE, *out)
        call.fails(INVALID_ARGUMENT, name, handle, None, *out[1:])
        if len(out) == 2 and out[1] == 96:
            call.fails(TOO_SMALL, name, handle, text, 4)
    call("nvmlDeviceGetUUID", handle, text, 96)
    call("nvmlDeviceGetHandleByUUID", text, byref(found))
    assert found.value == handle.value
    call.fails(NOT_FOUND, "nvmlDeviceGetHandleByUUID", b"GPU-0", byref(found))
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetHandleByUUID", None, byref(found))
    bus = ctypes.cast(ctypes.byref(info, 32 + 4), c_char_p).value
    for name in ("nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetHandleByPciBusId_v2"):
        call(name, bus, byref(found))
        assert found.value == handle.value, bus
        call.fails(NOT_FOUND, name, b"0000:EE:00.0", byref(found))
        call.fails(INVALID_ARGUMENT, name, b"nonsense", byref(found))


def memory(call: Calls, handle: c_void_p) -> None:
    plain, count, processes = Memory(), c_uint(8), ctypes.create_string_buffer(1024)
    newer = Memory2(version=ctypes.sizeof(Memory2) | 2 << 24)
    call("nvmlDeviceGetMemoryInfo", handle, byref(plain))
    assert plain.total == 64 * MIB
    call("nvmlDeviceGetMemoryInfo_v2", handle, byref(newer))
    assert newer.total == 64 * MIB
    for name, out in (("nvmlDeviceGetMemoryInfo", plain), ("nvmlDeviceGetMemoryInfo_v2", newer)):
        call.fails(INVALID_ARGUMENT, name, NO_HANDLE, byref(out))
        call.fails(INVALID_ARGUMENT, name, handle, None)
    call.fails(VERSION_MISMATCH, "nvmlDeviceGetMemoryInfo_v2", handle, byref(Memory2(version=1)))
    for version in ("", "_v2", "_v3"):
        name = f"nvmlDeviceGetComputeRunningProcesses{version}"
        count.value = 8
        call(name, handle, byref(count), processes)
        call.fails(INVALID_ARGUMENT, name, NO_HANDLE, byref(count), processes)
        call.fails(INVALID_ARGUMENT, name, handle, None, processes)


def links(call: Calls, handle: c_void_p, other: c_void_p) -> None:
    status, info = c_uint(9), ctypes.create_string_buffer(512)
    call("nvmlDeviceGetP2PStatus", handle, other, 0, byref(status))
    assert status.value == 0
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetP2PStatus", handle, handle, 0, byref(status))
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetP2PStatus", handle, other, 99, byref(status))
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetP2PStatus", handle, NO_HANDLE, 0, byref(status))
    call("nvmlDeviceGetGpuFabricInfoV", handle, info)
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetGpuFabricInfoV", None, info)
    call.fails(INVALID_ARGUMENT, "nvmlDeviceGetGpuFabricInfoV", handle, None)
    for name, arguments in ABSENT.items():
        call.fails(NOT_SUPPORTED, name, handle, *arguments, info)


#: What no emulated device has: NVML says so.
ABSENT: dict[str, tuple[int, ...]] = {
    "nvmlDeviceGetNvLinkState": (0,),
    "nvmlDeviceGetNvLinkCapability": (0, 0),
    "nvmlDeviceGetNvLinkRemoteDeviceType": (0,),
    "nvmlDeviceGetNvLinkRemotePciInfo_v2": (0,),
    "nvmlDeviceGetClockInfo": (0,),
    "nvmlDeviceGetPowerUsage": (),
    "nvmlDeviceGetTemperature": (0,),
    "nvmlDeviceGetUtilizationRates": (),
    "nvmlDeviceGetFieldValues": (1,),
}

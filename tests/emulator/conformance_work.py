"""Copies, memsets and kernels of the emulated driver, called rightly and wrongly.

See :mod:`conformance_driver`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

from conformance import Calls
from conformance_driver import NO_HANDLE
from driver_ctypes import (
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    NO_BINARY,
    NOT_SUPPORTED,
    Buffer,
    Driver,
    copy_batch,
)

SIZE = 1024


class Side(ctypes.Structure):
    """One side of ``CUDA_MEMCPY2D``."""

    _fields_ = (
        ("x_bytes", c_size_t),
        ("y", c_size_t),
        ("type", c_int),
        ("host", c_void_p),
        ("device", c_uint64),
        ("array", c_void_p),
        ("pitch", c_size_t),
    )


class Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D``."""

    _fields_ = (("source", Side), ("target", Side), ("width", c_size_t), ("height", c_size_t))


def device_side(pointer: int, *, pitch: int = 0, kind: int = 4) -> Side:
    return Side(0, 0, kind, pointer, pointer, None, pitch)


def copies(call: Calls, cuda: Driver) -> None:
    stream, first, second = cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)
    host = cuda.pinned(SIZE).fill(3)
    for stem, target, source in (
        ("cuMemcpy", first, host),
        ("cuMemcpyHtoD", first, host),
        ("cuMemcpyDtoH", host, first),
        ("cuMemcpyDtoD", second, first),
    ):
        for name, rest in ((stem, ()), (f"{stem}Async", (stream,))):
            call(name, target, source, SIZE, *rest)
            cuda("cuCtxSynchronize")
            call(name, target, source, 0, *rest)
            call.fails(INVALID_VALUE, name, 0, source, SIZE, *rest)
            call.fails(INVALID_VALUE, name, target, 0, SIZE, *rest)
            call.fails(ILLEGAL_ADDRESS, name, target, source, 1 << 40, *rest)
        call.fails(INVALID_HANDLE, f"{stem}Async", target, source, SIZE, NO_HANDLE)
    call.fails(INVALID_VALUE, "cuMemcpyHtoD", Buffer.pageable(SIZE), host, SIZE)
    call.fails(INVALID_VALUE, "cuMemcpyHtoD", first, second, SIZE)
    call.fails(INVALID_VALUE, "cuMemcpyDtoH", host, Buffer.pageable(SIZE), SIZE)
    call.fails(INVALID_VALUE, "cuMemcpyDtoD", Buffer.pageable(SIZE), first, SIZE)
    here, there = c_void_p(), c_void_p()
    cuda("cuCtxGetCurrent", byref(here))
    cuda("cuDevicePrimaryCtxRetain", byref(there), 1)
    for name, rest in (("cuMemcpyPeer", ()), ("cuMemcpyPeerAsync", (stream,))):
        cuda("cuCtxSynchronize")
        call(name, second, here, first, here, SIZE, *rest)
        call.fails(INVALID_VALUE, name, second, there, first, here, SIZE, *rest)
        call.fails(INVALID_CONTEXT, name, second, NO_HANDLE, first, here, SIZE, *rest)
        call.fails(INVALID_VALUE, name, 0, here, first, here, SIZE, *rest)
    cuda("cuCtxSynchronize")
    cuda("cuDevicePrimaryCtxRelease_v2", 1)
    for pointer in (first, second):
        cuda.free(pointer)
    cuda("cuMemFreeHost", host)


def copies_of_rows(call: Calls, cuda: Driver) -> None:
    stream, first, second = cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)
    cuda("cuMemsetD8_v2", first, 1, SIZE)
    for name, rest in (
        ("cuMemcpy2D", ()),
        ("cuMemcpy2DUnaligned", ()),
        ("cuMemcpy2DAsync", (stream,)),
    ):
        cuda("cuCtxSynchronize")
        right = Copy2D(device_side(first, pitch=32), device_side(second, pitch=64), 16, 8)
        call(name, byref(right), *rest)
        arrays = Copy2D(device_side(first, kind=3), device_side(second), 16, 8)
        for code, wrong in (
            (INVALID_VALUE, Copy2D(device_side(first, pitch=8), device_side(second), 16, 8)),
            (INVALID_VALUE, Copy2D(device_side(0), device_side(second), 16, 8)),
            (INVALID_VALUE, Copy2D(device_side(first, kind=7), device_side(second), 16, 8)),
            (ILLEGAL_ADDRESS, Copy2D(device_side(first), device_side(second), 1 << 20, 1)),
            (NOT_SUPPORTED, arrays),
        ):
            call.fails(code, name, byref(wrong), *rest)
        call.fails(INVALID_VALUE, name, None, *rest)
    call.fails(INVALID_HANDLE, "cuMemcpy2DAsync", byref(right), NO_HANDLE)
    cuda("cuCtxSynchronize")
    for pointer in (first, second):
        cuda.free(pointer)


def copies_in_batches(call: Calls, cuda: Driver) -> None:
    name, stream, device, host = "cuMemcpyBatchAsync", cuda.stream(), cuda.alloc(SIZE), None
    host = cuda.pinned(SIZE).fill(7)
    pairs = [(device + 256 * part, host.address + 256 * part, 256) for part in range(4)]
    call(name, *copy_batch(pairs, orders=(1, 3, 2), firsts=(0, 1, 3), flags=1), stream)
    cuda.sync(stream)
    for wrong in (
        copy_batch(pairs, orders=(0,)),
        copy_batch(pairs, orders=(4,)),
        copy_batch(pairs, firsts=(1,)),
        copy_batch(pairs, orders=(1, 1), firsts=(0, 0)),
        copy_batch(pairs, orders=(1, 1), firsts=(0, 4)),
        copy_batch(pairs[:1], orders=(1, 1), firsts=(0, 1)),
        copy_batch(pairs, flags=2),
        copy_batch([*pairs[:3], (0, host.address, 256)]),
    ):
        call.fails(INVALID_VALUE, name, *wrong, stream)
    right = copy_batch(pairs)
    for missing in (0, 1, 2, 4, 5):
        call.fails(INVALID_VALUE, name, *right[:missing], None, *right[missing + 1 :], stream)
    for zero in (3, 6):
        call.fails(INVALID_VALUE, name, *right[:zero], 0, *right[zero + 1 :], stream)
    call.fails(INVALID_VALUE, name, *right, LEGACY)
    call.fails(INVALID_HANDLE, name, *right, NO_HANDLE)
    # Whole or not at all: nothing of a batch runs where one of its copies is wrong.
    cuda("cuMemsetD8_v2", device, 1, SIZE)
    cuda("cuCtxSynchronize")
    call.fails(
        ILLEGAL_ADDRESS, name, *copy_batch([*pairs, (device, host.address, 1 << 40)]), stream
    )
    call.fails(
        ILLEGAL_ADDRESS, name, *copy_batch([(device, host.address, 1 << 40), *pairs]), stream
    )
    assert cuda.fetch(device, SIZE) == b"\1" * SIZE
    cuda.free(device)
    cuda("cuMemFreeHost", host)


def fills(call: Calls, cuda: Driver) -> None:
    stream, device = cuda.stream(), cuda.alloc(SIZE)
    for bits, element in ((8, 1), (16, 2), (32, 4)):
        for name, rest in ((f"cuMemsetD{bits}", ()), (f"cuMemsetD{bits}Async", (stream,))):
            cuda("cuCtxSynchronize")
            call(name, device, 5, SIZE // element, *rest)
            call.fails(INVALID_VALUE, name, 0, 5, 8, *rest)
            call.fails(INVALID_VALUE, name, Buffer.pageable(64), 5, 8, *rest)
            if element > 1:
                call.fails(ILLEGAL_ADDRESS, name, device, 5, SIZE, *rest)
                call.fails(INVALID_VALUE, name, device + 1, 5, 8, *rest)
        call.fails(INVALID_HANDLE, f"cuMemsetD{bits}Async", device, 5, 8, NO_HANDLE)
        for name, rest in ((f"cuMemsetD2D{bits}", ()), (f"cuMemsetD2D{bits}Async", (stream,))):
            cuda("cuCtxSynchronize")
            call(name, device, 64, 5, 32 // element, 8, *rest)
            call.fails(INVALID_VALUE, name, device, 16, 5, 32 // element, 8, *rest)
            call.fails(INVALID_VALUE, name, 0, 64, 5, 32 // element, 8, *rest)
            if element > 1:
                call.fails(INVALID_VALUE, name, device, 65, 5, 32 // element, 8, *rest)
    cuda("cuCtxSynchronize")
    cuda.free(device)


class LaunchConfiguration(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("shape", c_uint * 6),
        ("shared_bytes", c_uint),
        ("stream", c_uint64),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


BODY = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
#: The driver keeps bodies for good.
NOTHING = BODY(lambda *_: None)


def registered_kernel(cuda: Driver) -> bytes:
    """A kernel with one int as its parameter."""
    name = b"conformance"
    cuda("spillover_emulator_register_kernel", name, NOTHING, None, byref(c_size_t(4)), 1)
    return name


def int_parameters() -> ctypes.Array[c_void_p]:
    return (c_void_p * 1)(ctypes.addressof(_ARGUMENT))


_ARGUMENT = c_int(3)


def kernels(call: Calls, cuda: Driver) -> None:
    kernel, mode, text = registered_kernel(cuda), c_int(-1), c_char_p()
    module, library, function, of_library = c_uint64(), c_uint64(), c_uint64(), c_uint64()
    for name, rest in (
        ("cuModuleLoadData", ()),
        ("cuModuleLoadDataEx", (0, None, None)),
        ("cuModuleLoadFatBinary", ()),
    ):
        call(name, byref(module), b"image", *rest)
        call.fails(INVALID_VALUE, name, None, b"image", *rest)
        call.fails(INVALID_VALUE, name, byref(module), None, *rest)
    call("cuModuleGetLoadingMode", byref(mode))
    call.fails(INVALID_VALUE, "cuModuleGetLoadingMode", None)
    call("cuModuleGetFunction", byref(function), module, kernel)
    call.fails(INVALID_VALUE, "cuModuleGetFunction", None, module, kernel)
    call.fails(INVALID_VALUE, "cuModuleGetFunction", byref(function), module, None)
    call.fails(INVALID_HANDLE, "cuModuleGetFunction", byref(function), NO_HANDLE, kernel)
    call.fails(NO_BINARY, "cuModuleGetFunction", byref(c_uint64()), module, b"nothing")
    none = (None, None, 0, None, None, 0)
    call("cuLibraryLoadData", byref(library), b"image", *none)
    call.fails(INVALID_VALUE, "cuLibraryLoadData", None, b"image", *none)
    call.fails(INVALID_VALUE, "cuLibraryLoadData", byref(library), None, *none)
    call("cuLibraryGetKernel", byref(of_library), library, kernel)
    call.fails(INVALID_VALUE, "cuLibraryGetKernel", None, library, kernel)
    call.fails(INVALID_HANDLE, "cuLibraryGetKernel", byref(c_uint64()), NO_HANDLE, kernel)
    call("cuKernelGetFunction", byref(function), of_library)
    call.fails(INVALID_VALUE, "cuKernelGetFunction", None, of_library)
    call.fails(INVALID_HANDLE, "cuKernelGetFunction", byref(function), NO_HANDLE)
    call("cuFuncGetName", byref(text), function)
    assert text.value == kernel
    call.fails(INVALID_VALUE, "cuFuncGetName", None, function)
    call.fails(INVALID_VALUE, "cuFuncGetName", byref(text), 0)
    call("cuFuncGetAttribute", byref(mode), 0, function)
    assert mode.value == 1024
    call.fails(INVALID_VALUE, "cuFuncGetAttribute", None, 0, function)
    call.fails(INVALID_VALUE, "cuFuncGetAttribute", byref(mode), 99, function)
    call.fails(INVALID_HANDLE, "cuFuncGetAttribute", byref(mode), 0, NO_HANDLE)
    call("cuFuncSetAttribute", function, 8, 100_000)
    call.fails(INVALID_VALUE, "cuFuncSetAttribute", function, 8, 1 << 30)
    call.fails(INVALID_VALUE, "cuFuncSetAttribute", function, 0, 1)
    call.fails(INVALID_VALUE, "cuFuncSetAttribute", function, 99, 1)
    call.fails(INVALID_HANDLE, "cuFuncSetAttribute", NO_HANDLE, 8, 100)
    call("cuFuncSetCacheConfig", function, 2)
    call.fails(INVALID_VALUE, "cuFuncSetCacheConfig", function, 9)
    occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
    call(occupancy, byref(mode), function, 256, 0)
    assert mode.value == 8
    call.fails(INVALID_VALUE, occupancy, None, function, 256, 0)
    call.fails(INVALID_VALUE, occupancy, byref(mode), function, 0, 0)
    launches(call, cuda, function.value)
    call("cuLibraryUnload", library)
    call.fails(INVALID_HANDLE, "cuLibraryUnload", library)


def launches(call: Calls, cuda: Driver, function: int) -> None:
    stream, parameters = cuda.stream(), int_parameters()
    right = (1, 1, 1, 32, 1, 1, 0)
    wrong = [
        (0, *right[1:]),
        (1, 1, 1, 1024, 2, 1, 0),
        (1, 65536, *right[2:]),
        (*right[:6], 1 << 20),
    ]
    for name, tail in (("cuLaunchKernel", (None,)), ("cuLaunchCooperativeKernel", ())):
        call(name, function, *right, stream, parameters, *tail)
        for shape in wrong:
            call.fails(INVALID_VALUE, name, function, *shape, stream, parameters, *tail)
        call.fails(INVALID_VALUE, name, function, *right, stream, None, *tail)
        call.fails(INVALID_HANDLE, name, NO_HANDLE, *right, stream, parameters, *tail)
        call.fails(INVALID_HANDLE, name, function, *right, NO_HANDLE, parameters, *tail)

    def configuration(shape: Sequence[int], handle: int = stream) -> LaunchConfiguration:
        return LaunchConfiguration((c_uint * 6)(*shape[:6]), shape[6], handle, None, 0)

    name = "cuLaunchKernelEx"
    call(name, byref(configuration(right)), function, parameters, None)
    for shape in wrong:
        call.fails(INVALID_VALUE, name, byref(configuration(shape)), function, parameters, None)
    call.fails(INVALID_VALUE, name, None, function, parameters, None)
    call.fails(INVALID_HANDLE, name, byref(configuration(right)), NO_HANDLE, parameters, None)
    cuda.sync(stream)


AREAS = (copies, copies_of_rows, copies_in_batches, fills, kernels)

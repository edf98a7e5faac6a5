"""Calls the emulated CUDA runtime as a C program does; shared by the tests of its parts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from spillover._paths import library_path

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2
HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
NON_BLOCKING = 1


@contextmanager
def open_runtime() -> Iterator[ctypes.CDLL]:
    """The emulated runtime on device 0, with no error left behind by another test."""
    library = ctypes.CDLL(str(library_path("emulator") / "libcudart.so.13"))
    library.cudaGetErrorName.restype = ctypes.c_char_p
    library.cudaGetErrorString.restype = ctypes.c_char_p
    assert library.cudaSetDevice(0) == SUCCESS
    library.cudaGetLastError()
    yield library
    assert library.cudaDeviceSynchronize() == SUCCESS
    library.cudaGetLastError()


def size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def address_of(array: ctypes.Array[ctypes.c_char]) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(array))


@contextmanager
def device_memory(runtime: ctypes.CDLL, count: int) -> Iterator[ctypes.c_void_p]:
    pointer = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(pointer), size(count)) == SUCCESS
    yield pointer
    assert runtime.cudaFree(pointer) == SUCCESS


@contextmanager
def pinned_memory(runtime: ctypes.CDLL, count: int) -> Iterator[ctypes.c_void_p]:
    pointer = ctypes.c_void_p()
    assert runtime.cudaHostAlloc(ctypes.byref(pointer), size(count), 0) == SUCCESS
    yield pointer
    assert runtime.cudaFreeHost(pointer) == SUCCESS


@contextmanager
def new_stream(runtime: ctypes.CDLL) -> Iterator[ctypes.c_void_p]:
    stream = ctypes.c_void_p()
    assert runtime.cudaStreamCreateWithFlags(ctypes.byref(stream), NON_BLOCKING) == SUCCESS
    yield stream
    assert runtime.cudaStreamDestroy(stream) == SUCCESS


@contextmanager
def new_event(runtime: ctypes.CDLL, flags: int = 0) -> Iterator[ctypes.c_void_p]:
    event = ctypes.c_void_p()
    assert runtime.cudaEventCreateWithFlags(ctypes.byref(event), flags) == SUCCESS
    yield event
    assert runtime.cudaEventDestroy(event) == SUCCESS

"""Kernels and variables that programs register with the emulated CUDA runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
from runtime_library import (
    DEVICE_TO_HOST,
    INVALID_VALUE,
    SUCCESS,
    address_of,
    device_memory,
    new_stream,
    open_runtime,
    size,
)

from spillover._paths import library_path

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

INVALID_CONFIGURATION, INVALID_SYMBOL, INVALID_DEVICE_FUNCTION, NO_KERNEL_IMAGE = 9, 13, 98, 209


class Dim3(ctypes.Structure):
    """``dim3``."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class LaunchShape(ctypes.Structure):
    """``spillover_emulator_launch_shape``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
    )


KERNEL_BODY = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(LaunchShape),
    ctypes.c_void_p,
)
#: The driver keeps a body for good, so Python's side of it must live as long.
KEPT_BODIES: list[object] = []


@pytest.fixture
def runtime() -> Iterator[ctypes.CDLL]:
    with open_runtime() as library:
        yield library


class Program:
    """Registers with the runtime what a compiled program's static constructors register."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self.runtime = runtime
        register = runtime["__cudaRegisterFatBinary"]
        register.restype = ctypes.c_void_p
        self.module = ctypes.c_void_p(register(None))
        self._kept: list[object] = []
        void, dim = ctypes.c_void_p, Dim3
        runtime.cudaLaunchKernel.argtypes = [void, dim, dim, void, ctypes.c_size_t, void]

    def add_kernel(self, name: bytes) -> ctypes.c_void_p:
        """Register a kernel and return its host stub."""
        stub, kept_name = ctypes.create_string_buffer(1), ctypes.create_string_buffer(name)
        self._kept += [stub, kept_name]
        nulls = [None] * 5
        self.runtime["__cudaRegisterFunction"](self.module, stub, stub, kept_name, -1, *nulls)
        return address_of(stub)

    def add_variable(self, count: int) -> ctypes.c_void_p:
        """Register a __device__ variable and return the address of its host shadow."""
        shadow = ctypes.create_string_buffer(count)
        self._kept.append(shadow)
        self.runtime["__cudaRegisterVar"](self.module, shadow, shadow, b"v", 0, size(count), 0, 0)
        return address_of(shadow)

    def launch(self, stub: ctypes.c_void_p, stream: ctypes.c_void_p, *values: object) -> int:
        """Launch one block of 32 threads."""
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        arguments = (ctypes.c_void_p * max(1, len(values)))(*pointers)
        grid, block = Dim3(1, 1, 1), Dim3(32, 1, 1)
        return int(self.runtime.cudaLaunchKernel(stub, grid, block, arguments, 0, stream))


@pytest.fixture
def program(runtime: ctypes.CDLL) -> Iterator[Program]:
    loaded = Program(runtime)
    runtime.__cudaRegisterFatBinaryEnd(loaded.module)
    yield loaded
    runtime.__cudaUnregisterFatBinary(loaded.module)


def test_unknown_kernel_is_named(
    runtime: ctypes.CDLL, program: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = program.add_kernel(b"_Z9transposePfi")
    for _ in range(2):
        assert program.launch(stub, ctypes.c_void_p()) == NO_KERNEL_IMAGE
        assert runtime.cudaGetLastError() == NO_KERNEL_IMAGE
    lines = [line for line in capfd.readouterr().err.splitlines() if "transpose" in line]
    assert len(lines) == 1
    assert lines[0].startswith("spillover emulator: ")
    assert program.launch(ctypes.c_void_p(0x1234), ctypes.c_void_p()) == INVALID_DEVICE_FUNCTION


def test_registered_body_runs_in_stream_order(runtime: ctypes.CDLL, program: Program) -> None:
    """A kernel that adds its second argument to the integer at its first, once a launch."""
    driver = ctypes.CDLL(str(library_path("emulator") / "libcuda.so.1"))
    driver.spillover_emulator_host_pointer.restype = ctypes.c_void_p
    driver.spillover_emulator_host_pointer.argtypes = [ctypes.c_void_p]
    shapes: list[tuple[int, int, int]] = []

    def add(
        parameters: ctypes._Pointer[ctypes.c_void_p],
        shape: ctypes._Pointer[LaunchShape],
        user: int | None,
    ) -> None:
        device = ctypes.cast(parameters[0] or 0, ctypes.POINTER(ctypes.c_void_p)).contents.value
        value = ctypes.cast(parameters[1] or 0, ctypes.POINTER(ctypes.c_int)).contents.value
        host = driver.spillover_emulator_host_pointer(device)
        ctypes.cast(host, ctypes.POINTER(ctypes.c_int)).contents.value += value
        shapes.append((shape.contents.grid[0], shape.contents.block[0], user or 0))

    name = b"_Z3addPii"
    body = KERNEL_BODY(add)
    KEPT_BODIES.append(body)
    sizes = (ctypes.c_size_t * 2)(8, 4)
    register = driver.spillover_emulator_register_kernel
    assert register(name, body, ctypes.c_void_p(7), sizes, size(2)) == SUCCESS
    stub = program.add_kernel(name)
    result = ctypes.create_string_buffer(4)
    with device_memory(runtime, 4) as device, new_stream(runtime) as stream:
        assert runtime.cudaMemsetAsync(device, 0, size(4), stream) == SUCCESS
        for value in (1, 2, 3):
            assert program.launch(stub, stream, device, ctypes.c_int(value)) == SUCCESS
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        assert runtime.cudaMemcpy(result, device, size(4), DEVICE_TO_HOST) == SUCCESS
    assert int.from_bytes(result.raw, "little") == 6
    assert shapes == [(1, 32, 7)] * 3


def test_a_kernels_handle_launches_it(runtime: ctypes.CDLL, program: Program) -> None:
    """As compilers do since CUDA 13: the stub asks for the kernel's handle once."""
    stub, kernel = program.add_kernel(b"_Z8handlelyv"), ctypes.c_void_p()
    get_kernel = runtime["__cudaGetKernel"]
    assert get_kernel(ctypes.byref(kernel), stub) == SUCCESS
    assert kernel.value
    assert kernel.value != stub.value
    assert program.launch(kernel, ctypes.c_void_p()) == NO_KERNEL_IMAGE
    unknown = ctypes.c_void_p(0x1234)
    assert get_kernel(ctypes.byref(kernel), unknown) == INVALID_DEVICE_FUNCTION


def test_too_large_a_block_is_refused(runtime: ctypes.CDLL, program: Program) -> None:
    stub = program.add_kernel(b"_Z5largev")
    arguments = (ctypes.c_void_p * 1)()
    for block in (Dim3(2048, 1, 1), Dim3(32, 0, 1)):
        status = runtime.cudaLaunchKernel(stub, Dim3(1, 1, 1), block, arguments, 0, None)
        assert status == INVALID_CONFIGURATION


def test_call_configurations_nest(runtime: ctypes.CDLL) -> None:
    void = ctypes.c_void_p
    runtime.__cudaPushCallConfiguration.argtypes = [Dim3, Dim3, ctypes.c_size_t, void]
    for number in (1, 2):
        runtime.__cudaPushCallConfiguration(Dim3(number, 1, 1), Dim3(32, 1, 1), number, None)
    grid, block, shared, stream = Dim3(), Dim3(), ctypes.c_size_t(), ctypes.c_void_p()
    outputs = [ctypes.byref(output) for output in (grid, block, shared, stream)]
    for number in (2, 1):
        assert runtime.__cudaPopCallConfiguration(*outputs) == SUCCESS
        assert (grid.x, block.x, shared.value) == (number, 32, number)
    assert runtime.__cudaPopCallConfiguration(*outputs) == 52  # nothing was pushed


def test_occupancy_and_function_attributes(runtime: ctypes.CDLL, program: Program) -> None:
    stub = program.add_kernel(b"_Z4busyv")
    blocks = ctypes.c_int()
    occupancy = runtime.cudaOccupancyMaxActiveBlocksPerMultiprocessor
    for threads, expected in ((1024, 2), (256, 8), (2048, 0)):
        assert occupancy(ctypes.byref(blocks), stub, threads, size(0)) == SUCCESS
        assert blocks.value == expected
    attributes = (ctypes.c_int * 64)()
    assert runtime.cudaFuncGetAttributes(attributes, stub) == SUCCESS
    assert attributes[6] == 1024  # maxThreadsPerBlock follows three sizes
    dynamic_shared = 8
    assert runtime.cudaFuncSetAttribute(stub, dynamic_shared, 100_000) == SUCCESS
    assert runtime.cudaFuncSetAttribute(stub, dynamic_shared, 10_000_000) == INVALID_VALUE
    unknown = ctypes.c_void_p(0x1234)
    assert runtime.cudaFuncGetAttributes(attributes, unknown) == INVALID_DEVICE_FUNCTION


def test_device_variables(runtime: ctypes.CDLL, program: Program) -> None:
    variable = program.add_variable(16)
    result = ctypes.create_string_buffer(b"\xff" * 16, 16)
    pointer, count = ctypes.c_void_p(), ctypes.c_size_t()
    assert runtime.cudaGetSymbolSize(ctypes.byref(count), variable) == SUCCESS
    assert count.value == 16
    assert runtime.cudaGetSymbolAddress(ctypes.byref(pointer), variable) == SUCCESS
    assert runtime.cudaMemcpyToSymbol(variable, b"abcd", size(4), size(8), 1) == SUCCESS
    assert runtime.cudaMemcpyFromSymbol(result, variable, size(16), size(0), 2) == SUCCESS
    assert result.raw == b"\0" * 8 + b"abcd" + b"\0" * 4
    past_the_end = runtime.cudaMemcpyToSymbol(variable, b"abcd", size(4), size(13), 1)
    assert past_the_end == INVALID_VALUE
    unknown = ctypes.c_void_p(0x1234)
    assert runtime.cudaGetSymbolAddress(ctypes.byref(pointer), unknown) == INVALID_SYMBOL

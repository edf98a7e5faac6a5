"""CUDA kernels whose source is compiled for the host run on the emulated stream, and are judged."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable
from ctypes import byref, c_float, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_sources import compile_for_host, compile_with_nvrtc
from driver_ctypes import (
    HAZARD,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_FOUND,
    SCHEDULES,
    SUCCESS,
    Driver,
    expect,
    run_program,
)
from graph_calls import begin, end, instantiate

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

KERNELS = Path(__file__).parent / "kernels"
LIBRARY = "SPILLOVER_TEST_HOST_KERNELS"

Grid = tuple[int, int, int]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "sample_kernels.so"
    compile_for_host(KERNELS / "sample_kernels_on_host.cpp", path)
    os.environ[LIBRARY] = str(path)
    return path


class Program:
    """The kernels' module, on a device of this process's own."""

    def __init__(self) -> None:
        self.cuda = Driver()
        host = ctypes.CDLL(os.environ[LIBRARY])
        assert host.spillover_register_host_kernels() == 0
        self.module = c_void_p()
        self.cuda("cuModuleLoadData", byref(self.module), b"an image that nobody looks at")

    def function(self, name: str) -> c_void_p:
        function = c_void_p()
        self.cuda("cuModuleGetFunction", byref(function), self.module, name.encode())
        return function

    def launch(
        self,
        name: str,
        grid: Grid,
        block: Grid,
        *values: Any,
        shared: int = 0,
        stream: int = 0,
    ) -> int:
        pointers = [ctypes.cast(ctypes.pointer(value), c_void_p) for value in values]
        arguments = (c_void_p * len(values))(*pointers)
        return self.cuda.status(
            "cuLaunchKernel", self.function(name), *grid, *block, shared, stream, arguments, None
        )

    def upload(self, array: np.ndarray[Any, Any], stream: int = 0) -> c_uint64:
        pointer = self.cuda.alloc(array.nbytes)
        self.cuda("cuMemcpyHtoD_v2", pointer, array.ctypes.data, array.nbytes)
        return c_uint64(pointer)

    def fetch(self, pointer: c_uint64, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        data = self.cuda.fetch(pointer.value, like.nbytes)
        return np.frombuffer(data, like.dtype).reshape(like.shape)


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def axpy() -> None:
    program = Program()
    for count in (1, 3, 4, 1003, 4096):
        x, y = numbers(count), numbers(count)[::-1].copy()
        device_x, device_y = program.upload(x), program.upload(y)
        values = (c_float(0.5), device_x, device_y, c_uint(count))
        expect(SUCCESS, program.launch("axpy", (3, 1, 1), (64, 1, 1), *values))
        assert np.array_equal(program.fetch(device_y, y), y + np.float32(0.5) * x)


def squared_norm() -> None:
    program = Program()
    x = numbers(10_007)
    for grid, block in ((1, 32), (1, 256), (5, 96), (7, 1024)):
        total = program.upload(np.zeros(1))
        values = (program.upload(x), c_uint(x.size), total)
        expect(SUCCESS, program.launch("squared_norm", (grid, 1, 1), (block, 1, 1), *values))
        expected = np.square(x.astype(np.float64)).sum()
        np.testing.assert_allclose(program.fetch(total, np.zeros(1)), expected, rtol=1e-12)


def transpose_to_float() -> None:
    program = Program()
    for rows, columns in ((32, 32), (1, 70), (45, 37)):
        wide = numbers(rows, columns)
        bits = (wide.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, rounded down
        exact = (bits.astype(np.uint32) << 16).view(np.float32)
        result = program.upload(np.zeros((columns, rows), np.float32))
        values = (program.upload(bits), result, c_uint(rows), c_uint(columns))
        grid = ((columns + 31) // 32, (rows + 31) // 32, 1)
        status = program.launch("transpose_to_float", grid, (32, 8, 1), *values, shared=4 * 32 * 33)
        expect(SUCCESS, status)
        assert np.array_equal(program.fetch(result, exact.T.copy()), exact.T)


def votes() -> None:
    program = Program()
    ballots, counts = (
        program.upload(np.zeros(64, np.uint32)),
        program.upload(np.zeros(64, np.int32)),
    )
    expect(SUCCESS, program.launch("votes", (1, 1, 1), (64, 1, 1), ballots, counts))
    lanes = np.arange(64, dtype=np.uint32) % 32
    before = np.where(lanes == 0, 0, lanes - 1)
    expected = np.uint32(0xAAAAAAAA) ^ (lanes // 8 * 8 + 3) ^ before << 8
    assert np.array_equal(program.fetch(ballots, expected), expected)
    assert program.fetch(counts, np.zeros(64, np.int32)).tolist() == [22 + 1] * 64


def is_ordered_on_its_stream() -> None:
    """A launch comes after the copy before it, and before the copy after it."""
    program = Program()
    cuda = program.cuda
    stream, size = cuda.stream(), 4 * 1000
    x, y = cuda.alloc(size), cuda.alloc(size)
    source, target = cuda.pinned(size), cuda.pinned(size)
    floats = np.frombuffer((ctypes.c_char * size).from_address(source.address), np.float32)
    floats[:] = 2
    cuda.upload(x, source, stream)
    cuda.upload(y, source, stream)
    values = (c_float(3), c_uint64(x), c_uint64(y), c_uint(1000))
    expect(SUCCESS, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values, stream=stream))
    cuda.download(target, y, stream)
    cuda.sync(stream)
    assert target.get() == np.full(1000, 8, np.float32).tobytes()


def hazards() -> None:
    """The checker knows the bytes that a kernel declares."""
    program = Program()
    cuda = program.cuda
    copies, compute, size = cuda.stream(), cuda.stream(), 4000
    x, y, other = cuda.alloc(size), cuda.alloc(size), cuda.alloc(size)
    cuda.fill(y, 0, size, compute)
    cuda.upload(x, cuda.pinned(size), copies)

    def status(into: int) -> int:
        values = (c_float(1), c_uint64(x), c_uint64(into), c_uint(1000))
        return program.launch("axpy", (1, 1, 1), (32, 1, 1), *values, stream=compute)

    expect(HAZARD, status(y))
    assert "read of 4000 bytes" in cuda.hazards()[0], cuda.hazards()
    assert "by axpy on stream" in cuda.hazards()[0]
    cuda.order(copies, compute)
    expect(SUCCESS, status(y))
    # What it writes may not be read by a stream that does not wait.
    expect(HAZARD, cuda.status("cuMemcpyDtoDAsync_v2", other, y, size, copies))
    assert "after write by axpy" in cuda.hazards()[1], cuda.hazards()


def memory_that_is_gone() -> None:
    program = Program()
    cuda = program.cuda
    x, y = cuda.alloc(4000), cuda.alloc(4000)
    cuda.free(x)
    values = (c_float(1), c_uint64(x), c_uint64(y), c_uint(1000))
    expect(HAZARD, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values))
    assert "kind: use after free" in cuda.hazards()[0], cuda.hazards()
    values = (c_float(1), c_uint64(y), c_uint64(y), c_uint(1001))
    expect(HAZARD, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values))
    last = cuda.library.spillover_emulator_last_hazard().decode()
    assert "kind: illegal address" in last, last


def memory_that_goes_before_its_turn() -> None:
    """As on a GPU the device has an error from then on; the process lives."""
    program = Program()
    cuda = program.cuda
    stream, size = cuda.stream(), 2 << 20
    pointer = cuda.reserve(size)
    cuda.map(pointer, size, cuda.create(size))
    values = (c_float(1), c_uint64(pointer), c_uint64(pointer), c_uint(1000))
    expect(SUCCESS, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values, stream=stream))
    expect(SUCCESS, cuda.status("cuMemUnmap", pointer, size))
    expect(ILLEGAL_ADDRESS, cuda.status("cuStreamSynchronize", stream))


def neighbours_memory() -> None:
    program = Program()
    cuda = program.cuda
    cuda.use_device(1)
    there = cuda.alloc(4000)
    cuda.use_device(0)
    here = cuda.alloc(4000)
    values = (c_float(1), c_uint64(there), c_uint64(here), c_uint(1000))
    expect(HAZARD, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values))
    assert "kind: cross-device use without peer access" in cuda.hazards()[0]
    peer = c_void_p()
    cuda("cuDevicePrimaryCtxRetain", byref(peer), 1)
    cuda("cuCtxEnablePeerAccess", peer, 0)
    expect(SUCCESS, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values))


def wrong_launches() -> None:
    program = Program()
    x = program.upload(numbers(8))
    values = (c_float(1), x, x, c_uint(8))
    one = (1, 1, 1)
    for grid, block in (
        ((0, 1, 1), one),
        ((1, 65536, 1), one),
        (one, (0, 1, 1)),
        (one, (1025, 1, 1)),
        (one, (1, 1, 65)),
        (one, (32, 33, 1)),
    ):
        expect(INVALID_VALUE, program.launch("axpy", grid, block, *values))
    expect(INVALID_VALUE, program.launch("axpy", one, one, *values, shared=232449))
    function = program.function("axpy")
    launch = ("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0)
    expect(INVALID_VALUE, program.cuda.status(*launch, 0, None, None))
    array = (c_void_p * 4)(*[ctypes.cast(ctypes.pointer(v), c_void_p) for v in values])
    expect(INVALID_HANDLE, program.cuda.status(*launch, 0xDEAD0, array, None))
    expect(
        INVALID_HANDLE,
        program.cuda.status("cuLaunchKernel", 0xDEAD0, 1, 1, 1, 1, 1, 1, 0, 0, array, None),
    )


def wrong_declarations() -> None:
    program = Program()
    declare = "spillover_emulator_declare_accesses"
    accesses = ctypes.CFUNCTYPE(c_size_t)(lambda: 0)
    pointer = ctypes.cast(accesses, c_void_p)
    expect(INVALID_VALUE, program.cuda.status(declare, None, pointer, None))
    expect(INVALID_VALUE, program.cuda.status(declare, b"axpy", None, None))
    expect(NOT_FOUND, program.cuda.status(declare, b"nobody", pointer, None))


def kernels_on_the_clock() -> None:
    """A kernel has its name there, and the time of the bytes that it declares."""
    program = Program()
    cuda, size = program.cuda, 40 << 20
    x, y, stream = cuda.alloc(size), cuda.alloc(size), cuda.stream()
    values = (c_float(1), c_uint64(x), c_uint64(y), c_uint(size // 4))
    expect(SUCCESS, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values, stream=stream))
    begin(cuda, stream)
    expect(SUCCESS, program.launch("axpy", (1, 1, 1), (32, 1, 1), *values, stream=stream))
    executable = instantiate(cuda, end(cuda, stream))
    for _ in range(2):
        cuda("cuGraphLaunch", executable, stream)
    report = cuda.library.spillover_emulator_clock_report
    text = ctypes.create_string_buffer(report(None, c_size_t(0)) + 1)
    report(text, c_size_t(len(text)))
    operations = {entry["name"]: entry for entry in json.loads(text.value)["operations"]}
    assert operations["axpy"]["count"] == 3
    # It declares x and y, which move at 900 GB/s and with the ramp of 2 us of the made-up card.
    assert operations["axpy"]["ns"] == 3 * math.ceil(2000 + 2 * size / 900)


def a_barrier_that_not_all_reach() -> None:
    program = Program()
    program.launch("hangs", (1, 1, 1), (64, 1, 1), program.upload(np.zeros(64, np.int32)))
    program.cuda("cuCtxSynchronize")


RUNS: tuple[Callable[[], None], ...] = (
    axpy,
    squared_norm,
    transpose_to_float,
    votes,
    is_ordered_on_its_stream,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results(schedule: str) -> None:
    run_program(*RUNS, schedule=schedule)


def test_accesses() -> None:
    run_program(hazards, memory_that_is_gone, wrong_launches, wrong_declarations)
    run_program(neighbours_memory, devices=2)
    run_program(memory_that_goes_before_its_turn, hazards="off")


def test_the_clock_knows_them() -> None:
    run_program(kernels_on_the_clock, clock=1, vram="256MiB")


def test_a_barrier_that_not_all_reach() -> None:
    """A GPU would hang; here a sentence says so, and the process ends."""
    with pytest.raises(AssertionError, match="a kernel hangs: of 64 threads in a block 0 ended"):
        run_program(a_barrier_that_not_all_reach)


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_the_same_source_is_cuda(architecture: str) -> None:
    ptx = compile_with_nvrtc(KERNELS / "sample_kernels.cu", architecture)
    for name in ("axpy", "squared_norm", "transpose_to_float", "votes"):
        assert f".entry {name}(" in ptx

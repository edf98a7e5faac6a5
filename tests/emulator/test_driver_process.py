"""Initialisation, configuration, forks, the end of a process, and looking up entry points."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p

import pytest
from driver_ctypes import (
    HOST_FUNCTION,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NO_BINARY,
    NOT_FOUND,
    NOT_INITIALIZED,
    SUCCESS,
    Driver,
    expect,
    library_path,
    run_program,
)


def before_cuinit() -> None:
    cuda = Driver(initialise=False)
    expect(NOT_INITIALIZED, cuda.status("cuDeviceGetCount", byref(c_int())))
    expect(NOT_INITIALIZED, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 10))
    expect(NOT_INITIALIZED, cuda.status("cuStreamSynchronize", 0))
    assert cuda.library.spillover_emulator_hazard_count() == 0
    assert cuda.library.spillover_emulator_host_pointer(c_uint64(0x1234)) == 0x1234
    version, text = c_int(), c_char_p()
    cuda("cuDriverGetVersion", byref(version))
    cuda("cuGetErrorName", 700, byref(text))
    assert (version.value, text.value) == (13000, b"CUDA_ERROR_ILLEGAL_ADDRESS")
    cuda("cuGetErrorString", 1, byref(text))
    assert text.value == b"invalid argument"
    expect(INVALID_VALUE, cuda.status("cuGetErrorName", 12345, byref(text)))
    expect(INVALID_VALUE, cuda.status("cuInit", 1))
    expect(SUCCESS, cuda.status("cuInit", 0))
    expect(SUCCESS, cuda.status("cuInit", 0))
    expect(INVALID_DEVICE, cuda.status("cuDeviceGet", byref(c_int()), 1))


def device_facts() -> None:
    cuda = Driver()
    name, total = ctypes.create_string_buffer(64), c_size_t()
    cuda("cuDeviceGetName", name, 64, 0)
    cuda("cuDeviceTotalMem_v2", byref(total), 0)
    assert (name.value, total.value) == (b"NVIDIA Emulated H100", 64 << 20)
    facts = {75: 9, 76: 0, 16: 132, 10: 32, 102: 1}
    for attribute, value in facts.items():
        got = c_int(-1)
        cuda("cuDeviceGetAttribute", byref(got), attribute, 0)
        assert got.value == value, attribute
    expect(INVALID_VALUE, cuda.status("cuDeviceGetAttribute", byref(c_int()), 100000, 0))
    bus, device = ctypes.create_string_buffer(32), c_int(7)
    cuda("cuDeviceGetPCIBusId", bus, 32, 0)
    cuda("cuDeviceGetByPCIBusId", byref(device), bus)
    assert device.value == 0
    print(cuda.library.spillover_emulator_config().decode())


def contexts() -> None:
    cuda = Driver()
    primary, current, created = c_void_p(), c_void_p(), c_void_p()
    cuda("cuCtxGetCurrent", byref(primary))
    cuda("cuCtxCreate_v4", byref(created), None, 0, 0)
    cuda("cuCtxGetCurrent", byref(current))
    assert current.value == created.value != primary.value
    cuda("cuCtxPopCurrent_v2", byref(current))
    assert current.value == created.value
    cuda("cuCtxPushCurrent_v2", created)
    cuda("cuCtxDestroy_v2", created)
    cuda("cuCtxGetCurrent", byref(current))
    assert current.value == primary.value
    expect(201, cuda.status("cuCtxSetCurrent", created))
    expect(201, cuda.status("cuCtxSetCurrent", 0x1234))
    flags, active = c_int(), c_int()
    cuda("cuDevicePrimaryCtxGetState", 0, byref(flags), byref(active))
    assert active.value == 1
    cuda("cuDevicePrimaryCtxRelease_v2", 0)
    expect(201, cuda.status("cuDevicePrimaryCtxRelease_v2", 0))


def forked_child() -> None:
    cuda = Driver()
    stream, pointer, pinned = cuda.stream(), cuda.alloc(1000), cuda.pinned(1000)
    cuda.upload(pointer, pinned, stream)
    function = HOST_FUNCTION(lambda _: None)
    cuda("cuLaunchHostFunc", stream, function, None)
    child = os.fork()
    if child == 0:
        calls = (
            ("cuInit", 0),
            ("cuDeviceGetCount", byref(c_int())),
            ("cuMemAlloc_v2", byref(c_uint64()), 10),
            ("cuMemFree_v2", pointer),
            ("cuStreamSynchronize", stream),
            ("cuCtxSynchronize",),
            ("spillover_emulator_operator_begin", stream),
        )
        codes = {cuda.status(*call) for call in calls}
        quiet = cuda.host_access(reads=[pinned]) == SUCCESS
        os._exit(0 if codes == {NOT_INITIALIZED} and quiet else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    cuda.sync(stream)


def fork_before_use() -> None:
    """A child whose parent never used the device has one of its own."""
    child = os.fork()
    cuda = Driver()
    cuda.alloc(1000)
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def exit_with_everything_live() -> None:
    cuda = Driver()
    stream, pointer, pinned = cuda.stream(), cuda.alloc(1000), cuda.pinned(1000)
    other = cuda.alloc(1000)
    for _ in range(10):
        cuda.upload(pointer, pinned, stream)
        cuda.fill(other, 1, 1000, 2)
    cuda.record(stream)
    function = HOST_FUNCTION(lambda _: None)
    cuda("cuLaunchHostFunc", stream, function, None)
    Driver.kept = (cuda, function)  # type: ignore[attr-defined]
    print("end")


def look_up(cuda: Driver, name: str, version: int = 13000, flags: int = 0) -> tuple[int, int, int]:
    function, status = c_void_p(1), c_int(-1)
    code = cuda.status(
        "cuGetProcAddress_v2", name.encode(), byref(function), version, flags, byref(status)
    )
    return code, function.value or 0, status.value


def address_of(cuda: Driver, symbol: str) -> int:
    return ctypes.cast(getattr(cuda.library, symbol), c_void_p).value or 0


def entry_points() -> None:
    cuda = Driver()
    for name, symbol in (
        ("cuMemAlloc", "cuMemAlloc_v2"),
        ("cuMemAlloc_v2", "cuMemAlloc_v2"),
        ("cuStreamDestroy", "cuStreamDestroy_v2"),
        ("cuMemCreate", "cuMemCreate"),
        ("cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2"),
        ("cuDeviceGetUuid", "cuDeviceGetUuid_v2"),
        ("cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v3"),
        ("cuStreamGetCaptureInfo_v2", "cuStreamGetCaptureInfo_v2"),
        ("cuGetProcAddress", "cuGetProcAddress_v2"),
    ):
        assert look_up(cuda, name) == (SUCCESS, address_of(cuda, symbol), 0), name
    older = look_up(cuda, "cuStreamGetCaptureInfo", 12000)
    assert older[1] == address_of(cuda, "cuStreamGetCaptureInfo_v2")
    assert look_up(cuda, "cuStreamGetCaptureInfo", 9000) == (SUCCESS, 0, 2)
    for name in (
        "cuGraphAddMemAllocNode",
        "cuMulticastCreate",
        "cuNoSuchFunction",
        "",
        "cuMemAlloc_",
    ):
        assert look_up(cuda, name) == (SUCCESS, 0, 1), name
        older = cuda.status("cuGetProcAddress", name.encode(), byref(c_void_p()), 13000, 0)
        expect(NOT_FOUND, older)
    # The per-thread variants differ in what the null stream means.
    pointer = cuda.alloc(100)
    call = ctypes.CFUNCTYPE(c_int, c_uint64, ctypes.c_ubyte, c_size_t, c_void_p)
    for name, flags in (("cuMemsetD8Async_ptsz", 0), ("cuMemsetD8Async", 2)):
        code, function, _ = look_up(cuda, name, flags=flags)
        assert code == SUCCESS
        assert function != address_of(cuda, "cuMemsetD8Async")
        expect(SUCCESS, call(function)(pointer, 1, 100, None))
    expect(600, cuda.status("cuStreamQuery", 2))  # that is where it is
    cuda.sync(2)


def kernels() -> None:
    cuda = Driver()
    module, function, stream, seen = c_void_p(), c_void_p(), cuda.stream(), []
    cuda("cuModuleLoadData", byref(module), b"image")
    for _ in range(2):
        code = cuda.status("cuModuleGetFunction", byref(function), module, b"unknown_kernel")
        expect(NO_BINARY, code)
    kind = ctypes.CFUNCTYPE(None, ctypes.POINTER(c_void_p), ctypes.POINTER(c_int), c_void_p)

    @kind
    def body(parameters: object, shape: object, _: object) -> None:
        number = ctypes.cast(parameters[0], ctypes.POINTER(c_int))[0]  # type: ignore[index]
        seen.append((number, shape[0], shape[3], shape[6]))  # type: ignore[index]

    sizes = (c_size_t * 1)(4)
    cuda("spillover_emulator_register_kernel", b"add_one", body, None, sizes, 1)
    cuda("cuModuleGetFunction", byref(function), module, b"add_one")
    number = c_int(42)
    arguments = (c_void_p * 1)(ctypes.addressof(number))
    cuda("cuLaunchKernel", function, 2, 1, 1, 64, 1, 1, 128, stream, arguments, None)
    number.value = 0  # the launch has its own copy
    launch = HOST_FUNCTION(lambda argument: seen.append(argument))
    cuda("spillover_emulator_launch", stream, b"named", launch, 99)
    cuda.sync(stream)
    assert seen == [(42, 2, 64, 128), 99]
    bad = (0x1234, 1, 1, 1, 1, 1, 1, 0, stream, None, None)
    expect(INVALID_HANDLE, cuda.status("cuLaunchKernel", *bad))
    cuda("cuModuleUnload", module)
    expect(INVALID_HANDLE, cuda.status("cuModuleUnload", module))


def only_cuinit() -> None:
    print(Driver(initialise=False).status("cuInit", 0))


def test_before_cuinit() -> None:
    run_program(before_cuinit)


def test_device_facts() -> None:
    result = run_program(device_facts, seed=5)
    assert "SPILLOVER_EMULATOR_VRAM=67108864\n" in result.stdout
    assert "SPILLOVER_EMULATOR_SEED=5\n" in result.stdout


def test_contexts() -> None:
    run_program(contexts)


@pytest.mark.parametrize("schedule", ["late", "threaded"])
def test_forked_child(schedule: str) -> None:
    run_program(forked_child, schedule=schedule)


def test_fork_before_use() -> None:
    run_program(fork_before_use)


@pytest.mark.parametrize("schedule", ["late", "eager", "threaded", "random"])
def test_exit_with_everything_live(schedule: str) -> None:
    assert run_program(exit_with_everything_live, schedule=schedule).stdout == "end\n"


def test_entry_points() -> None:
    run_program(entry_points)


def test_kernels() -> None:
    result = run_program(kernels)
    assert result.stderr.count("kernel unknown_kernel has no body") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vram", "lots"),
        ("vram", "1KiB"),
        ("devices", "17"),
        ("schedule", "soon"),
        ("seed", "-1"),
    ],
)
def test_malformed_configuration(name: str, value: str) -> None:
    result = run_program(only_cuinit, **{name: value})
    assert result.stdout == f"{INVALID_VALUE}\n"
    sentence = rf"SPILLOVER_EMULATOR_{name.upper()}={re.escape(value)} is not valid: use .*\."
    assert re.search(sentence, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1048576000", 1048576000), ("0.5gib", 1 << 29), ("100MB", 10**8)],
)
def test_units(value: str, expected: int) -> None:
    result = run_program(device_total, vram=value)
    assert int(result.stdout) == expected


def device_total() -> None:
    total = c_size_t()
    Driver()("cuDeviceTotalMem_v2", byref(total), 0)
    print(total.value)


def test_exported_symbols_and_dependencies() -> None:
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(library_path())], capture_output=True, text=True
    ).stdout.split()[2::3]
    assert len(names) > 150
    assert all(re.match(r"cu[A-Z]|spillover_emulator_", name) for name in names)
    header = subprocess.run(
        ["readelf", "-d", str(library_path())], capture_output=True, text=True
    ).stdout
    assert "soname: [libcuda.so.1]" in header
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", header)
    known = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert {name for name in needed if not re.match("lib[atu][a-z]san", name)} <= known

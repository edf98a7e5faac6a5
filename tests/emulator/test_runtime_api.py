"""The emulated CUDA runtime by itself, called as a C program calls it, without torch."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator

import pytest
from runtime_library import (
    DEFAULT,
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    HOST_TO_HOST,
    INVALID_VALUE,
    NON_BLOCKING,
    OUT_OF_MEMORY,
    SUCCESS,
    device_memory,
    new_event,
    new_stream,
    open_runtime,
    pinned_memory,
    size,
)

from spillover import emulator

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

MIB = 1 << 20
INVALID_DEVICE, INVALID_HANDLE, NOT_READY, UNKNOWN = 101, 400, 600, 999
UNREGISTERED, HOST, DEVICE = range(3)
COMPUTE_MAJOR, MULTIPROCESSORS = 75, 16

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
STREAM_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class PointerAttributes(ctypes.Structure):
    """``cudaPointerAttributes``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    )


@pytest.fixture
def runtime() -> Iterator[ctypes.CDLL]:
    with open_runtime() as library:
        yield library


# Errors


def test_error_names_and_descriptions(runtime: ctypes.CDLL) -> None:
    expected = {
        SUCCESS: (b"cudaSuccess", b"no error"),
        OUT_OF_MEMORY: (b"cudaErrorMemoryAllocation", b"out of memory"),
        INVALID_DEVICE: (b"cudaErrorInvalidDevice", b"invalid device ordinal"),
        NOT_READY: (b"cudaErrorNotReady", b"device not ready"),
        801: (b"cudaErrorNotSupported", b"operation not supported"),
        54321: (b"unrecognized error code", b"unrecognized error code"),
    }
    for code, (name, description) in expected.items():
        assert runtime.cudaGetErrorName(code) == name
        assert runtime.cudaGetErrorString(code) == description


def test_last_error_is_kept_until_it_is_taken(runtime: ctypes.CDLL) -> None:
    assert runtime.cudaSetDevice(99) == INVALID_DEVICE
    assert runtime.cudaFree(None) == SUCCESS  # a success does not clear it
    assert runtime.cudaPeekAtLastError() == INVALID_DEVICE
    assert runtime.cudaGetLastError() == INVALID_DEVICE
    assert runtime.cudaGetLastError() == SUCCESS


def test_last_error_belongs_to_its_thread(runtime: ctypes.CDLL) -> None:
    assert runtime.cudaSetDevice(99) == INVALID_DEVICE
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(runtime.cudaPeekAtLastError()))
    thread.start()
    thread.join()
    assert seen == [SUCCESS]
    assert runtime.cudaGetLastError() == INVALID_DEVICE


def test_a_hazard_is_the_description_of_its_error(runtime: ctypes.CDLL) -> None:
    """Two streams write the same bytes and nothing orders them."""
    with (
        device_memory(runtime, 4096) as device,
        new_stream(runtime) as first,
        new_stream(runtime) as second,
    ):
        assert runtime.cudaDeviceSynchronize() == SUCCESS
        assert runtime.cudaMemsetAsync(device, 1, size(4096), first) == SUCCESS
        assert runtime.cudaMemsetAsync(device, 2, size(4096), second) == UNKNOWN
        description = runtime.cudaGetErrorString(UNKNOWN).decode()
        assert description in emulator.hazards()[0]
        assert runtime.cudaGetErrorName(UNKNOWN) == b"cudaErrorUnknown"
        elsewhere: list[bytes] = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(runtime.cudaGetErrorString(UNKNOWN))
        )
        thread.start()
        thread.join()
        assert elsewhere == [b"unknown error"]
        assert runtime.cudaDeviceSynchronize() == SUCCESS
    emulator.clear_hazards()


# Devices


def test_versions(runtime: ctypes.CDLL) -> None:
    version = ctypes.c_int()
    assert runtime.cudaRuntimeGetVersion(ctypes.byref(version)) == SUCCESS
    assert version.value == 13000
    assert runtime.cudaDriverGetVersion(ctypes.byref(version)) == SUCCESS
    assert version.value >= 13000


def test_properties_agree_with_attributes(runtime: ctypes.CDLL) -> None:
    properties = ctypes.create_string_buffer(4096)
    assert runtime.cudaGetDeviceProperties(properties, 0) == SUCCESS
    assert properties.value  # the name is the first field
    total_memory = int.from_bytes(properties.raw[288:296], "little")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == SUCCESS
    assert total_memory == total.value
    assert 0 < free.value <= total.value
    value = ctypes.c_int()
    assert runtime.cudaDeviceGetAttribute(ctypes.byref(value), COMPUTE_MAJOR, 0) == SUCCESS
    assert value.value == 9
    assert runtime.cudaDeviceGetAttribute(ctypes.byref(value), MULTIPROCESSORS, 0) == SUCCESS
    assert value.value > 0
    assert runtime.cudaGetDeviceProperties(properties, 99) == INVALID_DEVICE


def test_pci_bus_id_round_trip(runtime: ctypes.CDLL) -> None:
    text = ctypes.create_string_buffer(32)
    assert runtime.cudaDeviceGetPCIBusId(text, 32, 0) == SUCCESS
    assert re.fullmatch(rb"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.0", text.value)
    device = ctypes.c_int(-1)
    assert runtime.cudaDeviceGetByPCIBusId(ctypes.byref(device), text) == SUCCESS
    assert device.value == 0
    assert runtime.cudaDeviceGetPCIBusId(text, 4, 0) == INVALID_VALUE


def test_device_is_chosen_per_thread(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import ctypes, threading
        from spillover._paths import library_path
        runtime = ctypes.CDLL(str(library_path("emulator") / "libcudart.so.13"))
        count, here, there = ctypes.c_int(), ctypes.c_int(-1), ctypes.c_int(-1)
        assert runtime.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value == 2
        assert runtime.cudaSetDevice(1) == 0
        thread = threading.Thread(target=lambda: runtime.cudaGetDevice(ctypes.byref(there)))
        thread.start()
        thread.join()
        assert runtime.cudaGetDevice(ctypes.byref(here)) == 0
        assert (here.value, there.value) == (1, 0), (here.value, there.value)
        pointer = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(1 << 20)) == 0
        attributes = (ctypes.c_int * 32)()
        assert runtime.cudaPointerGetAttributes(attributes, pointer) == 0
        assert attributes[0] == 2 and attributes[1] == 1, list(attributes[:2])
        assert runtime.cudaFree(pointer) == 0
        """,
        devices=2,
    )


def test_child_of_a_user_gets_an_error(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import ctypes, os
        from spillover._paths import library_path
        runtime = ctypes.CDLL(str(library_path("emulator") / "libcudart.so.13"))
        pointer = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(4096)) == 0
        child = os.fork()
        if child == 0:
            status = runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(4096))
            os._exit(status if runtime.cudaGetLastError() == status else 99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert runtime.cudaFree(pointer) == 0
        """
    )


# Memory


def test_allocation_that_does_not_fit_fails_and_the_next_succeeds(runtime: ctypes.CDLL) -> None:
    pointer = ctypes.c_void_p(1)
    assert runtime.cudaMalloc(ctypes.byref(pointer), size(1 << 44)) == OUT_OF_MEMORY
    assert pointer.value is None
    assert runtime.cudaGetLastError() == OUT_OF_MEMORY
    with device_memory(runtime, MIB) as fits:
        assert fits.value
    assert runtime.cudaGetLastError() == SUCCESS


def test_empty_allocations_are_null(runtime: ctypes.CDLL) -> None:
    pointer = ctypes.c_void_p(1)
    assert runtime.cudaMalloc(ctypes.byref(pointer), size(0)) == SUCCESS
    assert pointer.value is None
    assert runtime.cudaFree(pointer) == SUCCESS
    assert runtime.cudaFreeHost(None) == SUCCESS


def test_freeing_a_wrong_pointer_fails(runtime: ctypes.CDLL) -> None:
    assert runtime.cudaFree(ctypes.c_void_p(0x1234)) == INVALID_VALUE
    with device_memory(runtime, 4096) as pointer:
        inside = ctypes.c_void_p(int(pointer.value or 0) + 256)
        assert runtime.cudaFree(inside) == INVALID_VALUE


def test_pointer_attributes(runtime: ctypes.CDLL) -> None:
    attributes = PointerAttributes()
    host = ctypes.create_string_buffer(64)
    with device_memory(runtime, 4096) as device, pinned_memory(runtime, 4096) as pinned:
        assert runtime.cudaPointerGetAttributes(ctypes.byref(attributes), device) == SUCCESS
        assert (attributes.type, attributes.device) == (DEVICE, 0)
        assert attributes.device_pointer == device.value
        assert attributes.host_pointer is None
        assert runtime.cudaPointerGetAttributes(ctypes.byref(attributes), pinned) == SUCCESS
        assert attributes.type == HOST
        assert attributes.host_pointer == pinned.value
    assert runtime.cudaPointerGetAttributes(ctypes.byref(attributes), host) == SUCCESS
    assert (attributes.type, attributes.device) == (UNREGISTERED, -2)


def test_registering_host_memory(runtime: ctypes.CDLL) -> None:
    attributes = PointerAttributes()
    host = ctypes.create_string_buffer(8192)
    for _ in range(2):
        assert runtime.cudaHostRegister(host, size(8192), 0) == SUCCESS
        assert runtime.cudaHostRegister(host, size(8192), 0) == 712  # already registered
        assert runtime.cudaPointerGetAttributes(ctypes.byref(attributes), host) == SUCCESS
        assert attributes.type == HOST
        assert runtime.cudaHostUnregister(host) == SUCCESS
    assert runtime.cudaHostUnregister(host) == 713  # not registered


@pytest.mark.parametrize("kind", [HOST_TO_DEVICE, DEFAULT])
def test_copies_there_and_back(runtime: ctypes.CDLL, kind: int) -> None:
    source = ctypes.create_string_buffer(os.urandom(4096), 4096)
    result = ctypes.create_string_buffer(4096)
    back = DEVICE_TO_HOST if kind == HOST_TO_DEVICE else DEFAULT
    within = DEVICE_TO_DEVICE if kind == HOST_TO_DEVICE else DEFAULT
    with device_memory(runtime, 4096) as first, device_memory(runtime, 4096) as second:
        assert runtime.cudaMemcpy(first, source, size(4096), kind) == SUCCESS
        assert runtime.cudaMemcpy(second, first, size(4096), within) == SUCCESS
        assert runtime.cudaMemcpy(result, second, size(4096), back) == SUCCESS
    assert result.raw == source.raw


def test_copies_in_a_wrong_direction_are_refused(runtime: ctypes.CDLL) -> None:
    host = ctypes.create_string_buffer(64)
    with device_memory(runtime, 64) as device:
        wrong = [
            (device, host, DEVICE_TO_HOST),
            (host, device, HOST_TO_DEVICE),
            (device, host, DEVICE_TO_DEVICE),
            (device, host, HOST_TO_HOST),
            (host, host, HOST_TO_DEVICE),
            (host, host, DEVICE_TO_DEVICE),
        ]
        for destination, source, kind in wrong:
            status = runtime.cudaMemcpy(destination, source, size(64), kind)
            assert status == INVALID_VALUE, kind
        assert runtime.cudaMemcpy(device, host, size(64), 77) == 21  # no such direction
        assert runtime.cudaMemcpy(host, device, size(0), HOST_TO_DEVICE) == SUCCESS


def test_copying_rows(runtime: ctypes.CDLL) -> None:
    rows, width, pitch = 3, 5, 8
    source = ctypes.create_string_buffer(bytes(range(rows * pitch)), rows * pitch)
    result = ctypes.create_string_buffer(rows * width)
    with device_memory(runtime, 4096) as device, new_stream(runtime) as stream:
        assert (
            runtime.cudaMemcpy2DAsync(
                device, size(512), source, size(pitch), size(width), size(rows), 1, stream
            )
            == SUCCESS
        )
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        status = runtime.cudaMemcpy2D(
            result, size(width), device, size(512), size(width), size(rows), 2
        )
        assert status == SUCCESS
        too_wide = runtime.cudaMemcpy2D(
            result, size(1), device, size(512), size(width), size(rows), 2
        )
        assert too_wide == 12  # invalid pitch
    assert result.raw == bytes(r * pitch + c for r in range(rows) for c in range(width))


def test_memset(runtime: ctypes.CDLL) -> None:
    result = ctypes.create_string_buffer(256)
    with device_memory(runtime, 256) as device, new_stream(runtime) as stream:
        assert runtime.cudaMemset(device, 0x1AB, size(128)) == SUCCESS
        second_half = ctypes.c_void_p(int(device.value or 0) + 128)
        assert runtime.cudaDeviceSynchronize() == SUCCESS
        assert runtime.cudaMemsetAsync(second_half, 7, size(128), stream) == SUCCESS
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        assert runtime.cudaMemcpy(result, device, size(256), DEVICE_TO_HOST) == SUCCESS
    assert result.raw == b"\xab" * 128 + b"\x07" * 128


def test_stream_ordered_allocation(runtime: ctypes.CDLL) -> None:
    pool, pointer = ctypes.c_void_p(), ctypes.c_void_p()
    used = ctypes.c_uint64()
    result = ctypes.create_string_buffer(64)
    assert runtime.cudaDeviceGetDefaultMemPool(ctypes.byref(pool), 0) == SUCCESS
    with new_stream(runtime) as stream:
        assert runtime.cudaMallocAsync(ctypes.byref(pointer), size(MIB), stream) == SUCCESS
        assert runtime.cudaMemsetAsync(pointer, 5, size(64), stream) == SUCCESS
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        assert runtime.cudaMemPoolGetAttribute(pool, 7, ctypes.byref(used)) == SUCCESS
        assert used.value >= MIB
        assert runtime.cudaMemcpy(result, pointer, size(64), DEVICE_TO_HOST) == SUCCESS
        assert runtime.cudaFreeAsync(pointer, stream) == SUCCESS
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        status = runtime.cudaMallocAsync(ctypes.byref(pointer), size(1 << 44), stream)
        assert status == OUT_OF_MEMORY
    assert result.raw == b"\x05" * 64
    assert runtime.cudaMemPoolTrimTo(pool, size(0)) == SUCCESS


# Streams and events


def test_stream_properties(runtime: ctypes.CDLL) -> None:
    least, greatest = ctypes.c_int(), ctypes.c_int()
    limits = (ctypes.byref(least), ctypes.byref(greatest))
    assert runtime.cudaDeviceGetStreamPriorityRange(*limits) == SUCCESS
    assert greatest.value < least.value
    stream, value = ctypes.c_void_p(), ctypes.c_int()
    flags, first_id, second_id = ctypes.c_uint(), ctypes.c_ulonglong(), ctypes.c_ulonglong()
    status = runtime.cudaStreamCreateWithPriority(
        ctypes.byref(stream), NON_BLOCKING, greatest.value
    )
    assert status == SUCCESS
    assert runtime.cudaStreamGetPriority(stream, ctypes.byref(value)) == SUCCESS
    assert value.value == greatest.value
    assert runtime.cudaStreamGetFlags(stream, ctypes.byref(flags)) == SUCCESS
    assert flags.value == NON_BLOCKING
    assert runtime.cudaStreamGetDevice(stream, ctypes.byref(value)) == SUCCESS
    assert value.value == 0
    assert runtime.cudaStreamGetId(stream, ctypes.byref(first_id)) == SUCCESS
    with new_stream(runtime) as other:
        assert runtime.cudaStreamGetId(other, ctypes.byref(second_id)) == SUCCESS
    assert first_id.value != second_id.value
    assert runtime.cudaStreamIsCapturing(stream, ctypes.byref(value)) == SUCCESS
    assert value.value == 0
    assert runtime.cudaStreamDestroy(stream) == SUCCESS


def test_event_is_ready_after_its_stream(runtime: ctypes.CDLL) -> None:
    ran: list[int] = []
    function = HOST_FUNCTION(lambda _: ran.append(1))
    with new_stream(runtime) as stream, new_event(runtime, flags=2) as event:
        assert runtime.cudaEventQuery(event) == SUCCESS  # never recorded
        assert runtime.cudaLaunchHostFunc(stream, function, None) == SUCCESS
        assert runtime.cudaEventRecord(event, stream) == SUCCESS
        assert runtime.cudaEventSynchronize(event) == SUCCESS
        assert ran == [1]
        assert runtime.cudaEventQuery(event) == SUCCESS
        elapsed = ctypes.c_float()
        status = runtime.cudaEventElapsedTime(ctypes.byref(elapsed), event, event)
        assert status == INVALID_HANDLE  # made without timing


def test_elapsed_time(runtime: ctypes.CDLL) -> None:
    elapsed = ctypes.c_float(-1)
    with new_stream(runtime) as stream, new_event(runtime) as start, new_event(runtime) as end:
        assert runtime.cudaEventRecord(start, stream) == SUCCESS
        assert runtime.cudaEventRecordWithFlags(end, stream, 0) == SUCCESS
        assert runtime.cudaEventSynchronize(end) == SUCCESS
        assert runtime.cudaEventElapsedTime(ctypes.byref(elapsed), start, end) == SUCCESS
        assert elapsed.value >= 0
        assert runtime.cudaEventRecordWithFlags(end, stream, 8) == INVALID_VALUE


def test_stream_callback_gets_the_runtimes_arguments(runtime: ctypes.CDLL) -> None:
    calls: list[tuple[int | None, int, int | None]] = []
    callback = STREAM_CALLBACK(lambda *arguments: calls.append(arguments))
    with new_stream(runtime) as stream:
        assert runtime.cudaStreamAddCallback(stream, callback, ctypes.c_void_p(42), 0) == SUCCESS
        assert runtime.cudaStreamSynchronize(stream) == SUCCESS
        assert calls == [(stream.value, SUCCESS, 42)]


def test_capture_mode_is_exchanged_per_thread(runtime: ctypes.CDLL) -> None:
    mode = ctypes.c_int(2)
    assert runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == SUCCESS
    assert mode.value == 0
    assert runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == SUCCESS
    assert mode.value == 2
    mode.value = 9
    assert runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == INVALID_VALUE


def test_entry_points_of_the_driver(runtime: ctypes.CDLL) -> None:
    function, answer = ctypes.c_void_p(), ctypes.c_int(-1)

    def look_up(name: bytes) -> int:
        flags = ctypes.c_ulonglong(0)
        outputs = (ctypes.byref(function), ctypes.c_uint(12000), flags, ctypes.byref(answer))
        return int(runtime.cudaGetDriverEntryPointByVersion(name, *outputs))

    assert look_up(b"cuMemCreate") == SUCCESS
    assert function.value
    assert answer.value == 0
    assert look_up(b"cuNoSuchFunction") == SUCCESS
    assert function.value is None
    assert answer.value == 1

"""Memory and events that processes share by cuIpc*, against CUDA's words.

Each program starts a second process; see ``ipc_peer``.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from ctypes import byref, c_int, c_uint, c_uint64

import pytest
from driver_ctypes import (
    DISABLE_TIMING,
    HAZARD,
    HOST_FUNCTION,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    MIB,
    NOT_READY,
    SCHEDULES,
    SUCCESS,
    expect,
    run_program,
)
from ipc_peer import INTERPROCESS, LAZY_PEER_ACCESS, Handle, Peer, Sharing, other_process

from spillover._paths import library_path

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

INVALID_DEVICE = 101
ALLOWED_IPC, IPC_EVENTS = 13, 125
SIZE = 3 * MIB


def memory() -> None:
    """Both see the bytes, whoever writes; the exporter's address and budget stay."""
    cuda = Sharing()
    stream, before = cuda.stream(), cuda.free_bytes()
    pointer = cuda.alloc(SIZE)
    used = before - cuda.free_bytes()
    cuda.fill(pointer, 5, SIZE, stream)
    cuda.sync(stream)
    handle = cuda.export(pointer)
    assert str(cuda.export(pointer)) == str(handle)
    assert str(cuda.export(pointer + 100)) == str(handle), "the base's"
    assert cuda.fetch(pointer, SIZE) == b"\5" * SIZE
    with other_process() as other:
        (free,) = other.ask("free_bytes")
        status, there = other.open(handle)
        expect(SUCCESS, status)
        assert other.ask("free_bytes") == [free], "its owner pays"
        event = cuda.shared_event()
        status, their_event = map(int, other.ask("open_event", cuda.export_event(event)))
        expect(SUCCESS, status)
        cuda.record(stream, event)
        assert other.ask("first_byte_after", their_event, there) == ["5"]
        other.ask("fill", there, 9, SIZE, their_event)
        cuda("cuStreamWaitEvent", stream, event, 0)
        target = cuda.pinned(SIZE)
        cuda.download(target, pointer, stream)
        cuda.sync(stream)
        assert target.holds(9)
        # Opened twice: one address, and as many closes.
        assert other.open(handle) == (SUCCESS, there)
        assert other.ask("free", there) == [str(INVALID_VALUE)], "cuIpcCloseMemHandle frees it"
        assert other.ask("close", there + 4096) == [str(INVALID_VALUE)]
        for expected in (SUCCESS, SUCCESS, INVALID_VALUE):
            assert other.ask("close", there) == [str(expected)]
        # Opened again after that.
        assert other.open(handle)[0] == SUCCESS
    cuda.free(pointer)
    assert cuda.free_bytes() == before
    assert used > 0


def two_ways() -> None:
    """A process may import and export at a time."""
    cuda = Sharing()
    with other_process() as other:
        (text,) = other.ask("alloc", 100, 7)
        status, pointer = cuda.open(Handle.parse(text))
        expect(SUCCESS, status)
        assert cuda.fetch(pointer, 100) == b"\7" * 100
        expect(INVALID_VALUE, cuda.status("cuIpcGetMemHandle", byref(Handle()), pointer))
        size = ctypes.c_size_t()
        cuda("cuMemGetAddressRange_v2", None, byref(size), pointer)
        assert size.value == 100
    # The exporter has died; what is mapped stays.
    assert cuda.fetch(pointer, 100) == b"\7" * 100
    expect(SUCCESS, cuda.status("cuIpcCloseMemHandle", pointer))
    expect(INVALID_HANDLE, cuda.open(Handle.parse(text))[0])


def handles_that_are_gone() -> None:
    cuda = Sharing()
    pointer = cuda.alloc(SIZE)
    handle, event = cuda.export(pointer), cuda.shared_event()
    event_handle = cuda.export_event(event)
    cuda.free(pointer)
    cuda("cuEventDestroy_v2", event)
    again, another = cuda.alloc(SIZE), cuda.shared_event()
    cuda.export(again)
    with other_process() as other:
        assert other.open(handle)[0] == INVALID_HANDLE
        assert other.ask("open_event", event_handle)[0] == str(INVALID_HANDLE)
        status, theirs = map(int, other.ask("open_event", cuda.export_event(another)))
        expect(SUCCESS, status)
        assert other.ask("query", theirs) == [str(SUCCESS)], "never recorded"
        assert other.ask("destroy_event", theirs) == [str(SUCCESS)]
    expect(SUCCESS, cuda.status("cuEventQuery", another))


def wrong_arguments() -> None:
    cuda = Sharing()
    pointer, stream = cuda.alloc(SIZE), cuda.stream()
    value = c_int()
    cuda("cuDeviceGetAttribute", byref(value), IPC_EVENTS, 0)
    assert value.value == 1
    # Memory.
    handle = cuda.export(pointer)
    expect(INVALID_VALUE, cuda.status("cuIpcGetMemHandle", None, pointer))
    expect(INVALID_VALUE, cuda.status("cuIpcGetMemHandle", byref(handle), 12345))
    for other in (cuda.pinned(10).address, cuda.alloc_async(100, stream), cuda.reserve(2 * MIB)):
        expect(INVALID_VALUE, cuda.status("cuIpcGetMemHandle", byref(Handle()), other))
    expect(INVALID_CONTEXT, cuda.open(handle)[0])  # a process's own
    expect(INVALID_HANDLE, cuda.open(Handle())[0])
    for flags in (0, 2, 3):
        expect(INVALID_VALUE, cuda.open(handle, flags)[0])
    opened = cuda.library.cuIpcOpenMemHandle_v2(None, handle, c_uint(LAZY_PEER_ACCESS))
    expect(INVALID_VALUE, opened)
    for wrong in (0, 12345, pointer):
        expect(INVALID_VALUE, cuda.status("cuIpcCloseMemHandle", wrong))
    capable = c_uint()
    cuda("cuPointerGetAttribute", byref(capable), ALLOWED_IPC, pointer)
    assert capable.value == 1
    # Events.
    event = cuda.shared_event()
    event_handle = cuda.export_event(event)
    expect(INVALID_VALUE, cuda.status("cuEventCreate", byref(c_uint64()), INTERPROCESS))
    expect(INVALID_VALUE, cuda.status("cuIpcGetEventHandle", None, event))
    expect(INVALID_HANDLE, cuda.status("cuIpcGetEventHandle", byref(Handle()), cuda.event()))
    expect(INVALID_HANDLE, cuda.status("cuIpcGetEventHandle", byref(Handle()), 0xDEAD0))
    expect(INVALID_CONTEXT, cuda.open_event(event_handle)[0])
    expect(INVALID_HANDLE, cuda.open_event(Handle())[0])
    expect(INVALID_HANDLE, cuda.open_event(handle)[0])
    expect(INVALID_VALUE, cuda.library.cuIpcOpenEventHandle(None, event_handle))
    elapsed = ctypes.c_float()
    expect(INVALID_HANDLE, cuda.status("cuEventElapsedTime_v2", byref(elapsed), event, event))
    # Without a context.
    cuda("cuCtxSetCurrent", None)
    expect(INVALID_CONTEXT, cuda.status("cuIpcGetMemHandle", byref(Handle()), pointer))


def an_event_completes_unasked() -> None:
    """The other process waits for work that nobody in this one waits for."""
    cuda = Sharing()
    pointer, stream = cuda.alloc(SIZE), cuda.stream()
    cuda.fill(pointer, 1, SIZE, stream)
    cuda.sync(stream)
    event = cuda.shared_event()
    with other_process() as other:
        _, there = other.open(cuda.export(pointer))
        _, theirs = other.ask("open_event", cuda.export_event(event))
        for value in range(2, 6):
            cuda.fill(pointer, value, SIZE, stream)
            cuda.record(stream, event)
            assert other.ask("first_byte_after", theirs, there) == [str(value)]
            assert other.ask("synchronize", theirs) == [str(SUCCESS)]
            assert other.ask("query", theirs) == [str(SUCCESS)]


def an_event_is_not_early() -> None:
    """Before its stream's work is done the event is not, for the other process either."""
    cuda = Sharing()
    stream, event = cuda.stream(), cuda.shared_event()
    gate = threading.Event()
    function = HOST_FUNCTION(lambda _: gate.wait(60) and None)
    with other_process() as other:
        _, theirs = other.ask("open_event", cuda.export_event(event))
        cuda("cuLaunchHostFunc", stream, function, None)
        cuda.record(stream, event)  # does not block
        assert other.ask("query", theirs) == [str(NOT_READY)]
        threading.Timer(0.3, gate.set).start()
        start = time.monotonic()
        assert other.ask("synchronize", theirs) == [str(SUCCESS)]
        assert time.monotonic() - start > 0.1
        assert other.ask("query", theirs) == [str(SUCCESS)]
    cuda.sync(stream)


def an_event_is_destroyed_under_a_waiter() -> None:
    """Who waits for an event that is gone does not wait for the one that came after it."""
    cuda = Sharing()
    stream, event = cuda.stream(), cuda.shared_event()
    with other_process() as other:
        _, theirs = other.ask("open_event", cuda.export_event(event))
        cuda.record(stream, event)
        other.ask("wait", theirs)
        cuda.sync(stream)
        cuda("cuEventDestroy_v2", event)
        cuda.shared_event()
        assert other.ask("drain") == [str(SUCCESS)]


def the_recorder_dies() -> None:
    """Work of a process that has ended is not waited for."""
    cuda = Sharing()
    stream, event = cuda.stream(), cuda.shared_event()
    other = Peer()
    _, theirs = other.ask("open_event", cuda.export_event(event))
    (text,) = other.ask("alloc", 100, 7)
    _, pointer = cuda.open(Handle.parse(text))
    other.process.kill()
    other.process.wait()
    expect(SUCCESS, cuda.status("cuEventSynchronize", event))
    cuda("cuStreamWaitEvent", stream, event, 0)
    cuda.sync(stream)
    assert cuda.fetch(pointer, 1) == b"\7"
    assert theirs


def neighbours() -> None:
    """Opened on another device: the flag enables peer access. Device numbers must exist."""
    cuda = Sharing()
    cuda.use_device(1)
    pointer = cuda.alloc(SIZE)
    cuda("cuMemsetD8_v2", pointer, 3, SIZE)
    cuda("cuCtxSynchronize")
    handle = cuda.export(pointer)
    with other_process() as other:
        status, there = other.open(handle)  # where device 0 is current
        expect(SUCCESS, status)
        assert other.ask("read", there) == [str(SUCCESS)]
    os.environ["SPILLOVER_EMULATOR_DEVICES"] = "1"
    with other_process() as other:
        assert other.open(handle)[0] == INVALID_DEVICE


def closed_while_in_use() -> None:
    """The last close waits as cuMemFree does; the checker knows what other streams still do."""
    cuda = Sharing()
    with other_process() as other:
        (text,) = other.ask("alloc", SIZE, 7)
        _, pointer = cuda.open(Handle.parse(text))
        stream = cuda.stream()
        cuda.fill(pointer, 1, SIZE, stream)
        expect(SUCCESS, cuda.status("cuIpcCloseMemHandle", pointer))
        expect(HAZARD, cuda.operator(stream, "reader", reads=[(pointer, 1)]))
        assert "kind: use after free" in cuda.hazards()[0], cuda.hazards()


def imported_memory_is_written() -> None:
    """What another process wrote does not count as uninitialised."""
    cuda = Sharing()
    with other_process() as other:
        (text,) = other.ask("alloc", 100, 7)
        _, pointer = cuda.open(Handle.parse(text))
        stream = cuda.stream()
        expect(SUCCESS, cuda.operator(stream, "reader", reads=[(pointer, 100)]))
        fresh = cuda.alloc(100)
        expect(HAZARD, cuda.operator(stream, "reader", reads=[(fresh, 100)]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_and_events(schedule: str) -> None:
    run_program(memory, an_event_completes_unasked, an_event_is_not_early, schedule=schedule)


def test_lifetimes() -> None:
    run_program(two_ways, handles_that_are_gone, the_recorder_dies, closed_while_in_use)
    run_program(an_event_is_destroyed_under_a_waiter)
    run_program(imported_memory_is_written, uninitialized=1)


def test_arguments() -> None:
    run_program(wrong_arguments)


def test_several_devices() -> None:
    run_program(neighbours, devices=2)


def test_runtime() -> None:
    """The runtime's functions are the driver's under other names."""
    run_program(runtime_functions)


def runtime_functions() -> None:
    runtime = ctypes.CDLL(str(library_path("emulator") / "libcudart.so.13"))
    pointer, handle = ctypes.c_void_p(), Handle()
    assert runtime.cudaMalloc(byref(pointer), ctypes.c_size_t(100)) == SUCCESS
    assert runtime.cudaMemset(pointer, 8, ctypes.c_size_t(100)) == SUCCESS
    assert runtime.cudaDeviceSynchronize() == SUCCESS
    assert runtime.cudaIpcGetMemHandle(byref(handle), pointer) == SUCCESS
    assert runtime.cudaIpcGetMemHandle(None, pointer) == INVALID_VALUE
    assert runtime.cudaIpcOpenMemHandle(byref(pointer), handle, 1) == INVALID_CONTEXT
    assert runtime.cudaIpcOpenMemHandle(None, handle, 1) == INVALID_VALUE
    assert runtime.cudaIpcCloseMemHandle(pointer) == INVALID_VALUE
    event, event_handle = ctypes.c_void_p(), Handle()
    flags = DISABLE_TIMING | INTERPROCESS
    assert runtime.cudaEventCreateWithFlags(byref(event), flags) == SUCCESS
    assert runtime.cudaIpcGetEventHandle(byref(event_handle), event) == SUCCESS
    assert runtime.cudaIpcGetEventHandle(None, event) == INVALID_VALUE
    assert runtime.cudaIpcOpenEventHandle(byref(event), event_handle) == INVALID_CONTEXT
    with other_process() as other:
        status, there = other.open(handle)
        assert status == SUCCESS
        status, theirs = map(int, other.ask("open_event", event_handle))
        assert other.ask("first_byte_after", theirs, there) == ["8"]
        (text,) = other.ask("alloc", 100, 7)
        opened, value = ctypes.c_void_p(), ctypes.c_ubyte()
        assert runtime.cudaIpcOpenMemHandle(byref(opened), Handle.parse(text), 1) == SUCCESS
        assert runtime.cudaMemcpy(byref(value), opened, ctypes.c_size_t(1), 2) == SUCCESS
        assert value.value == 7
        assert runtime.cudaIpcCloseMemHandle(opened) == SUCCESS

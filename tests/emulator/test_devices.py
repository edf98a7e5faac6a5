"""Several devices of one process through the driver and NVML: contexts, streams, peers, memory."""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import byref, c_char, c_int, c_size_t, c_uint, c_uint64, c_void_p

import pytest
from driver_ctypes import (
    DISABLE_TIMING,
    HAZARD,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    MIB,
    OUT_OF_MEMORY,
    SCHEDULES,
    SUCCESS,
    AccessDescriptor,
    Driver,
    Location,
    expect,
    properties,
    run_program,
)

from spillover._paths import library_path

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

COUNT = 4
ALREADY_ENABLED, NOT_ENABLED = 704, 705
DEVICE_ORDINAL = 9
SIZE = 4096
NONE, READ, READ_WRITE = 0, 1, 3


def context_of(cuda: Driver, device: int) -> c_void_p:
    context = c_void_p()
    cuda("cuDevicePrimaryCtxRetain", byref(context), device)
    return context


def last_hazard(cuda: Driver) -> str:
    return str(cuda.library.spillover_emulator_last_hazard().decode())


def current_device(cuda: Driver) -> int:
    device = c_int(-1)
    cuda("cuCtxGetDevice", byref(device))
    return device.value


def contexts() -> None:
    """Each thread has a current device of its own; flags and counts are each device's."""
    cuda = Driver()
    for device in range(COUNT):
        cuda.use_device(device)
        assert current_device(cuda) == device
    seen: list[int] = []

    def other_thread() -> None:
        seen.append(cuda.status("cuCtxGetDevice", byref(c_int())))
        cuda.use_device(1)
        seen.append(current_device(cuda))

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert seen == [INVALID_CONTEXT, 1]
    assert current_device(cuda) == COUNT - 1
    flags, active = c_uint(), c_int()
    cuda("cuDevicePrimaryCtxSetFlags_v2", 1, 4)
    for device, expected in ((1, 4), (2, 0)):
        cuda("cuDevicePrimaryCtxGetState", device, byref(flags), byref(active))
        assert (flags.value, active.value) == (expected, 1)
    expect(INVALID_VALUE, cuda.status("cuDevicePrimaryCtxSetFlags_v2", 1, 3))
    expect(INVALID_VALUE, cuda.status("cuDevicePrimaryCtxSetFlags_v2", 1, 0x1000))
    for call in ("Retain", "GetState", "SetFlags_v2", "Release_v2", "Reset_v2"):
        arguments = {"Retain": (byref(c_void_p()), COUNT), "SetFlags_v2": (COUNT, 0)}
        name = f"cuDevicePrimaryCtx{call}"
        expect(INVALID_DEVICE, cuda.status(name, *arguments.get(call, (COUNT, None, None))))
    while cuda.status("cuDevicePrimaryCtxRelease_v2", 2) == SUCCESS:
        pass
    expect(INVALID_CONTEXT, cuda.status("cuDevicePrimaryCtxRelease_v2", 2))


def reset() -> None:
    """A device's memory and settings go, and nobody else's."""
    cuda = Driver()
    cuda("cuCtxEnablePeerAccess", context_of(cuda, 1), 0)
    kept = cuda.alloc(SIZE)
    cuda.use_device(1)
    total = cuda.free_bytes()
    stream, gone = cuda.stream(), cuda.alloc(MIB)
    cuda.fill(gone, 1, MIB, stream)
    assert cuda.free_bytes() < total
    cuda("cuDevicePrimaryCtxReset_v2", 1)
    assert cuda.free_bytes() == total
    expect(INVALID_VALUE, cuda.status("cuMemFree_v2", gone))
    cuda.library.spillover_emulator_hazards_clear()
    cuda.use_device(0)
    expect(ALREADY_ENABLED, cuda.status("cuCtxEnablePeerAccess", context_of(cuda, 1), 0))
    cuda.free(kept)
    cuda("cuDevicePrimaryCtxReset_v2", 0)
    cuda("cuCtxEnablePeerAccess", context_of(cuda, 1), 0)


def capacities() -> None:
    """Each device has its own capacity, and a pointer says whose it is."""
    cuda = Driver()
    pointers = []
    for device in range(COUNT):
        cuda.use_device(device)
        pointers.append(cuda.alloc(40 * MIB))
        expect(OUT_OF_MEMORY, cuda.status("cuMemAlloc_v2", byref(c_uint64()), 40 * MIB))
        assert cuda.free_bytes() == 24 * MIB
    ordinal = c_int()
    for device, pointer in enumerate(pointers):
        cuda("cuPointerGetAttribute", byref(ordinal), DEVICE_ORDINAL, pointer + 100)
        assert ordinal.value == device
    cuda.free(pointers[0])  # whatever device is current
    cuda.use_device(0)
    assert cuda.free_bytes() == 64 * MIB
    assert cuda.library.spillover_emulator_peak_bytes(1) == 40 * MIB


def streams_and_events() -> None:
    """A stream may wait for another device's event; an event is recorded on its own device only."""
    cuda = Driver()
    host = cuda.pinned(SIZE).fill(7)
    first, here = cuda.stream(), cuda.alloc(SIZE)
    event = cuda.event()
    cuda.use_device(1)
    second, there = cuda.stream(), cuda.alloc(SIZE)
    timed = cuda.event(0)
    cuda.upload(here, host, first)
    expect(INVALID_HANDLE, cuda.status("cuEventRecord", event, second))
    expect(INVALID_HANDLE, cuda.status("cuEventRecord", event, LEGACY))  # that of device 1
    cuda.record(first, event)
    cuda("cuStreamWaitEvent", second, event, 0)
    contexts = (context_of(cuda, 1), context_of(cuda, 0))
    cuda("cuMemcpyPeerAsync", there, contexts[0], here, contexts[1], SIZE, second)
    target = cuda.pinned(SIZE)
    cuda.download(target, there, second)
    cuda.record(second, timed)
    cuda.use_device(0)  # an event may be waited for from anywhere
    cuda("cuEventSynchronize", timed)
    assert target.holds(7)
    other = cuda.record(first, cuda.event(0))
    cuda("cuEventSynchronize", other)
    elapsed = ctypes.c_float()
    expect(INVALID_HANDLE, cuda.status("cuEventElapsedTime_v2", byref(elapsed), timed, other))
    # Default streams are one a device.
    cuda("cuMemsetD8Async", here, 1, SIZE, LEGACY)
    cuda.use_device(1)
    expect(SUCCESS, cuda.status("cuStreamQuery", LEGACY))
    cuda("cuCtxSynchronize")


def synchronising_covers_one_device() -> None:
    cuda = Driver()
    here, stream = cuda.alloc(SIZE), cuda.stream()
    cuda.fill(here, 1, SIZE, stream)
    cuda.use_device(1)
    cuda("cuCtxSynchronize")
    assert cuda.peek(here, 1) != b"\1"
    cuda.use_device(0)
    cuda("cuCtxSynchronize")
    assert cuda.peek(here, 1) == b"\1"


def peer_calls() -> None:
    """Arguments of the calls that enable, disable and ask for peer access."""
    cuda = Driver()
    can = c_int()
    for device in range(COUNT):
        for peer in range(COUNT):
            cuda("cuDeviceCanAccessPeer", byref(can), device, peer)
            assert can.value == (device != peer)
    expect(INVALID_VALUE, cuda.status("cuDeviceCanAccessPeer", None, 0, 1))
    expect(INVALID_DEVICE, cuda.status("cuDeviceCanAccessPeer", byref(can), 0, COUNT))
    expect(INVALID_DEVICE, cuda.status("cuDeviceCanAccessPeer", byref(can), -1, 0))
    value = c_int()
    for attribute, expected in ((1, 0), (2, 1), (3, 0), (4, 0)):
        cuda("cuDeviceGetP2PAttribute", byref(value), attribute, 0, 1)
        assert value.value == expected
    expect(INVALID_VALUE, cuda.status("cuDeviceGetP2PAttribute", byref(value), 0, 0, 1))
    expect(INVALID_DEVICE, cuda.status("cuDeviceGetP2PAttribute", byref(value), 1, 0, 0))
    expect(INVALID_VALUE, cuda.status("cuDeviceGetP2PAttribute", None, 1, 0, 1))
    expect(INVALID_DEVICE, cuda.status("cuDeviceGetP2PAttribute", byref(value), 1, 0, COUNT))

    own, other = context_of(cuda, 0), context_of(cuda, 1)
    enable, disable = "cuCtxEnablePeerAccess", "cuCtxDisablePeerAccess"
    expect(INVALID_CONTEXT, cuda.status(enable, own, 0))
    expect(INVALID_CONTEXT, cuda.status(enable, None, 0))
    expect(INVALID_CONTEXT, cuda.status(enable, 0xDEAD0, 0))
    expect(INVALID_VALUE, cuda.status(enable, other, 1))
    expect(NOT_ENABLED, cuda.status(disable, other))
    expect(SUCCESS, cuda.status(enable, other, 0))
    expect(ALREADY_ENABLED, cuda.status(enable, other, 0))
    expect(SUCCESS, cuda.status(disable, other))
    expect(INVALID_CONTEXT, cuda.status(disable, own))
    cuda("cuCtxSetCurrent", None)
    expect(INVALID_CONTEXT, cuda.status(enable, other, 0))


def peer_copies() -> None:
    """Copies between devices need no peer access, but the right contexts."""
    cuda = Driver()
    own, other = context_of(cuda, 0), context_of(cuda, 1)
    here, stream = cuda.alloc(SIZE), cuda.stream()
    cuda.use_device(1)
    there = cuda.alloc(SIZE)
    cuda("cuMemsetD8_v2", there, 9, SIZE)
    cuda("cuCtxSynchronize")
    cuda.use_device(0)
    cuda("cuMemcpyPeer", here, own, there, other, SIZE)
    assert cuda.fetch(here, SIZE) == b"\t" * SIZE
    cuda.copy(there, here, SIZE, stream)  # addresses are unified
    cuda.sync(stream)
    for wrong in ((there, own, here, own), (here, other, there, other)):
        expect(INVALID_VALUE, cuda.status("cuMemcpyPeer", *wrong, SIZE))
        expect(INVALID_VALUE, cuda.status("cuMemcpyPeerAsync", *wrong, SIZE, stream))
    expect(INVALID_CONTEXT, cuda.status("cuMemcpyPeer", here, None, there, other, SIZE))
    expect(INVALID_CONTEXT, cuda.status("cuMemcpyPeer", here, own, there, 0xDEAD0, SIZE))
    expect(INVALID_VALUE, cuda.status("cuMemcpyPeer", 0, own, there, other, SIZE))
    runtime = ctypes.CDLL(str(library_path("emulator") / "libcudart.so.13"))
    size = c_size_t(SIZE)
    assert runtime.cudaSetDevice(0) == SUCCESS
    pointers = (c_void_p(here), 0, c_void_p(there))
    assert runtime.cudaMemcpyPeer(*pointers, 1, size) == SUCCESS
    assert runtime.cudaMemcpyPeer(*pointers, COUNT, size) == INVALID_DEVICE
    assert runtime.cudaMemcpyPeer(*pointers, 2, size) == INVALID_VALUE
    assert runtime.cudaSetDevice(COUNT) == INVALID_DEVICE
    assert runtime.cudaSetDevice(-1) == INVALID_DEVICE
    assert runtime.cudaDeviceEnablePeerAccess(0, 0) == INVALID_DEVICE
    assert runtime.cudaDeviceEnablePeerAccess(COUNT, 0) == INVALID_DEVICE
    assert runtime.cudaDeviceEnablePeerAccess(1, 1) == INVALID_VALUE
    assert runtime.cudaDeviceEnablePeerAccess(1, 0) == SUCCESS
    assert runtime.cudaDeviceEnablePeerAccess(1, 0) == ALREADY_ENABLED
    assert runtime.cudaDeviceDisablePeerAccess(1) == SUCCESS
    assert runtime.cudaDeviceDisablePeerAccess(1) == NOT_ENABLED
    value = c_int()
    assert runtime.cudaDeviceGetP2PAttribute(byref(value), 2, 0, 1) == SUCCESS
    assert value.value == 1
    assert runtime.cudaDeviceGetP2PAttribute(byref(value), 2, 0, COUNT) == INVALID_DEVICE


def reaches(cuda: Driver, stream: int, pointer: int) -> bool:
    status = cuda.operator(stream, "reader", reads=[(pointer, 100)])
    if status == SUCCESS:
        return True
    expect(HAZARD, status)
    assert "kind: cross-device use without peer access" in last_hazard(cuda)
    return False


def peer_access() -> None:
    """Between every two devices: allowed where enabled, in that direction only."""
    cuda = Driver()
    contexts, streams, pointers = [], [], []
    for device in range(COUNT):
        contexts.append(context_of(cuda, device))
        cuda.use_device(device)
        streams.append(cuda.stream())
        pointers.append(cuda.alloc(SIZE))
        cuda("cuMemsetD8_v2", pointers[-1], 0, SIZE)
        cuda("cuCtxSynchronize")
    for device in range(COUNT):
        for owner in range(COUNT):
            assert reaches(cuda, streams[device], pointers[owner]) == (device == owner)
    cuda.use_device(2)
    cuda("cuCtxEnablePeerAccess", contexts[3], 0)
    assert reaches(cuda, streams[2], pointers[3])
    assert not reaches(cuda, streams[3], pointers[2])
    assert not reaches(cuda, streams[1], pointers[3])
    for stream in streams:
        cuda.sync(stream)
    # A memset runs on its stream's device; a copy finds a way.
    expect(SUCCESS, cuda.status("cuMemsetD8Async", pointers[3], 1, SIZE, streams[2]))
    expect(HAZARD, cuda.status("cuMemsetD8Async", pointers[1], 1, SIZE, streams[2]))
    cuda("cuCtxDisablePeerAccess", contexts[3])
    assert not reaches(cuda, streams[2], pointers[3])


def pool_access() -> None:
    """Who reaches a pool's memory is the pool's matter, not peer access."""
    cuda = Driver()
    cuda("cuCtxEnablePeerAccess", context_of(cuda, 1), 0)
    reader = cuda.stream()
    cuda.use_device(1)
    pool, flags = c_void_p(), c_int()
    cuda("cuDeviceGetDefaultMemPool", byref(pool), 1)
    stream = cuda.stream()
    pointer = cuda.alloc_async(SIZE, stream)
    cuda.fill(pointer, 0, SIZE, stream)
    cuda.sync(stream)

    def access(device: int) -> int:
        cuda("cuMemPoolGetAccess", byref(flags), pool, byref(Location(1, device)))
        return flags.value

    def allow(device: int, value: int, kind: int = 1) -> int:
        descriptor = AccessDescriptor(Location(kind, device), value)
        return cuda.status("cuMemPoolSetAccess", pool, byref(descriptor), 1)

    assert [access(device) for device in range(COUNT)] == [NONE, READ_WRITE, NONE, NONE]
    assert not reaches(cuda, reader, pointer)
    expect(SUCCESS, allow(0, READ_WRITE))
    assert access(0) == READ_WRITE
    assert reaches(cuda, reader, pointer)
    expect(SUCCESS, allow(0, NONE))
    assert not reaches(cuda, reader, pointer)
    expect(INVALID_DEVICE, allow(1, NONE))  # its own device stays
    expect(INVALID_DEVICE, allow(COUNT, READ_WRITE))
    expect(INVALID_VALUE, allow(0, 2))
    expect(INVALID_VALUE, allow(0, READ_WRITE, kind=2))
    expect(INVALID_VALUE, cuda.status("cuMemPoolSetAccess", pool, None, 1))
    expect(INVALID_VALUE, cuda.status("cuMemPoolSetAccess", None, None, 0))
    location = byref(Location(1, 0))
    expect(INVALID_VALUE, cuda.status("cuMemPoolGetAccess", None, pool, location))
    expect(INVALID_VALUE, cuda.status("cuMemPoolGetAccess", byref(flags), pool, None))
    wrong = byref(Location(1, COUNT))
    expect(INVALID_DEVICE, cuda.status("cuMemPoolGetAccess", byref(flags), pool, wrong))
    current = c_void_p()
    cuda("cuDeviceGetMemPool", byref(current), 0)
    assert current.value != pool.value, "one a device"
    expect(INVALID_VALUE, cuda.status("cuDeviceSetMemPool", 0, pool))


def mapped_access() -> None:
    """cuMemSetAccess for several devices at a time."""
    cuda = Driver()
    size, handle = 2 * MIB, c_uint64()
    cuda("cuMemCreate", byref(handle), size, byref(properties(device=3)), 0)
    pointer = cuda.reserve(size)
    cuda("cuMemMap", pointer, size, 0, handle, 0)
    allowed = (AccessDescriptor * 2)(
        AccessDescriptor(Location(1, 3), READ_WRITE), AccessDescriptor(Location(1, 1), READ_WRITE)
    )
    cuda("cuMemSetAccess", pointer, size, allowed, 2)
    value = c_uint64()
    for device, expected in ((0, NONE), (1, READ_WRITE), (2, NONE), (3, READ_WRITE)):
        cuda("cuMemGetAccess", byref(value), byref(Location(1, device)), pointer)
        assert value.value == expected
        cuda.use_device(device)
        assert reaches(cuda, cuda.stream(), pointer) == (expected == READ_WRITE)
    ordinal = c_int()
    cuda("cuPointerGetAttribute", byref(ordinal), DEVICE_ORDINAL, pointer)
    assert ordinal.value == 3
    allowed[1].location.id = COUNT
    expect(INVALID_DEVICE, cuda.status("cuMemSetAccess", pointer, size, allowed, 2))
    wrong = properties(device=COUNT)
    expect(INVALID_DEVICE, cuda.status("cuMemCreate", byref(handle), size, byref(wrong), 0))


def pipeline() -> None:
    """Four devices hand a buffer on, with the events that it takes; nothing is reported."""
    cuda = Driver()
    contexts = [context_of(cuda, device) for device in range(COUNT)]
    streams, buffers, done, free = [], [], [], []
    for device in range(COUNT):
        cuda.use_device(device)
        streams.append(cuda.stream())
        buffers.append(cuda.alloc(SIZE))
        done.append(cuda.event(DISABLE_TIMING))
        free.append(cuda.event(DISABLE_TIMING))
    source, target = cuda.pinned(SIZE), cuda.pinned(SIZE)
    for round_ in range(1, 9):
        source.fill(round_)
        for device in range(COUNT):
            cuda.use_device(device)
            stream = streams[device]
            if device == 0:
                cuda("cuStreamWaitEvent", stream, free[0], 0)
                cuda.upload(buffers[0], source, stream)
            else:
                cuda("cuStreamWaitEvent", stream, done[device - 1], 0)
                cuda("cuStreamWaitEvent", stream, free[device], 0)
                pair = (buffers[device], contexts[device], buffers[device - 1])
                cuda("cuMemcpyPeerAsync", *pair, contexts[device - 1], SIZE, stream)
                cuda.record(stream, before := cuda.event())
                cuda("cuStreamWaitEvent", streams[device - 1], before, 0)
                cuda.use_device(device - 1)
                cuda.record(streams[device - 1], free[device - 1])
                cuda.use_device(device)
            expect(SUCCESS, cuda.operator(stream, "work", writes=[(buffers[device], SIZE)]))
            cuda.record(stream, done[device])
        cuda.download(target, buffers[-1], streams[-1])
        cuda.record(streams[-1], free[-1])
        cuda("cuEventSynchronize", free[-1])
        assert target.holds(round_)
    assert cuda.hazards() == []


def broken_pipeline() -> None:
    cuda = Driver()
    contexts = [context_of(cuda, device) for device in range(2)]
    first, here = cuda.stream(), cuda.alloc(SIZE)
    cuda.fill(here, 1, SIZE, first)
    cuda.use_device(1)
    second, there = cuda.stream(), cuda.alloc(SIZE)
    arguments = (there, contexts[1], here, contexts[0], SIZE, second)
    expect(HAZARD, cuda.status("cuMemcpyPeerAsync", *arguments))
    assert "by memcpy peer on stream" in last_hazard(cuda)


def nvml() -> None:
    """All devices are there with names of their own, memory and peers."""
    cuda = Driver()
    library = ctypes.CDLL(str(library_path("emulator") / "libnvidia-ml.so.1"))
    assert library.nvmlInit_v2() == 0
    count, handles, uuids, places = c_uint(), [], set(), set()
    assert library.nvmlDeviceGetCount_v2(byref(count)) == 0
    assert count.value == COUNT
    cuda.use_device(2)
    cuda.alloc(8 * MIB)
    for index in range(COUNT):
        handle, found = c_void_p(), c_void_p()
        assert library.nvmlDeviceGetHandleByIndex_v2(c_uint(index), byref(handle)) == 0
        handles.append(handle)
        text = (c_char * 96)()
        assert library.nvmlDeviceGetUUID(handle, text, c_uint(96)) == 0
        uuids.add(text.value)
        assert library.nvmlDeviceGetHandleByUUID(text, byref(found)) == 0
        assert found.value == handle.value
        cuda("cuDeviceGetPCIBusId", text, 96, index)
        places.add(text.value)
        assert library.nvmlDeviceGetHandleByPciBusId_v2(text, byref(found)) == 0
        assert found.value == handle.value
        memory = (c_uint64 * 3)()
        assert library.nvmlDeviceGetMemoryInfo(handle, memory) == 0
        assert tuple(memory) == (64 * MIB, (56 if index == 2 else 64) * MIB, memory[2])
    assert len(uuids) == len(places) == COUNT
    status = c_uint(99)
    expected = {0: 0, 1: 0, 2: 5, 3: 5, 4: 0}
    ask = library.nvmlDeviceGetP2PStatus
    for capability, answer in expected.items():
        assert ask(handles[0], handles[3], capability, byref(status)) == 0
        assert status.value == answer
    invalid = 2
    assert ask(handles[0], handles[0], 0, byref(status)) == invalid
    assert ask(handles[0], handles[1], 5, byref(status)) == invalid
    assert ask(handles[0], handles[1], 0, None) == invalid
    assert ask(handles[0], c_void_p(COUNT + 1), 0, byref(status)) == invalid
    assert ask(None, handles[1], 0, byref(status)) == invalid


ORDERED = (contexts, reset, streams_and_events, peer_copies, pipeline, broken_pipeline)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order(schedule: str) -> None:
    for program in ORDERED:
        run_program(program, devices=COUNT, schedule=schedule)


def test_memory() -> None:
    for program in (capacities, peer_access, pool_access, mapped_access):
        run_program(program, devices=COUNT)


def test_calls() -> None:
    for program in (peer_calls, nvml, synchronising_covers_one_device):
        run_program(program, devices=COUNT)

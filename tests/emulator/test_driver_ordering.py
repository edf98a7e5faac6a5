"""Edges of the checker's order: destroyed streams, waiting hosts, refused accesses, aliased memory.

Each program here was a wrong report, or a missing one, once.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_uint64, c_void_p

import pytest
from driver_ctypes import (
    HAZARD,
    HOST_FUNCTION,
    INVALID_HANDLE,
    LEGACY,
    MIB,
    NOT_READY,
    SCHEDULES,
    SUCCESS,
    Driver,
    expect,
    run_program,
)

SIZE = 1000
BLOCKING = 0


def destroyed_blocking_stream() -> None:
    """The default stream comes after what a blocking stream did before it was destroyed."""
    cuda = Driver()
    blocking, pointer = cuda.stream(BLOCKING), cuda.alloc(SIZE)
    cuda.fill(pointer, 1, SIZE, blocking)
    cuda("cuStreamDestroy_v2", blocking)
    expect(SUCCESS, cuda.operator(LEGACY, "after", writes=[(pointer, SIZE)]))
    # Other streams do not, unless the default stream had work in between.
    blocking, other = cuda.stream(BLOCKING), cuda.stream(BLOCKING)
    cuda("cuCtxSynchronize")
    cuda.fill(pointer, 1, SIZE, blocking)
    cuda("cuStreamDestroy_v2", blocking)
    expect(HAZARD, cuda.operator(other, "too early", writes=[(pointer, SIZE)]))


def waiting_for_a_blocking_stream() -> None:
    """Synchronising or polling it waits for its own work, and not for the default stream's."""
    cuda = Driver()
    blocking, pointer, pinned = cuda.stream(BLOCKING), cuda.alloc(SIZE), cuda.pinned(SIZE)
    cuda.upload(pointer, pinned, LEGACY)
    cuda.sync(blocking)
    expect(SUCCESS, cuda.status("cuStreamQuery", blocking))
    expect(HAZARD, cuda.host_access(writes=[pinned]))
    cuda.fill(pointer, 1, SIZE, blocking)  # its own work comes after the default stream's
    cuda.sync(blocking)
    expect(SUCCESS, cuda.host_access(writes=[pinned]))


def idle_stream_is_ready_beside_a_busy_default_stream() -> None:
    cuda = Driver()
    blocking = cuda.stream(BLOCKING)
    gate = threading.Event()
    hold = HOST_FUNCTION(lambda _: gate.wait() and None)
    cuda("cuLaunchHostFunc", LEGACY, hold, 0)
    expect(SUCCESS, cuda.status("cuStreamQuery", blocking))
    expect(NOT_READY, cuda.status("cuStreamQuery", LEGACY))
    gate.set()
    cuda("cuCtxSynchronize")


def default_stream_waits_for_blocking_streams() -> None:
    cuda = Driver()
    blocking, pinned = cuda.stream(BLOCKING), cuda.pinned(SIZE)
    pointer = cuda.alloc(SIZE)
    cuda.download(pinned, pointer, blocking)
    cuda("cuStreamSynchronize", LEGACY)
    expect(SUCCESS, cuda.host_access(reads=[pinned]))


def refused_host_write_leaves_no_trace() -> None:
    cuda = Driver()
    first, second, pointer, pinned = (
        cuda.stream(), cuda.stream(), cuda.alloc(SIZE), cuda.pinned(SIZE)
    )  # fmt: skip
    cuda.upload(pointer, pinned, first)
    expect(HAZARD, cuda.host_access(writes=[pinned]))
    # Had the write run, the next reader would come after it and the one below would not conflict.
    expect(SUCCESS, cuda.operator(second, "reader", reads=[pinned]))
    cuda.sync(second)
    expect(HAZARD, cuda.host_access(writes=[pinned]))
    cuda.sync(first)
    expect(SUCCESS, cuda.host_access(writes=[pinned]))


def values_are_forgotten_with_their_memory() -> None:
    cuda = Driver()
    first, second, data = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    flag = cuda.alloc(SIZE)
    cuda.fill(data, 1, SIZE, first)
    cuda("cuStreamWriteValue32_v2", first, flag, 1, 0)
    cuda.sync(first)
    expect(SUCCESS, cuda.operator(first, "writer", writes=[(data, SIZE)]))
    cuda("cuStreamWriteValue32_v2", first, flag, 1, 0)
    cuda.free(flag)
    again = cuda.alloc(SIZE)
    assert again == flag
    cuda("cuMemsetD32_v2", again, 1, 1)
    expect(SUCCESS, cuda.operator(first, "writer", writes=[(data, SIZE)]))
    cuda("cuStreamWaitValue32_v2", second, again, 1, 0)  # a value of nobody's
    expect(HAZARD, cuda.operator(second, "reader", reads=[(data, SIZE)]))


def aliased_mappings() -> None:
    """Two addresses of one physical handle are the same bytes."""
    cuda = Driver()
    first, second, handle = cuda.stream(), cuda.stream(), cuda.create(4 * MIB)
    a, b = cuda.reserve(4 * MIB), cuda.reserve(4 * MIB)
    cuda.map(a, 4 * MIB, handle)
    expect(SUCCESS, cuda.operator(first, "before", writes=[(a + SIZE, SIZE)]))
    cuda.map(b, 4 * MIB, handle)  # what came before counts too
    expect(HAZARD, cuda.operator(second, "reader", reads=[(b + SIZE, SIZE)]))
    expect(SUCCESS, cuda.operator(second, "beside", reads=[(b + 2 * SIZE, SIZE)]))
    cuda.order(first, second)
    expect(SUCCESS, cuda.operator(second, "reader", reads=[(b + SIZE, SIZE)]))
    expect(HAZARD, cuda.operator(first, "writer", writes=[(a, 2 * SIZE)]))
    # Taking one of the two away does not touch what runs through the other.
    cuda.sync(first)
    expect(SUCCESS, cuda.status("cuMemUnmap", a, 4 * MIB))
    expect(HAZARD, cuda.status("cuMemUnmap", b, 4 * MIB))


def handles_do_not_come_back() -> None:
    cuda = Driver()
    first = cuda.event()
    cuda("cuEventDestroy_v2", first)
    for _ in range((1 << 16) + 10):
        event = cuda.event()
        assert event != first
        cuda("cuEventDestroy_v2", event)
    expect(INVALID_HANDLE, cuda.status("cuEventQuery", first))


def replaced_kernel_keeps_its_name() -> None:
    cuda = Driver()
    body_type = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
    calls: list[int] = []
    bodies = [body_type(lambda *_, i=i: calls.append(i)) for i in range(2)]
    module, function, name = c_uint64(), c_uint64(), b"a kernel name too long to be inline"
    register = cuda.library.spillover_emulator_register_kernel
    assert register(name, bodies[0], None, None, ctypes.c_size_t(0)) == SUCCESS
    cuda("cuModuleLoadData", byref(module), ctypes.c_char_p(b"image"))
    cuda("cuModuleGetFunction", byref(function), module, ctypes.c_char_p(name))
    cuda("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, 0, None, None)
    assert register(name, bodies[1], None, None, ctypes.c_size_t(0)) == SUCCESS
    text = ctypes.c_char_p()
    cuda("cuFuncGetName", byref(text), function)
    assert text.value == name
    cuda("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, 0, None, None)
    cuda("cuCtxSynchronize")
    assert calls == [0, 1]


def unknown_kernel() -> None:
    cuda = Driver()
    module, function = c_uint64(), c_uint64()
    cuda("cuModuleLoadData", byref(module), ctypes.c_char_p(b"image"))
    name = ctypes.c_char_p(b"_ZN5space6kernelEPfi")
    assert cuda.status("cuModuleGetFunction", byref(function), module, name) != SUCCESS


def eager_behind_a_host_function() -> None:
    """What waits for a stream that a host function held up runs as soon as that is over."""
    cuda = Driver()
    first, second, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    cuda("cuMemsetD8_v2", pointer, 0, SIZE)
    cuda("cuCtxSynchronize")
    gate, ran = threading.Event(), threading.Event()
    hold = HOST_FUNCTION(lambda _: gate.wait() and None)
    tell = HOST_FUNCTION(lambda _: ran.set())
    cuda("cuLaunchHostFunc", first, hold, 0)
    cuda.order(first, second)
    cuda.fill(pointer, 7, SIZE, second)
    cuda("cuLaunchHostFunc", second, tell, 0)
    assert cuda.peek(pointer, SIZE) == bytes(SIZE)
    gate.set()
    assert ran.wait(20)
    assert cuda.peek(pointer, SIZE) == b"\7" * SIZE


def full_queue_behind_a_host_function() -> None:
    """A queue is bounded: the host waits once it is full, whatever is at its front."""
    cuda = Driver()
    stream, pointer = cuda.stream(), cuda.alloc(SIZE)
    gate = threading.Event()
    hold = HOST_FUNCTION(lambda _: gate.wait() and None)
    cuda("cuLaunchHostFunc", stream, hold, 0)
    threading.Timer(0.3, gate.set).start()
    for _ in range(5000):
        cuda.fill(pointer, 1, SIZE, stream)
    assert gate.is_set()
    cuda.sync(stream)


PROGRAMS = (
    destroyed_blocking_stream,
    waiting_for_a_blocking_stream,
    idle_stream_is_ready_beside_a_busy_default_stream,
    default_stream_waits_for_blocking_streams,
    refused_host_write_leaves_no_trace,
    values_are_forgotten_with_their_memory,
    aliased_mappings,
    full_queue_behind_a_host_function,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order(schedule: str) -> None:
    run_program(*PROGRAMS, schedule=schedule)


def test_handles_and_names() -> None:
    result = run_program(handles_do_not_come_back, replaced_kernel_keeps_its_name, unknown_kernel)
    assert "kernel space::kernel(float*, int) has no body" in result.stderr


def test_eager_is_eager_behind_a_host_function() -> None:
    run_program(eager_behind_a_host_function, schedule="eager")

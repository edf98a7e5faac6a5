"""What CUDA forbids while a stream captures, and what the error is."""

from __future__ import annotations

import threading
from ctypes import byref, c_int, c_uint64

from driver_ctypes import (
    HOST_FUNCTION,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    PER_THREAD,
    SUCCESS,
    Driver,
    expect,
    run_program,
)
from graph_calls import (
    ACTIVE,
    BLOCKING,
    CAPTURED_EVENT,
    GLOBAL,
    ILLEGAL_STATE,
    IMPLICIT,
    INVALID,
    INVALIDATED,
    ISOLATION,
    MERGE,
    NONE,
    RELAXED,
    SIZE,
    THREAD_LOCAL,
    UNJOINED,
    UNMATCHED,
    UNSUPPORTED,
    WRONG_THREAD,
    begin,
    end_status,
    fork,
    status_of,
)

# What a capture forbids.


def waiting_invalidates() -> None:
    cuda = Driver()
    stream, a = cuda.stream(), cuda.alloc(SIZE)
    for call in (("cuStreamSynchronize", stream), ("cuStreamQuery", stream), ("cuCtxSynchronize",)):
        begin(cuda, stream)
        cuda.fill(a, 1, SIZE, stream)
        expect(UNSUPPORTED, cuda.status(*call))
        assert status_of(cuda, stream) == INVALID
        expect(INVALIDATED, cuda.status("cuMemsetD8Async", a, 1, SIZE, stream))
        expect(INVALIDATED, end_status(cuda, stream))
        assert status_of(cuda, stream) == NONE
    cuda.fill(a, 1, SIZE, stream)
    cuda.sync(stream)


def unsafe_calls_depend_on_modes() -> None:
    cuda = Driver()
    stream, pointer, mode = cuda.stream(), c_uint64(), c_int(RELAXED)
    done = cuda.record(cuda.stream())
    for capture_mode, expected in (
        (GLOBAL, UNSUPPORTED),
        (THREAD_LOCAL, UNSUPPORTED),
        (RELAXED, 0),
    ):
        for call in (("cuMemAlloc_v2", byref(pointer), SIZE), ("cuEventQuery", done)):
            begin(cuda, stream, capture_mode)
            expect(expected, cuda.status(*call))
            expect(SUCCESS if expected == 0 else INVALIDATED, end_status(cuda, stream))
    begin(cuda, stream)
    cuda("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == GLOBAL
    cuda("cuMemAlloc_v2", byref(pointer), SIZE)
    cuda("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == RELAXED
    expect(SUCCESS, end_status(cuda, stream))
    mode.value = 3
    expect(INVALID_VALUE, cuda.status("cuThreadExchangeStreamCaptureMode", byref(mode)))
    expect(INVALID_VALUE, cuda.status("cuThreadExchangeStreamCaptureMode", None))


def other_threads() -> None:
    cuda = Driver()
    stream, outcomes = cuda.stream(), []

    def allocate() -> None:
        cuda.use_device(0)
        pointer = c_uint64()
        outcomes.append(cuda.status("cuMemAlloc_v2", byref(pointer), SIZE))

    def finish() -> None:
        outcomes.append(end_status(cuda, stream))

    def on_thread(function: object) -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    for mode, expected in ((GLOBAL, UNSUPPORTED), (THREAD_LOCAL, SUCCESS), (RELAXED, SUCCESS)):
        begin(cuda, stream, mode)
        on_thread(allocate)
        expect(SUCCESS if expected == SUCCESS else INVALIDATED, end_status(cuda, stream))
        assert outcomes.pop() == expected
    begin(cuda, stream, THREAD_LOCAL)
    on_thread(finish)
    assert outcomes.pop() == WRONG_THREAD
    expect(SUCCESS, end_status(cuda, stream))
    begin(cuda, stream, RELAXED)
    on_thread(finish)
    assert outcomes.pop() == SUCCESS


def the_legacy_stream() -> None:
    cuda = Driver()
    blocking, stream, a = cuda.stream(BLOCKING), cuda.stream(), cuda.alloc(SIZE)
    expect(UNSUPPORTED, cuda.status("cuStreamBeginCapture_v2", LEGACY, GLOBAL))
    begin(cuda, blocking)
    status = c_int()
    expect(IMPLICIT, cuda.status("cuStreamIsCapturing", LEGACY, byref(status)))
    assert status_of(cuda, blocking) == ACTIVE, "asking must not end the capture"
    expect(IMPLICIT, cuda.status("cuMemsetD8Async", a, 1, SIZE, LEGACY))
    expect(INVALIDATED, end_status(cuda, blocking))
    begin(cuda, stream)  # does not order with the legacy stream
    cuda.fill(a, 1, SIZE, LEGACY)
    cuda.fill(a, 1, SIZE, stream)
    event = cuda.record(stream)
    expect(IMPLICIT, cuda.status("cuStreamWaitEvent", LEGACY, event, 0))
    expect(INVALIDATED, end_status(cuda, stream))
    begin(cuda, PER_THREAD)
    expect(SUCCESS, end_status(cuda, PER_THREAD))


def crossing_events() -> None:
    cuda = Driver()
    stream, other, third, a = cuda.stream(), cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    outside = cuda.record(other)
    begin(cuda, stream)
    expect(ISOLATION, cuda.status("cuStreamWaitEvent", stream, outside, 0))
    expect(INVALIDATED, end_status(cuda, stream))
    begin(cuda, stream, RELAXED)
    begin(cuda, other, RELAXED)
    event = cuda.record(stream)
    expect(MERGE, cuda.status("cuStreamWaitEvent", other, event, 0))
    expect(INVALIDATED, end_status(cuda, stream))
    expect(INVALIDATED, end_status(cuda, other))
    begin(cuda, stream)
    cuda.fill(a, 1, SIZE, stream)
    event = cuda.record(stream)
    expect(CAPTURED_EVENT, cuda.status("cuEventQuery", event))
    expect(INVALIDATED, end_status(cuda, stream))
    expect(CAPTURED_EVENT, cuda.status("cuEventSynchronize", event))
    cuda("cuEventRecord", event, third)  # makes it an ordinary event again
    cuda("cuEventSynchronize", event)


def ends_of_captures() -> None:
    cuda = Driver()
    stream, side, a = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    expect(ILLEGAL_STATE, end_status(cuda, stream))
    expect(INVALID_VALUE, cuda.status("cuStreamBeginCapture_v2", stream, 3))
    begin(cuda, stream)
    expect(ILLEGAL_STATE, cuda.status("cuStreamBeginCapture_v2", stream, GLOBAL))
    fork(cuda, stream, side)
    cuda.fill(a, 1, SIZE, side)
    expect(UNJOINED, end_status(cuda, stream))
    assert status_of(cuda, side) == NONE
    begin(cuda, stream)
    fork(cuda, stream, side)
    expect(UNMATCHED, end_status(cuda, side))
    expect(INVALIDATED, end_status(cuda, stream))
    expect(INVALID_HANDLE, cuda.status("cuStreamBeginCapture_v2", 0x1234560, GLOBAL))
    begin(cuda, stream)
    expect(INVALID_VALUE, cuda.status("cuStreamEndCapture", stream, None))
    expect(SUCCESS, end_status(cuda, stream))
    dying = cuda.stream()
    begin(cuda, dying)
    cuda("cuStreamDestroy_v2", dying)
    cuda("cuCtxSynchronize")


def unsupported_work_is_refused() -> None:
    cuda = Driver()
    stream, a, host = cuda.stream(), cuda.alloc(SIZE), cuda.pinned(SIZE)
    pointer, callback = c_uint64(), HOST_FUNCTION(lambda _: None)
    for call in (
        ("cuMemAllocAsync", byref(pointer), SIZE, stream),
        ("cuStreamAddCallback", stream, callback, 0, 0),
        ("cuMemcpyHtoD_v2", a, host, SIZE),
        ("spillover_emulator_operator_begin", stream, b"operator", None, 0),
    ):
        begin(cuda, stream)
        expect(UNSUPPORTED, cuda.status(*call))
        expect(INVALIDATED, end_status(cuda, stream))


def test_rules_of_capture() -> None:
    run_program(
        waiting_invalidates,
        unsafe_calls_depend_on_modes,
        other_threads,
        the_legacy_stream,
        crossing_events,
        ends_of_captures,
        unsupported_work_is_refused,
    )

"""CUDA graphs at the driver's level: capture, its rules, nodes made by hand, launches, hazards."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p

import pytest
from driver_ctypes import (
    HAZARD,
    HOST_FUNCTION,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    NOT_READY,
    NOT_SUPPORTED,
    PER_THREAD,
    SCHEDULES,
    SUCCESS,
    Driver,
    expect,
    run_program,
)

SIZE = 1000
GLOBAL, THREAD_LOCAL, RELAXED = range(3)
NONE, ACTIVE, INVALID = range(3)
BLOCKING, EXTERNAL = 0, 1
ILLEGAL_STATE = 401
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT = range(900, 907)
CAPTURED_EVENT, WRONG_THREAD, _, UPDATE_FAILURE = range(907, 911)
KERNEL, MEMCPY, MEMSET, HOST, GRAPH, EMPTY, WAIT_EVENT, EVENT_RECORD = range(8)


def begin(cuda: Driver, stream: int, mode: int = GLOBAL) -> None:
    cuda("cuStreamBeginCapture_v2", stream, mode)


def end(cuda: Driver, stream: int) -> int:
    graph = c_uint64()
    cuda("cuStreamEndCapture", stream, byref(graph))
    return graph.value


def end_status(cuda: Driver, stream: int) -> int:
    graph = c_uint64(1)
    status = cuda.status("cuStreamEndCapture", stream, byref(graph))
    assert status == SUCCESS or not graph.value
    return status


def instantiate(cuda: Driver, graph: int) -> int:
    executable = c_uint64()
    cuda("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
    return executable.value


def status_of(cuda: Driver, stream: int) -> int:
    status = c_int(-1)
    cuda("cuStreamIsCapturing", stream, byref(status))
    return status.value


def nodes_of(cuda: Driver, graph: int, function: str = "cuGraphGetNodes") -> list[int]:
    count = c_size_t()
    cuda(function, graph, None, byref(count))
    nodes = (c_uint64 * max(count.value, 1))()
    cuda(function, graph, nodes, byref(count))
    return list(nodes)[: count.value]


def type_of(cuda: Driver, node: int) -> int:
    kind = c_int(-1)
    cuda("cuGraphNodeGetType", node, byref(kind))
    return kind.value


def fork(cuda: Driver, before: int, after: int) -> None:
    cuda.order(before, after)


def new_graph(cuda: Driver) -> int:
    graph = c_uint64()
    cuda("cuGraphCreate", byref(graph), 0)
    return graph.value


class MemsetParameters(ctypes.Structure):
    """``CUDA_MEMSET_NODE_PARAMS``."""

    _fields_ = (
        ("dst", c_uint64),
        ("pitch", c_size_t),
        ("value", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("width", c_size_t),
        ("height", c_size_t),
    )


class HostParameters(ctypes.Structure):
    """``CUDA_HOST_NODE_PARAMS``."""

    _fields_ = (("function", HOST_FUNCTION), ("argument", c_void_p))


def add_fill(
    cuda: Driver, graph: int, pointer: int, value: int, *after: int, size: int = SIZE
) -> int:
    node = c_uint64()
    parameters = MemsetParameters(pointer, 0, value, 1, size, 1)
    cuda(
        "cuGraphAddMemsetNode", byref(node), graph, handles(after), len(after), byref(parameters), 0
    )
    return node.value


def handles(values: tuple[int, ...]) -> ctypes.Array[c_uint64] | None:
    return (c_uint64 * len(values))(*values) if values else None


# Capture and launch.


def copies_are_captured_and_replayed() -> None:
    cuda = Driver()
    stream, other = cuda.stream(), cuda.stream()
    source, target, host = cuda.alloc(SIZE), cuda.alloc(SIZE), cuda.pinned(SIZE).fill(3)
    cuda.fill(target, 9, SIZE, stream)
    cuda.sync(stream)
    begin(cuda, stream)
    assert status_of(cuda, stream) == ACTIVE
    assert status_of(cuda, other) == NONE
    cuda.upload(source, host, stream)
    cuda.copy(target, source, SIZE, stream)
    graph = end(cuda, stream)
    assert status_of(cuda, stream) == NONE
    assert cuda.fetch(target, SIZE) == bytes([9]) * SIZE, "capturing must not run anything"
    assert [type_of(cuda, node) for node in nodes_of(cuda, graph)] == [MEMCPY, MEMCPY]
    executable = instantiate(cuda, graph)
    cuda("cuGraphDestroy", graph)
    for value in (4, 5):
        cuda.sync(other)
        host.fill(value)
        cuda("cuGraphLaunch", executable, other)
        assert cuda.fetch(target, SIZE) == bytes([value]) * SIZE
    cuda("cuGraphExecDestroy", executable)


def a_launch_is_work_of_its_stream() -> None:
    """Later work, events and queries see it; an executable's launches come one after the other."""
    cuda = Driver()
    stream, other, pointer = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    begin(cuda, stream)
    cuda.fill(pointer, 1, SIZE, stream)
    executable = instantiate(cuda, end(cuda, stream))
    gate = threading.Event()
    hold = HOST_FUNCTION(lambda _: gate.wait() and None)
    cuda("cuLaunchHostFunc", stream, hold, 0)
    cuda("cuGraphLaunch", executable, stream)
    event = cuda.record(stream)
    expect(NOT_READY, cuda.status("cuEventQuery", event))
    expect(NOT_READY, cuda.status("cuStreamQuery", stream))
    gate.set()
    cuda("cuEventSynchronize", event)
    assert cuda.peek(pointer, SIZE) == bytes([1]) * SIZE
    cuda("cuGraphLaunch", executable, stream)
    cuda("cuGraphLaunch", executable, other)  # would be a hazard if nothing ordered it
    cuda.sync(other)
    cuda("cuGraphExecDestroy", executable)


def forked_branches_run_and_join() -> None:
    cuda = Driver()
    stream, side, a, b = cuda.stream(), cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)
    begin(cuda, stream)
    cuda.fill(a, 1, SIZE, stream)
    fork(cuda, stream, side)
    assert status_of(cuda, side) == ACTIVE
    cuda.fill(b, 2, SIZE, side)
    fork(cuda, side, stream)
    cuda.copy(b, a, SIZE // 2, stream)
    graph = end(cuda, stream)
    assert status_of(cuda, side) == NONE
    assert len(nodes_of(cuda, graph, "cuGraphGetRootNodes")) == 1
    executable = instantiate(cuda, graph)
    for target in (stream, LEGACY, side):
        cuda("cuMemsetD8Async", b, 0, SIZE, target)
        cuda("cuGraphLaunch", executable, target)
        assert cuda.fetch(b, SIZE) == bytes([1]) * (SIZE // 2) + bytes([2]) * (SIZE // 2)


def host_functions_and_values_are_captured() -> None:
    cuda = Driver()
    stream, flag = cuda.stream(), cuda.alloc(64)
    calls: list[int] = []
    function = HOST_FUNCTION(lambda argument: calls.append(argument or 0))
    cuda.fill(flag, 0, 64, stream)
    begin(cuda, stream)
    cuda("cuLaunchHostFunc", stream, function, 7)
    cuda("cuStreamWriteValue32_v2", stream, flag, 5, 0)
    cuda("cuStreamWaitValue32_v2", stream, flag, 5, 1)
    graph = end(cuda, stream)
    assert [type_of(cuda, node) for node in nodes_of(cuda, graph)] == [HOST, 12, 12]
    executable = instantiate(cuda, graph)
    for _ in range(2):
        cuda("cuGraphLaunch", executable, stream)
    assert cuda.fetch(flag, 4) == b"\5\0\0\0"
    assert calls == [7, 7]


def external_events() -> None:
    """Recorded and waited for by each launch."""
    cuda = Driver()
    stream, other, a = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    wait_for, recorded = cuda.event(), cuda.event()
    begin(cuda, stream)
    cuda("cuStreamWaitEvent", stream, wait_for, EXTERNAL)
    cuda.fill(a, 1, SIZE, stream)
    cuda("cuEventRecordWithFlags", recorded, stream, EXTERNAL)
    graph = end(cuda, stream)
    kinds = [type_of(cuda, node) for node in nodes_of(cuda, graph)]
    assert kinds == [WAIT_EVENT, MEMSET, EVENT_RECORD]
    executable = instantiate(cuda, graph)
    cuda.fill(a, 2, SIZE, other)
    cuda("cuEventRecord", wait_for, other)
    cuda("cuGraphLaunch", executable, stream)
    cuda("cuStreamWaitEvent", other, recorded, 0)
    cuda.copy(a, a, SIZE, other)  # a hazard without the event
    assert cuda.fetch(a, SIZE) == bytes([1]) * SIZE


def launches_can_be_captured() -> None:
    cuda = Driver()
    stream, a = cuda.stream(), cuda.alloc(SIZE)
    begin(cuda, stream)
    cuda.fill(a, 1, SIZE // 2, stream)
    inner = instantiate(cuda, end(cuda, stream))
    begin(cuda, stream)
    cuda.fill(a, 2, SIZE, stream)
    cuda("cuGraphLaunch", inner, stream)
    graph = end(cuda, stream)
    assert [type_of(cuda, node) for node in nodes_of(cuda, graph)] == [MEMSET, GRAPH]
    outer = instantiate(cuda, graph)
    cuda("cuGraphExecDestroy", inner)
    cuda("cuGraphLaunch", outer, stream)
    assert cuda.fetch(a, SIZE) == bytes([1]) * (SIZE // 2) + bytes([2]) * (SIZE // 2)
    cuda("cuGraphExecDestroy", outer)
    cuda("cuGraphDestroy", graph)


def an_executable_may_be_destroyed_while_it_runs() -> None:
    cuda = Driver()
    stream, a = cuda.stream(), cuda.alloc(SIZE)
    begin(cuda, stream)
    cuda.fill(a, 6, SIZE, stream)
    graph = end(cuda, stream)
    executable = instantiate(cuda, graph)
    cuda("cuGraphLaunch", executable, stream)
    cuda("cuGraphExecDestroy", executable)
    cuda("cuGraphDestroy", graph)
    assert cuda.fetch(a, SIZE) == bytes([6]) * SIZE
    expect(INVALID_VALUE, cuda.status("cuGraphLaunch", executable, stream))
    expect(INVALID_VALUE, cuda.status("cuGraphDestroy", graph))


ON_EVERY_SCHEDULE = (
    copies_are_captured_and_replayed,
    a_launch_is_work_of_its_stream,
    forked_branches_run_and_join,
    host_functions_and_values_are_captured,
    external_events,
    launches_can_be_captured,
    an_executable_may_be_destroyed_while_it_runs,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_launches(schedule: str) -> None:
    run_program(*ON_EVERY_SCHEDULE, schedule=schedule)


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


# Information about captures, and graphs by hand.


def capture_info_and_dependencies() -> None:
    cuda = Driver()
    stream, a, b = cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)
    status, number, graph, count = c_int(), c_uint64(), c_uint64(), c_size_t()
    dependencies = ctypes.POINTER(c_uint64)()
    outputs = (byref(number), byref(graph), byref(dependencies))

    def info() -> list[int]:
        cuda("cuStreamGetCaptureInfo_v3", stream, byref(status), *outputs, None, byref(count))
        return dependencies[: count.value] if status.value == ACTIVE else []

    assert info() == []
    assert (status.value, number.value) == (NONE, 0)
    begin(cuda, stream)
    assert info() == []
    first_number = number.value
    cuda.fill(a, 1, SIZE, stream)
    (first,) = info()
    assert graph.value
    # A node of the program's own joins the capture.
    added = add_fill(cuda, graph.value, b, 2)
    nodes = (c_uint64 * 1)(added)
    update = "cuStreamUpdateCaptureDependencies_v2"
    cuda(update, stream, nodes, None, 1, 0)
    assert info() == [first, added]
    cuda(update, stream, nodes, None, 1, 1)
    assert info() == [added]
    expect(INVALID_VALUE, cuda.status(update, stream, nodes, None, 1, 2))
    expect(INVALID_VALUE, cuda.status(update, stream, (c_uint64 * 1)(77), None, 1, 0))
    expect(INVALID_VALUE, cuda.status("cuGraphDestroy", graph.value))
    expect(SUCCESS, end_status(cuda, stream))
    expect(ILLEGAL_STATE, cuda.status(update, stream, nodes, None, 1, 0))
    expect(INVALID_VALUE, cuda.status("cuStreamGetCaptureInfo_v2", stream, None, None))
    begin(cuda, stream)
    info()
    assert number.value != first_number
    end(cuda, stream)


def capture_to_an_existing_graph() -> None:
    cuda = Driver()
    stream, a = cuda.stream(), cuda.alloc(SIZE)
    graph = new_graph(cuda)
    first = add_fill(cuda, graph, a, 1)
    name = "cuStreamBeginCaptureToGraph"
    expect(INVALID_VALUE, cuda.status(name, stream, 0, None, None, 0, GLOBAL))
    cuda(name, stream, graph, (c_uint64 * 1)(first), None, 1, GLOBAL)
    cuda.fill(a, 2, SIZE // 2, stream)
    assert end(cuda, stream) == graph
    assert len(nodes_of(cuda, graph)) == 2
    assert nodes_of(cuda, graph, "cuGraphGetRootNodes") == [first]
    cuda("cuGraphLaunch", instantiate(cuda, graph), stream)
    assert cuda.fetch(a, SIZE) == bytes([2]) * (SIZE // 2) + bytes([1]) * (SIZE // 2)


def graphs_by_hand() -> None:
    cuda = Driver()
    stream, a, calls = cuda.stream(), cuda.alloc(SIZE), []
    graph, node, count = new_graph(cuda), c_uint64(), c_size_t(5)
    first = add_fill(cuda, graph, a, 1)
    second = add_fill(cuda, graph, a, 2, first, size=10)
    function = HOST_FUNCTION(lambda argument: calls.append(argument))
    parameters = HostParameters(function, 3)
    cuda("cuGraphAddHostNode", byref(node), graph, handles((second,)), 1, byref(parameters))
    cuda("cuGraphAddEmptyNode", byref(node), graph, None, 0)
    empty = node.value
    from_, to = handles((second,)), handles((empty,))
    cuda("cuGraphAddDependencies_v2", graph, from_, to, None, 1)
    expect(INVALID_VALUE, cuda.status("cuGraphAddDependencies_v2", graph, from_, to, None, 1))
    listed = (c_uint64 * 5)(*[9] * 5)
    cuda("cuGraphNodeGetDependencies_v2", empty, listed, None, byref(count))
    assert (count.value, list(listed)) == (1, [second, 0, 0, 0, 0])
    cuda("cuGraphGetEdges_v2", graph, None, None, None, byref(count))
    assert count.value == 3
    cuda("cuGraphNodeGetDependentNodes_v2", second, None, None, byref(count))
    assert count.value == 2
    executable = instantiate(cuda, graph)
    cuda("cuGraphLaunch", executable, stream)
    assert cuda.fetch(a, SIZE) == bytes([2]) * 10 + bytes([1]) * (SIZE - 10)
    assert calls == [3]
    # Circles cannot run.
    cuda("cuGraphAddDependencies_v2", graph, to, handles((first,)), None, 1)
    result = c_uint64()
    expect(INVALID_VALUE, cuda.status("cuGraphInstantiateWithFlags", byref(result), graph, 0))
    cuda("cuGraphRemoveDependencies_v2", graph, to, handles((first,)), None, 1)
    cuda("cuGraphDestroyNode", empty)
    assert len(nodes_of(cuda, graph)) == 3
    expect(INVALID_VALUE, cuda.status("cuGraphDestroyNode", empty))
    clone, found = c_uint64(), c_uint64()
    cuda("cuGraphClone", byref(clone), graph)
    cuda("cuGraphNodeFindInClone", byref(found), second, clone.value)
    assert type_of(cuda, found.value) == MEMSET
    expect(INVALID_VALUE, cuda.status("cuGraphNodeFindInClone", byref(found), empty, clone.value))
    cuda("cuGraphDestroy", graph)
    cuda("cuGraphLaunch", instantiate(cuda, clone.value), stream)
    cuda.sync(stream)
    assert calls == [3, 3]


def wrong_arguments() -> None:
    cuda = Driver()
    a, graph, node = cuda.alloc(SIZE), new_graph(cuda), c_uint64()
    out = byref(node)
    good = MemsetParameters(a, 0, 1, 1, SIZE, 1)
    add = ("cuGraphAddMemsetNode", out, graph, None, 0)
    for bad in (
        MemsetParameters(a, 0, 1, 3, SIZE, 1),
        MemsetParameters(a + 1, 0, 1, 4, 8, 1),
        MemsetParameters(0, 0, 1, 1, SIZE, 1),
        MemsetParameters(a, 0, 1, 1, 0, 1),
        MemsetParameters(a, 0, 1, 1, SIZE, 0),
        MemsetParameters(a, 4, 1, 1, 8, 2),
        MemsetParameters(a, 0, 1, 1, SIZE + 10_000_000, 1),
    ):
        expect(INVALID_VALUE, cuda.status(*add, byref(bad), 0))
    expect(INVALID_VALUE, cuda.status(*add, None, 0))
    expect(INVALID_VALUE, cuda.status("cuGraphAddMemsetNode", None, graph, None, 0, byref(good), 0))
    expect(INVALID_VALUE, cuda.status("cuGraphAddMemsetNode", out, 0, None, 0, byref(good), 0))
    expect(INVALID_VALUE, cuda.status("cuGraphAddEmptyNode", out, graph, None, 1))
    expect(INVALID_VALUE, cuda.status("cuGraphAddEmptyNode", out, graph, handles((5,)), 1))
    expect(INVALID_VALUE, cuda.status("cuGraphAddHostNode", out, graph, None, 0, None))
    expect(INVALID_VALUE, cuda.status("cuGraphAddChildGraphNode", out, graph, None, 0, graph))
    expect(INVALID_VALUE, cuda.status("cuGraphAddEventRecordNode", out, graph, None, 0, 5))
    expect(INVALID_VALUE, cuda.status("cuGraphAddMemcpyNode", out, graph, None, 0, None, 0))
    expect(INVALID_VALUE, cuda.status("cuGraphCreate", out, 1))
    expect(INVALID_VALUE, cuda.status("cuGraphCreate", None, 0))
    for function in ("cuGraphGetNodes", "cuGraphGetRootNodes"):
        expect(INVALID_VALUE, cuda.status(function, graph, None, None))
    expect(INVALID_VALUE, cuda.status("cuGraphNodeGetType", 5, out))
    expect(INVALID_VALUE, cuda.status("cuGraphInstantiateWithFlags", out, graph, 64))
    expect(INVALID_VALUE, cuda.status("cuGraphInstantiateWithFlags", None, graph, 0))
    expect(NOT_SUPPORTED, cuda.status("cuGraphInstantiateWithFlags", out, graph, 4))
    expect(INVALID_VALUE, cuda.status("cuGraphLaunch", 5, cuda.stream()))
    expect(INVALID_HANDLE, cuda.status("cuGraphLaunch", instantiate(cuda, graph), 0x123450))
    expect(INVALID_VALUE, cuda.status("cuGraphExecDestroy", 5))
    conditional = (c_int * 64)(13)
    expect(NOT_SUPPORTED, cuda.status("cuGraphAddNode_v2", out, graph, None, None, 0, conditional))
    expect(INVALID_VALUE, cuda.status("cuGraphDebugDotPrint", graph, None, 0))
    expect(304, cuda.status("cuGraphDebugDotPrint", graph, b"/nowhere/at/all", 0))


def executables_are_updated() -> None:
    cuda = Driver()
    stream, a, b = cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)

    def capture(pointer: int, value: int, more: bool = False) -> int:
        begin(cuda, stream)
        cuda.fill(pointer, value, SIZE, stream)
        if more:
            cuda.fill(pointer, value, SIZE, stream)
        return end(cuda, stream)

    executable = instantiate(cuda, capture(a, 1))
    result = (c_uint64 * 3)()
    cuda("cuGraphExecUpdate_v2", executable, capture(b, 2), byref(result))
    assert result[0] == 0
    cuda("cuGraphLaunch", executable, stream)
    assert cuda.fetch(b, SIZE) == bytes([2]) * SIZE
    status = cuda.status("cuGraphExecUpdate_v2", executable, capture(a, 1, True), byref(result))
    expect(UPDATE_FAILURE, status)
    assert result[0] & 0xFFFFFFFF == 2, "the topology changed"
    expect(INVALID_VALUE, cuda.status("cuGraphExecUpdate_v2", executable, 0, byref(result)))
    graph = capture(a, 5)
    (node,) = nodes_of(cuda, graph)
    executable = instantiate(cuda, graph)
    cuda("cuGraphNodeSetEnabled", executable, node, 0)
    cuda.fill(a, 7, SIZE, stream)
    cuda("cuGraphLaunch", executable, stream)
    assert cuda.fetch(a, SIZE) == bytes([7]) * SIZE


def user_objects_live_as_long_as_graphs() -> None:
    cuda = Driver()
    stream, graph, ended = cuda.stream(), new_graph(cuda), []
    destroy = HOST_FUNCTION(lambda argument: ended.append(argument))
    thing = c_uint64()
    expect(INVALID_VALUE, cuda.status("cuUserObjectCreate", byref(thing), 1, destroy, 0, 1))
    expect(INVALID_VALUE, cuda.status("cuUserObjectCreate", byref(thing), 1, destroy, 1, 0))
    cuda("cuUserObjectCreate", byref(thing), 11, destroy, 1, 1)
    expect(INVALID_VALUE, cuda.status("cuGraphRetainUserObject", graph, thing.value, 2, 1))
    cuda("cuGraphRetainUserObject", graph, thing.value, 1, 1)
    expect(INVALID_VALUE, cuda.status("cuUserObjectRelease", thing.value, 1))
    pointer = cuda.alloc(SIZE)
    add_fill(cuda, graph, pointer, 1)
    executable = instantiate(cuda, graph)
    cuda("cuGraphDestroy", graph)
    assert ended == []
    cuda("cuGraphLaunch", executable, stream)
    cuda.sync(stream)
    cuda("cuGraphExecDestroy", executable)
    assert ended == [11]
    cuda("cuUserObjectCreate", byref(thing), 12, destroy, 2, 1)
    cuda("cuUserObjectRetain", thing.value, 1)
    cuda("cuUserObjectRelease", thing.value, 3)
    assert ended == [11, 12]


def graphs_are_drawn() -> None:
    cuda = Driver()
    graph, pointer = new_graph(cuda), cuda.alloc(SIZE)
    first = add_fill(cuda, graph, pointer, 1)
    add_fill(cuda, graph, pointer, 2, first)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "graph.dot")
        cuda("cuGraphDebugDotPrint", graph, path.encode(), 1)
        with open(path) as file:
            text = file.read()
    assert text.startswith("digraph dot {")
    assert text.count("memset") >= 2
    assert text.count("->") == 1


def test_graphs_by_hand() -> None:
    run_program(
        capture_info_and_dependencies,
        capture_to_an_existing_graph,
        graphs_by_hand,
        wrong_arguments,
        executables_are_updated,
        user_objects_live_as_long_as_graphs,
        graphs_are_drawn,
    )


# Hazards.


def unordered_nodes_are_a_hazard() -> None:
    cuda = Driver()
    stream, a, b = cuda.stream(), cuda.alloc(SIZE), cuda.alloc(SIZE)
    for conflicting, status in ((True, HAZARD), (False, SUCCESS)):
        graph = new_graph(cuda)
        first = add_fill(cuda, graph, a, 1)
        add_fill(cuda, graph, a if conflicting else b, 2)
        executable = instantiate(cuda, graph)
        expect(status, cuda.status("cuGraphLaunch", executable, stream))
        cuda("cuCtxSynchronize")
        ordered = new_graph(cuda)
        first = add_fill(cuda, ordered, a, 1)
        add_fill(cuda, ordered, a, 2, first)
        expect(SUCCESS, cuda.status("cuGraphLaunch", instantiate(cuda, ordered), stream))
        cuda("cuCtxSynchronize")
    (text,) = cuda.hazards()
    assert "two unordered writes" in text
    assert "memset in a graph (node 1)" in text


def a_launch_must_be_ordered() -> None:
    cuda = Driver()
    stream, other, a = cuda.stream(), cuda.stream(), cuda.alloc(SIZE)
    graph = new_graph(cuda)
    add_fill(cuda, graph, a, 1)
    executable = instantiate(cuda, graph)
    cuda("cuGraphLaunch", executable, stream)
    expect(HAZARD, cuda.status("cuMemsetD8Async", a, 2, SIZE, other))
    cuda("cuCtxSynchronize")
    cuda("cuGraphLaunch", executable, stream)
    cuda.order(stream, other)
    cuda.fill(a, 2, SIZE, other)
    expect(HAZARD, cuda.status("cuGraphLaunch", executable, stream))
    cuda("cuCtxSynchronize")


def memory_that_is_gone_is_reported() -> None:
    cuda = Driver()
    stream, a = cuda.stream(), cuda.alloc(SIZE)
    graph = new_graph(cuda)
    add_fill(cuda, graph, a, 1)
    executable = instantiate(cuda, graph)
    cuda.free(a)
    expect(ILLEGAL_ADDRESS, cuda.status("cuGraphLaunch", executable, stream))
    (text,) = cuda.hazards()
    assert "use after free" in text
    cuda.sync(stream)  # nothing ran, so the device is well


def test_hazards() -> None:
    run_program(unordered_nodes_are_a_hazard)
    run_program(a_launch_must_be_ordered)
    run_program(memory_that_is_gone_is_reported)


def forked_children_get_errors() -> None:
    cuda = Driver()
    stream = cuda.stream()
    begin(cuda, stream)
    child = os.fork()
    if child == 0:
        graph = c_uint64()
        wrong = cuda.status("cuStreamEndCapture", stream, byref(graph)) != 3
        wrong |= cuda.status("cuGraphCreate", byref(graph), 0) != 3
        os._exit(int(wrong))
    assert os.waitpid(child, 0)[1] == 0
    expect(SUCCESS, end_status(cuda, stream))


def test_after_a_fork() -> None:
    run_program(forked_children_get_errors)

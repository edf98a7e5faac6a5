"""CUDA graphs at the driver's level: capture, launches on every schedule, hazards."""

from __future__ import annotations

import os
import threading
from ctypes import byref, c_uint64

import pytest
from driver_ctypes import (
    HAZARD,
    HOST_FUNCTION,
    ILLEGAL_ADDRESS,
    INVALID_VALUE,
    LEGACY,
    NOT_READY,
    SCHEDULES,
    SUCCESS,
    Driver,
    expect,
    run_program,
)
from graph_calls import (
    ACTIVE,
    EVENT_RECORD,
    EXTERNAL,
    GRAPH,
    HOST,
    MEMCPY,
    MEMSET,
    NONE,
    SIZE,
    WAIT_EVENT,
    add_fill,
    begin,
    end,
    end_status,
    fork,
    instantiate,
    new_graph,
    nodes_of,
    status_of,
    type_of,
)

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

"""Information about captures, and graphs made and changed by hand."""

from __future__ import annotations

import ctypes
import os
import tempfile
from ctypes import byref, c_int, c_size_t, c_uint64

from driver_ctypes import (
    HOST_FUNCTION,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_SUPPORTED,
    SUCCESS,
    Driver,
    expect,
    run_program,
)
from graph_calls import (
    ACTIVE,
    GLOBAL,
    ILLEGAL_STATE,
    MEMSET,
    NONE,
    SIZE,
    UPDATE_FAILURE,
    HostParameters,
    MemsetParameters,
    add_fill,
    begin,
    end,
    end_status,
    handles,
    instantiate,
    new_graph,
    nodes_of,
    type_of,
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

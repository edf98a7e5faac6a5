"""Captures, graphs and user objects of the emulated driver, called rightly and wrongly.

See :mod:`conformance_driver`.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

from conformance import Calls
from conformance_driver import HOST_NOTHING, NO_DEVICE, NO_HANDLE
from conformance_work import SIZE, int_parameters, registered_kernel
from driver_ctypes import (
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    LEGACY,
    NOT_SUPPORTED,
    Driver,
)
from graph_calls import (
    ACTIVE,
    EMPTY,
    GLOBAL,
    GRAPH,
    HOST,
    ILLEGAL_STATE,
    KERNEL,
    MEMCPY,
    MEMSET,
    UNSUPPORTED,
    UPDATE_FAILURE,
    HostParameters,
    MemsetParameters,
    handles,
)

OPERATING_SYSTEM = 304
CONDITIONAL = 13


def captures(call: Calls, cuda: Driver) -> None:
    stream, graph, status, mode = cuda.stream(), c_uint64(), c_int(-1), c_int(2)
    number, nodes, count = c_uint64(), c_void_p(), c_size_t()
    call("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == GLOBAL
    cuda("cuThreadExchangeStreamCaptureMode", byref(mode))
    call.fails(INVALID_VALUE, "cuThreadExchangeStreamCaptureMode", byref(c_int(3)))
    call.fails(INVALID_VALUE, "cuThreadExchangeStreamCaptureMode", None)
    call.fails(INVALID_VALUE, "cuStreamBeginCapture", stream, 3)
    call.fails(UNSUPPORTED, "cuStreamBeginCapture", LEGACY, GLOBAL)
    call.fails(INVALID_HANDLE, "cuStreamBeginCapture", NO_HANDLE, GLOBAL)
    update = "cuStreamUpdateCaptureDependencies"
    call.fails(ILLEGAL_STATE, update, stream, None, None, 0, 1)
    call.fails(ILLEGAL_STATE, "cuStreamEndCapture", stream, byref(graph))
    call("cuStreamBeginCapture", stream, GLOBAL)
    call.fails(ILLEGAL_STATE, "cuStreamBeginCapture", stream, GLOBAL)
    info = (byref(number), byref(graph), byref(nodes), None, byref(count))
    call("cuStreamIsCapturing", stream, byref(status))
    assert status.value == ACTIVE
    call.fails(INVALID_VALUE, "cuStreamIsCapturing", stream, None)
    call.fails(INVALID_HANDLE, "cuStreamIsCapturing", NO_HANDLE, byref(status))
    call("cuStreamGetCaptureInfo", stream, byref(status), *info)
    assert graph.value
    assert count.value == 0
    call.fails(INVALID_VALUE, "cuStreamGetCaptureInfo", stream, None, *info)
    call(update, stream, None, None, 0, 1)
    call.fails(INVALID_VALUE, update, stream, None, None, 1, 0)
    call.fails(INVALID_VALUE, update, stream, None, None, 0, 9)
    call.fails(INVALID_VALUE, "cuStreamEndCapture", stream, None)
    call("cuStreamEndCapture", stream, byref(graph))
    to_graph = "cuStreamBeginCaptureToGraph"
    call.fails(INVALID_VALUE, to_graph, stream, NO_HANDLE, None, None, 0, GLOBAL)
    call.fails(INVALID_VALUE, to_graph, stream, graph, None, None, 1, GLOBAL)
    call.fails(INVALID_VALUE, to_graph, stream, graph, None, None, 0, 3)
    call(to_graph, stream, graph, None, None, 0, GLOBAL)
    cuda("cuStreamEndCapture", stream, byref(graph))
    cuda("cuGraphDestroy", graph)


class Copy3DSide(ctypes.Structure):
    """One side of ``CUDA_MEMCPY3D``."""

    _fields_ = (
        ("x_bytes", c_size_t),
        ("y", c_size_t),
        ("z", c_size_t),
        ("level", c_size_t),
        ("type", c_int),
        ("host", c_void_p),
        ("device", c_uint64),
        ("array", c_void_p),
        ("reserved", c_void_p),
        ("pitch", c_size_t),
        ("height", c_size_t),
    )


class Copy3D(ctypes.Structure):
    """``CUDA_MEMCPY3D``."""

    _fields_ = (
        ("source", Copy3DSide),
        ("target", Copy3DSide),
        ("width", c_size_t),
        ("height", c_size_t),
        ("depth", c_size_t),
    )


def copy_node(target: int, source: int, size: int) -> Copy3D:
    sides = [Copy3DSide(type=4, device=pointer) for pointer in (source, target)]
    return Copy3D(*sides, size, 1, 1)


class KernelNode(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS``."""

    _fields_ = (
        ("function", c_uint64),
        ("shape", c_uint * 6),
        ("shared_bytes", c_uint),
        ("parameters", c_void_p),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    )


def kernel_node(function: int, shape: Sequence[int] = (1, 1, 1, 32, 1, 1)) -> KernelNode:
    parameters = ctypes.cast(_PARAMETERS, c_void_p)
    return KernelNode(function, (c_uint * 6)(*shape), 0, parameters, None, None, None)


_PARAMETERS = int_parameters()


class NodeParameters(ctypes.Structure):
    """``CUgraphNodeParams``: a type, and what its node needs from byte 16 on."""

    _fields_ = (
        ("type", c_int),
        ("reserved", c_int * 3),
        ("body", ctypes.c_ubyte * 232),
        ("end", ctypes.c_longlong),
    )

    @classmethod
    def of(cls, kind: int, body: ctypes.Structure | c_uint64 | None = None) -> NodeParameters:
        made = cls(kind)
        if body is not None:
            ctypes.memmove(ctypes.addressof(made) + 16, byref(body), ctypes.sizeof(body))
        return made


class MemsetParameters2(ctypes.Structure):
    """``CUDA_MEMSET_NODE_PARAMS_v2``."""

    _fields_ = (*MemsetParameters._fields_, ("context", c_void_p))


def graph_nodes(call: Calls, cuda: Driver) -> None:
    """Nodes of each type: added, changed, read back."""
    graph, other, node, out = c_uint64(), c_uint64(), c_uint64(), c_uint64()
    device, event = cuda.alloc(SIZE), cuda.event()
    function = loaded_function(cuda)
    cuda("cuGraphCreate", byref(graph), 0)
    cuda("cuGraphCreate", byref(other), 0)
    fill, host = MemsetParameters(device, 0, 1, 1, 64, 1), HostParameters(HOST_NOTHING, None)
    odd, no_host = MemsetParameters(device, 0, 1, 3, 64, 1), HostParameters()
    move, wild = copy_node(device + 512, device, 64), copy_node(device, NO_HANDLE, 1 << 40)
    launch, empty = kernel_node(function), kernel_node(function, (0, 1, 1, 1, 1, 1))
    for kind, right, wrong, context in (
        ("Kernel", launch, empty, ()),
        ("Memcpy", move, wild, (0,)),
        ("Memset", fill, odd, (0,)),
        ("Host", host, no_host, ()),
    ):
        add = f"cuGraphAdd{kind}Node"
        call(add, byref(node), graph, None, 0, byref(right), *context)
        call.fails(INVALID_VALUE, add, byref(out), graph, None, 0, byref(wrong), *context)
        call.fails(INVALID_VALUE, add, byref(out), graph, None, 0, None, *context)
        call.fails(INVALID_VALUE, add, None, graph, None, 0, byref(right), *context)
        call.fails(INVALID_VALUE, add, byref(out), NO_HANDLE, None, 0, byref(right), *context)
        call.fails(INVALID_VALUE, add, byref(out), graph, None, 1, byref(right), *context)
        foreign = handles((node.value,))
        call.fails(INVALID_VALUE, add, byref(out), other, foreign, 1, byref(right), *context)
        change = f"cuGraph{kind}NodeSetParams"
        call(change, node, byref(right))
        call.fails(INVALID_VALUE, change, node, byref(wrong))
        call.fails(INVALID_VALUE, change, node, None)
        call.fails(INVALID_VALUE, change, NO_HANDLE, byref(right))
        if kind in ("Memset", "Host"):
            read = f"cuGraph{kind}NodeGetParams"
            call(read, node, byref(type(right)()))
            call.fails(INVALID_VALUE, read, node, None)
            call.fails(INVALID_VALUE, read, NO_HANDLE, byref(type(right)()))
    call("cuGraphAddEmptyNode", byref(node), graph, None, 0)
    call.fails(INVALID_VALUE, "cuGraphAddEmptyNode", None, graph, None, 0)
    call.fails(INVALID_VALUE, "cuGraphMemsetNodeGetParams", node, byref(fill))
    call.fails(INVALID_VALUE, "cuGraphKernelNodeSetParams", node, byref(launch))
    call("cuGraphAddChildGraphNode", byref(node), graph, None, 0, other)
    call.fails(INVALID_VALUE, "cuGraphAddChildGraphNode", byref(out), graph, None, 0, graph)
    call.fails(INVALID_VALUE, "cuGraphAddChildGraphNode", byref(out), graph, None, 0, NO_HANDLE)
    call("cuGraphChildGraphNodeGetGraph", node, byref(out))
    call.fails(INVALID_VALUE, "cuGraphChildGraphNodeGetGraph", node, None)
    for kind in ("Record", "Wait"):
        add, read = f"cuGraphAddEvent{kind}Node", f"cuGraphEvent{kind}NodeGetEvent"
        call(add, byref(node), graph, None, 0, event)
        call.fails(INVALID_VALUE, add, byref(out), graph, None, 0, NO_HANDLE)
        call(read, node, byref(out))
        assert out.value == event
        call.fails(INVALID_VALUE, read, node, None)
        call.fails(INVALID_VALUE, read, NO_HANDLE, byref(out))
    general = NodeParameters.of(MEMSET, MemsetParameters2(device, 0, 2, 1, 64, 1, None))
    add = "cuGraphAddNode"
    for kind, parameters in (
        (MEMSET, general),
        (HOST, NodeParameters.of(HOST, host)),
        (EMPTY, NodeParameters.of(EMPTY)),
        (KERNEL, NodeParameters.of(KERNEL, launch)),
        (GRAPH, NodeParameters.of(GRAPH, other)),
    ):
        call(add, byref(node), graph, None, None, 0, byref(parameters))
        if kind == MEMSET:
            filled = node.value
    call.fails(INVALID_VALUE, add, byref(out), graph, None, None, 0, None)
    wrong_copy = NodeParameters.of(MEMCPY)
    call.fails(INVALID_VALUE, add, byref(out), graph, None, None, 0, byref(wrong_copy))
    conditional = NodeParameters.of(CONDITIONAL)
    call.fails(NOT_SUPPORTED, add, byref(out), graph, None, None, 0, byref(conditional))
    call("cuGraphNodeSetParams", filled, byref(general))
    call.fails(INVALID_VALUE, "cuGraphNodeSetParams", filled, None)
    call.fails(INVALID_VALUE, "cuGraphNodeSetParams", filled, byref(NodeParameters.of(EMPTY)))
    for each in (graph, other):
        cuda("cuGraphDestroy", each)
    cuda("cuEventDestroy_v2", event)
    cuda.free(device)


def loaded_function(cuda: Driver) -> int:
    module, function = c_uint64(), c_uint64()
    cuda("cuModuleLoadData", byref(module), b"image")
    cuda("cuModuleGetFunction", byref(function), module, registered_kernel(cuda))
    return function.value


def graph_structure(call: Calls, cuda: Driver) -> None:
    graph, clone, kind = c_uint64(), c_uint64(), c_int(-1)
    first, second, found = c_uint64(), c_uint64(), c_uint64()
    call("cuGraphCreate", byref(graph), 0)
    call.fails(INVALID_VALUE, "cuGraphCreate", byref(clone), 1)
    call.fails(INVALID_VALUE, "cuGraphCreate", None, 0)
    for node in (first, second):
        cuda("cuGraphAddEmptyNode", byref(node), graph, None, 0)
    call("cuGraphNodeGetType", first, byref(kind))
    assert kind.value == EMPTY
    call.fails(INVALID_VALUE, "cuGraphNodeGetType", first, None)
    call.fails(INVALID_VALUE, "cuGraphNodeGetType", NO_HANDLE, byref(kind))
    pair = (handles((first.value,)), handles((second.value,)))
    backwards = (pair[1], pair[0])
    add, remove = "cuGraphAddDependencies", "cuGraphRemoveDependencies"
    call(add, graph, *pair, None, 1)
    call.fails(INVALID_VALUE, add, graph, *pair, None, 1)
    call.fails(INVALID_VALUE, add, graph, pair[0], pair[0], None, 1)
    call.fails(INVALID_VALUE, add, graph, None, pair[1], None, 1)
    call.fails(INVALID_VALUE, add, NO_HANDLE, *pair, None, 1)
    call.fails(INVALID_VALUE, remove, graph, *backwards, None, 1)
    call.fails(INVALID_VALUE, remove, graph, *pair[:1], None, None, 1)
    nodes, count = (c_uint64 * 4)(), c_size_t(4)
    for name, expected in (("cuGraphGetNodes", 2), ("cuGraphGetRootNodes", 1)):
        count.value = 4
        call(name, graph, nodes, byref(count))
        assert count.value == expected
        call.fails(INVALID_VALUE, name, graph, nodes, None)
        call.fails(INVALID_VALUE, name, NO_HANDLE, nodes, byref(count))
    count.value = 4
    call("cuGraphGetEdges", graph, nodes, (c_uint64 * 4)(), None, byref(count))
    assert count.value == 1
    call.fails(INVALID_VALUE, "cuGraphGetEdges", graph, nodes, None, None, byref(count))
    call.fails(INVALID_VALUE, "cuGraphGetEdges", graph, nodes, nodes, None, None)
    for name, node in (
        ("cuGraphNodeGetDependencies", second),
        ("cuGraphNodeGetDependentNodes", first),
    ):
        count.value = 4
        call(name, node, nodes, None, byref(count))
        assert count.value == 1
        call.fails(INVALID_VALUE, name, node, nodes, None, None)
        call.fails(INVALID_VALUE, name, NO_HANDLE, nodes, None, byref(count))
    call("cuGraphClone", byref(clone), graph)
    call.fails(INVALID_VALUE, "cuGraphClone", None, graph)
    call.fails(INVALID_VALUE, "cuGraphClone", byref(found), NO_HANDLE)
    call("cuGraphNodeFindInClone", byref(found), first, clone)
    call.fails(INVALID_VALUE, "cuGraphNodeFindInClone", byref(found), NO_HANDLE, clone)
    call.fails(INVALID_VALUE, "cuGraphNodeFindInClone", None, first, clone)
    call(remove, graph, *pair, None, 1)
    call("cuGraphDestroyNode", second)
    call.fails(INVALID_VALUE, "cuGraphDestroyNode", second)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        call("cuGraphDebugDotPrint", graph, str(path).encode(), 0)
        assert path.read_text().startswith("digraph")
        nowhere = str(Path(folder) / "none" / "graph.dot").encode()
        call.fails(OPERATING_SYSTEM, "cuGraphDebugDotPrint", graph, nowhere, 0)
    call.fails(INVALID_VALUE, "cuGraphDebugDotPrint", graph, None, 0)
    for each in (graph, clone):
        call("cuGraphDestroy", each)
        call.fails(INVALID_VALUE, "cuGraphDestroy", each)


class InstantiateParameters(ctypes.Structure):
    """``CUDA_GRAPH_INSTANTIATE_PARAMS``."""

    _fields_ = (
        ("flags", c_uint64),
        ("stream", c_uint64),
        ("error_node", c_void_p),
        ("result", c_int),
    )


class UpdateResult(ctypes.Structure):
    """``CUgraphExecUpdateResultInfo``."""

    _fields_ = (("result", c_int), ("node", c_void_p), ("from_node", c_void_p))


def executables(call: Calls, cuda: Driver) -> None:
    graph, empty, node, exec_, out = (c_uint64() for _ in range(5))
    stream, device, number = cuda.stream(), cuda.alloc(SIZE), c_uint64()
    fill = MemsetParameters2(device, 0, 6, 1, SIZE, 1, None)
    for each in (graph, empty):
        cuda("cuGraphCreate", byref(each), 0)
    cuda("cuGraphAddMemsetNode", byref(node), graph, None, 0, byref(fill), 0)
    call("cuGraphInstantiateWithFlags", byref(exec_), graph, 1)
    for wrong in ((None, graph, 0), (byref(out), NO_HANDLE, 0), (byref(out), graph, 0x100)):
        call.fails(INVALID_VALUE, "cuGraphInstantiateWithFlags", *wrong)
    call.fails(NOT_SUPPORTED, "cuGraphInstantiateWithFlags", byref(out), graph, 4)
    right = InstantiateParameters(0, stream, None, -1)
    call("cuGraphInstantiateWithParams", byref(out), graph, byref(right))
    assert right.result == 0
    call("cuGraphExecDestroy", out)
    call.fails(INVALID_VALUE, "cuGraphExecDestroy", out)
    call.fails(INVALID_VALUE, "cuGraphInstantiateWithParams", byref(out), graph, None)
    call.fails(INVALID_VALUE, "cuGraphInstantiateWithParams", None, graph, byref(right))
    call("cuGraphExecGetFlags", exec_, byref(number))
    assert number.value == 1
    call.fails(INVALID_VALUE, "cuGraphExecGetFlags", exec_, None)
    call.fails(INVALID_VALUE, "cuGraphExecGetFlags", NO_HANDLE, byref(number))
    for name in ("cuGraphUpload", "cuGraphLaunch"):
        call(name, exec_, stream)
        call.fails(INVALID_VALUE, name, NO_HANDLE, stream)
        call.fails(INVALID_HANDLE, name, exec_, NO_HANDLE)
    assert cuda.fetch(device, SIZE) == b"\6" * SIZE
    call("cuGraphNodeGetEnabled", exec_, node, byref(number))
    call.fails(INVALID_VALUE, "cuGraphNodeGetEnabled", exec_, node, None)
    call.fails(INVALID_VALUE, "cuGraphNodeGetEnabled", exec_, NO_HANDLE, byref(number))
    call("cuGraphNodeSetEnabled", exec_, node, 0)
    call.fails(INVALID_VALUE, "cuGraphNodeSetEnabled", exec_, NO_HANDLE, 0)
    call.fails(INVALID_VALUE, "cuGraphNodeSetEnabled", NO_HANDLE, node, 0)
    change, parameters = "cuGraphExecNodeSetParams", NodeParameters.of(MEMSET, fill)
    call(change, exec_, node, byref(parameters))
    call.fails(INVALID_VALUE, change, exec_, node, None)
    call.fails(INVALID_VALUE, change, exec_, NO_HANDLE, byref(parameters))
    call.fails(INVALID_VALUE, change, exec_, node, byref(NodeParameters.of(EMPTY)))
    call.fails(INVALID_VALUE, change, NO_HANDLE, node, byref(parameters))
    result = UpdateResult()
    call("cuGraphExecUpdate", exec_, graph, byref(result))
    call.fails(UPDATE_FAILURE, "cuGraphExecUpdate", exec_, empty, byref(result))
    assert result.result != 0
    call.fails(INVALID_VALUE, "cuGraphExecUpdate", exec_, graph, None)
    call.fails(INVALID_VALUE, "cuGraphExecUpdate", exec_, NO_HANDLE, byref(result))
    cuda("cuGraphExecDestroy", exec_)
    for each in (graph, empty):
        cuda("cuGraphDestroy", each)
    cuda.free(device)


def user_objects(call: Calls, cuda: Driver) -> None:
    graph, thing, out = c_uint64(), c_uint64(), c_uint64()
    cuda("cuGraphCreate", byref(graph), 0)
    create = "cuUserObjectCreate"
    call(create, byref(thing), None, HOST_NOTHING, 2, 1)
    for wrong in (
        (None, None, HOST_NOTHING, 1, 1),
        (byref(out), None, None, 1, 1),
        (byref(out), None, HOST_NOTHING, 0, 1),
        (byref(out), None, HOST_NOTHING, 1 << 31, 1),
        (byref(out), None, HOST_NOTHING, 1, 0),
    ):
        call.fails(INVALID_VALUE, create, *wrong)
    call("cuUserObjectRetain", thing, 1)
    call.fails(INVALID_VALUE, "cuUserObjectRetain", thing, 0)
    call.fails(INVALID_VALUE, "cuUserObjectRetain", NO_HANDLE, 1)
    call("cuGraphRetainUserObject", graph, thing, 1, 1)
    call.fails(INVALID_VALUE, "cuGraphRetainUserObject", graph, thing, 9, 1)
    call.fails(INVALID_VALUE, "cuGraphRetainUserObject", graph, thing, 1, 2)
    call.fails(INVALID_VALUE, "cuGraphRetainUserObject", NO_HANDLE, thing, 1, 0)
    call("cuGraphReleaseUserObject", graph, thing, 1)
    call.fails(INVALID_VALUE, "cuGraphReleaseUserObject", graph, thing, 1)
    call.fails(INVALID_VALUE, "cuUserObjectRelease", thing, 9)
    call("cuUserObjectRelease", thing, 2)
    call.fails(INVALID_VALUE, "cuUserObjectRelease", thing, 1)
    cuda("cuGraphDestroy", graph)


def graph_memory(call: Calls, cuda: Driver) -> None:
    value = c_uint64(5)
    call("cuDeviceGraphMemTrim", 0)
    call.fails(INVALID_DEVICE, "cuDeviceGraphMemTrim", NO_DEVICE)
    read, write = "cuDeviceGetGraphMemAttribute", "cuDeviceSetGraphMemAttribute"
    call(read, 0, 0, byref(value))
    assert value.value == 0
    call(write, 0, 1, byref(value))
    for name in (read, write):
        call.fails(INVALID_DEVICE, name, NO_DEVICE, 1, byref(value))
        call.fails(INVALID_VALUE, name, 0, 99, byref(value))
        call.fails(INVALID_VALUE, name, 0, 1, None)
    call.fails(INVALID_VALUE, write, 0, 1, byref(c_uint64(1)))


AREAS = (
    captures,
    graph_nodes,
    graph_structure,
    executables,
    user_objects,
    graph_memory,
)

"""Calls and constants of CUDA graphs that several test modules use."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p

from driver_ctypes import HOST_FUNCTION, SUCCESS, Driver

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

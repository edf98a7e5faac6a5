"""Graphs, captures and user objects of the emulated runtime, called rightly and wrongly.

See :mod:`conformance_runtime`.
"""

from __future__ import annotations

import ctypes
import tempfile
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

from conformance import Calls
from conformance_driver import HOST_NOTHING, NO_HANDLE
from conformance_graphs import InstantiateParameters, UpdateResult
from conformance_runtime import (
    INVALID_DIRECTION,
    INVALID_FUNCTION,
    NO_DIRECTION,
    SIZE,
    CompiledProgram,
    Dim3,
    one,
)
from conformance_work import int_parameters
from driver_ctypes import INVALID_VALUE, Driver
from graph_calls import (
    ACTIVE,
    EMPTY,
    GLOBAL,
    HOST,
    ILLEGAL_STATE,
    UPDATE_FAILURE,
    HostParameters,
    MemsetParameters,
    handles,
)
from runtime_library import DEFAULT


class Pitched(ctypes.Structure):
    """``cudaPitchedPtr``."""

    _fields_ = (("pointer", c_uint64), ("pitch", c_size_t), ("x", c_size_t), ("y", c_size_t))


class CopyParameters(ctypes.Structure):
    """``cudaMemcpy3DParms``."""

    _fields_ = (
        ("source_array", c_void_p),
        ("source_place", c_size_t * 3),
        ("source", Pitched),
        ("target_array", c_void_p),
        ("target_place", c_size_t * 3),
        ("target", Pitched),
        ("extent", c_size_t * 3),
        ("kind", c_int),
    )


class KernelParameters(ctypes.Structure):
    """``cudaKernelNodeParams``."""

    _fields_ = (
        ("function", c_void_p),
        ("grid", Dim3),
        ("block", Dim3),
        ("shared_bytes", c_uint),
        ("parameters", c_void_p),
        ("extra", c_void_p),
    )


class GeneralParameters(ctypes.Structure):
    """``cudaGraphNodeParams``."""

    _fields_ = (
        ("type", c_int),
        ("reserved", c_int * 3),
        ("body", ctypes.c_ubyte * 232),
        ("end", ctypes.c_longlong),
    )


def nodes(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    graph, other = one(call, "cudaGraphCreate", 0), one(call, "cudaGraphCreate", 0)
    device, event, out = one(call, "cudaMalloc", SIZE), one(call, "cudaEventCreate"), c_uint64()
    arguments = ctypes.cast(int_parameters(), c_void_p)
    launch = KernelParameters(program.kernel, Dim3(1, 1, 1), Dim3(32, 1, 1), 0, arguments, None)
    unknown = KernelParameters(NO_HANDLE, Dim3(1, 1, 1), Dim3(32, 1, 1), 0, arguments, None)
    extent = (c_size_t * 3)(64, 1, 1)
    copy = CopyParameters(
        source=Pitched(device, 64), target=Pitched(device + 512, 64), extent=extent, kind=DEFAULT
    )
    nothing = CopyParameters(extent=extent, kind=DEFAULT)
    fill, odd = MemsetParameters(device, 0, 1, 1, 64, 1), MemsetParameters(device, 0, 1, 3, 64, 1)
    for kind, right, wrong, code in (
        ("Kernel", launch, unknown, INVALID_FUNCTION),
        ("Memcpy", copy, nothing, INVALID_VALUE),
        ("Memset", fill, odd, INVALID_VALUE),
        ("Host", HostParameters(HOST_NOTHING, None), HostParameters(), INVALID_VALUE),
    ):
        name = f"cudaGraphAdd{kind}Node"
        node = one(call, name, graph, None, 0, byref(right))
        call.fails(code, name, byref(out), graph, None, 0, byref(wrong))
        call.fails(INVALID_VALUE, name, byref(out), graph, None, 0, None)
        call.fails(INVALID_VALUE, name, byref(out), NO_HANDLE, None, 0, byref(right))
        if kind == "Kernel":
            call("cudaGraphKernelNodeSetParams", node, byref(launch))
            call.fails(INVALID_VALUE, "cudaGraphKernelNodeSetParams", node, None)
            call.fails(INVALID_VALUE, "cudaGraphKernelNodeSetParams", NO_HANDLE, byref(launch))
    one_dimension = (device, device + 512, 64, DEFAULT)
    one(call, "cudaGraphAddMemcpyNode1D", graph, None, 0, *one_dimension)
    name = "cudaGraphAddMemcpyNode1D"
    call.fails(INVALID_VALUE, name, byref(out), graph, None, 0, 0, *one_dimension[1:])
    wrong_way = (*one_dimension[:3], NO_DIRECTION)
    call.fails(INVALID_DIRECTION, name, byref(out), graph, None, 0, *wrong_way)
    one(call, "cudaGraphAddEmptyNode", graph, None, 0)
    call.fails(INVALID_VALUE, "cudaGraphAddEmptyNode", None, graph, None, 0)
    child = one(call, "cudaGraphAddChildGraphNode", graph, None, 0, other)
    call.fails(INVALID_VALUE, "cudaGraphAddChildGraphNode", byref(out), graph, None, 0, graph)
    call("cudaGraphChildGraphNodeGetGraph", child, byref(out))
    call.fails(INVALID_VALUE, "cudaGraphChildGraphNodeGetGraph", child, None)
    for kind in ("Record", "Wait"):
        one(call, f"cudaGraphAddEvent{kind}Node", graph, None, 0, event)
        wrong_event = (byref(out), graph, None, 0, NO_HANDLE)
        call.fails(INVALID_VALUE, f"cudaGraphAddEvent{kind}Node", *wrong_event)
    general = GeneralParameters(HOST)
    ctypes.memmove(ctypes.addressof(general) + 16, byref(HostParameters(HOST_NOTHING, None)), 16)
    one(call, "cudaGraphAddNode", graph, None, None, 0, byref(general))
    call.fails(INVALID_VALUE, "cudaGraphAddNode", byref(out), graph, None, None, 0, None)
    empty_host = GeneralParameters(HOST)
    call.fails(
        INVALID_VALUE, "cudaGraphAddNode", byref(out), graph, None, None, 0, byref(empty_host)
    )
    for each in (graph, other):
        call("cudaGraphDestroy", each)
    call("cudaEventDestroy", event)
    call("cudaFree", device)


def structure(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    graph, kind, out = one(call, "cudaGraphCreate", 0), c_int(-1), c_uint64()
    call.fails(INVALID_VALUE, "cudaGraphCreate", None, 0)
    first, second = (one(call, "cudaGraphAddEmptyNode", graph, None, 0) for _ in range(2))
    call("cudaGraphNodeGetType", first, byref(kind))
    assert kind.value == EMPTY
    call.fails(INVALID_VALUE, "cudaGraphNodeGetType", NO_HANDLE, byref(kind))
    pair = (handles((first,)), handles((second,)))
    add, remove = "cudaGraphAddDependencies", "cudaGraphRemoveDependencies"
    call(add, graph, *pair, None, 1)
    call.fails(INVALID_VALUE, add, graph, pair[0], pair[0], None, 1)
    call.fails(INVALID_VALUE, remove, graph, pair[1], pair[0], None, 1)
    found, count = (c_uint64 * 4)(), c_size_t(4)
    for name in ("cudaGraphGetNodes", "cudaGraphGetRootNodes"):
        call(name, graph, found, byref(count))
        call.fails(INVALID_VALUE, name, NO_HANDLE, found, byref(count))
        count.value = 4
    call("cudaGraphGetEdges", graph, found, (c_uint64 * 4)(), None, byref(count))
    assert count.value == 1
    call.fails(INVALID_VALUE, "cudaGraphGetEdges", graph, found, None, None, byref(count))
    for name, node in (
        ("cudaGraphNodeGetDependencies", second),
        ("cudaGraphNodeGetDependentNodes", first),
    ):
        count.value = 4
        call(name, node, found, None, byref(count))
        assert count.value == 1
        call.fails(INVALID_VALUE, name, NO_HANDLE, found, None, byref(count))
    clone = one(call, "cudaGraphClone", graph)
    call.fails(INVALID_VALUE, "cudaGraphClone", byref(out), NO_HANDLE)
    call("cudaGraphNodeFindInClone", byref(out), first, clone)
    call.fails(INVALID_VALUE, "cudaGraphNodeFindInClone", byref(out), NO_HANDLE, clone)
    call(remove, graph, *pair, None, 1)
    call("cudaGraphDestroyNode", second)
    call.fails(INVALID_VALUE, "cudaGraphDestroyNode", second)
    with tempfile.TemporaryDirectory() as folder:
        call("cudaGraphDebugDotPrint", graph, str(Path(folder) / "graph.dot").encode(), 0)
    call.fails(INVALID_VALUE, "cudaGraphDebugDotPrint", graph, None, 0)
    for each in (graph, clone):
        call("cudaGraphDestroy", each)
        call.fails(INVALID_VALUE, "cudaGraphDestroy", each)


def executables(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    graph, empty = one(call, "cudaGraphCreate", 0), one(call, "cudaGraphCreate", 0)
    device, stream = one(call, "cudaMalloc", SIZE), one(call, "cudaStreamCreate")
    number, out = c_uint64(), c_uint64()
    fill = MemsetParameters(device, 0, 6, 1, SIZE, 1)
    node = one(call, "cudaGraphAddMemsetNode", graph, None, 0, byref(fill))
    for name in ("cudaGraphInstantiate", "cudaGraphInstantiateWithFlags"):
        executable = one(call, name, graph, 1)
        call.fails(INVALID_VALUE, name, byref(out), NO_HANDLE, 0)
        call.fails(INVALID_VALUE, name, None, graph, 0)
        call("cudaGraphExecDestroy", executable)
        call.fails(INVALID_VALUE, "cudaGraphExecDestroy", executable)
    right = InstantiateParameters(1, stream, None, -1)
    executable = one(call, "cudaGraphInstantiateWithParams", graph, byref(right))
    call.fails(INVALID_VALUE, "cudaGraphInstantiateWithParams", byref(out), graph, None)
    call("cudaGraphExecGetFlags", executable, byref(number))
    assert number.value == 1
    call.fails(INVALID_VALUE, "cudaGraphExecGetFlags", executable, None)
    for name in ("cudaGraphUpload", "cudaGraphLaunch"):
        call(name, executable, stream)
        call.fails(INVALID_VALUE, name, NO_HANDLE, stream)
    call("cudaStreamSynchronize", stream)
    call("cudaGraphNodeGetEnabled", executable, node, byref(number))
    call.fails(INVALID_VALUE, "cudaGraphNodeGetEnabled", executable, node, None)
    call("cudaGraphNodeSetEnabled", executable, node, 0)
    call.fails(INVALID_VALUE, "cudaGraphNodeSetEnabled", executable, NO_HANDLE, 0)
    result = UpdateResult()
    call("cudaGraphExecUpdate", executable, graph, byref(result))
    call.fails(UPDATE_FAILURE, "cudaGraphExecUpdate", executable, empty, byref(result))
    call("cudaGraphExecDestroy", executable)
    for each in (graph, empty):
        call("cudaGraphDestroy", each)
    call("cudaFree", device)
    call("cudaStreamDestroy", stream)


def captures(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    stream, out, status, mode = one(call, "cudaStreamCreate"), c_uint64(), c_int(-1), c_int(0)
    number, found, count = c_uint64(), c_void_p(), c_size_t()
    call("cudaThreadExchangeStreamCaptureMode", byref(mode))
    call.fails(INVALID_VALUE, "cudaThreadExchangeStreamCaptureMode", byref(c_int(3)))
    call.fails(INVALID_VALUE, "cudaStreamBeginCapture", stream, 3)
    update = "cudaStreamUpdateCaptureDependencies"
    call.fails(ILLEGAL_STATE, update, stream, None, None, 0, 1)
    call("cudaStreamBeginCapture", stream, GLOBAL)
    call("cudaStreamIsCapturing", stream, byref(status))
    assert status.value == ACTIVE
    call.fails(INVALID_VALUE, "cudaStreamIsCapturing", stream, None)
    info = (byref(number), byref(out), byref(found), None, byref(count))
    call("cudaStreamGetCaptureInfo", stream, byref(status), *info)
    call.fails(INVALID_VALUE, "cudaStreamGetCaptureInfo", stream, None, *info)
    call(update, stream, None, None, 0, 1)
    call.fails(INVALID_VALUE, update, stream, None, None, 0, 9)
    call.fails(INVALID_VALUE, "cudaStreamEndCapture", stream, None)
    call("cudaStreamEndCapture", stream, byref(out))
    to_graph = "cudaStreamBeginCaptureToGraph"
    call.fails(INVALID_VALUE, to_graph, stream, NO_HANDLE, None, None, 0, GLOBAL)
    call(to_graph, stream, out, None, None, 0, GLOBAL)
    call("cudaStreamEndCapture", stream, byref(out))
    call("cudaGraphDestroy", out)
    call("cudaStreamDestroy", stream)


def user_objects(call: Calls, cuda: Driver, program: CompiledProgram) -> None:
    graph, out = one(call, "cudaGraphCreate", 0), c_uint64()
    thing = one(call, "cudaUserObjectCreate", None, HOST_NOTHING, 2, 1)
    call.fails(INVALID_VALUE, "cudaUserObjectCreate", byref(out), None, HOST_NOTHING, 0, 1)
    call("cudaUserObjectRetain", thing, 1)
    call.fails(INVALID_VALUE, "cudaUserObjectRetain", thing, 0)
    call("cudaGraphRetainUserObject", graph, thing, 1, 1)
    call.fails(INVALID_VALUE, "cudaGraphRetainUserObject", graph, thing, 9, 1)
    call("cudaGraphReleaseUserObject", graph, thing, 1)
    call.fails(INVALID_VALUE, "cudaGraphReleaseUserObject", graph, thing, 1)
    call.fails(INVALID_VALUE, "cudaUserObjectRelease", thing, 9)
    call("cudaUserObjectRelease", thing, 2)
    call("cudaGraphDestroy", graph)


PROGRAM_AREAS = (nodes, structure, executables, captures, user_objects)

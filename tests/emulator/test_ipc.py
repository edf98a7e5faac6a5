"""Memory and events that processes share: cuIpc* and shareable handles, against CUDA's words.

Each program starts a second process, :func:`peer`, which does what lines on its input say.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    NOT_SUPPORTED,
    SCHEDULES,
    SUCCESS,
    Driver,
    expect,
    run_program,
)

from spillover._paths import library_path

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

INVALID_DEVICE = 101
INTERPROCESS = 4
LAZY_PEER_ACCESS = 1
ALLOWED_IPC, IPC_EVENTS = 13, 125
SIZE = 3 * MIB


class Handle(ctypes.Structure):
    """``CUipcMemHandle`` and ``CUipcEventHandle``."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)

    def __str__(self) -> str:
        return bytes(self.reserved).hex()

    @classmethod
    def parse(cls, text: str) -> Handle:
        return cls.from_buffer_copy(bytes.fromhex(text))


class Sharing(Driver):
    """The driver with its calls between processes."""

    def export(self, pointer: int) -> Handle:
        handle = Handle()
        self("cuIpcGetMemHandle", byref(handle), pointer)
        return handle

    def open(self, handle: Handle, flags: int = LAZY_PEER_ACCESS) -> tuple[int, int]:
        pointer = c_uint64()
        status = self.library.cuIpcOpenMemHandle_v2(byref(pointer), handle, c_uint(flags))
        return status, pointer.value

    def export_file(self, physical: int) -> int:
        """Give a descriptor of physical memory, which the caller closes."""
        file = c_int(-1)
        self("cuMemExportToShareableHandle", byref(file), physical, 1, 0)
        return file.value

    def import_file(self, file: int) -> int:
        handle = c_uint64()
        self("cuMemImportFromShareableHandle", byref(handle), file, 1)
        return handle.value

    def export_event(self, event: int) -> Handle:
        handle = Handle()
        self("cuIpcGetEventHandle", byref(handle), event)
        return handle

    def open_event(self, handle: Handle) -> tuple[int, int]:
        event = c_uint64()
        return self.library.cuIpcOpenEventHandle(byref(event), handle), event.value

    def shared_event(self) -> int:
        return self.event(DISABLE_TIMING | INTERPROCESS)


class Peer:
    """Another process; ``ask`` has it run one command and returns the answer's words."""

    def __init__(self) -> None:
        code = "import test_ipc; test_ipc.peer()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: object) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()

    def open(self, handle: Handle) -> tuple[int, int]:
        status, pointer = self.ask("open", handle)
        return int(status), int(pointer)


@contextmanager
def other_process() -> Iterator[Peer]:
    other = Peer()
    try:
        yield other
        assert other.ask("hazards") == ["0"]
    finally:
        other.process.kill()
        other.process.wait()


def peer() -> None:
    """Obey. Commands name pointers, events and handles by their numbers."""
    cuda = Sharing()
    stream = cuda.stream()
    for line in sys.stdin:
        command, *words = line.split()
        numbers = [int(word) for word in words if word.lstrip("-").isdigit()]
        answer: object = ""
        if command == "open":
            answer = "{} {}".format(*cuda.open(Handle.parse(words[0])))
        elif command == "close":
            answer = cuda.status("cuIpcCloseMemHandle", *numbers)
        elif command == "free":
            answer = cuda.status("cuMemFree_v2", *numbers)
        elif command == "open_event":
            answer = "{} {}".format(*cuda.open_event(Handle.parse(words[0])))
        elif command == "destroy_event":
            answer = cuda.status("cuEventDestroy_v2", *numbers)
        elif command == "first_byte_after":  # event, pointer: a copy that waits on the stream
            cuda("cuStreamWaitEvent", stream, numbers[0], 0)
            target = cuda.pinned(1)
            cuda.download(target, numbers[1], stream)
            cuda.sync(stream)
            answer = target.get()[0]
        elif command == "wait":  # for an event, on the stream
            cuda("cuStreamWaitEvent", stream, numbers[0], 0)
        elif command == "drain":
            answer = cuda.status("cuStreamSynchronize", stream)
        elif command == "query":
            answer = cuda.status("cuEventQuery", *numbers)
        elif command == "synchronize":
            answer = cuda.status("cuEventSynchronize", *numbers)
        elif command == "fill":  # pointer, value, size, event: fill and record
            cuda.fill(*numbers[:3], stream)
            cuda.record(stream, numbers[3])
        elif command == "alloc":
            pointer = cuda.alloc(numbers[0])
            cuda.fill(pointer, numbers[1], numbers[0], stream)
            cuda.sync(stream)
            answer = cuda.export(pointer)
        elif command == "use":  # a device
            cuda.use_device(numbers[0])
        elif command == "read":  # by a kernel of this process's device
            answer = cuda.operator(stream, "reader", reads=[(numbers[0], 1)])
        elif command == "free_bytes":
            answer = cuda.free_bytes()
        elif command == "hazards":
            answer = len(cuda.hazards())
        print(answer, flush=True)


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


def writers_during_the_export() -> None:
    cuda = Sharing()
    pointers = [cuda.alloc(8 * MIB) for _ in range(16)]
    write_during_exports(cuda, pointers, 8 * MIB, [lambda p=p: cuda.export(p) for p in pointers])


def writers_during_the_export_of_mappings() -> None:
    cuda = Sharing()
    size = 8 * MIB
    handles = [cuda.create(size, exportable=True) for _ in range(16)]
    pointers = [cuda.reserve(size) for _ in handles]
    for pointer, handle in zip(pointers, handles, strict=True):
        cuda.map(pointer, size, handle)
    exports = [lambda handle=handle: cuda.export_file(handle) for handle in handles]
    write_during_exports(cuda, pointers, size, exports)


def write_during_exports(
    cuda: Sharing, pointers: list[int], size: int, exports: list[Callable[[], object]]
) -> None:
    """Operators of other threads write while the bytes move; nothing is lost."""
    host = cuda.library.spillover_emulator_host_pointer
    words = [
        (ctypes.c_uint64 * (size // 8)).from_address(host(c_uint64(pointer)))
        for pointer in pointers
    ]
    for each in words:
        ctypes.memset(each, 0, size)
    started, stop, written = threading.Barrier(2), threading.Event(), [0]

    def write() -> None:
        started.wait()
        while not stop.is_set():
            written[0] += 1
            for each in words:
                for place in range(0, size // 8, 64 * 1024):
                    each[place] = written[0]

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    for export in exports:
        export()
        time.sleep(0.002)
    stop.set()
    thread.join()
    for each in words:
        assert {each[place] for place in range(0, size // 8, 64 * 1024)} == {written[0]}


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


def shareable_handles() -> None:
    """Physical memory by descriptor: one process after the other has it."""
    cuda = Sharing()
    size = 2 * MIB
    physical = cuda.create(size, exportable=True)
    file = c_int(-1)
    export, handle = "cuMemExportToShareableHandle", c_uint64()
    expect(INVALID_VALUE, cuda.status(export, None, physical, 1, 0))
    expect(INVALID_VALUE, cuda.status(export, byref(file), physical, 1, 1))
    expect(INVALID_VALUE, cuda.status(export, byref(file), 12345, 1, 0))
    expect(INVALID_VALUE, cuda.status(export, byref(file), cuda.create(size), 1, 0))
    expect(NOT_SUPPORTED, cuda.status(export, byref(file), physical, 8, 0))
    cuda(export, byref(file), physical, 1, 0)
    load = "cuMemImportFromShareableHandle"
    expect(INVALID_VALUE, cuda.status(load, None, file.value, 1))
    expect(INVALID_VALUE, cuda.status(load, byref(handle), 9999, 1))
    expect(NOT_SUPPORTED, cuda.status(load, byref(handle), file.value, 8))
    first = cuda.reserve(size)
    cuda.map(first, size, physical)
    cuda("cuMemsetD8_v2", first, 4, size)
    cuda("cuCtxSynchronize")
    code = "import test_ipc; test_ipc.import_file()"
    text = subprocess.run(
        [sys.executable, "-c", code, str(file.value)],
        pass_fds=[file.value],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert text.split() == ["4", "0"], text
    assert cuda.fetch(first, 1) == b"\6"


def exported_at_any_time() -> None:
    """Before it is mapped, while a part of it is, and at two addresses: the bytes are the same."""
    cuda = Sharing()
    size = 4 * MIB
    for mapped_first in (False, True):
        physical = cuda.create(size, exportable=True)
        files = [] if mapped_first else [cuda.export_file(physical)]
        part = cuda.reserve(2 * MIB)
        cuda.map(part, 2 * MIB, physical, offset=2 * MIB)
        cuda("cuMemsetD8_v2", part, 3, 2 * MIB)
        cuda("cuCtxSynchronize")
        files.append(cuda.export_file(physical))
        whole = cuda.reserve(size)
        cuda.map(whole, size, physical)
        assert cuda.fetch(whole + 2 * MIB, 1) == b"\3"
        cuda("cuMemsetD8_v2", whole, 5, size)
        cuda("cuCtxSynchronize")
        for file in files:
            again = cuda.import_file(file)
            os.close(file)
            other = cuda.reserve(size)
            cuda.map(other, size, again)
            assert cuda.fetch(other, 1) == cuda.fetch(part, 1) == b"\5"
            cuda("cuMemUnmap", other, size)
            cuda("cuMemRelease", again)
        for pointer, length in ((part, 2 * MIB), (whole, size)):
            cuda("cuMemUnmap", pointer, length)
        cuda("cuMemRelease", physical)


def more_handles_than_descriptors() -> None:
    """What may be exported takes no descriptor before it is."""
    cuda = Sharing()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    handles = [cuda.create(2 * MIB, exportable=True) for _ in range(100)]
    os.close(cuda.export_file(handles[0]))
    for handle in handles:
        cuda("cuMemRelease", handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def import_file() -> None:
    cuda = Sharing()
    handle = c_uint64()
    file = int(sys.argv[1])
    before = cuda.free_bytes()
    cuda("cuMemImportFromShareableHandle", byref(handle), file, 1)
    os.close(file)
    pointer = cuda.reserve(2 * MIB)
    cuda.map(pointer, 2 * MIB, handle.value)
    assert cuda.free_bytes() == before
    print(cuda.fetch(pointer, 1)[0])
    cuda("cuMemsetD8_v2", pointer, 6, 1)
    cuda("cuCtxSynchronize")
    cuda("cuMemUnmap", pointer, 2 * MIB)
    cuda("cuMemRelease", handle)
    print(len(cuda.hazards()))


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


def test_writers_during_the_export() -> None:
    run_program(writers_during_the_export, vram="256MiB", hazards="off")
    run_program(writers_during_the_export_of_mappings, vram="256MiB", hazards="off")


def test_shareable_handles() -> None:
    run_program(shareable_handles, exported_at_any_time)
    run_program(more_handles_than_descriptors, vram="256MiB")


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

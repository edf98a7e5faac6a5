"""Exports of memory: shareable handles, against CUDA's words, and what moves under writers."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_uint64

import pytest
from driver_ctypes import INVALID_VALUE, MIB, NOT_SUPPORTED, expect, run_program
from ipc_peer import Sharing

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)


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
    code = "import test_ipc_handles; test_ipc_handles.import_file()"
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


def test_shareable_handles() -> None:
    run_program(shareable_handles, exported_at_any_time)
    run_program(more_handles_than_descriptors, vram="256MiB")


def test_writers_during_the_export() -> None:
    run_program(writers_during_the_export, vram="256MiB", hazards="off")
    run_program(writers_during_the_export_of_mappings, vram="256MiB", hazards="off")

"""What tests of memory and events between processes share: the calls, and a second process.

The process runs :func:`peer`, which does what lines on its input say.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_uint, c_uint64

from driver_ctypes import DISABLE_TIMING, Driver

INTERPROCESS = 4
LAZY_PEER_ACCESS = 1


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
        code = "import ipc_peer; ipc_peer.peer()"
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

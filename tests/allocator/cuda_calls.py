"""What the pool's tests share: driver calls that they make themselves, and a view of the pool.

The library is the one that is loaded already, the emulated driver or the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator

from spillover import _core, emulator

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Cuda:
    """Calls the CUDA driver on one device; every handle and address is an int."""

    def __init__(self, device: int = 0) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
        self._context = context
        self.use_device()

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        assert result == 0, f"{name} failed with CUresult {result}"

    def use_device(self) -> None:
        """Make the device's context current on this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def is_current(self) -> bool:
        """Whether the device's context is current on this thread."""
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        return current.value == self._context.value

    def allow_peer(self, peer: Cuda) -> None:
        """Let this device use the peer's memory from cuMemAlloc."""
        self.use_device()
        self._call("cuCtxEnablePeerAccess", peer._context, ctypes.c_uint(0))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between any two devices in stream order."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    @property
    def has_virtual_memory(self) -> bool:
        """Whether the device has virtual memory management."""
        supported = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(supported), ctypes.c_int(102), 0)
        return bool(supported.value)

    def create_stream(self, flags: int = 1) -> int:
        """Give a new stream, a non-blocking one by default."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(flags))
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def fill(self, address: int, size_bytes: int, stream: int, value: int = 7) -> None:
        """Write to device memory in stream order."""
        self._call(
            "cuMemsetD8Async",
            ctypes.c_uint64(address),
            ctypes.c_ubyte(value),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def read(self, host_address: int, address: int, size_bytes: int, stream: int) -> None:
        """Copy device memory to pinned memory in stream order."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host_address),
            ctypes.c_uint64(address),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def malloc(self, size_bytes: int) -> int:
        """Give device memory that the pool knows nothing of; MemoryError where there is none."""
        address = ctypes.c_uint64()
        result = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size_bytes))
        if result == 2:
            raise MemoryError
        assert result == 0, f"cuMemAlloc_v2 failed with CUresult {result}"
        return address.value

    def free(self, address: int) -> None:
        """Take what malloc() gave; waits for the device."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def malloc_ordered(self, size_bytes: int) -> int:
        """Give memory of the driver's own pool, which other processes cannot open."""
        address = ctypes.c_uint64()
        self._call("cuMemAllocAsync", ctypes.byref(address), ctypes.c_size_t(size_bytes), None)
        return address.value

    def free_ordered(self, address: int) -> None:
        self._call("cuMemFreeAsync", ctypes.c_uint64(address), None)

    def pin(self, size_bytes: int) -> int:
        """Give pinned host memory."""
        pointer = ctypes.c_void_p()
        self._call(
            "cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size_bytes), ctypes.c_uint(0)
        )
        assert pointer.value is not None
        return pointer.value

    def unpin(self, host_address: int) -> None:
        self._call("cuMemFreeHost", ctypes.c_void_p(host_address))

    def create_event(self) -> int:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(2))
        assert event.value is not None
        return event.value

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def is_complete(self, event: int) -> bool:
        result = self._library.cuEventQuery(ctypes.c_void_p(event))
        assert result in (0, 600), f"cuEventQuery failed with CUresult {result}"
        return bool(result == 0)

    def order(self, first: int, then: int) -> None:
        """Make the next work of stream ``then`` wait for the work of stream ``first``."""
        event = self.create_event()
        self.record(event, first)
        self._call(
            "cuStreamWaitEvent", ctypes.c_void_p(then), ctypes.c_void_p(event), ctypes.c_uint(0)
        )
        self.destroy_event(event)

    def forbid_unsafe_calls_in_captures(self) -> None:
        """Put the calling thread's capture mode back to the driver's default, global."""
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(0)))

    def synchronize(self) -> None:
        """Wait for all of the device's work."""
        self._call("cuCtxSynchronize")

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    @contextlib.contextmanager
    def host_function(self, stream: int, function: Callable[[], object]) -> Iterator[None]:
        """Submit a function of the host; it must have run when the block ends."""

        @_HOST_FUNCTION
        def run(_: object) -> None:
            function()

        self._call("cuLaunchHostFunc", ctypes.c_void_p(stream), run, None)
        yield

    @contextlib.contextmanager
    def stuck(self, stream: int) -> Iterator[Callable[[], None]]:
        """Hold what is submitted to the stream from now on; the block's end or a call lets go."""
        held = ctypes.c_uint64()
        self._call(
            "spillover_emulator_hold_stream",
            ctypes.c_void_p(stream),
            ctypes.c_uint(5000),
            ctypes.byref(held),
        )

        def let_go() -> None:
            self._library.spillover_emulator_release_stream(held)

        try:
            yield let_go
        finally:
            let_go()

    @contextlib.contextmanager
    def capture(self, stream: int) -> Iterator[list[int]]:
        """Record a graph; gives how many nodes it has in the end."""
        nodes: list[int] = []
        graph, count = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(0))
        try:
            yield nodes
        finally:
            self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes.append(count.value)
        self._call("cuGraphDestroy", graph)


def live_blocks(pool: _core.Pool) -> dict[int, int]:
    """Address and size of each live block."""
    return {
        block["address"]: block["size_bytes"]
        for segment in pool.segments()
        for block in segment["blocks"]
        if block["state"] == "live"
    }


def on_thread(work: Callable[[], None]) -> None:
    """Run work on a thread of its own, to its end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []


def wait_for_call(name: str) -> None:
    """Wait until another thread has made the call, within a block of ``faults()``."""
    deadline = time.monotonic() + 30
    while emulator.calls().get(name, 0) == 0:
        assert time.monotonic() < deadline, f"nobody has called {name}"
        time.sleep(0.001)

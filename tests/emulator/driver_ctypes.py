"""The emulated driver through ctypes, without torch or a CUDA runtime.

Test programs run in processes of their own (:func:`run_program`), since the device reads its
configuration once. Inside one, :class:`Driver` loads ``libcuda.so.1`` and makes its calls short.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from ctypes import byref, c_char, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
NO_BINARY = 209
INVALID_HANDLE = 400
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713
NOT_PERMITTED = 800
NOT_SUPPORTED = 801
HAZARD = 999
REFUSED = -1  # SPILLOVER_EMULATOR_HAZARD

LEGACY = 1
PER_THREAD = 2
NON_BLOCKING = 1
DISABLE_TIMING = 2
MIB = 1 << 20
GRANULARITY = 2 * MIB

SCHEDULES = ("late", "eager", "threaded", "random")

HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)


class DriverError(Exception):
    """A driver call that failed."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} returned {code}")
        self.code = code


class Range(ctypes.Structure):
    """``spillover_emulator_range``."""

    _fields_ = (("pointer", c_void_p), ("size_bytes", c_size_t), ("is_write", c_int))


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", c_uint64),
    )


class AccessDescriptor(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", Location), ("flags", c_int))


class CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``."""

    _fields_ = (
        ("source_order", c_int),
        ("source_location", Location),
        ("target_location", Location),
        ("flags", c_uint),
    )


def copy_batch(
    copies: Sequence[tuple[int, int, int]],
    *,
    orders: Sequence[int] = (1,),
    firsts: Sequence[int] = (0,),
    flags: int = 0,
) -> tuple[Any, ...]:
    """Arguments of cuMemcpyBatchAsync for (target, source, bytes), up to the attributes' count."""
    columns = [(c_uint64 * len(copies))(*column) for column in zip(*copies, strict=True)]
    attributes = [CopyAttributes(order, Location(), Location(), flags) for order in orders]
    return (
        *columns,
        len(copies),
        (CopyAttributes * len(orders))(*attributes),
        (c_size_t * len(firsts))(*firsts),
        len(orders),
    )


def library_path() -> Path:
    """Where the driver under test is; ``SPILLOVER_TEST_LIBCUDA`` names another build."""
    if other := os.environ.get("SPILLOVER_TEST_LIBCUDA"):
        return Path(other)
    from spillover import _paths

    return Path(_paths.library_path("emulator/libcuda.so.1"))


class Buffer:
    """Host memory: pinned by the driver, or the program's own."""

    def __init__(self, address: int, size: int, keep: object = None) -> None:
        self.address = address
        self.size = size
        self._keep = keep
        self._bytes = (c_char * size).from_address(address)

    @classmethod
    def pageable(cls, size: int) -> Buffer:
        memory = ctypes.create_string_buffer(size)
        return cls(ctypes.addressof(memory), size, memory)

    def get(self) -> bytes:
        return bytes(self._bytes)

    def fill(self, value: int) -> Buffer:
        ctypes.memset(self.address, value, self.size)
        return self

    def holds(self, value: int) -> bool:
        return self.get() == bytes([value]) * self.size


def converted(argument: Any) -> Any:
    """Whole numbers as 64 bits wide, so that pointers arrive unharmed."""
    if isinstance(argument, Buffer):
        return c_uint64(argument.address)
    return c_uint64(argument & (2**64 - 1)) if isinstance(argument, int) else argument


class Driver:
    """The driver, initialised, with device 0's primary context current."""

    def __init__(self, *, initialise: bool = True) -> None:
        self.library = ctypes.CDLL(str(library_path()))
        self.library.spillover_emulator_host_pointer.restype = c_void_p
        self.library.spillover_emulator_last_hazard.restype = ctypes.c_char_p
        self.library.spillover_emulator_config.restype = ctypes.c_char_p
        for name in ("hazard_count", "hazard_text", "peak_bytes", "pinned_count"):
            getattr(self.library, f"spillover_emulator_{name}").restype = c_size_t
        if initialise:
            self("cuInit", 0)
            self.use_device(0)

    def status(self, name: str, *arguments: Any) -> int:
        """Call a function and return its CUresult."""
        return int(getattr(self.library, name)(*map(converted, arguments)))

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self.status(name, *arguments)
        if code != SUCCESS:
            raise DriverError(name, code)

    def use_device(self, device: int) -> None:
        context = c_void_p()
        self("cuDevicePrimaryCtxRetain", byref(context), device)
        self("cuCtxSetCurrent", context)

    # Memory.
    def alloc(self, size: int) -> int:
        pointer = c_uint64()
        self("cuMemAlloc_v2", byref(pointer), size)
        return pointer.value

    def free(self, pointer: int) -> None:
        self("cuMemFree_v2", pointer)

    def pinned(self, size: int) -> Buffer:
        pointer = c_void_p()
        self("cuMemHostAlloc", byref(pointer), size, 0)
        assert pointer.value is not None
        return Buffer(pointer.value, size)

    def alloc_async(self, size: int, stream: int) -> int:
        pointer = c_uint64()
        self("cuMemAllocAsync", byref(pointer), size, stream)
        return pointer.value

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def peek(self, pointer: int, size: int) -> bytes:
        """Bytes of device memory as they are now, without ordering anything."""
        address = self.library.spillover_emulator_host_pointer(c_uint64(pointer))
        return ctypes.string_at(address, size)

    # Streams and events.
    def stream(self, flags: int = NON_BLOCKING) -> int:
        handle = c_uint64()
        self("cuStreamCreate", byref(handle), flags)
        return handle.value

    def event(self, flags: int = DISABLE_TIMING) -> int:
        handle = c_uint64()
        self("cuEventCreate", byref(handle), flags)
        return handle.value

    def record(self, stream: int, event: int | None = None) -> int:
        event = self.event() if event is None else event
        self("cuEventRecord", event, stream)
        return event

    def order(self, before: int, after: int) -> None:
        """Make stream ``after`` wait for what is on ``before`` now."""
        self("cuStreamWaitEvent", after, self.record(before), 0)

    def sync(self, stream: int) -> None:
        self("cuStreamSynchronize", stream)

    # Copies.
    def upload(self, pointer: int, source: Buffer, stream: int) -> None:
        self("cuMemcpyHtoDAsync_v2", pointer, source, source.size, stream)

    def download(self, target: Buffer, pointer: int, stream: int) -> None:
        self("cuMemcpyDtoHAsync_v2", target, pointer, target.size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self("cuMemcpyDtoDAsync_v2", target, source, size, stream)

    def fill(self, pointer: int, value: int, size: int, stream: int) -> None:
        self("cuMemsetD8Async", pointer, value, size, stream)

    def fetch(self, pointer: int, size: int) -> bytes:
        """Bytes of device memory once everything has run."""
        self("cuCtxSynchronize")
        buffer = Buffer.pageable(size)
        self("cuMemcpyDtoH_v2", buffer, pointer, size)
        return buffer.get()

    # Virtual memory.
    def create(self, size: int, *, exportable: bool = False) -> int:
        handle = c_uint64()
        self("cuMemCreate", byref(handle), size, byref(properties(exportable=exportable)), 0)
        return handle.value

    def reserve(self, size: int) -> int:
        pointer = c_uint64()
        self("cuMemAddressReserve", byref(pointer), size, 0, 0, 0)
        return pointer.value

    def map(
        self, pointer: int, size: int, handle: int, *, offset: int = 0, access: int = 3
    ) -> None:
        self("cuMemMap", pointer, size, offset, handle, 0)
        descriptor = AccessDescriptor(Location(1, 0), access)
        self("cuMemSetAccess", pointer, size, byref(descriptor), 1)

    # The emulator's own interface.
    def operator(
        self, stream: int, name: str, *, reads: Sequence[Any] = (), writes: Sequence[Any] = ()
    ) -> int:
        """Pretend to run an operator on (pointer, size) ranges; its hazard status."""
        ranges = ranges_of(reads, writes)
        status = self.status(
            "spillover_emulator_operator_begin", stream, name.encode(), ranges, len(ranges)
        )
        return HAZARD if status == REFUSED else status

    def host_access(self, *, reads: Sequence[Any] = (), writes: Sequence[Any] = ()) -> int:
        ranges = ranges_of(reads, writes)
        status = self.status("spillover_emulator_host_access", b"host code", ranges, len(ranges))
        return HAZARD if status == REFUSED else status

    def hazards(self) -> list[str]:
        texts = []
        for index in range(self.library.spillover_emulator_hazard_count()):
            text = ctypes.create_string_buffer(2000)
            if self.library.spillover_emulator_hazard_text(c_size_t(index), text, c_size_t(2000)):
                texts.append(text.value.decode())
        return texts

    def live(self) -> tuple[int, ...]:
        """Device bytes and allocations, pinned bytes and regions, streams, events."""
        values = [c_size_t() for _ in range(6)]
        self.library.spillover_emulator_live(*map(byref, values))
        return tuple(value.value for value in values)


def properties(*, exportable: bool = False, device: int = 0) -> AllocationProperties:
    return AllocationProperties(1, int(exportable), Location(1, device), None, 0)


def ranges_of(reads: Sequence[Any], writes: Sequence[Any]) -> Any:
    pairs = [(item, 0) for item in reads] + [(item, 1) for item in writes]
    ranges = (Range * len(pairs))()
    for place, (item, is_write) in zip(ranges, pairs, strict=True):
        pointer, size = (item.address, item.size) if isinstance(item, Buffer) else item
        place.pointer, place.size_bytes, place.is_write = pointer, size, is_write
    return ranges


def expect(code: int, status: int) -> None:
    assert status == code, f"expected {code}, got {status}"


def elapsed_ms(cuda: Driver, start: int, end: int) -> tuple[int, float]:
    value = c_float()
    return cuda.status("cuEventElapsedTime_v2", byref(value), start, end), value.value


def flags_of(cuda: Driver, stream: int) -> int:
    value = c_uint()
    cuda("cuStreamGetFlags", stream, byref(value))
    return value.value


def run_all(module: str, names: Sequence[str]) -> None:
    """Run functions of a test module one after the other, from a clean slate each."""
    programs = importlib.import_module(module)
    for name in names:
        print(f"running {name}", file=sys.stderr, flush=True)
        getattr(programs, name)()
        if len(names) > 1:
            cuda = Driver()
            cuda("cuCtxSynchronize")
            cuda.library.spillover_emulator_hazards_clear()


def run_program(
    *programs: Callable[[], object],
    vram: str = "64MiB",
    schedule: str = "late",
    hazards: str = "raise",
    timeout: float = 100,
    **variables: object,
) -> subprocess.CompletedProcess[str]:
    """Run functions of a test module in a new process with a device of its own."""
    module = inspect.getmodulename(inspect.getfile(programs[0]))
    names = [program.__name__ for program in programs]
    settings = {"vram": vram, "schedule": schedule, "hazards": hazards, **variables}
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR_")},
        **{f"SPILLOVER_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()},
        "SPILLOVER_TEST_LIBCUDA": str(library_path()),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", f"import driver_ctypes as d; d.run_all({module!r}, {names!r})"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result

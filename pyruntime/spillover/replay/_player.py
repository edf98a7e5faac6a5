"""The player of csrc/replay through ctypes: plays a trace in this process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spillover._errors import DriverError
from spillover._paths import library_path
from spillover.replay._trace import Trace

_SAMPLES_MAX = 2000
_ERROR_BYTES = 4096


class _Job(ctypes.Structure):
    """``spillover_replay_job``."""

    _fields_ = (
        ("events", ctypes.c_void_p),
        ("event_count", ctypes.c_size_t),
        ("block_count", ctypes.c_size_t),
        ("streams", ctypes.POINTER(ctypes.c_void_p)),
        ("thread_count", ctypes.c_size_t),
        ("latency_ns", ctypes.c_void_p),
        ("reserved_bytes", ctypes.c_void_p),
        ("sample_every", ctypes.c_size_t),
    )


class _Target(ctypes.Structure):
    """``spillover_replay_target``, of which Python calls two functions."""

    _fields_ = (
        ("allocate", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
        ("record_stream", ctypes.c_void_p),
        ("reserved_bytes", ctypes.CFUNCTYPE(ctypes.c_size_t)),
        ("last_error", ctypes.c_void_p),
    )


@dataclass(frozen=True, eq=False)
class Played:
    """What one run of the player found."""

    event_count: int
    error: str
    latency_ns: npt.NDArray[np.uint32]
    sample_every: int
    reserved_bytes: npt.NDArray[np.uint64]


class Player:
    """Plays traces and pairs on one allocator of device 0 of this process."""

    def __init__(self, target: Any, library: ctypes.CDLL) -> None:
        self._target = target
        self._library = library

    @classmethod
    def of_pool(cls) -> Player:
        """A player on Spillover's pool, without torch."""
        library = _library()
        return cls(library.spillover_replay_pool_target(0), library)

    @classmethod
    def of_torch(cls) -> Player:
        """A player on the allocator that torch uses in this process."""
        import torch

        from spillover import _build

        cuda: Any = torch.cuda  # torch leaves some of its functions without types
        cuda.init()
        part = ctypes.CDLL(str(_build.build("replay")))
        part.spillover_torch_replay_target.restype = ctypes.POINTER(_Target)
        return cls(part.spillover_torch_replay_target(), _library())

    def play(self, trace: Trace) -> Played:
        """Play the trace from its first event to its last, or to the first that fails."""
        events = np.ascontiguousarray(trace.events)
        every = max(1, -(-len(events) // _SAMPLES_MAX))
        latency_ns = np.zeros(len(events), np.uint32)
        reserved_bytes = np.zeros(-(-len(events) // every), np.uint64)
        streams = make_streams(trace.stream_count)
        job = _Job(
            events.ctypes.data,
            len(events),
            trace.block_count,
            streams,
            trace.thread_count,
            latency_ns.ctypes.data,
            reserved_bytes.ctypes.data,
            every,
        )
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        count = self._library.spillover_replay_run(
            self._target, ctypes.byref(job), error, _ERROR_BYTES
        )
        return Played(
            event_count=count,
            error=error.value.decode(errors="replace"),
            latency_ns=latency_ns[:count],
            sample_every=every,
            reserved_bytes=reserved_bytes[: -(-count // every)],
        )

    def pairs_ns(self, size_bytes: int, *, threads: int, pairs: int) -> int:
        """Wall-clock time of ``pairs`` pairs on each of ``threads`` threads at once."""
        elapsed = self._library.spillover_replay_pairs(self._target, size_bytes, threads, pairs)
        if elapsed == 0:
            raise DriverError(f"allocating {size_bytes} bytes on {threads} threads failed")
        return int(elapsed)

    def reserved_bytes(self) -> int:
        """Bytes that the allocator holds from the driver now."""
        return int(self._target.contents.reserved_bytes())


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path("libspillover.so")))
    library.spillover_replay_pool_target.restype = ctypes.POINTER(_Target)
    run, pairs = library.spillover_replay_run, library.spillover_replay_pairs
    run.restype = ctypes.c_size_t
    run.argtypes = [
        ctypes.POINTER(_Target),
        ctypes.POINTER(_Job),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    pairs.restype = ctypes.c_uint64
    pairs.argtypes = [ctypes.POINTER(_Target), *[ctypes.c_size_t] * 3]
    return library


def make_streams(count: int) -> Any:
    """Handles of ``count`` streams; the first is the default stream. They live with the process."""
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    _check("cuInit", driver.cuInit(0))
    retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    _check("cuDevicePrimaryCtxRetain", retained)
    _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    streams = (ctypes.c_void_p * count)()
    for number in range(1, count):
        stream = ctypes.c_void_p()
        _check("cuStreamCreate", driver.cuStreamCreate(ctypes.byref(stream), 1))  # non-blocking
        streams[number] = stream.value
    return streams


def _check(name: str, status: int) -> None:
    if status != 0:
        raise DriverError(f"{name} failed with CUresult {status}")

"""Replays a trace on allocators, each in a process of its own, and sums up what it cost."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from spillover._errors import ConfigError, SpilloverError
from spillover._units import parse_bytes
from spillover.emulator import is_enabled
from spillover.replay._prices import PRICES, priced_ms
from spillover.replay._trace import ALLOC, FREE, Trace

Allocator = Literal["ours", "native", "expandable"]
ALLOCATORS: tuple[Allocator, ...] = get_args(Allocator)

_PERCENTILES = (50, 90, 99, 99.9, 100)
#: An A100's or H100's memory: what a trace of a real training was made for.
_EMULATED_VRAM = "80GiB"
#: Both names that torch reads its allocator's configuration from.
_CONFIGURATION_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Where a replay takes place.

    Parameters
    ----------
    vram
        Capacity of an emulated device, bytes or a text such as ``"8GiB"``. None: a device like the
        caller's where that is emulated, else the machine's own GPU if it has one, else an emulated
        device of 80 GiB.
    """

    vram: int | str | None = None

    def __post_init__(self) -> None:
        if self.vram is not None:
            object.__setattr__(self, "vram", parse_bytes(self.vram, name="vram"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What one allocator did with one trace.

    Parameters
    ----------
    utilisation
        Requested bytes live at their peak over the bytes that the allocator held from the driver at
        the peak of that; the two peaks need not coincide.
    reserved_peak_bytes
        The most bytes ever held from the driver: physical memory, on the emulated device as the
        driver counts it.
    reserved_end_bytes
        Bytes that the allocator held after the last event.
    driver_calls, driver_bytes
        Calls by function and the bytes that they were about; empty on a real GPU, whose driver
        does not count them.
    priced_ms, priced_by_call_ms
        What the calls would take on an A100, see :data:`PRICES`: by 2 MiB page, and by call.
    alloc_ns, free_ns
        Percentiles of the time that one call takes, on this machine's processor.
    failed_at
        The first event that failed, with ``error``; None where all succeeded.
    reserved_bytes
        Bytes held before every ``sample_every``-th event.
    """

    trace: str
    allocator: Allocator
    is_emulated: bool
    event_count: int
    peak_bytes: int
    reserved_peak_bytes: int
    reserved_end_bytes: int
    utilisation: float
    driver_calls: dict[str, int]
    driver_bytes: dict[str, int]
    priced_ms: float
    priced_by_call_ms: float
    alloc_ns: dict[str, float]
    free_ns: dict[str, float]
    failed_at: int | None
    error: str
    sample_every: int = field(repr=False)
    reserved_bytes: list[int] = field(repr=False)


def replay(trace: Trace, allocator: Allocator, options: ReplayOptions | None = None) -> Replay:
    """Play a trace on an allocator in a new process.

    Parameters
    ----------
    trace
        What :func:`read_trace` gave.
    allocator
        ``"ours"``: Spillover's pool, through its C interface. ``"native"``: PyTorch's allocator in
        its default configuration. ``"expandable"``: the same with ``expandable_segments``.
    options
        Where.

    Raises
    ------
    ConfigError
        There is no such allocator.
    SpilloverError
        The process failed; running out of device memory is a result, not an error.
    """
    if allocator not in ALLOCATORS:
        raise ConfigError(f"allocator {allocator!r} is not one of {', '.join(ALLOCATORS)}")
    vram = (options or ReplayOptions()).vram
    if vram is None and is_enabled():
        vram = parse_bytes(os.environ["SPILLOVER_EMULATOR_VRAM"])
    elif vram is None and not _has_gpu():
        vram = parse_bytes(_EMULATED_VRAM)
    with tempfile.TemporaryDirectory(prefix="spillover-replay-") as name:
        folder = Path(name)
        np.save(folder / "events.npy", trace.events)
        facts = {
            key: getattr(trace, key)
            for key in ("name", "block_count", "stream_count", "thread_count")
        }
        (folder / "trace.json").write_text(json.dumps(facts))
        _run_worker(trace.name, allocator, folder, "gpu" if vram is None else str(vram))
        found = json.loads((folder / "result.json").read_text())
        latency_ns = np.load(folder / "latency_ns.npy")
    return _summarise(trace, allocator, found, latency_ns, is_emulated=vram is not None)


def _run_worker(name: str, allocator: Allocator, folder: Path, vram: str) -> None:
    command = [sys.executable, "-m", "spillover.replay._worker", allocator, str(folder), vram]
    result = subprocess.run(
        command, env=worker_environment(allocator), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SpilloverError(
            f"replaying {name} on {allocator} failed (exit code {result.returncode}): "
            f"{result.stderr.strip() or 'no message'}"
        )


def worker_environment(allocator: Allocator) -> dict[str, str]:
    """The environment of a process that uses one allocator: this one's, but for what chooses it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        # A worker chooses its device itself.
        if name not in _CONFIGURATION_VARIABLES and not name.startswith("SPILLOVER_EMULATOR")
    }
    if allocator == "expandable":
        for name in _CONFIGURATION_VARIABLES:
            environment[name] = "expandable_segments:True"
    return environment


def _summarise(
    trace: Trace,
    allocator: Allocator,
    found: dict[str, Any],
    latency_ns: npt.NDArray[np.uint32],
    *,
    is_emulated: bool,
) -> Replay:
    count = int(found["event_count"])
    live = trace.live_bytes()[:count]
    peak = int(live.max()) if count else 0
    reserved_peak = int(found["reserved_peak_bytes"])
    calls = {name: found["calls"][name] for name in PRICES if name in found["calls"]}
    kinds = trace.events["kind"][:count]
    return Replay(
        trace=trace.name,
        allocator=allocator,
        is_emulated=is_emulated,
        event_count=count,
        peak_bytes=peak,
        reserved_peak_bytes=reserved_peak,
        reserved_end_bytes=int(found["reserved_end_bytes"]),
        utilisation=peak / reserved_peak if reserved_peak else 1.0,
        driver_calls=calls,
        driver_bytes=dict(found["call_bytes"]),
        priced_ms=priced_ms(calls, found["call_bytes"], per="page"),
        priced_by_call_ms=priced_ms(calls, found["call_bytes"], per="call"),
        alloc_ns=_percentiles(latency_ns[kinds == ALLOC]),
        free_ns=_percentiles(latency_ns[kinds == FREE]),
        failed_at=count if count < len(trace.events) else None,
        error=str(found["error"]),
        sample_every=int(found["sample_every"]),
        reserved_bytes=found["reserved_bytes"],
    )


def _percentiles(values: npt.NDArray[np.uint32]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, _PERCENTILES)
    return {f"p{p:g}": float(value) for p, value in zip(_PERCENTILES, found, strict=True)}


def _has_gpu() -> bool:
    """Whether a driver is installed that finds a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0

"""The disk store's engines beside a raw loop over the same files.

The physical limit is the raw loop: plain O_DIRECT transfers without checksums, over queue depths,
by threads and by io_uring, the best of them. It takes turns with ours. The store writes and reads
with checksums, and what it read is compared with what was written, outside of the time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks._disk.raw import RawDisk, Way, fio_gb_s
from benchmarks._harness import spread
from spillover import DiskStore, StorageError
from spillover._core import HostPool, crc32c
from spillover._units import parse_bytes

DIRECTIONS = ("write", "read")
_MIB = 1 << 20
_PAYLOAD_BYTES = 64 * _MIB
_BUFFER_BYTES = 4 * _PAYLOAD_BYTES


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told beyond the common options."""
    parser.add_argument("--folder", type=Path, help="a folder on the disk; else the temporary one")
    parser.add_argument("--size", help="bytes of each round, such as 2GiB")


def run(*, quick: bool, folder: Path | None = None, size: str | None = None) -> dict[str, Any]:
    """Find the raw loop's best way, then measure pairs of ours and that."""
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    size_bytes = parse_bytes(size or ("64MiB" if quick else "2GiB"), name="--size")
    size_bytes = max(1, size_bytes // _PAYLOAD_BYTES) * _PAYLOAD_BYTES
    pairs = 2 if quick else 7
    notes = [
        f"{size_bytes >> 20} MiB a round in {folder}, medians of {pairs} pairs that take turns",
        "ratio_to_raw: ours over the raw loop right after it, median of the pairs; io_uring's, "
        "and with .threads the other engine's; our checksums on, none in the raw loop",
        "crc_gb_s: checksums of one core over memory beyond its caches",
    ]
    metrics: dict[str, float] = {"crc_gb_s": _crc_gb_s(5 if quick else 15)}
    details: dict[str, Any] = {}
    engines = [engine for engine in ("io_uring", "threads") if _works(folder, engine, notes)]
    ours = {engine: _Ours(folder, engine, size_bytes) for engine in engines}
    with RawDisk([each.descriptor for each in ours.values()]) as raw:
        for each in ours.values():  # Files have their blocks from then on.
            each.seconds("write")
            notes += each.notes
        first = next(iter(ours.values()))
        best = _best_ways(raw, first.descriptor, min(size_bytes, 512 * _MIB), quick, details)
        for direction in DIRECTIONS:
            rows: dict[str, list[float]] = {}
            for each in ours.values():
                each.seconds("write")  # The raw loop has written over it.
            for _ in range(pairs):
                for engine, each in ours.items():
                    mine = size_bytes / each.seconds(direction) / 1e9
                    limit = (
                        size_bytes
                        / 1e9
                        / raw.seconds(direction, best[direction], size_bytes, each.descriptor)
                    )
                    rows.setdefault(f"ours_{_short(engine)}", []).append(mine)
                    rows.setdefault("raw", []).append(limit)
                    rows.setdefault(f"ratio_{engine}", []).append(mine / limit)
            _add(metrics, direction, rows)
            details[direction] = {name: spread(values) for name, values in rows.items()}
    for each in ours.values():
        each.close()
    _ask_fio(folder, size_bytes, best, metrics, notes)
    if importlib.util.find_spec("deepspeed") is None:
        notes.append("DeepSpeed's async_io: deepspeed is not installed (needs libaio-dev, too)")
    else:
        notes.append("DeepSpeed's async_io is installed and not measured by this benchmark yet")
    return {"metrics": metrics, "details": details, "notes": notes}


def _short(engine: str) -> str:
    return "uring" if engine == "io_uring" else engine


def _add(metrics: dict[str, float], direction: str, rows: dict[str, list[float]]) -> None:
    for name, values in rows.items():
        median = statistics.median(values)
        if name == "ratio_io_uring":
            metrics[f"ratio_to_raw.{direction}"] = median
        elif name == "ratio_threads":
            metrics[f"ratio_to_raw.{direction}.threads"] = median
        else:
            metrics[f"{direction}_gb_s.{name}"] = median


def _works(folder: Path, engine: Literal["io_uring", "threads"] | str, notes: list[str]) -> bool:
    try:
        with DiskStore(folder, engine=engine) as store:  # type: ignore[arg-type]
            if not store.stats().is_direct:
                notes.append("the file system refuses O_DIRECT: figures are the page cache's")
    except StorageError as error:
        notes.append(f"{engine}: {error}")
        return False
    return True


class _Ours:
    """A store with payloads of ``size_bytes`` together."""

    def __init__(self, folder: Path, engine: str, size_bytes: int) -> None:
        self._store = DiskStore(folder, engine=engine)  # type: ignore[arg-type]
        self._count = size_bytes // _PAYLOAD_BYTES
        self._payloads: list[Any] = []
        self._registrations = [self._store.register(half) for half in _halves()]
        self.descriptor = self._store._descriptor()
        self.notes = [self._store.stats().engine_notes] if self._store.stats().engine_notes else []

    def seconds(self, direction: str) -> float:
        sources, targets = _buffers()
        if direction == "write":
            self._payloads.clear()
            start = time.perf_counter()
            requests = [
                self._store.write(sources[index % len(sources)]) for index in range(self._count)
            ]
            for _, ticket in requests:
                ticket.wait()
            end = time.perf_counter()
            self._payloads = [payload for payload, _ in requests]
            return end - start
        for target in targets:
            np.frombuffer(target, dtype=np.uint8)[::4096] = 0
        start = time.perf_counter()
        tickets: list[Any] = []
        for index, payload in enumerate(self._payloads):
            if index >= len(targets):  # The buffer is used again.
                tickets[index - len(targets)].wait()
            tickets.append(self._store.read(payload, targets[index % len(targets)]))
        for ticket in tickets:
            ticket.wait()
        end = time.perf_counter()
        for source, target in list(zip(sources, targets, strict=True))[: self._count]:
            assert np.array_equal(
                np.frombuffer(source, dtype=np.uint64), np.frombuffer(target, dtype=np.uint64)
            ), "read is not what was written"
        return end - start

    def close(self) -> None:
        self._payloads.clear()
        for registration in self._registrations:
            registration.remove()
        self._store.close()


@functools.lru_cache(maxsize=1)
def _halves() -> list[memoryview]:
    pool = HostPool(pinned=False)
    return [memoryview(pool.allocate(_BUFFER_BYTES)) for _ in range(2)]


@functools.lru_cache(maxsize=1)
def _buffers() -> tuple[list[memoryview], list[memoryview]]:
    """Page-aligned memory of payloads: random numbers, and as much to read into."""
    halves = _halves()
    np.frombuffer(halves[0], dtype=np.uint64)[:] = np.random.default_rng(0).integers(
        0, 2**64, _BUFFER_BYTES // 8, dtype=np.uint64
    )
    source, target = (
        [half[at : at + _PAYLOAD_BYTES] for at in range(0, _BUFFER_BYTES, _PAYLOAD_BYTES)]
        for half in halves
    )
    return source, target


def _best_ways(
    raw: RawDisk, descriptor: int, size_bytes: int, quick: bool, details: dict[str, Any]
) -> dict[str, Way]:
    ways = [
        Way(engine, depth, block_bytes)
        for engine in ("io_uring", "threads")
        for depth in ((4, 16) if quick else (1, 2, 4, 8, 16, 32))
        for block_bytes in ((_MIB,) if quick else (_MIB // 2, _MIB))
    ]
    best = {}
    for direction in DIRECTIONS:
        found = {
            way: min(
                raw.seconds(direction, way, size_bytes, descriptor)
                for _ in range(1 if quick else 2)
            )
            for way in ways
        }
        best[direction] = min(ways, key=lambda way: found[way])
        details[f"raw_{direction}_gb_s"] = {
            f"{way.engine} {way.depth} x {way.block_bytes >> 10} KiB": size_bytes / seconds / 1e9
            for way, seconds in found.items()
        }
        details[f"raw_{direction}_best"] = repr(best[direction])
    return best


def _ask_fio(
    folder: Path,
    size_bytes: int,
    best: dict[str, Way],
    metrics: dict[str, float],
    notes: list[str],
) -> None:
    for direction in DIRECTIONS:
        found = fio_gb_s(direction, folder, best[direction], size_bytes)
        if isinstance(found, str):
            notes.append(found)
            return
        metrics[f"{direction}_gb_s.fio"] = found


def _crc_gb_s(repeats: int) -> float:
    sources, _ = _buffers()
    seconds = []
    for index in range(repeats):
        start = time.perf_counter()
        crc32c(sources[index % len(sources)])
        seconds.append(time.perf_counter() - start)
    return _PAYLOAD_BYTES / statistics.median(seconds) / 1e9

"""The disk store's engines beside a raw loop over the same files.

The physical limit is the raw loop: plain O_DIRECT transfers without checksums, over queue depths,
by threads and by io_uring, the best of them. It takes turns with ours, and with DeepSpeed's
async_io where that is installed and builds. The store writes and reads with checksums, and what it
read is compared with what was written, outside of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks._disk.deepspeed import DeepSpeed, DeepSpeedError, Setting
from benchmarks._disk.memory import huge_memory
from benchmarks._disk.raw import RawDisk, Way, fio_gb_s
from benchmarks._harness import spread
from spillover import DiskStore, StorageError
from spillover._core import crc32c
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
        "ratio_to_raw: ours over the raw loop beside it, median of the pairs; io_uring's, "
        "and with .threads the other engine's; our checksums on, none in the raw loop",
        "raw_with_sums: the raw loop by io_uring, whose thread computes a checksum of each block: "
        "what it costs here that all memory is read once more",
        "memory of both: private, huge pages where the system has them; DeepSpeed's is its own",
        "crc_gb_s: checksums of one core over memory beyond its caches",
    ]
    metrics: dict[str, float] = {"crc_gb_s": _crc_gb_s(5 if quick else 15)}
    details: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        ours = {
            engine: stack.enter_context(_Ours(folder, engine, size_bytes))
            for engine in ("io_uring", "threads")
            if _works(folder, engine, notes)
        }
        raw = stack.enter_context(RawDisk([each.descriptor for each in ours.values()]))
        peer = _deepspeed(stack, folder, size_bytes, quick, notes, details)
        for each in ours.values():  # Files have their blocks from then on.
            each.seconds("write")
            notes += each.notes
        first = next(iter(ours.values()))
        best = _best_ways(raw, first.descriptor, size_bytes, quick, details)
        for direction in DIRECTIONS:
            for each in ours.values():
                each.seconds("write")  # The raw loop has written over it.
            rows = _take_turns(direction, pairs, size_bytes, ours, raw, best[direction], peer)
            _add(metrics, direction, rows)
            details[direction] = {name: spread(values) for name, values in rows.items()}
    _ask_fio(folder, size_bytes, best, metrics, notes)
    return {"metrics": metrics, "details": details, "notes": notes}


Peer = tuple[DeepSpeed, dict[str, Setting]]


def _take_turns(
    direction: str,
    pairs: int,
    size_bytes: int,
    ours: dict[str, _Ours],
    raw: RawDisk,
    way: Way,
    peer: Peer | None,
) -> dict[str, list[float]]:
    """GB/s of each, and ratios of neighbours in time; who goes first takes turns, too."""
    rows: dict[str, list[float]] = {}
    for pair in range(pairs):
        for engine, each in ours.items():
            turns: dict[str, Callable[[], float]] = {
                "raw": functools.partial(raw.seconds, direction, way, size_bytes, each.descriptor),
                "ours": functools.partial(each.seconds, direction),
            }
            if engine == "io_uring":
                turns["raw_with_sums"] = functools.partial(
                    raw.seconds, direction, _with_sums(way), size_bytes, each.descriptor
                )
            if peer is not None and engine == "io_uring":
                library, settings = peer
                turns["deepspeed"] = functools.partial(
                    library.seconds, direction, settings[direction], size_bytes
                )
            order = list(turns) if pair % 2 else list(turns)[::-1]
            rates = {name: size_bytes / turns[name]() / 1e9 for name in order}
            rows.setdefault(f"ours_{_short(engine)}", []).append(rates["ours"])
            rows.setdefault("raw", []).append(rates["raw"])
            rows.setdefault(f"ratio_{engine}", []).append(rates["ours"] / rates["raw"])
            for other in rates.keys() - {"ours", "raw"}:
                rows.setdefault(other, []).append(rates[other])
                rows.setdefault(f"ratio_to_{other}", []).append(rates["ours"] / rates[other])
    return rows


def _with_sums(way: Way) -> Way:
    return dataclasses.replace(way, engine="io_uring_sums")


def _deepspeed(
    stack: contextlib.ExitStack,
    folder: Path,
    size_bytes: int,
    quick: bool,
    notes: list[str],
    details: dict[str, Any],
) -> Peer | None:
    """It and its best settings, where it works; its defects go to the notes."""
    try:
        peer = stack.enter_context(DeepSpeed(folder))
    except DeepSpeedError as error:
        notes.append(f"DeepSpeed's async_io: {error}")
        return None
    details["deepspeed_defects"] = defects = peer.defects()
    notes += [f"DeepSpeed's async_io, {name}: {_told(found)}" for name, found in defects.items()]
    settings = [
        Setting(block_bytes, depth, threads)
        for block_bytes in ((_MIB,) if quick else (_MIB, 8 * _MIB))
        for depth in ((32,) if quick else (8, 32, 128))
        for threads in ((1,) if quick else (1, 2, 4))
    ]
    some_bytes = min(size_bytes, 512 * _MIB)
    best = {}
    peer.seconds("write", settings[0], size_bytes)
    for direction in DIRECTIONS:
        found = {each: peer.seconds(direction, each, some_bytes) for each in settings}
        best[direction] = min(settings, key=lambda each: found[each])
        details[f"deepspeed_{direction}_best"] = repr(best[direction])
    return peer, best


def _told(found: dict[str, Any] | str) -> str:
    """What a write said, and what became of it."""
    if isinstance(found, str):
        return found
    said = f"raised {found['raised']}" if "raised" in found else f"returned {found['returned']}"
    stored = f"{found['stored_bytes']} bytes are in the file"
    right = ", the right ones" if found["is_right"] else ""
    return f"a write of {found['bytes']} bytes {said}; {stored}{right}"


def _short(engine: str) -> str:
    return "uring" if engine == "io_uring" else engine


def _add(metrics: dict[str, float], direction: str, rows: dict[str, list[float]]) -> None:
    for name, values in rows.items():
        median = statistics.median(values)
        if name == "ratio_io_uring":
            metrics[f"ratio_to_raw.{direction}"] = median
        elif name == "ratio_threads":
            metrics[f"ratio_to_raw.{direction}.threads"] = median
        elif name.startswith("ratio_to_"):
            metrics[f"{name}.{direction}"] = median
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

    def __enter__(self) -> _Ours:
        return self

    def __exit__(self, *error: object) -> None:
        self._payloads.clear()
        for registration in self._registrations:
            registration.remove()
        self._store.close()


@functools.lru_cache(maxsize=1)
def _halves() -> list[memoryview]:
    return [huge_memory(_BUFFER_BYTES) for _ in range(2)]


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
    """All ways over a part of the file, then the best of them over more of it."""
    ways = [
        Way(engine, depth, block_bytes)
        for engine in ("io_uring", "threads")
        for depth in ((4, 16) if quick else (1, 2, 4, 8, 16, 32, 64))
        for block_bytes in ((_MIB,) if quick else [(256 << 10) << shift for shift in range(6)])
    ]
    best = {}
    for direction in DIRECTIONS:
        some_bytes = min(size_bytes, 256 * _MIB)
        found = {way: raw.seconds(direction, way, some_bytes, descriptor) for way in ways}
        details[f"raw_{direction}_gb_s"] = {
            f"{way.engine} {way.depth} x {way.block_bytes >> 10} KiB": some_bytes / seconds / 1e9
            for way, seconds in found.items()
        }
        finalists = sorted(ways, key=lambda way: found[way])[: 2 if quick else 6]
        again: dict[Way, list[float]] = {way: [] for way in finalists}
        for _ in range(1 if quick else 3):
            for way in finalists:
                again[way].append(raw.seconds(direction, way, size_bytes, descriptor))
        best[direction] = min(finalists, key=lambda way: statistics.median(again[way]))
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
    notes.append("fio: the same way over a file and memory of its own, without huge pages")


def _crc_gb_s(repeats: int) -> float:
    sources, _ = _buffers()
    seconds = []
    for index in range(repeats):
        start = time.perf_counter()
        crc32c(sources[index % len(sources)])
        seconds.append(time.perf_counter() - start)
    return _PAYLOAD_BYTES / statistics.median(seconds) / 1e9

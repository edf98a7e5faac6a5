"""Sequential bandwidth and latency of folders, past the page cache (O_DIRECT).

Files are unnamed, so that a killed process leaves nothing behind. With several folders each has a
file and a thread of its own, and their rates add up.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spillover._errors import ConfigError, DiskFull, StorageError
from spillover.bench._timing import fastest_seconds

_BLOCK_BYTES = 4096
_CHUNK_BYTES = 8 << 20
_THREADS = 4
_LATENCY_TRANSFERS = 64


def measure(folders: Sequence[Path], *, size_bytes: int, rounds: int) -> dict[str, float]:
    """Numbers of a ``[disk]`` table; ``size_bytes`` are written to each folder in each round."""
    chunk_bytes = max(_BLOCK_BYTES, min(_CHUNK_BYTES, size_bytes // _THREADS))
    chunk_bytes -= chunk_bytes % _BLOCK_BYTES
    chunks = max(size_bytes // chunk_bytes, 1)
    with ExitStack() as stack:
        files = [stack.enter_context(_scratch(folder)) for folder in folders]
        total = len(files) * chunks * chunk_bytes
        seconds = {
            which: fastest_seconds(
                lambda which=which: _stream(files, which, chunks, chunk_bytes),  # type: ignore[misc]
                rounds=rounds,
            )
            for which in ("write", "read")
        }
        latency_us = {which: _latency_us(files[0], which) for which in ("write", "read")}
    return {
        "drives": len(files),
        "read_gb_s": total / seconds["read"] / 1e9,
        "write_gb_s": total / seconds["write"] / 1e9,
        "read_latency_us": latency_us["read"],
        "write_latency_us": latency_us["write"],
    }


@contextmanager
def _scratch(folder: Path) -> Iterator[int]:
    """Descriptor of an unnamed file in ``folder`` that bypasses the page cache."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r} to measure")
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            raise ConfigError(
                f"the file system of {str(folder)!r} refuses O_DIRECT, so a figure would be the "
                "page cache's; name a folder on the disk itself"
            ) from error
        raise StorageError(error.errno, os.strerror(error.errno or 0), str(folder)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stream(files: Sequence[int], which: str, chunks: int, chunk_bytes: int) -> None:
    """Transfer ``chunks`` of every file once, from several threads a file."""
    failures: list[BaseException] = []

    def run(descriptor: int, first: int) -> None:
        try:
            with mmap.mmap(-1, chunk_bytes) as buffer:
                buffer[:] = os.urandom(_BLOCK_BYTES) * (chunk_bytes // _BLOCK_BYTES)
                for chunk in range(first, chunks, _THREADS):
                    _transfer(descriptor, which, buffer, chunk * chunk_bytes)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=run, args=(descriptor, first))
        for descriptor in files
        for first in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if which == "write":
        for descriptor in files:
            os.fdatasync(descriptor)
    if failures:
        raise failures[0]


def _transfer(descriptor: int, which: str, buffer: mmap.mmap, offset: int) -> None:
    """One transfer of the whole buffer; the rest of a short one is transferred again."""
    view = memoryview(buffer)
    operation: Callable[..., int] = os.pwritev if which == "write" else os.preadv
    done = 0
    try:
        while done < len(view):
            try:
                moved = operation(descriptor, [view[done:]], offset + done)
            except OSError as error:
                kind = DiskFull if error.errno == errno.ENOSPC else StorageError
                raise kind(
                    error.errno, os.strerror(error.errno or 0), "the scratch file"
                ) from error
            if moved == 0:
                raise StorageError(errno.EIO, f"the {which} ended at {offset + done}")
            done += moved
    finally:
        view.release()


def _latency_us(descriptor: int, which: str) -> float:
    """Median duration of one transfer of a block, one after another."""
    durations = []
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:
        _transfer(descriptor, "write", buffer, 0)
        for _ in range(_LATENCY_TRANSFERS):
            start = time.perf_counter_ns()
            _transfer(descriptor, which, buffer, 0)
            durations.append(time.perf_counter_ns() - start)
    return sorted(durations)[len(durations) // 2] / 1000

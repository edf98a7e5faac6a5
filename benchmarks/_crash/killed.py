"""Processes that commit to a durable store on a real disk and are killed at random instants."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from spillover import DurableStore, SpilloverError, StorageError

EXTENT_BYTES = 16384
#: Each is written at every so many commits, so that slots change roles at different times.
ENTRIES = {"every": (300_000, 1), "second": (50_000, 2), "third": (7, 3)}


def contents(sequence: int) -> dict[str, bytes]:
    """What commit ``sequence`` holds."""
    return {
        name: random.Random(f"{name} {sequence - sequence % period}").randbytes(size)
        for name, (size, period) in ENTRIES.items()
    }


def run_worker(folders: list[str]) -> None:
    """Commit until somebody ends this process; says so of each commit on standard output."""
    print(json.dumps("start"), flush=True)
    store = DurableStore(
        folders, {name: size for name, (size, _) in ENTRIES.items()}, extent_bytes=EXTENT_BYTES
    )
    sequence = store.sequence
    while True:
        sequence += 1
        expected = contents(sequence)
        tickets = [
            store.write(name, expected[name])
            for name, (_, period) in ENTRIES.items()
            if sequence % period == 0 or not store.is_committed(name)
        ]
        for ticket in tickets:
            ticket.wait()
        os.write(1, f"{store.commit({'step': sequence})}\n".encode())


def kill_once(folders: list[Path], seed: int, window_s: float) -> str | None:
    """Start a worker, kill it, open the store; what is wrong, or None."""
    names = [str(folder) for folder in folders]
    before = _found(names)
    worker = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import run_worker; run_worker({names!r})"],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, window_s))
    worker.kill()
    output, errors = worker.communicate()
    if worker.returncode != -9:
        return f"seed {seed}: the worker ended by itself: {errors.decode()}"
    acknowledged = [int(line) for line in output.split()]
    least = acknowledged[-1] if acknowledged else before
    try:
        problem = _check(names, least)
    except SpilloverError as error:
        problem = f"{type(error).__name__}: {error}"
    return None if problem is None else f"seed {seed}: {problem}"


def _found(names: list[str]) -> int | None:
    try:
        with DurableStore(names) as store:
            return store.sequence
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _check(names: list[str], least: int | None) -> str | None:
    if least is None and _found(names) is None:
        return None  # It was not made yet, and may be.
    with DurableStore(names) as store:
        sequence, extra = store.sequence, store.extra
        if not (least or 0) <= sequence <= (least or 0) + 1:
            return f"commit {sequence} was found, and {least} was acknowledged"
        if sequence == 0:
            return None
        if extra != {"step": sequence}:
            return f"commit {sequence} has the extra {extra}"
        for name, data in contents(sequence).items():
            target = bytearray(len(data))
            store.read(name, target).wait()
            if target != data:
                return f"{name} is not what commit {sequence} holds"
        store.verify()
    return None


def kill_many(root: Path, count: int, *, seed: int = 0, window_s: float = 0.08) -> list[str]:
    """So many kills, each third of a store that is not there yet; the problems."""
    problems = []
    generation = 0
    for index in range(count):
        if index % 3 == 0:
            generation += 1
        folders = [root / f"{generation}{name}" for name in "ab"]
        problem = kill_once(folders, seed + index, window_s)
        if problem is not None:
            problems.append(problem)
        if index % 3 == 2 and _found([str(folder) for folder in folders]) is not None:
            DurableStore.delete(folders)
    return problems

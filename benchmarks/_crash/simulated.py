"""A durable store on the simulated disk, cut at every point of its history.

A workload's history is recorded once; each cut of it, with each seed, is opened again and must give
the last commit that was acknowledged before, or the one under way, as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from spillover import SpilloverError, _core


@dataclass(frozen=True)
class Workload:
    """What is done to the store; everything follows from the seed."""

    seed: int
    commits: int = 3
    engine: str = "threads"

    @property
    def folders(self) -> list[str]:
        """One to three."""
        return [f"/disk{index}/state" for index in range(1 + self.seed % 3)]

    @property
    def extent_bytes(self) -> int:
        """Small, so that entries have several extents."""
        return 4096 * (1 + self.seed % 2)

    @property
    def entries(self) -> list[tuple[str, int]]:
        """Of sizes that are no whole blocks."""
        rng = random.Random(self.seed)
        return [("weight", rng.randint(8193, 20000)), ("bias", rng.randint(1, 4096)), ("step", 4)]


@dataclass
class Commit:
    """What a commit holds, and between which events of the history it was made."""

    sequence: int
    extra: bytes
    contents: dict[str, bytes]
    begun: int
    acknowledged: int


@dataclass
class Recording:
    """A workload that ran."""

    workload: Workload
    history: _core.DiskHistory
    commits: list[Commit] = field(default_factory=list)


@contextmanager
def simulated_disk() -> Iterator[None]:
    """An empty simulated disk in the place of the machine's file systems."""
    _core.simulated_disk_begin()
    try:
        yield
    finally:
        _core.simulated_disk_end()


def open_store(workload: Workload, *, may_make: bool = True) -> _core.DurableStore:
    """With one thread a folder, which makes the order of events the same in each run."""
    return _core.DurableStore(
        workload.folders,
        workload.entries if may_make else [],
        extent_bytes=workload.extent_bytes if may_make else None,
        extra_limit_bytes=4000 if may_make else None,
        engine=workload.engine,
        threads_per_folder=1,
    )


def record(workload: Workload) -> Recording:
    """Run the workload on the simulated disk as it is."""
    rng = random.Random(workload.seed)
    store = open_store(workload)
    commits = [Commit(0, b"", {}, 0, _core.simulated_disk_events())]
    newest: dict[str, bytes] = {}
    for number in range(1, workload.commits + 1):
        for _ in range(rng.randint(1, 2)):  # Steps between two commits.
            _step(workload, store, newest, rng)
        if number > 1 and rng.random() < 0.3:  # A step that fails.
            _step(workload, store, dict(newest), rng)
            store.rollback()
            newest = dict(commits[-1].contents)
            _step(workload, store, newest, rng)
        extra = rng.randbytes(rng.choice([0, 10, 4000]))
        begun = _core.simulated_disk_events()
        sequence = store._commit(extra, 1)
        commits.append(Commit(sequence, extra, dict(newest), begun, _core.simulated_disk_events()))
        if rng.random() < 0.3:
            store.close()
            store = open_store(workload)
    store.close()
    return Recording(workload, _core.simulated_disk_take_history(), commits)


def _step(
    workload: Workload, store: _core.DurableStore, newest: dict[str, bytes], rng: random.Random
) -> None:
    tickets = []
    for name, size in workload.entries:
        if name not in newest or rng.random() < 0.6:
            newest[name] = rng.randbytes(size)
            tickets.append(store.write(name, newest[name]))
        elif size > workload.extent_bytes:  # Only one extent.
            part = rng.randbytes(workload.extent_bytes)
            tickets.append(store.write(name, part))
            newest[name] = part + newest[name][len(part) :]
    for ticket in tickets:
        ticket.wait()


def check(
    recording: Recording,
    cut: int,
    seed: int,
    *,
    ignores_syncs: bool = False,
    ignored_sync: int | None = None,
) -> str | None:
    """Crash there, open, and say what is wrong; None where all is well.

    The store then goes on, and crashes again while it is opened or used.
    """
    history = recording.history
    _core.simulated_disk_crash(
        history, cut, seed, ignores_syncs=ignores_syncs, ignored_sync=ignored_sync
    )
    problem = _find_problem(recording, cut)
    if problem is None and seed % 4 == 0:
        again = _core.simulated_disk_take_history()
        cut_again = random.Random(seed * 1_000_003 + cut).randint(0, len(again))
        _core.simulated_disk_crash(again, cut_again, seed + 1)
        problem = _find_problem(recording, cut, is_second=True)
    if problem is None:
        return None
    last = history.describe(cut - 1) if cut > 0 else "nothing"
    return f"{recording.workload}, cut {cut} (after {last}), seed {seed}: {problem}"


def _find_problem(recording: Recording, cut: int, *, is_second: bool = False) -> str | None:
    commits = recording.commits
    acknowledged = [commit for commit in commits if commit.acknowledged <= cut]
    possible = {commit.sequence: commit for commit in commits if commit.begun <= cut}
    least = acknowledged[-1].sequence if acknowledged else 0
    later = _later(recording.workload, least)
    try:
        # Where it was not there for sure, it may have to be made.
        store = open_store(recording.workload, may_make=not acknowledged)
    except SpilloverError as error:
        return f"{type(error).__name__}: {error}"
    try:
        found = store.stats().sequence
        if is_second:  # What was done after the first crash, or before.
            possible[found] = next(
                (commit for commit in (later, possible.get(found)) if _has(store, commit)), later
            )
        if found < least or found not in possible:
            return f"commit {found} was found, and {least} was acknowledged"
        if not _has(store, possible[found]):
            return f"commit {found} is not whole"
        if is_second:
            return None
        # Life goes on; its events are the second history.
        for name, data in later.contents.items():
            store.write(name, data).wait()
        store._commit(later.extra, 1)
        if not _has(store, later):
            return "a commit after the crash is not whole"
    except SpilloverError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        store.close()
    return None


def _later(workload: Workload, after: int) -> Commit:
    rng = random.Random(-1 - workload.seed)
    contents = {name: rng.randbytes(size) for name, size in workload.entries}
    return Commit(after + 1, b"later", contents, 0, 0)


def _has(store: _core.DurableStore, commit: Commit | None) -> bool:
    if commit is None or store._extra()[1] != commit.extra:
        return False
    for name, data in commit.contents.items():
        target = bytearray(len(data))
        store.read(name, target).wait()
        if target != data:
            return False
    return True


def cut_everywhere(workload: Workload, seeds: int) -> tuple[int, list[str]]:
    """Every cut of the workload's history with so many seeds: how many, and the problems."""
    with simulated_disk():
        recording = record(workload)
        found = [
            check(recording, cut, seed)
            for cut in range(len(recording.history) + 1)
            for seed in range(seeds)
        ]
    return len(found), [problem for problem in found if problem is not None]


def lost_without_syncs(workload: Workload, seeds: int) -> int:
    """Cuts with a problem when the disk forgets what was flushed: there must be some."""
    with simulated_disk():
        recording = record(workload)
        created = recording.commits[0].acknowledged
        return sum(
            check(recording, cut, seed, ignores_syncs=True) is not None
            for cut in range(created, len(recording.history) + 1, 5)
            for seed in range(seeds)
        )


def losing_syncs(workload: Workload, seeds: int) -> list[tuple[str, bool]]:
    """Each sync of the last commit, and whether leaving out that one alone loses something."""
    with simulated_disk():
        recording = record(workload)
        history, last = recording.history, recording.commits[-1]
        found = []
        for event in range(last.begun, last.acknowledged):
            if history.describe(event).startswith("return of sync"):
                loses = any(
                    check(recording, cut, seed, ignored_sync=event) is not None
                    for cut in range(event, last.acknowledged + 1)
                    for seed in range(seeds)
                )
                found.append((history.describe(event), loses))
    return found

"""Repeats a scenario with a fault at call 1, 2, 3, ... and checks what is left after each."""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TextIO

from spillover._errors import ConfigError, SpilloverError, StorageError
from spillover.emulator._control import clear_hazards, hazards, live
from spillover.emulator._faults import Fault, StorageFault, calls, faults

#: How long threads and queued frees of a failed run may take to be gone.
_SETTLE_S = 2.0


@dataclass(frozen=True)
class SweepFailure:
    """A fault after which something was not as it should be."""

    fault: Fault | StorageFault
    fired: tuple[str, ...]
    problem: str

    def __str__(self) -> str:
        return f"{', '.join(self.fired) or self.fault}: {self.problem}"


@dataclass
class SweepReport:
    """What :func:`sweep` has found."""

    #: Runs in which the fault struck.
    points: int = 0
    #: Of them, those that ended well: the fault was retried or did not matter.
    survived: int = 0
    #: The others, by the type of their error.
    raised: Counter[str] = field(default_factory=Counter)
    failures: list[SweepFailure] = field(default_factory=list)

    def check(self) -> None:
        """Raise ``AssertionError`` with every failure, if there is any."""
        if self.failures:
            lines = "\n".join(str(failure) for failure in self.failures)
            raise AssertionError(f"{len(self.failures)} of {self.points} faults:\n{lines}")


def sweep(
    scenario: Callable[[], object],
    *,
    points: Iterable[Fault | StorageFault] | None = None,
    sample: int | None = None,
    seed: int = 0,
    check: Callable[[], None] | None = None,
    failures_max: int = 20,
    progress: TextIO | None = None,
) -> SweepReport:
    """Run ``scenario`` with one fault after the other, by default one at each call of the driver.

    After each fault it must hold that the error, if there was one, is one of Spillover's or torch's
    and says what failed; that a run without a fault gives the same result as ever; that nothing is
    held that was not held before (device and pinned memory, streams, events, file descriptors,
    threads); and that no hazard was found.

    Parameters
    ----------
    scenario
        Does the same work at each call and returns its result: tensors, numbers and strings in
        lists, tuples and dicts. It frees what it makes.
    points
        The faults to try; those that do not strike are passed over. None: ``Fault(call=1)``,
        ``Fault(call=2)``, ... until a run ends before its fault strikes.
    sample
        Try so many of the points only.
    seed
        Chooses the sample.
    check
        Called after each fault, when the scenario's objects are gone; raises if state is broken.
    failures_max
        Give up after so many.
    progress
        Where to write a line before each fault, for scenarios that may end the process.

    Returns
    -------
    SweepReport
        Call its ``check()`` to raise what was found.
    """
    run = _Runner(scenario, check, progress)
    run.warm_up()
    chosen: Iterable[Fault | StorageFault]
    if points is not None:
        chosen = list(points)
    elif sample is None:
        chosen = (Fault(call=call) for call in itertools.count(1))
    else:
        chosen = [Fault(call=call) for call in range(1, run.driver_calls + 1)]
    if sample is not None and isinstance(chosen, list):
        chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
    # What is there already cannot leak; without it each collection takes milliseconds.
    gc.collect()
    gc.freeze()
    try:
        for point in chosen:
            struck = run.strike(point)
            if len(run.report.failures) >= failures_max or not (struck or points or sample):
                break
    finally:
        gc.unfreeze()
    return run.report


class _Runner:
    def __init__(
        self,
        scenario: Callable[[], object],
        check: Callable[[], None] | None,
        progress: TextIO | None,
    ) -> None:
        self._scenario = scenario
        self._check = check
        self._progress = progress
        self._expected: object = None
        self._held: dict[str, int] = {}
        self.driver_calls = 0
        self.report = SweepReport()

    def warm_up(self) -> None:
        """The second run finds every cache and pool as all later ones do."""
        self._expected = self._scenario()
        _settle()
        with faults():
            again = self._scenario()
            counts = calls()
        if not same(self._expected, again):
            raise ConfigError("the scenario gives another result each time; fix its seed")
        self.driver_calls = sum(counts[name] for name in counts if name[2:3].isupper())
        del again
        _settle()
        self._held = held()

    def strike(self, fault: Fault | StorageFault) -> bool:
        """Run with the fault; False when the scenario ended before it."""
        if self._progress is not None:
            print(fault, file=self._progress, flush=True)
        plan = ((), (fault,)) if isinstance(fault, StorageFault) else ((fault,), ())
        error: Exception | None = None
        result: object = None
        with faults(*plan[0], storage=plan[1]) as injected:
            try:
                result = self._scenario()
            except Exception as raised:
                error = raised
            fired = tuple(injected.fired())
        if error is None and not same(result, self._expected):
            self._fail(fault, fired, "the run ended well with a wrong result")
        result = None
        if not fired:
            if error is not None:
                self._fail(fault, (), f"a run without a fault failed: {_shown(error)}")
            return False
        self.report.points += 1
        if error is None:
            self.report.survived += 1
        else:
            self.report.raised[type(error).__name__] += 1
            problem = unclear(error, fired)
            if problem is not None:
                self._fail(fault, fired, problem)
            # Its traceback, and those of the errors behind it, hold what the scenario held.
            error = None
        self._inspect(fault, fired)
        return True

    def _inspect(self, fault: Fault | StorageFault, fired: tuple[str, ...]) -> None:
        try:
            _settle()
            if self._check is not None:
                self._check()
            if not same(self._scenario(), self._expected):
                self._fail(fault, fired, "a run without a fault after it gives a wrong result")
        except Exception as error:
            self._fail(fault, fired, f"a run without a fault after it failed: {_shown(error)}")
        found = hazards()
        clear_hazards()
        if found:
            self._fail(fault, fired, f"hazards: {found[0]}")
        try:
            left = self._leaks()
        except Exception as error:
            self._fail(fault, fired, f"the device does not work after it: {_shown(error)}")
            return
        if left:
            self._fail(fault, fired, f"held after it: {left}")
            # Each leak is reported once.
            self._held = held()

    def _leaks(self) -> str:
        end = time.monotonic() + _SETTLE_S
        while True:
            _settle()
            now = held()
            more = [
                f"{now[name] - before} {name} more"
                for name, before in self._held.items()
                if now[name] > before
            ]
            if not more or time.monotonic() > end:
                return ", ".join(more)
            time.sleep(0.01)

    def _fail(self, fault: Fault | StorageFault, fired: tuple[str, ...], problem: str) -> None:
        self.report.failures.append(SweepFailure(fault, fired, problem))


def held() -> dict[str, int]:
    """What this process holds, by kind."""
    resources = asdict(live())
    resources["descriptors"] = len(os.listdir("/proc/self/fd"))
    resources["threads"] = len(os.listdir("/proc/self/task"))
    # Python keeps a stand-in for each native thread that ever logged; those are counted above.
    resources["python_threads"] = sum(
        not isinstance(thread, threading._DummyThread) for thread in threading.enumerate()
    )
    return resources


def _settle() -> None:
    """Let go of all that is not used, so that what is left is held by somebody."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    pinned = sys.modules.get("spillover._pinned")
    if pinned is not None:
        pinned.host_pool().trim()


def _shown(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def same(one: object, other: object) -> bool:
    """Whether two results are equal, tensors to the last bit."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.dtype != other.dtype:
            return False
        return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def unclear(error: BaseException, fired: tuple[str, ...]) -> str | None:
    """What is wrong with an error as an answer to the faults that were injected; None: nothing.

    Spillover's errors and torch's are right where they say what failed: with CUDA's name for the
    error, its text, or the errno's.
    """
    message = str(error)
    shown = _shown(error)
    if isinstance(error, StorageError):
        return None if error.errno is not None else f"no errno in {shown}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return None
    if isinstance(error, SpilloverError | MemoryError) and len(message) > 20:
        return None
    known = isinstance(error, RuntimeError)
    if known and any(word in message for word in _words(fired)):
        return None
    return f"the error does not say what failed: {shown}"


def _words(fired: tuple[str, ...]) -> Iterator[str]:
    """What an error may call the faults."""
    for text in fired:
        name = text.rpartition(": ")[2]
        yield name
        yield _CUDA_TEXTS.get(name, name)


#: CUDA's descriptions of the errors that are injected when none is named.
_CUDA_TEXTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "out of memory",
    "CUDA_ERROR_OPERATING_SYSTEM": "OS call failed",
}

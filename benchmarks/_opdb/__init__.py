"""PyTorch's own operator samples (``op_db``) on the emulated device, against the CPU.

``run`` hands the operators out to worker processes (``_worker.py``), so that an operator that
crashes or hangs costs its own result and nothing else. ``_compare.py`` says what is compared and
``exceptions.json`` lists, with a reason each, what is compared in another way or not at all.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import random
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

#: ``sparse`` takes the float32 samples of all sparse layouts that an operator supports;
#: ``accesses`` compares nothing but what the checker is told with what is touched.
Mode = Literal["float32", "bfloat16", "sparse", "accesses"]
Status = Literal["pass", "fail", "skip", "absent"]

ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = Path(__file__).with_name("exceptions.json")
#: An operator that takes longer has hung; the slowest take a few seconds on an idle machine.
_OPERATOR_SECONDS_MAX = 180.0
_STDERR_LINES_KEPT = 15


@dataclass(frozen=True)
class Result:
    """What came of one operator's samples.

    ``status`` is ``absent`` where CUDA has no kernel for the type, so that there is nothing to
    compare; ``detail`` says why an operator failed or was skipped.
    """

    name: str
    status: Status
    detail: str = ""
    compared: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class Report:
    """The results of one run over the operators."""

    mode: Mode
    results: list[Result] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """How many operators ended this way."""
        return sum(result.status == status for result in self.results)

    def named(self, status: Status) -> dict[str, str]:
        """The operators that ended this way, with the reason."""
        return {r.name: r.detail for r in self.results if r.status == status}


def exceptions() -> dict[str, dict[str, Any]]:
    """The content of ``exceptions.json``: kind of exception, then operator, then the reason."""
    content: dict[str, dict[str, Any]] = json.loads(EXCEPTIONS.read_text())
    return content


@functools.lru_cache(maxsize=1)
def all_names() -> list[str]:
    """All operators of ``op_db``."""
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks._opdb._worker", "--list"],
        cwd=ROOT,
        env=_environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return sorted(output.split())


def draw(seed: int, size: int) -> list[str]:
    """So many operators, the same for the same seed."""
    return random.Random(seed).sample(all_names(), size)


def run(
    mode: Mode,
    *,
    names: Iterable[str] | None = None,
    workers: int = 2,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Compare operators and return a result for each.

    Parameters
    ----------
    mode
        The type of the samples. Operators without float32 use the nearest type that they have.
    names
        Only these; all of ``op_db`` by default.
    workers
        Processes that run at once, each with one thread.
    on_result
        Is called with each result as it comes, from several threads.
    """
    chosen = all_names() if names is None else list(names)
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in chosen:
        pending.put(name)
    report = Report(mode)

    def work() -> None:
        for result in _results_of_one_worker(mode, pending):
            report.results.append(result)
            if on_result is not None:
                on_result(result)

    threads = [threading.Thread(target=work) for _ in range(min(workers, max(len(chosen), 1)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.results.sort(key=lambda result: result.name)
    return report


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _results_of_one_worker(mode: Mode, pending: queue.SimpleQueue[str]) -> Iterator[Result]:
    """Feed a worker with operators until none is left; start a new one when it dies."""
    worker: _Worker | None = None
    try:
        while True:
            try:
                name = pending.get_nowait()
            except queue.Empty:
                return
            if worker is None:
                worker = _Worker(mode)
            result = worker.compare(name)
            if worker.is_lost:
                worker.close()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    """One worker process, owned by one thread."""

    def __init__(self, mode: Mode) -> None:
        self.is_lost = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._opdb._worker", mode],
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stderr: list[str] = []
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def compare(self, name: str) -> Result:
        """Have one operator compared; a worker that died or hung gives a failure that says so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
            line = self._read_line()
        except BrokenPipeError:
            line = ""
        if line:
            content = json.loads(line)
            return Result(**{**content, "compared": tuple(content["compared"])})
        self.is_lost = True
        if line is None:
            self._process.kill()
            return Result(name, "fail", f"hung: no result in {_OPERATOR_SECONDS_MAX:.0f} s")
        code = self._process.wait()
        self._reader.join()
        tail = "".join(self._stderr[-_STDERR_LINES_KEPT:])
        return Result(name, "fail", f"the process ended with code {code}: {tail}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._reader.join()

    def _read_line(self) -> str | None:
        """The next line; empty when the process is gone, None when it takes too long."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_OPERATOR_SECONDS_MAX):
                return None
        return self._process.stdout.readline()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr.append(line)
            del self._stderr[:-_STDERR_LINES_KEPT]
        self._process.stderr.close()

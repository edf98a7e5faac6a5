"""How long a pair of an allocation and a free takes, in the core and through torch.

``python -m benchmarks._allocator.pairs TARGET`` measures in a process of its own, one line of JSON
for each line of standard input; three of them take turns, so that what else the machine does meets
all alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SIZES = {"512B": 512, "4KiB": 4 << 10, "1MiB": 1 << 20, "8MiB": 8 << 20, "64MiB": 64 << 20}
THREADS = (1, 2, 4)
#: The pool through its C interface, and the allocators of torch through c10's.
TARGETS = ("core", "torch.ours", "torch.native")


class _Process:
    def __init__(self, target: str) -> None:
        from spillover.replay._measure import worker_environment

        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._allocator.pairs", target],
            env=worker_environment("native"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: int) -> int:
        """Wall-clock nanoseconds of what the question describes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"measuring pairs failed (exit code {self._process.wait()})")
        elapsed: int = json.loads(answer)
        return elapsed

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() != 0:
            raise RuntimeError("a pool is broken after its pairs were measured")


def per_pair_ns(elapsed_ns: int, *, threads: int, pairs: int) -> float:
    """Time of one pair on one core: wall-clock time times the cores in use, over all pairs.

    Cores in use are those that the threads can have at once, so perfect scaling leaves the number
    as it is for one thread, on a machine of any size.
    """
    cores = min(threads, len(os.sched_getaffinity(0)))
    return elapsed_ns * cores / (threads * pairs)


def measure(*, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Medians over repeats that take turns, by ``pair_ns.`` and ``pair_ratio.`` name; every repeat.

    A ratio is native's time over ours in the same repeat, so that load on the machine cancels out.
    """
    repeats, pairs = (2, 2000) if quick else (15, 50_000)
    processes = {target: _Process(target) for target in TARGETS}
    samples: dict[str, list[float]] = {}
    try:
        for size_name, size_bytes in SIZES.items():
            for threads in THREADS:
                for _ in range(repeats):
                    for target, process in processes.items():
                        elapsed = process.ask(size_bytes=size_bytes, threads=threads, pairs=pairs)
                        name = _metric(target, size_name, threads)
                        value = per_pair_ns(elapsed, threads=threads, pairs=pairs)
                        samples.setdefault(name, []).append(value)
    finally:
        for process in processes.values():
            process.close()
    metrics = {name: statistics.median(values) for name, values in samples.items()}
    for size_name in SIZES:
        for threads in THREADS:
            ours, native = (
                samples[_metric(target, size_name, threads)]
                for target in ("torch.ours", "torch.native")
            )
            ratios = [other / own for own, other in zip(ours, native, strict=True)]
            metrics[f"pair_ratio.torch.{size_name}.{threads}t"] = statistics.median(ratios)
    return metrics, samples


def _metric(target: str, size_name: str, threads: int) -> str:
    layer, _, allocator = target.partition(".")
    return ".".join(filter(None, ("pair_ns", layer, size_name, f"{threads}t", allocator)))


def _pairs_of(target: str) -> Callable[[int, int, int], int]:
    """A function of size, threads and pairs that gives wall-clock nanoseconds."""
    from spillover.replay._player import Player, make_streams
    from spillover.replay._worker import enable_emulator

    enable_emulator(8 << 30)
    if target == "core":
        make_streams(1)
        player = Player.of_pool()
        return lambda size, threads, pairs: player.pairs_ns(size, threads=threads, pairs=pairs)
    from spillover import _build, allocator

    if target == "torch.ours":
        allocator.install(adapter="full")
    import torch

    torch.cuda.init()
    part = ctypes.CDLL(str(_build.build("replay")))
    function = part.spillover_torch_replay_pairs
    function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_size_t] * 3
    return lambda size, threads, pairs: int(function(size, threads, pairs))


def _main(target: str) -> None:
    pairs_of = _pairs_of(target)
    for line in sys.stdin:
        question = json.loads(line)
        elapsed = pairs_of(question["size_bytes"], question["threads"], question["pairs"])
        if elapsed == 0:
            sys.exit(f"{target} failed to serve {question}")
        print(elapsed, flush=True)
    if target != "torch.native":
        from spillover.allocator import check_invariants

        check_invariants()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1])

"""Times steps of all ways in turns; run by ``benchmarks.optimizer`` in a process of its own."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks import _harness
from benchmarks._optimizer import ways
from benchmarks._optimizer.arrays import Arrays, Check, Piece, windows_of
from benchmarks._transfer.host_memory import weight_counts

# OpenMP's threads, torch's and DeepSpeed's, spin for milliseconds after their work and would take a
# processor from whoever comes next.
_SETTLE_SECONDS = 0.03


def _shapes(name: str) -> list[int]:
    if name == "1b":
        return weight_counts()
    return [int(name)]


def _steps(arrays: Arrays, window: list[Piece], deepspeed: ways.DeepSpeed | None) -> dict[str, Any]:
    threads = torch.get_num_threads()
    steps = ways.streams(arrays, window, threads=threads)
    steps |= ways.ours(arrays, window, threads=threads)
    steps["torch_fused"] = ways.torch_fused(arrays, window)
    if deepspeed is not None:
        steps["deepspeed_fp32"] = deepspeed.fp32(arrays, window)
        steps["deepspeed_mixed"] = deepspeed.mixed(arrays, window)
    return steps


def _main(shape_list: str, rounds: int) -> None:
    torch.manual_seed(7)
    counts = _shapes(shape_list)
    windows = windows_of(counts)
    arrays = Arrays(max(window[-1].start + window[-1].count for window in windows))
    deepspeed, reason = None, ""
    try:
        deepspeed = ways.DeepSpeed()
    except ways.DeepSpeedError as error:
        reason = str(error)
    steps = [_steps(arrays, window, deepspeed) for window in windows]
    names = list(steps[0])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1 + rounds):  # The first is cold.
        # Who goes first changes, since what runs after another finds other pages in the caches.
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            total = 0.0
            for index, window in enumerate(windows):
                check = Check(arrays, window, seed=number)
                time.sleep(_SETTLE_SECONDS)
                begin = time.perf_counter()
                steps[index][name]()
                total += time.perf_counter() - begin
                if not name.startswith("stream") and name != "ours_8bit":
                    is_mixed = name.endswith("mixed")
                    gradient = arrays.low_gradient if is_mixed else arrays.gradient
                    check.verify(gradient, writes_low=is_mixed)
            if number:
                seconds[name].append(total)
        if deepspeed is not None:
            arrays.gradient.copy_(arrays.low_gradient)  # What the casts left, for all.
    _harness.end_measurement(
        {
            "count": sum(counts),
            "tensors": len(counts),
            "windows": len(windows),
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "no_deepspeed": reason,
        }
    )


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))

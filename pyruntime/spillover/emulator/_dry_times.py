"""Simulated times of a dry run's training steps: how long, how many tokens, limited by what.

A training step ends when all that the program had launched until its optimizer's step returned is
done, in virtual time. Programs with several optimizers (one a network, one a parameter) count the
steps of the optimizer that has made most; a step then ends with the last of them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from spillover.emulator import _libraries

#: Of the held-out cases in docs/cost-model.md, in percent; tests/test_calibration.py keeps it true.
CALIBRATION_ERROR_MEDIAN, CALIBRATION_ERROR_MAX = 4.4, 19.8


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What is known of a program's steps.

    ``shares`` are the parts of the critical path of the steps that count, by what would have to be
    faster for them to end earlier; they add up to 1.
    """

    step_time_s: float
    counted_steps: int
    tokens_per_step: int | None
    shares: dict[str, float]


class StepTimes:
    """Follows the steps of one process; made once torch is imported, with the clock on."""

    def __init__(self) -> None:
        self._library = _libraries.driver()
        self._start: int | None = None
        self._ends: dict[int, int] = {}
        self._indices: dict[int, dict[tuple[int, ...], int]] = defaultdict(lambda: defaultdict(int))
        self._step = 1

    def watch(self, torch: Any) -> None:
        """Note when the first forward pass begins, and what embeddings are asked for."""
        modules = importlib.import_module("torch.nn.modules.module")

        def begin(module: Any, arguments: Any) -> None:
            handle.remove()
            self._start = self._mark()

        handle = modules.register_module_forward_pre_hook(begin)
        functional = torch.nn.functional
        original = functional.embedding

        @functools.wraps(original)
        def embedding(indices: Any, weight: Any, *arguments: Any, **options: Any) -> Any:
            # A checkpoint computes again in the backward pass; without gradients it is no training.
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self._indices[self._step][tuple(weight.shape)] += indices.numel()
            return original(indices, weight, *arguments, **options)

        functional.embedding = embedding

    def end_step(self, step: int) -> None:
        """An optimizer has made its step of this number; the last one of a number counts."""
        self._ends[step] = self._mark()
        self._step = max(self._step, step + 1)

    def summary(self) -> StepSummary | None:
        """None before the first step has ended.

        Steps after the first count, from one end to the next; where there is only one, it counts
        from the first forward pass on.
        """
        marks = [self._ends[step] for step in sorted(self._ends)]
        if len(marks) == 1 and self._start is not None:
            marks.insert(0, self._start)
        if len(marks) < 2:
            return None
        self._library.spillover_emulator_clock_report(None, 0)  # simulates all that was launched
        ends = [int(self._library.spillover_emulator_clock_mark_time(mark)) for mark in marks]
        times = [end - start for start, end in itertools.pairwise(ends)]
        return StepSummary(
            step_time_s=statistics.median(times) / 1e9,
            counted_steps=len(times),
            tokens_per_step=self._tokens(len(times)),
            shares=limits(ends[0], ends[-1]),
        )

    def _mark(self) -> int:
        return int(self._library.spillover_emulator_clock_mark())

    def _tokens(self, counted_steps: int) -> int | None:
        """Indices that the most used embedding was asked for in a step, as the median."""
        steps = sorted(self._ends)[-counted_steps:]
        counts = [max(self._indices[step].values(), default=0) for step in steps]
        return int(statistics.median(counts)) or None


def limits(start_ns: int, end_ns: int) -> dict[str, float]:
    """What the time between two moments went by, along the critical path: shares, largest first."""
    function = _libraries.driver().spillover_emulator_clock_limits
    length = function(start_ns, end_ns, None, 0)
    buffer = ctypes.create_string_buffer(length + 1)
    function(start_ns, end_ns, buffer, length + 1)
    found = {entry["name"]: int(entry["ns"]) for entry in json.loads(buffer.value)}
    total = sum(found.values())
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    return {name: ns / total for name, ns in ordered}

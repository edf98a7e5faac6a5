"""Timing of repeated work: the fastest of some rounds, since other load only ever adds time."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest_seconds(
    work: Callable[[], object],
    *,
    rounds: int,
    calls: int = 1,
    finish: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of one call of ``work``: the fastest of ``rounds``, each of ``calls`` calls.

    ``finish`` is called after each round and its time counts; one round before them does not.
    """
    best = float("inf")
    for index in range(rounds + 1):
        start = time.perf_counter_ns()
        for _ in range(calls):
            work()
        finish()
        seconds = (time.perf_counter_ns() - start) / 1e9 / calls
        if index:
            best = min(best, seconds)
    # A clock that does not advance would make a rate infinite.
    return max(best, 1e-9)

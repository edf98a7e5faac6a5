"""Recorded allocations of real training runs, replayed with a check for overlap at each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TRACES = Path(__file__).resolve().parents[2] / "benchmarks" / "traces"

REPLAY = """
import bisect, csv, gzip, sys

import spillover.emulator

# Not poisoned: nothing reads this memory, and filling gigabytes would take long.
spillover.emulator.enable(vram="64GiB", poison=False)

from spillover import _core

pool = _core.Pool(0)
starts, ends, blocks = [], {}, {}
with gzip.open(sys.argv[1], "rt", newline="") as file:
    for number, row in enumerate(csv.reader(file)):
        if row[0] == "alloc":
            size = int(row[2])
            address = pool.alloc(size)
            blocks[row[1]] = address
            if address == 0:
                assert size == 0
                continue
            position = bisect.bisect_left(starts, address)
            assert position == 0 or ends[starts[position - 1]] <= address, "overlap"
            assert position == len(starts) or address + size <= starts[position], "overlap"
            starts.insert(position, address)
            ends[address] = address + size
        elif row[0] == "free":
            address = blocks.pop(row[1])
            pool.free(address)
            if address:
                del starts[bisect.bisect_left(starts, address)], ends[address]
        if number % 1000 == 0:
            pool.check_invariants()
stats = pool.stats()
peak = stats["allocated_bytes"]["all"]["peak"] / stats["reserved_bytes"]["all"]["peak"]
assert stats["allocation"]["all"]["current"] == len(starts)
for address in starts:
    pool.free(address)
pool.check_invariants()
pool.trim()
pool.check_invariants()
assert pool.segments() == []
assert spillover.emulator.live().device_bytes == 0, spillover.emulator.live()
print(f"utilisation {100 * peak:.1f}")
"""


@pytest.mark.parametrize(
    "trace", sorted(TRACES.glob("*.csv.gz")), ids=lambda path: path.name.partition(".")[0]
)
def test_a_real_trace_is_served_and_returned(trace: Path, run_python: Callable[..., str]) -> None:
    output = run_python(REPLAY, str(trace))
    utilisation = float(output.split()[-1])
    assert utilisation > 80


def test_there_are_traces() -> None:
    assert len(list(TRACES.glob("*.csv.gz"))) >= 4

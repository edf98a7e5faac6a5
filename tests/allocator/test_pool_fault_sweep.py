"""Each driver call of a program on the pool fails in turn, and nothing is lost or overwritten."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cuda_calls import Cuda
from pool_program import OWN_CALLS, Program

from spillover import _core, emulator
from spillover.emulator import Fault, calls, faults


@pytest.fixture
def program(pool: _core.Pool, cuda: Cuda, kept_streams: list[int]) -> Iterator[Program]:
    program = Program(pool, cuda, kept_streams)
    # The second run finds what the pool keeps for later: events and the like.
    program.run()
    yield program
    # A pool that could not put the mode back must not change what later tests may do in captures.
    cuda.forbid_unsafe_calls_in_captures()
    program.check()
    program.close()


HAS_VIRTUAL_MEMORY = os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY") != "0"
#: Of the pool.
FUNCTIONS = (
    "cuCtxGetCurrent",
    "cuCtxSynchronize",
    "cuEventCreate",
    "cuEventDestroy",
    "cuEventQuery",
    "cuEventRecord",
    "cuMemGetInfo",
    "cuStreamGetDevice",
    "cuStreamGetId",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuThreadExchangeStreamCaptureMode",
) + (
    (
        "cuMemAddressFree",
        "cuMemAddressReserve",
        "cuMemCreate",
        "cuMemMap",
        "cuMemRelease",
        "cuMemSetAccess",
        "cuMemUnmap",
    )
    if HAS_VIRTUAL_MEMORY
    else ("cuDeviceGet", "cuDeviceGetAttribute", "cuMemAlloc", "cuMemFree")
)


def counted_calls(program: Program) -> dict[str, int]:
    with faults():
        program.run()
        return {name: count for name, count in calls().items() if name not in OWN_CALLS}


def fault_at(function: str, call: int, variant: int) -> Fault:
    """A call fails once, a few times, without end, or with an error other than the likely one."""
    times, error = (
        (1, None),
        (3, None),
        (None, None),
        (1, "CUDA_ERROR_OPERATING_SYSTEM"),
    )[variant]
    return Fault(function, call=call, times=times, error=error)


def test_any_call_may_fail(program: Program) -> None:
    """A few calls of each function; the soak has the others."""
    counts = counted_calls(program)
    assert counts.keys() == set(FUNCTIONS)
    generator = random.Random(5)
    points = [
        fault_at(name, generator.randint(1, count), generator.randrange(4))
        for name, count in counts.items()
        for _ in range(2)
    ]
    report = emulator.sweep(program.run, points=points, check=program.check)
    report.check()
    assert report.points > 0.9 * len(points)


@pytest.mark.soak
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_call_may_fail(program: Program, function: str) -> None:
    count = counted_calls(program)[function]
    points = [fault_at(function, call, 0) for call in range(1, count + 1)]
    # The others of a function that is called very often: evenly spread.
    others = range(1, count + 1, 1 + count // 50)
    points += [fault_at(function, call, variant) for call in others for variant in (1, 2, 3)]
    report = emulator.sweep(program.run, points=points, check=program.check)
    report.check()
    assert report.points > 0.9 * len(points)


FAILED_DEVICE = """
import sys
from spillover import SpilloverError, _core, emulator
emulator.enable(vram="512MiB", hazards="raise")
sys.path.insert(0, sys.argv[1])
from cuda_calls import Cuda
from pool_program import Program
cuda = Cuda()
pool = _core.Pool(0)
kept = [cuda.create_stream() for _ in range(2)]
for stream in kept:
    pool.keep_stream(stream)
program = Program(pool, cuda, kept)
program.run()
fault = emulator.Fault(sys.argv[2], call=2, error="CUDA_ERROR_ILLEGAL_ADDRESS")
refused = []
with emulator.faults(fault):
    for _ in range(3):
        try:
            program.run()
        except SpilloverError as error:
            refused.append(str(error))
        except AssertionError as error:
            # A free records nothing and says nothing: the program's next call is what is told.
            assert "failed with CUresult 700" in str(error), error
    pool.check_invariants()
    for address in program.live:
        try:
            pool.free(address)
        except SpilloverError as error:
            refused.append(str(error))
    pool.check_invariants()
    for call in (pool.trim, lambda: pool.alloc(64 << 20), lambda: pool.alloc(512, kept[0])):
        try:
            call()
        except SpilloverError as error:
            refused.append(str(error))
    pool.check_invariants()
    assert pool.stats()["allocation"]["all"]["current"] <= 2
assert len(refused) >= 1, refused
assert all("CUDA_ERROR_ILLEGAL_ADDRESS" in text for text in refused), refused
"""


@pytest.mark.parametrize(
    "function",
    ["cuMemCreate", "cuMemUnmap", "cuStreamQuery", "cuCtxSynchronize"]
    + [
        pytest.param(name, marks=pytest.mark.soak)
        for name in ("cuMemMap", "cuMemSetAccess", "cuMemRelease", "cuEventRecord", "cuEventQuery")
    ],
)
def test_a_device_that_has_failed_says_so_each_time(
    run_python: Callable[..., str], function: str
) -> None:
    run_python(FAILED_DEVICE, str(Path(__file__).parent), function)

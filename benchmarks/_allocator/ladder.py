"""The out-of-memory ladder: for each of its rungs, a run that the rung saves and native fails.

A rung is a trace or a program that needs less memory than the device has, in a state that an
allocator without that rung cannot serve. Each is judged by whether it comes to its end.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from spillover.replay import ReplayOptions, Trace, replay
from spillover.replay._measure import worker_environment
from spillover.replay._trace import TraceBuilder

Contender = Literal["ours", "native"]
_MIB = 1 << 20


@dataclass(frozen=True)
class Rung:
    """What the rung is called, and whether a run on an allocator comes to its end."""

    name: str
    what: str
    survives: Callable[[Contender], bool]


def by_trace(vram: str, make: Callable[[TraceBuilder], None]) -> Callable[[Contender], bool]:
    """A rung that a trace shows, on an emulated device of that capacity."""
    builder = TraceBuilder(make.__name__.lstrip("_"))
    make(builder)
    trace: Trace = builder.finish()
    return lambda allocator: replay(trace, allocator, ReplayOptions(vram=vram)).failed_at is None


_OUT_OF_MEMORY_CODE = 7
_HANG_CODE = 8
_PROGRAM = """
import sys
import spillover.emulator
spillover.emulator.enable(vram=sys.argv[2], hazards="off", poison=False, stacks=False)
if sys.argv[1] == "ours":
    import spillover.allocator
    spillover.allocator.install(adapter="full")
import torch
from spillover.emulator import stuck

MIB = 1 << 20
def make(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
def set_wait_max(seconds):
    if sys.argv[1] == "ours":
        spillover.allocator.configure(wait_max=seconds)

def program():
{body}
try:
    program()
except torch.OutOfMemoryError:
    sys.exit({out_of_memory})
except torch.AcceleratorError as error:
    # What a stuck stream makes of a wait that would hang.
    if "timed out" not in str(error):
        raise
    sys.exit({hang})
"""


def by_program(vram: str, body: str) -> Callable[[Contender], bool]:
    """A rung that a program in torch shows: the lines of a function.

    It has ``make(mib)``, ``stuck(stream)`` and ``set_wait_max(seconds)`` for ours.
    """

    def survives(allocator: Contender) -> bool:
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        code = _PROGRAM.format(body=lines, out_of_memory=_OUT_OF_MEMORY_CODE, hang=_HANG_CODE)
        result = subprocess.run(
            [sys.executable, "-c", code, allocator, vram],
            env=worker_environment("native"),
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode not in (0, _OUT_OF_MEMORY_CODE, _HANG_CODE):
            raise RuntimeError(f"a rung's program failed on {allocator}:\n{result.stderr}")
        return result.returncode == 0

    return survives


def _scattered_pages(builder: TraceBuilder) -> None:
    """One large segment, cut up, with every other part free: enough bytes, no run of them."""
    builder.alloc("whole", 900 * _MIB, place="")
    builder.free("whole", place="")
    for part in range(6):
        builder.alloc(part, 150 * _MIB, place="")
    for part in (0, 2, 4):
        builder.free(part, place="")
    builder.alloc("large", 400 * _MIB, place="")


def _idle_stream(builder: TraceBuilder) -> None:
    """Most of a segment is free, but it was another stream's, which has nothing left to do."""
    builder.alloc("whole", 800 * _MIB, stream="a", place="")
    builder.free("whole", place="")
    builder.alloc("kept", 100 * _MIB, stream="a", place="")
    builder.alloc("wanted", 600 * _MIB, stream="b", place="")


#: A block waits for another stream; the segment it lies in has a live neighbour and cannot go back.
_PENDING_USE = """
side = torch.cuda.Stream()
whole = make(900)
del whole
first, neighbour = make(450), make(450)
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    first[:1024].copy_(torch.empty(1024, dtype=torch.uint8).pin_memory(), non_blocking=True)
first.record_stream(side)
del first
wanted = make(440)
"""

#: What is held could be spared, and the allocator has a way to say that it is needed.
_RECLAIMER = """
held = [make(100) for _ in range(8)]
copies = []
def spill(missing_bytes, stream):
    if not held:
        return 0
    tensor = held.pop()
    copies.append(tensor.cpu())
    return tensor.nbytes
if sys.argv[1] == "ours":
    spillover.allocator.add_reclaimer(spill)
wanted = make(600)
assert len(copies) == 4
"""

#: The first stream has freed most of a segment, of which a live block keeps the rest. Both streams
#: have taken memory before.
_FREED_BY_ANOTHER_STREAM = """
first, second = torch.cuda.Stream(), torch.cuda.Stream()
with torch.cuda.stream(second):
    make(1)
with torch.cuda.stream(first):
    whole = make(200)
    del whole
    kept, freed = make(25), make(160)
"""

#: What the first stream does next waits for the second one; what came before the free is done.
_COMPLETED = f"""
{_FREED_BY_ANOTHER_STREAM}
set_wait_max(0)
with torch.cuda.stream(first):
    freed.zero_()
    del freed
    done = first.record_event()
done.synchronize()
with stuck(first, timeout_s=2), torch.cuda.stream(second):
    make(150).zero_()
"""

#: The same, while what came before the free goes on.
_JUST_ENOUGH = f"""
{_FREED_BY_ANOTHER_STREAM}
with torch.cuda.stream(first):
    freed.copy_(torch.empty(160 * MIB, dtype=torch.uint8).pin_memory(), non_blocking=True)
    del freed
with stuck(first, timeout_s=2), torch.cuda.stream(second):
    make(150).zero_()
"""

#: What came before the free waits for something that the host does once it has got its memory.
_BEHIND_A_FREE = f"""
{_FREED_BY_ANOTHER_STREAM}
set_wait_max(0.05)
with stuck(first, timeout_s=2):
    with torch.cuda.stream(first):
        freed.copy_(torch.empty(160 * MIB, dtype=torch.uint8).pin_memory(), non_blocking=True)
        del freed
    with torch.cuda.stream(second):
        wanted = make(150)
with torch.cuda.stream(second):
    wanted.zero_()
torch.cuda.synchronize()
"""

RUNGS = (
    Rung(
        "search_after_wait",
        "freed blocks whose streams are waited for are looked at again (pytorch#189504)",
        by_program("1GiB", _PENDING_USE),
    ),
    Rung(
        "steal_from_idle_stream",
        "a free block of a stream that is idle serves another one",
        by_trace("1GiB", _idle_stream),
    ),
    Rung(
        "completed_before_the_tail",
        "memory freed before its stream began to wait for the requesting one serves it at once",
        by_program("256MiB", _COMPLETED),
    ),
    Rung(
        "wait_for_just_enough",
        "the host waits for the work before a free, not for all that its stream was given since",
        by_program("256MiB", _JUST_ENOUGH),
    ),
    Rung(
        "wait_on_the_device",
        "the requesting stream is put behind the work before a free when the host cannot wait",
        by_program("256MiB", _BEHIND_A_FREE),
    ),
    Rung(
        "remap",
        "free pages that lie apart are mapped into one run",
        by_trace("1GiB", _scattered_pages),
    ),
    Rung(
        "reclaimers",
        "what the program holds and can spare is asked for before the request fails",
        by_program("1GiB", _RECLAIMER),
    ),
)


def measure() -> tuple[dict[str, int], dict[str, dict[str, object]]]:
    """1 where a run survived, by ``oom_ladder.RUNG.ALLOCATOR``, and how many only ours did."""
    metrics: dict[str, int] = {}
    rungs: dict[str, dict[str, object]] = {}
    saved = 0
    for rung in RUNGS:
        ours, native = rung.survives("ours"), rung.survives("native")
        metrics[f"oom_ladder.{rung.name}.ours"] = int(ours)
        metrics[f"oom_ladder.{rung.name}.native"] = int(native)
        saved += ours and not native
        rungs[rung.name] = {"what": rung.what, "ours": ours, "native": native}
    metrics["oom_ladder_saved"] = saved
    return metrics, rungs

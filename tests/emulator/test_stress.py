"""Random programs on four threads and four streams each, whose result no schedule may change.

Every buffer carries the number that a model predicts. Each access waits for the event of the last
one, so an emulator that loses a wait, runs an operation twice or starves a stream shows at once.
"""

from __future__ import annotations

from typing import get_args

import pytest

from spillover.emulator import Schedule

PROGRAM = """
import random, sys, threading
import torch

COUNT, SIZE, STEPS = 4, 4096, int(sys.argv[2])

class Buffers:
    '''Device and pinned buffers, the value each must hold, and the event of its last use.'''
    def __init__(self):
        self.device = [torch.zeros(SIZE, device="cuda") for _ in range(COUNT)]
        self.pinned = [torch.zeros(SIZE).pin_memory() for _ in range(COUNT)]
        self.expected = [0.0] * COUNT
        self.expected_pinned = [0.0] * COUNT
        self.last = [None] * COUNT
        torch.cuda.synchronize()

def step(rng, buffers, streams):
    i, stream, kind = rng.randrange(COUNT), rng.choice(streams), rng.randrange(5)
    j = (i + 1) % COUNT
    with torch.cuda.stream(stream):
        for used in (i, j) if kind == 3 else (i,):
            if buffers.last[used] is not None:
                stream.wait_event(buffers.last[used])
        if kind == 0:
            buffers.device[i].add_(1)
            buffers.expected[i] += 1
        elif kind == 1:
            buffers.pinned[i].copy_(buffers.device[i], non_blocking=True)
            buffers.expected_pinned[i] = buffers.expected[i]
        elif kind == 2:
            buffers.device[i].copy_(buffers.pinned[i], non_blocking=True)
            buffers.expected[i] = buffers.expected_pinned[i]
        elif kind == 3:
            buffers.device[j].copy_(buffers.device[i], non_blocking=True)
            buffers.expected[j] = buffers.expected[i]
        event = torch.cuda.Event()
        event.record()
        buffers.last[i] = event
        if kind == 3:
            buffers.last[j] = event
        if kind == 4 and rng.random() < 0.3:
            event.synchronize()

def worker(seed, failures):
    try:
        rng, buffers = random.Random(seed), Buffers()
        streams = [torch.cuda.Stream() for _ in range(4)]
        for _ in range(STEPS):
            step(rng, buffers, streams)
        for event in buffers.last:
            if event is not None:
                event.synchronize()
        for got, expected in ((buffers.device, buffers.expected),
                              (buffers.pinned, buffers.expected_pinned)):
            for tensor, value in zip(got, expected):
                assert (tensor == value).all().item(), (seed, tensor[0].item(), value)
    except BaseException as error:
        failures.append(repr(error))

seed, failures = int(sys.argv[1]), []
threads = [threading.Thread(target=worker, args=(seed * 100 + i, failures)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join(90)
assert not any(thread.is_alive() for thread in threads), "a thread hangs"
assert not failures, failures
torch.cuda.synchronize()
import spillover.emulator
assert not spillover.emulator.hazards(), spillover.emulator.hazards()
"""


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("threaded", 1),
        ("random", 1),
        pytest.param("late", 1, marks=pytest.mark.soak),
        pytest.param("eager", 1, marks=pytest.mark.soak),
        *(pytest.param(name, 2, marks=pytest.mark.soak) for name in get_args(Schedule)),
    ],
)
def test_ordered_programs_are_right(run_emulated, schedule: str, seed: int) -> None:
    run_emulated(PROGRAM, str(seed), "200", schedule=schedule, seed=seed)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["late", "eager", "threaded", "random"])
@pytest.mark.parametrize("seed", range(10, 20))
def test_ordered_programs_are_right_long(run_emulated, schedule: str, seed: int) -> None:
    run_emulated(PROGRAM, str(seed), "1500", schedule=schedule, seed=seed)

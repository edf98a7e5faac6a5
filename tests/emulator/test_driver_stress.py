"""Four host threads with a stream each, random operations, checked against a model."""

from __future__ import annotations

import os
import random
import threading

import pytest
from driver_ctypes import SCHEDULES, Buffer, Driver, run_program

THREADS = 4
STEPS = 400
BLOCK = 4096


class Worker(threading.Thread):
    """Works on blocks of its own, and now and then takes a block over from its neighbour."""

    def __init__(self, cuda: Driver, index: int, mailboxes: list[list[tuple[int, int, int]]]):
        super().__init__()
        self.cuda, self.index, self.mailboxes = cuda, index, mailboxes
        self.random = random.Random(f"{os.environ['SPILLOVER_EMULATOR_SEED']}-{index}")
        self.model: dict[int, int] = {}  # block -> the byte that it holds when all has run
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.cuda.use_device(0)
            self.stream = self.cuda.stream()
            self.pinned = self.cuda.pinned(BLOCK)
            self.last_use = self.cuda.record(self.stream)
            for _ in range(STEPS):
                getattr(self, self.random.choice(self.ACTIONS))()
            for pointer in list(self.model):
                self.verify(pointer)
        except BaseException as error:
            self.error = error

    ACTIONS = ("allocate", "fill", "fill", "upload", "copy", "check", "free", "send", "receive")

    def pick(self) -> int | None:
        return self.random.choice(list(self.model)) if self.model else None

    def allocate(self) -> None:
        if len(self.model) > 20:
            return
        pointer = self.cuda.alloc(BLOCK)
        self.model[pointer] = 0xFF

    def fill(self) -> None:
        if (pointer := self.pick()) is None:
            return
        self.model[pointer] = self.random.randrange(256)
        self.cuda.fill(pointer, self.model[pointer], BLOCK, self.stream)

    def upload(self) -> None:
        if (pointer := self.pick()) is None:
            return
        value = self.model[pointer] = self.random.randrange(256)
        if self.random.random() < 0.5:
            self.cuda.upload(pointer, Buffer.pageable(BLOCK).fill(value), self.stream)
            return
        self.cuda("cuEventSynchronize", self.last_use)  # the staging buffer is free again
        self.cuda.upload(pointer, self.pinned.fill(value), self.stream)
        self.cuda.record(self.stream, self.last_use)

    def copy(self) -> None:
        source, target = self.pick(), self.pick()
        if source is None or target is None or source == target:
            return
        self.model[target] = self.model[source]
        self.cuda.copy(target, source, BLOCK, self.stream)

    def verify(self, pointer: int) -> None:
        host = Buffer.pageable(BLOCK)
        self.cuda.download(host, pointer, self.stream)
        assert host.holds(self.model[pointer]), (pointer, self.model[pointer], host.get()[:4])

    def check(self) -> None:
        if (pointer := self.pick()) is not None:
            self.verify(pointer)

    def free(self) -> None:
        if self.random.random() < 0.3 and (pointer := self.pick()) is not None:
            del self.model[pointer]
            self.cuda.free(pointer)

    def send(self) -> None:
        if (pointer := self.pick()) is not None:
            event = self.cuda.record(self.stream)
            self.mailboxes[(self.index + 1) % THREADS].append((pointer, event, self.model[pointer]))
            del self.model[pointer]

    def receive(self) -> None:
        if self.mailboxes[self.index]:
            pointer, event, value = self.mailboxes[self.index].pop(0)
            self.cuda("cuStreamWaitEvent", self.stream, event, 0)
            self.cuda("cuEventDestroy_v2", event)
            self.model[pointer] = value


def stress() -> None:
    cuda = Driver()
    mailboxes: list[list[tuple[int, int, int]]] = [[] for _ in range(THREADS)]
    workers = [Worker(cuda, index, mailboxes) for index in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    assert cuda.hazards() == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stress(schedule: str) -> None:
    run_program(stress, schedule=schedule, seed=SCHEDULES.index(schedule))

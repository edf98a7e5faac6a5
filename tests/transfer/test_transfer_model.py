"""Random programs against the transfer engine, compared with ``transfer_model``."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from transfer_model import PLACES, SIZES, ModelledEngine

PICKS = st.integers(0, 1000)  # Of what there is, by the remainder.
STREAMS = st.integers(0, 1)
USES = st.one_of(st.none(), st.integers(0, 20))

PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import transfer_model
transfer_model.main(*sys.argv[1:])
"""


class Transfers(RuleBasedStateMachine):
    """Everything that a program can ask for, in any order."""

    @initialize(place=st.sampled_from(PLACES))
    def begin(self, place: tuple[int | None, bool]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="spillover-transfers-")
        self.model = ModelledEngine(*place, Path(self.folder.name))

    @rule(sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4), use=USES, stream=STREAMS)
    def put(self, sizes: list[int], use: int | None, stream: int) -> None:
        self.model.put(sizes, use, stream)

    @rule(pick=PICKS, priority=st.integers(-2, 2), stream=STREAMS)
    def fetch(self, pick: int, priority: int, stream: int) -> None:
        self.model.fetch(pick, priority, stream)

    @rule(pick=PICKS, stream=STREAMS)
    def use(self, pick: int, stream: int) -> None:
        self.model.use(pick, stream)

    @rule(pick=PICKS)
    def wait(self, pick: int) -> None:
        self.model.wait(pick)

    @rule(pick=PICKS)
    def ask(self, pick: int) -> None:
        self.model.ask(pick)

    @rule(pick=PICKS)
    def drop(self, pick: int) -> None:
        self.model.drop(pick)

    @rule(pick=PICKS)
    def cancel_fetch(self, pick: int) -> None:
        self.model.cancel_fetch(pick)

    @rule(pick=PICKS)
    def cancel_put(self, pick: int) -> None:
        self.model.cancel_put(pick)

    @rule(picks=st.lists(PICKS, min_size=1, max_size=5))
    def expect(self, picks: list[int]) -> None:
        self.model.expect(picks)

    @rule(steps=st.integers(0, 3))
    def advance(self, steps: int) -> None:
        self.model.advance(steps)

    @rule(wait=st.booleans())
    def collect(self, wait: bool) -> None:
        self.model.collect(wait)

    @rule()
    def synchronize(self) -> None:
        self.model.synchronize()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.finish()
            self.folder.cleanup()


@pytest.mark.parametrize(
    "examples", [20, pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_any_order(examples: int) -> None:
    run_state_machine_as_test(
        Transfers,
        settings=settings(max_examples=examples, stateful_step_count=40, deadline=None),
    )


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "schedule", ["random", *(pytest.param(s, marks=pytest.mark.soak) for s in ("late", "threaded"))]
)
def test_random_programs(schedule: str, run_emulated: Run) -> None:
    run_emulated(PROGRAM, "7", "60", schedule=schedule, seed=7)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("schedule", ["eager", "threaded", "random"])
def test_many_random_programs(schedule: str, seed: int, run_emulated: Run) -> None:
    run_emulated(PROGRAM, str(seed), "400", schedule=schedule, seed=seed, timeout=500)


def test_nothing_is_left(run_emulated: Run) -> None:
    """The device and the pinned memory are as before, once engines and pools are gone."""
    code: Any = f"""
    import gc, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import torch, transfer_model
    from spillover._pinned import host_pool
    from spillover.emulator import leaks
    transfer_model.main("3", "30")
    gc.collect()
    host_pool().trim()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert not [text for text in leaks() if "pinned" in text], leaks()
    assert torch.cuda.memory_allocated() == 0
    """
    run_emulated(code)

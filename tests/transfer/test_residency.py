"""The states of a chunk, without a driver: every order of what can happen to it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spillover._core import _Residency


def test_a_life() -> None:
    chunk = _Residency()
    names = [chunk.name]
    for step in (
        chunk.begin_leaving,
        chunk.has_left,
        chunk.begin_writing,
        chunk.has_written,
        chunk.evict,
        chunk.begin_reading,
        chunk.has_read,
        chunk.add_reader,
        chunk.remove_reader,
        chunk.drop,
    ):
        step()
        names.append(chunk.name)
        assert chunk.is_valid
    assert names == [
        "device",
        "leaving",
        "host",
        "writing",
        "host and disk",
        "disk",
        "reading",
        "host and disk",
        "arriving",
        "host and disk",
        "dropped",
    ]


def test_a_write_may_begin_while_the_copy_leaves() -> None:
    chunk = _Residency()
    chunk.begin_leaving()
    chunk.begin_writing()
    chunk.has_left()
    assert chunk.name == "writing"
    assert not chunk.can_evict
    chunk.writing_failed()
    assert chunk.name == "host"
    assert chunk.is_dirty


def test_a_read_that_fails_costs_nothing() -> None:
    chunk = on_disk()
    chunk.begin_reading()
    chunk.reading_failed()
    assert chunk.is_on_disk_only


def on_disk() -> _Residency:
    chunk = _Residency()
    chunk.begin_leaving()
    chunk.has_left()
    chunk.begin_writing()
    chunk.has_written()
    chunk.evict()
    return chunk


class Chunk(RuleBasedStateMachine):
    """All legal transitions in any order, beside a model that counts copies."""

    @initialize()
    def leave(self) -> None:
        self.chunk = _Residency()
        self.chunk.begin_leaving()
        self.host, self.disk, self.readers, self.is_dropped = "leaving", "none", 0, False

    @precondition(lambda self: self.host == "leaving")
    @rule()
    def has_left(self) -> None:
        self.chunk.has_left()
        self.host = "valid"

    @precondition(lambda self: self.host in ("leaving", "valid") and self.disk == "none")
    @rule()
    def write(self) -> None:
        self.chunk.begin_writing()
        self.disk = "writing"

    @precondition(lambda self: self.disk == "writing")
    @rule(is_well=st.booleans())
    def end_write(self, is_well: bool) -> None:
        if is_well:
            self.chunk.has_written()
        else:
            self.chunk.writing_failed()
        self.disk = "valid" if is_well else "none"

    @precondition(lambda self: self.host == "none" and self.disk == "valid")
    @rule()
    def read(self) -> None:
        self.chunk.begin_reading()
        self.host = "reading"

    @precondition(lambda self: self.host == "reading")
    @rule(is_well=st.booleans())
    def end_read(self, is_well: bool) -> None:
        if is_well:
            self.chunk.has_read()
        else:
            self.chunk.reading_failed()
        self.host = "valid" if is_well else "none"

    @precondition(lambda self: not self.is_dropped)
    @rule()
    def arrive(self) -> None:
        self.chunk.add_reader()
        self.readers += 1

    @precondition(lambda self: self.readers > 0)
    @rule()
    def has_arrived(self) -> None:
        self.chunk.remove_reader()
        self.readers -= 1

    @rule()
    def drop(self) -> None:
        self.chunk.drop()
        self.is_dropped = True

    @precondition(lambda self: self.can_evict())
    @rule()
    def evict(self) -> None:
        self.chunk.evict()
        self.host = "none"

    def can_evict(self) -> bool:
        return self.host == "valid" and self.disk == "valid" and self.readers == 0

    @invariant()
    def agrees(self) -> None:
        chunk = self.chunk
        assert chunk.is_valid
        assert chunk.can_evict == self.can_evict()
        assert chunk.is_over == (
            self.host in ("none", "valid") and self.disk != "writing" and self.readers == 0
        )
        # There are bytes somewhere, or on the way there.
        assert self.host in ("leaving", "valid") or self.disk == "valid"


@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_order(is_long: bool) -> None:
    from hypothesis import settings

    run_state_machine_as_test(
        Chunk, settings=settings(max_examples=2000 if is_long else 100, deadline=None)
    )

"""The ring of events and its export: exact, bounded, whole under threads, empty in a fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import chrome_format
from spillover import ConfigError, _core

LABEL = _core.TraceLabel("work", "test")


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    _core.trace_stop()


def export(**window: int) -> dict[str, Any]:
    data, event_count, dropped = _core.trace_export(process_name="tests", **window)
    trace = chrome_format.check(data)
    assert trace["spillover"]["dropped"] == dropped
    assert event_count == sum(event["ph"] in "XC" for event in trace["traceEvents"])
    return trace


def record(count: int, *, start: int = 0) -> None:
    for number in range(start, start + count):
        _core.trace_span(LABEL, number * 1000, number * 1000 + 500, number + 1)


def sizes(trace: dict[str, Any]) -> list[int]:
    return [span["args"]["bytes"] for span in chrome_format.spans(trace, "work")]


def test_nothing_is_recorded_while_off() -> None:
    _core.trace_start(64)
    _core.trace_stop()
    record(10)
    _core._time_trace_spans(10)
    assert export()["spillover"] == {"recorded": 0, "dropped": 0}
    assert chrome_format.by_row(export()) == {}


def test_events_are_as_they_were_recorded() -> None:
    _core.trace_start(64)
    record(20)
    trace = export()
    assert trace["spillover"] == {"recorded": 20, "dropped": 0}
    assert sizes(trace) == list(range(1, 21))
    found = chrome_format.spans(trace, "work")
    assert {span["dur"] for span in found} == {0.5}
    assert {span["cat"] for span in found} == {"test"}
    assert {span["pid"] for span in found} == {os.getpid()}
    (row,) = chrome_format.row_names(trace).values()
    assert str(threading.get_native_id()) in row


def test_the_latest_are_kept_and_the_others_counted() -> None:
    _core.trace_start(16)
    record(100)
    trace = export()
    assert trace["spillover"] == {"recorded": 100, "dropped": 84}
    assert sizes(trace) == list(range(85, 101))
    record(1, start=100)
    assert sizes(export()) == list(range(86, 102))


def test_capacity_is_a_power_of_two_within_bounds() -> None:
    _core.trace_start(17)
    record(40)
    assert export()["spillover"] == {"recorded": 40, "dropped": 8}
    for events_max in (0, 15, (1 << 26) + 1):
        with pytest.raises(ConfigError, match="between 16 and"):
            _core.trace_start(events_max)


def test_a_start_forgets_what_was_before_unless_it_is_on() -> None:
    for events_max in (16, 64, 16):
        _core.trace_start(events_max)
        record(5)
        _core.trace_start(events_max * 2)  # Is on already.
        record(5, start=5)
        assert sizes(export()) == list(range(1, 11))
        _core.trace_stop()
        assert sizes(export()) == list(range(1, 11))


def test_a_window_has_what_lies_in_it_in_part() -> None:
    _core.trace_start(64)
    record(10)
    assert sizes(export(from_ns=2400, until_ns=4000)) == [3, 4, 5]
    assert sizes(export(from_ns=2501, until_ns=3999)) == [4]


def test_what_was_dropped_before_a_window_does_not_count() -> None:
    _core.trace_start(16)
    record(100)
    assert export(from_ns=90_000)["spillover"]["dropped"] == 0
    assert export(from_ns=80_000)["spillover"]["dropped"] == 84


def test_spans_that_overlap_lie_side_by_side() -> None:
    _core.trace_start(64)
    lanes = _core.trace_lanes("lanes of a test")
    times = [(0, 100), (50, 150), (60, 90), (100, 120), (95, 130), (200, 210)]
    for number, (begin_ns, end_ns) in enumerate(times):
        _core.trace_span(LABEL, begin_ns, end_ns, number + 1, lanes)
    trace = export()
    names = chrome_format.row_names(trace)
    rows = {
        names[row]: [span["args"]["bytes"] for span in spans]
        for row, spans in chrome_format.by_row(trace).items()
    }
    assert rows == {
        "lanes of a test": [1, 4, 6],
        "lanes of a test #2": [2],
        "lanes of a test #3": [3, 5],
    }


def test_counters_have_values_in_time() -> None:
    _core.trace_start(64)
    track = _core.trace_counter_track("a counter")
    for value in (3, 0, 1 << 40):
        _core.trace_counter(_core.TraceLabel("bytes", "test"), track, value)
    assert chrome_format.counter(export(), "a counter", "bytes") == [3, 0, 1 << 40]


def test_arrows_join_spans() -> None:
    _core.trace_start(64)
    flow = _core.next_trace_flow()
    assert flow not in (0, _core.next_trace_flow())
    _core.trace_span(LABEL, 0, 10, 1, None, flow)
    (start,) = (event for event in export()["traceEvents"] if event["ph"] == "s")
    assert start["id"] == flow


@pytest.mark.parametrize("name", ['"', "\\", "a\nb\tc\x01", "spéíçial \N{HOT BEVERAGE}", ""])
def test_any_name_can_be_read_back(name: str) -> None:
    _core.trace_start(64)
    _core.trace_span(_core.TraceLabel(name, name), 0, 1, 0, _core.trace_lanes(f"lanes {name}"))
    trace = export()
    assert len(chrome_format.spans(trace, name)) == 1
    assert f"lanes {name}" in chrome_format.row_names(trace).values()


def test_times_are_those_of_the_host() -> None:
    _core.trace_start(64)
    before_ns = time.time_ns()
    begin_ns = time.monotonic_ns()
    _core.trace_span(LABEL, begin_ns, begin_ns)
    after_ns = time.time_ns()
    trace = export()
    (span,) = chrome_format.spans(trace, "work")
    recorded_ns = trace["baseTimeNanoseconds"] + span["ts"] * 1000
    slack_ns = 1_000_000  # Setting the clock, and the rounding of a float.
    assert before_ns - slack_ns <= recorded_ns <= after_ns + slack_ns


def test_threads_lose_nothing_and_have_rows_of_their_own() -> None:
    _core.trace_start(1 << 15)
    threads = [threading.Thread(target=_core._time_trace_spans, args=(2000,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace = export()
    assert trace["spillover"] == {"recorded": 16_000, "dropped": 0}
    rows = chrome_format.by_row(trace)
    assert len(rows) == 8
    for row in rows.values():
        assert [span.get("args", {"bytes": 0})["bytes"] for span in row] == list(range(2000))


def test_readers_and_writers_that_lap_each_other_see_whole_events() -> None:
    """A small ring, so that most slots are written again while they are read."""
    _core.trace_start(64)
    running = True

    def write() -> None:
        while running:
            _core._time_trace_spans(5000)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            trace = export()
            assert len(chrome_format.spans(trace, "benchmark")) <= 64
            for row in chrome_format.by_row(trace).values():
                assert {span["name"] for span in row} == {"benchmark"}
                assert all(span.get("args", {"bytes": 0})["bytes"] < 5000 for span in row)
                # One thread's loop: each ends before the next begins.
                ends = [0, *(round((span["ts"] + span["dur"]) * 1000) for span in row)]
                assert all(
                    end <= round(span["ts"] * 1000) for end, span in zip(ends, row, strict=False)
                )
    finally:
        running = False
        for thread in threads:
            thread.join()
    found = export()["spillover"]
    assert found["recorded"] - found["dropped"] <= 64


def test_a_forked_child_begins_with_nothing() -> None:
    _core.trace_start(64)
    record(3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            was_on = _core.trace_is_on()
            empty = export()["spillover"]
            _core.trace_start(32)
            record(40)
            found = export()
            (row,) = chrome_format.row_names(found).values()
            right = (
                not was_on
                and empty == {"recorded": 0, "dropped": 0}
                and found["spillover"] == {"recorded": 40, "dropped": 8}
                and str(threading.get_native_id()) in row
            )
            failed = 0 if right else 2
        finally:
            os.write(writer, bytes([failed]))
            os._exit(failed)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\0"
    assert _core.trace_is_on()
    assert sizes(export()) == [1, 2, 3]

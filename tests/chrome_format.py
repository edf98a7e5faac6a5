"""What Chrome's trace format asks of a file, and what Perfetto drops when it is not so."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_FIELDS = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid"},
    "C": {"name", "cat", "ts", "pid", "args"},
    "M": {"name", "pid", "tid", "args"},
    "s": {"name", "cat", "ts", "pid", "tid", "id"},
    "f": {"name", "cat", "ts", "pid", "tid", "id", "bp"},
}


def read(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return check(gzip.decompress(data) if path.suffix == ".gz" else data)


def check(data: bytes) -> dict[str, Any]:
    """The trace, once every event has what its phase asks for."""
    trace: dict[str, Any] = json.loads(data)
    assert isinstance(trace["baseTimeNanoseconds"], int)
    assert trace["displayTimeUnit"] == "ms"
    for event in trace["traceEvents"]:
        assert event.keys() >= _FIELDS[event["ph"]], event
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
    rows = by_row(trace)
    for row in rows.values():
        _check_nesting(row)
    named = {
        (event["pid"], event["tid"])
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert named == rows.keys()
    _check_flows(trace, rows)
    return trace


def by_row(trace: dict[str, Any]) -> dict[tuple[int, int], list[Event]]:
    rows: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    return rows


def _nanoseconds(event: Event) -> tuple[int, int]:
    begin = round(event["ts"] * 1000)
    return begin, begin + round(event["dur"] * 1000)


def _check_nesting(row: list[Event]) -> None:
    """Spans of one row lie within each other or apart; else a viewer drops them."""
    open_ends: list[int] = []
    for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = _nanoseconds(event)
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], event
        open_ends.append(end)


def _check_flows(trace: dict[str, Any], rows: dict[tuple[int, int], list[Event]]) -> None:
    """Each end of an arrow lies in a span of its row."""
    for event in trace["traceEvents"]:
        if event["ph"] in ("s", "f"):
            assert any(
                span["ts"] <= event["ts"] <= span["ts"] + span["dur"]
                for span in rows[event["pid"], event["tid"]]
            )


def spans(trace: dict[str, Any], name: str) -> list[Event]:
    """Spans of that name, the earliest first."""
    found = [event for event in trace["traceEvents"] if (event["ph"], event["name"]) == ("X", name)]
    return sorted(found, key=lambda event: float(event["ts"]))


def counter(trace: dict[str, Any], name: str, series: str) -> list[int]:
    """Values of a counter, the earliest first."""
    found = [event for event in trace["traceEvents"] if (event["ph"], event["name"]) == ("C", name)]
    found = [event for event in found if series in event["args"]]
    return [event["args"][series] for event in sorted(found, key=lambda event: float(event["ts"]))]


def row_names(trace: dict[str, Any]) -> dict[tuple[int, int], str]:
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }

"""Puts traces of several sources, such as torch's profiler, or of several ranks into one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spillover._errors import ConfigError
from spillover.trace._files import read_trace, require_place, write_file


def merge(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> Path:
    """Write one trace with the events of several: ours, torch.profiler's, and those of other ranks.

    Events are put on one time by what each file says of its own (``baseTimeNanoseconds``, as
    PyTorch's profiler since 2.3 and this package write it). Processes keep their numbers, so
    events of one process from several files are one process in the viewer. Files and the output
    may be compressed (``.gz``).

    Returns
    -------
    The output's path.

    Raises
    ------
    ConfigError
        There are no inputs; one is no trace, or does not say what its times are counted from; the
        output's place cannot be written to.
    OSError
        A file cannot be read or written.
    """
    if not inputs:
        raise ConfigError("name at least one trace to merge")
    place = require_place("output", output)
    traces = [(os.fspath(path), read_trace(path)) for path in inputs]
    bases = [_base_of(name, trace) for name, trace in traces]
    base = min(bases)
    merged: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    named: set[object] = set()
    # The traces of others first: what they call their processes stays.
    order = sorted(range(len(traces)), key=lambda index: "spillover" in traces[index][1])
    for index in order:
        trace = traces[index][1]
        shift_us = (bases[index] - base) / 1000
        here = {
            event.get("pid")
            for event in trace["traceEvents"]
            if event.get("name") == "process_name"
        }
        for event in trace["traceEvents"]:
            if event.get("name") == "process_name" and event.get("pid") in named:
                continue
            if shift_us and "ts" in event:
                event["ts"] += shift_us
            events.append(event)
        named |= here
        merged |= {key: value for key, value in trace.items() if key not in merged}
    merged["baseTimeNanoseconds"] = base
    merged["traceEvents"] = events
    write_file(place, json.dumps(merged).encode())
    return place


def _base_of(name: str, trace: dict[str, Any]) -> int:
    base = trace.get("baseTimeNanoseconds")
    if isinstance(base, int):
        return base
    raise ConfigError(
        f"{name!r} does not say what its times are counted from (baseTimeNanoseconds), so they "
        "cannot be compared with those of other files"
    )

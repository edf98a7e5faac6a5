"""Reads torch's memory snapshots, which are pickles, without executing anything in them.

A pickle is a program that may call any function it names. A snapshot needs none: it is made of
dicts, lists, tuples, texts and numbers, so an unpickler that finds no name at all reads it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from spillover.replay._trace import Trace, TraceBuilder, TraceError

_ACTIONS_WITHOUT_BLOCKS = frozenset(
    ("segment_alloc", "segment_free", "segment_map", "segment_unmap", "snapshot", "oom", "annotate")
)


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers and scalars, and refuses everything that a pickle names."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, and a memory snapshot names nothing"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside of it")


def read_snapshot(content: bytes, builder: TraceBuilder, *, path: Path, device: int) -> Trace:
    """The trace of one device: blocks live before the recording, then what was recorded.

    A block counts as allocated until its free was completed, since no allocator could have used
    its memory while another stream did.
    """
    snapshot = _unpickle(content, path)
    try:
        traces = snapshot["device_traces"]
        if not 0 <= device < len(traces):
            raise TraceError(f"{path}: the snapshot has no events of device {device}")
        events = _completed(traces[device])
        for number, (address, size_bytes, stream) in enumerate(_older(snapshot, events, device)):
            place = f"{path}: live block {number}"
            builder.alloc(address, size_bytes, stream=stream or None, place=place)
        for number, (action, event) in enumerate(events):
            place = f"{path}: event {number} of device {device}"
            if action == "alloc":
                builder.alloc(
                    event["addr"], event["size"], stream=event["stream"] or None, place=place
                )
            else:
                builder.free(event["addr"], place=place)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(
            f"{path}: not a memory snapshot of torch ({type(error).__name__}: {error})"
        ) from None
    trace = builder.finish()
    if not len(trace.events):
        raise TraceError(
            f"{path}: the snapshot has no events; call torch.cuda.memory._record_memory_history() "
            "before what is to be recorded"
        )
    return trace


def _unpickle(content: bytes, path: Path) -> dict[str, Any]:
    try:
        snapshot = _PlainUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise TraceError(f"{path}: the pickle is refused: {error}") from None
    except Exception as error:
        # A damaged pickle makes the unpickler raise almost anything.
        raise TraceError(
            f"{path}: the pickle is damaged ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(snapshot, dict) or "device_traces" not in snapshot:
        raise TraceError(f"{path}: the pickle is not a memory snapshot of torch: no device_traces")
    return snapshot


def _completed(entries: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """``("alloc" or "free", entry)`` of each entry that matters.

    A free is one that was completed, or one that was requested and never completed before the
    recording ended.
    """
    events: list[tuple[str, dict[str, Any]]] = []
    requested: dict[int, int] = {}  # address to the place in events of a free that is not complete
    for entry in entries:
        action, address = entry["action"], entry["addr"]
        if action == "alloc":
            requested.pop(address, None)
            events.append(("alloc", entry))
        elif action == "free_requested":
            requested[address] = len(events)
            events.append(("free", entry))
        elif action == "free_completed":
            # One that was requested before the recording began has a completion alone.
            if address in requested:
                events[requested.pop(address)] = ("", entry)
            events.append(("free", entry))
        elif action not in _ACTIONS_WITHOUT_BLOCKS:
            raise ValueError(f"{action!r} is not an action of a trace")
    return [event for event in events if event[0]]


def _older(
    snapshot: dict[str, Any], events: list[tuple[str, dict[str, Any]]], device: int
) -> list[tuple[int, int, int]]:
    """Address, size and stream of each block that was live when the recording began."""
    older: dict[int, tuple[int, int, int]] = {}
    seen: set[int] = set()  # addresses whose first event has been met
    for action, event in events:
        address = event["addr"]
        if action == "free" and address not in seen:
            older[address] = (address, event["size"], event["stream"])
        seen.add(address)
    for segment in snapshot["segments"]:
        if segment["device"] != device:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            # Later torches say the address; blocks of all lie side by side.
            address = block.get("address", address)
            if block["state"].startswith("active") and address not in seen:
                size_bytes = block.get("requested_size", block["size"])
                older[address] = (address, size_bytes, segment["stream"])
            address += block["size"]
    return sorted(older.values())

"""``python -m spillover.replay._worker ALLOCATOR FOLDER VRAM``: one replay in this process.

Reads the trace from the folder and leaves its measurements there. VRAM is the emulated device's
capacity in bytes, or ``gpu`` for the machine's own device.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from spillover import emulator
from spillover._errors import SpilloverError
from spillover.replay._player import Player
from spillover.replay._trace import Trace


def enable_emulator(vram_bytes: int) -> None:
    """Give this process a device whose memory takes none of the machine's.

    Nothing touches a replay's blocks and nothing fills them, so the pages behind them are never
    made. A dry device would save no more, and torch would follow each of its blocks.
    """
    emulator.enable(vram=vram_bytes, hazards="off", poison=False, stacks=False)


def make_player(allocator: str) -> Player:
    """A player on ``ours``, or else on the allocator that torch's configuration chose."""
    return Player.of_pool() if allocator == "ours" else Player.of_torch()


def measure(allocator: str, trace: Trace, *, is_emulated: bool) -> dict[str, Any]:
    """Play the trace; latencies are one a successful event, in nanoseconds."""
    player = make_player(allocator)
    counting: AbstractContextManager[Any] = (
        emulator.faults() if is_emulated else contextlib.nullcontext()
    )
    with counting:
        played = player.play(trace)
        calls = emulator.calls() if is_emulated else {}
        call_bytes = emulator.call_bytes() if is_emulated else {}
    samples = played.reserved_bytes.tolist()
    # The device's own peak counts what the allocator held between two samples, too.
    peak = emulator.peak_bytes() if is_emulated else _reserved_peak(allocator)
    return {
        "event_count": played.event_count,
        "error": played.error,
        "reserved_peak_bytes": peak,
        "reserved_end_bytes": player.reserved_bytes(),
        "sample_every": played.sample_every,
        "reserved_bytes": samples,
        "calls": calls,
        "call_bytes": call_bytes,
        "latency_ns": played.latency_ns,
    }


def _reserved_peak(allocator: str) -> int:
    if allocator == "ours":
        from spillover.allocator import stats

        return stats()["reserved_bytes.all.peak"]
    import torch

    return int(torch.cuda.memory_stats()["reserved_bytes.all.peak"])


def main() -> None:
    """Measure, write, and end without Python's shutdown: the blocks go with the process."""
    allocator, folder_name, vram = sys.argv[1:]
    folder = Path(folder_name)
    try:
        if vram != "gpu":
            enable_emulator(int(vram))
        facts = json.loads((folder / "trace.json").read_text())
        trace = Trace(events=np.load(folder / "events.npy"), **facts)
        result = measure(allocator, trace, is_emulated=vram != "gpu")
    except SpilloverError as error:
        sys.exit(f"spillover: {error}")
    np.save(folder / "latency_ns.npy", result.pop("latency_ns"))
    (folder / "result.json").write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""``python -m benchmarks._allocator.record [NAME...]``: records the programs' traces anew.

Each runs dry in a process of its own with PyTorch's own allocator. Threads and streams get small
numbers, so that the same program gives the same file.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "traces" / "recorded"
_SEED = 5
_STREAM, _THREAD = 3, 4  # columns


def _record_here(name: str, path: str) -> None:
    import random

    import spillover.emulator

    spillover.emulator.enable(dry=True, vram="1TiB", hazards="off", stacks=False)
    import torch

    from benchmarks._allocator.programs import PROGRAMS
    from spillover.allocator import record_trace

    torch.manual_seed(_SEED)
    with record_trace(path):
        PROGRAMS[name](random.Random(_SEED))
        torch.cuda.synchronize()


def _renumber(lines: list[str]) -> str:
    """The same events with streams and threads numbered in the order in which they appear."""
    streams: dict[str, str] = {"": "", "0": ""}
    threads: dict[str, str] = {}
    result = lines[:1]
    for line in lines[1:]:
        fields = line.split(",")
        fields[_STREAM] = streams.setdefault(fields[_STREAM], str(len(streams) - 1))
        fields[_THREAD] = threads.setdefault(fields[_THREAD], str(len(threads)))
        result.append(",".join(fields))
    return "\n".join(result) + "\n"


def record(name: str, folder: Path = FOLDER) -> Path:
    """Record one program; gives the compressed trace."""
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "trace.csv"
        command = [sys.executable, "-m", "benchmarks._allocator.record", "--here", name, str(raw)]
        subprocess.run(command, check=True)
        text = _renumber(raw.read_text().splitlines())
    path = folder / f"{name}.csv.gz"
    folder.mkdir(parents=True, exist_ok=True)
    # Without a time in the header the same events give the same bytes.
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return path


def main() -> None:
    """Record the named programs, or all."""
    from benchmarks._allocator.programs import PROGRAMS
    from spillover._units import format_bytes
    from spillover.replay import read_trace

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PROGRAMS)}; all if none is given")
    for name in parser.parse_args().names or PROGRAMS:
        path = record(name)
        trace = read_trace(path)
        print(
            f"{name}: {len(trace.events)} events, peak {format_bytes(trace.peak_bytes)}, "
            f"{trace.stream_count} streams, {trace.thread_count} threads, "
            f"{path.stat().st_size} bytes"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        _record_here(*sys.argv[2:])
    else:
        main()

"""``spillover replay``: allocation traces on several allocators, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spillover.replay import Allocator, Replay

_FAILED_EXIT_CODE = 3


def replay(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", metavar="TRACE...")],
    on: Annotated[str, typer.Option(help="ours, native, expandable, or all of them.")] = "all",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results there.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw live and held memory there.", metavar="FILE.png")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="Use an emulated device of this capacity, such as 24GiB.")
    ] = None,
    device: Annotated[int, typer.Option(help="Which device's events of a memory snapshot.")] = 0,
) -> None:
    """Replay allocation traces and print utilisation, peaks, driver calls and latencies.

    TRACE is a csv of spillover.allocator.record_trace(), a memory snapshot of torch, or a log
    of RMM. Without --vram it runs on this machine's GPU, or on an emulated device of 80 GiB.

    The exit code is 0 where every trace was replayed to its end, 3 where an allocator failed at an
    event, for example for want of memory, and 2 for an error, such as an option that is wrong.
    """
    from spillover._errors import ConfigError
    from spillover._pictures import require_picture
    from spillover.cli._places import require_file_place
    from spillover.replay import ALLOCATORS, ReplayOptions, read_trace
    from spillover.replay import plot as draw
    from spillover.replay import replay as run

    if on != "all" and on not in ALLOCATORS:
        raise ConfigError(f"--on {on!r} is not one of {', '.join(ALLOCATORS)} and all")
    for path in (json_file, plot):
        if path is not None:
            require_file_place(path)
    if plot is not None:
        require_picture(plot)
    options = ReplayOptions(vram=vram)
    chosen: Sequence[Allocator] = [name for name in ALLOCATORS if on in ("all", name)]
    read = [read_trace(path, device=device) for path in traces]
    results = []
    for trace in read:
        replays = [run(trace, allocator, options) for allocator in chosen]
        _print(replays)
        results.append((trace, replays))
    if json_file is not None:
        found = [asdict(one) for _, replays in results for one in replays]
        json_file.write_text(json.dumps({"replays": found}, indent=1) + "\n")
    if plot is not None:
        draw(results, plot)
    if any(one.failed_at is not None for _, replays in results for one in replays):
        raise typer.Exit(_FAILED_EXIT_CODE)


def _print(replays: Sequence[Replay]) -> None:
    from rich.console import Console
    from rich.table import Table

    from spillover._units import format_bytes

    first = replays[0]
    device = "an emulated device" if first.is_emulated else "this machine's GPU"
    table = Table(title=f"{first.trace}: {first.event_count} events on {device}")
    table.add_column("")
    for replay in replays:
        table.add_column(replay.allocator, justify="right")
    rows: dict[str, list[str]] = {
        "utilisation": [f"{100 * one.utilisation:.1f} %" for one in replays],
        "peak live": [format_bytes(one.peak_bytes) for one in replays],
        "peak held": [format_bytes(one.reserved_peak_bytes) for one in replays],
        "allocation p50 / p99": [_times(one.alloc_ns) for one in replays],
        "free p50 / p99": [_times(one.free_ns) for one in replays],
    }
    names = dict.fromkeys(name for one in replays for name in one.driver_calls)
    for name in names:
        rows[name] = [_calls(one, name) for one in replays]
    if first.is_emulated:
        rows["calls on an A100, by page"] = [f"{one.priced_ms:.1f} ms" for one in replays]
        rows["calls on an A100, by call"] = [f"{one.priced_by_call_ms:.1f} ms" for one in replays]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for one in replays:
        if one.failed_at is not None:
            console.print(f"{one.allocator} failed at event {one.failed_at}: {one.error}")


def _times(percentiles: dict[str, Any]) -> str:
    if not percentiles:
        return "-"
    return f"{percentiles['p50']:.0f} / {percentiles['p99']:.0f} ns"


def _calls(replay: Replay, name: str) -> str:
    from spillover._units import format_bytes

    count = replay.driver_calls.get(name, 0)
    size_bytes = replay.driver_bytes.get(name)
    return f"{count} ({format_bytes(size_bytes)})" if size_bytes else str(count)

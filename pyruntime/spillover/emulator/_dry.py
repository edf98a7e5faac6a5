"""Dry runs: what a program's memory would be on a card, without computing anything.

``report()`` may be called at any time in a dry run; ``spillover emulate --dry`` prints it when the
program ends, whatever it ends by.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from spillover._errors import StateError
from spillover._units import format_bytes
from spillover.emulator import _dry_values
from spillover.emulator._dry_records import Block, Records

#: Where ``spillover emulate --dry --report FILE`` has the report written as JSON.
REPORT_VARIABLE = "SPILLOVER_EMULATOR_DRY_REPORT"
_TOP_GROUPS = 12
_FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)')

_records: Records | None = None


@dataclass(frozen=True, kw_only=True)
class BlockGroup:
    """Blocks alive at the peak that the same line allocated for the same purpose."""

    kind: str
    line: str
    operator: str
    phase: str
    step: int
    count: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment when most memory was allocated: what was allocated last, and by whom."""

    step: int
    phase: str
    operator: str
    line: str
    stack: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """The first allocation that the card had no room for."""

    requested_bytes: int
    free_bytes: int
    short_bytes: int


@dataclass(frozen=True, kw_only=True)
class DryReport:
    """What a dry run found out about one device.

    Sizes are bytes. ``peak_allocated_bytes`` and ``peak_reserved_bytes`` are torch's own figures;
    ``by_class`` divides what was alive at the peak into ``parameters``, ``buffers``, ``gradients``,
    ``optimizer state``, ``activations`` (allocated in forward passes and alive still),
    ``temporaries`` (allocated in backward passes and optimizer steps), ``workspace`` (of cuBLAS)
    and ``rounding`` (of blocks). ``step_time_s`` and ``tokens_per_second`` are None without a
    virtual clock.
    """

    device: int
    fits: bool
    capacity_bytes: int
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    by_class: dict[str, int]
    peak: Peak | None
    top: tuple[BlockGroup, ...]
    shortage: Shortage | None
    steps: int
    step_time_s: float | None = None
    tokens_per_second: float | None = None
    limited_by: str | None = None

    def to_json(self) -> str:
        """All fields, as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def watch(torch: Any, library: str) -> None:
    """Begin to follow the dry run; called once torch is imported."""
    global _records
    _records = Records(library)
    _records.watch(torch)
    _dry_values.watch(torch)


def report(device: int = 0) -> DryReport:
    """What the dry run found so far.

    Parameters
    ----------
    device
        Index of the emulated device.

    Raises
    ------
    StateError
        This process makes no dry run, or has not imported torch yet.
    """
    if _records is None:
        raise StateError(
            "there is no dry run in this process: start it with 'spillover emulate --dry', or call "
            "spillover.emulator.enable(dry=True) and import torch"
        )
    import torch

    stats = torch.cuda.memory_stats(device)
    blocks = _records.peak(device)
    allocated = int(stats.get("allocated_bytes.all.peak", 0))
    failure = _records.failure
    if failure is not None and failure.device != device:
        failure = None
    shortage = None
    if failure is not None:
        allocated = sum(block.size_bytes for block in blocks)
        shortage = Shortage(
            requested_bytes=failure.requested_bytes,
            free_bytes=failure.free_bytes,
            short_bytes=max(0, failure.requested_bytes - failure.free_bytes),
        )
    return DryReport(
        device=device,
        fits=shortage is None,
        capacity_bytes=torch.cuda.get_device_properties(device).total_memory,
        peak_reserved_bytes=int(stats.get("reserved_bytes.all.peak", 0)),
        peak_allocated_bytes=allocated,
        by_class=_by_class(blocks, allocated),
        peak=_moment(blocks),
        top=_groups(blocks),
        shortage=shortage,
        steps=_records.step - 1,
    )


def _class_of(block: Block) -> str:
    if block.kind:
        return block.kind
    return "activations" if block.phase == "forward" else "temporaries"


def _by_class(blocks: Iterable[Block], allocated_bytes: int) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for block in blocks:
        sizes[_class_of(block)] += block.size_bytes
    rounding = allocated_bytes - sum(sizes.values())
    if rounding > 0:
        sizes["rounding"] = rounding
    return dict(sorted(sizes.items(), key=lambda entry: -entry[1]))


def _line_of(block: Block) -> str:
    """The innermost line of the program's own, or who else asked for the memory."""
    if not block.stack:
        return f"{block.phase}, in torch's own threads"
    found = _FRAME.fullmatch(block.stack[-1])
    if found is None:
        return block.stack[-1]
    path, line, function = found.groups()
    _, installed, inside = path.rpartition("/site-packages/")
    if not installed:
        inside = os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
    return f"{inside}:{line} ({function})"


def _moment(blocks: list[Block]) -> Peak | None:
    if not blocks:
        return None
    last = max(blocks, key=lambda block: block.number)
    return Peak(
        step=last.step,
        phase=last.phase,
        operator=last.operator,
        line=_line_of(last),
        stack=last.stack,
    )


def _groups(blocks: Iterable[Block]) -> tuple[BlockGroup, ...]:
    found: dict[tuple[str, str, str], list[Block]] = defaultdict(list)
    for block in blocks:
        found[_class_of(block), _line_of(block), block.operator].append(block)
    groups = [
        BlockGroup(
            kind=kind,
            line=line,
            operator=operator,
            phase=members[0].phase,
            step=members[0].step,
            count=len(members),
            size_bytes=sum(block.size_bytes for block in members),
        )
        for (kind, line, operator), members in found.items()
    ]
    return tuple(sorted(groups, key=lambda group: -group.size_bytes)[:_TOP_GROUPS])


def print_report(found: DryReport) -> None:
    """Show a report as tables on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, soft_wrap=True)
    console.print(f"\n[bold]{headline(found)}[/bold]")
    classes = Table("class", "at the peak", "share", title="Device memory")
    for name, size in found.by_class.items():
        share = size / max(1, found.peak_allocated_bytes)
        classes.add_row(name, format_bytes(size), f"{share:.1%}")
    classes.add_section()
    classes.add_row("allocated", format_bytes(found.peak_allocated_bytes), "")
    classes.add_row("reserved", format_bytes(found.peak_reserved_bytes), "")
    console.print(classes)
    if found.peak is not None:
        where = f"step {found.peak.step}, {found.peak.phase}"
        console.print(
            f"The peak: {where}, {found.peak.operator or 'an allocation'}, {found.peak.line}"
        )
    lines = Table("size", "blocks", "class", "allocated by", title="Largest at the peak")
    for group in found.top:
        by = f"{group.operator}\n{group.line}" if group.operator else group.line
        lines.add_row(format_bytes(group.size_bytes), str(group.count), group.kind, by)
    console.print(lines)


def headline(found: DryReport) -> str:
    """One sentence: does it fit?"""
    of = format_bytes(found.capacity_bytes)
    if found.shortage is not None:
        return (
            f"Dry run: does not fit into {of}: an allocation of "
            f"{format_bytes(found.shortage.requested_bytes)} found "
            f"{format_bytes(found.shortage.free_bytes)} free, "
            f"{format_bytes(found.shortage.short_bytes)} too little, in step {found.steps + 1}; "
            "a run with --vram 1TiB says what it needs"
        )
    return (
        f"Dry run: fits into {of}: {format_bytes(found.peak_reserved_bytes)} reserved at most, "
        f"{format_bytes(found.peak_allocated_bytes)} allocated, {found.steps} optimizer steps"
    )


def print_at_exit(owner_pid: int) -> None:
    """Print the report when the process ends, and write it where the environment says."""
    if os.getpid() != owner_pid or _records is None:
        return
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    found = [report(device) for device in range(torch.cuda.device_count())]
    used = [one for one in found if one.peak_reserved_bytes or one.shortage] or found[:1]
    for one in used:
        print_report(one)
    path = os.environ.get(REPORT_VARIABLE)
    if path:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps([asdict(one) for one in used], indent=1) + "\n")
        except OSError as error:
            print(f"spillover: the report cannot be written to {path}: {error}", file=sys.stderr)

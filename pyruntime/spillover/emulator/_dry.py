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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from spillover._errors import StateError
from spillover._units import format_bytes
from spillover.emulator import _clock, _dry_values
from spillover.emulator._dry_records import Block, Records
from spillover.emulator._dry_times import (
    CALIBRATION_ERROR_MAX,
    CALIBRATION_ERROR_MEDIAN,
    StepTimes,
)
from spillover.emulator._options import VRAM_BYTES_MAX

#: Where ``spillover emulate --dry --report FILE`` has the report written as JSON.
REPORT_VARIABLE = "SPILLOVER_EMULATOR_DRY_REPORT"
#: How many tokens (or images) a step has, where ``--tokens-per-step`` says so.
TOKENS_VARIABLE = "SPILLOVER_EMULATOR_TOKENS_PER_STEP"
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
    """The moment when most memory was allocated: what was allocated last, and by whom.

    ``stack`` is the forward operator's where a backward pass allocated.
    """

    step: int
    phase: str
    operator: str
    line: str
    stack: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """The first allocation that the card had no room for, and the step that asked for it."""

    requested_bytes: int
    free_bytes: int
    short_bytes: int
    step: int


@dataclass(frozen=True, kw_only=True)
class DryReport:
    """What a dry run found out about one device.

    Sizes are bytes. ``peak_allocated_bytes`` and ``peak_reserved_bytes`` are torch's own figures,
    of the whole run also where the program resets them;
    ``by_class`` divides what was alive at the peak into ``parameters``, ``buffers``, ``gradients``,
    ``optimizer state``, ``activations`` (allocated in forward passes and alive still),
    ``temporaries`` (allocated in backward passes and optimizer steps), ``workspace`` (of cuBLAS)
    and ``rounding`` (of blocks).

    Times are simulated on the card ``profile`` (``""``: a made-up one); they are None without the
    virtual clock, and those of steps where no optimizer made one. ``step_time_s`` is the median
    over the steps after the first. ``tokens_per_step`` is what the caller says, or the number of
    indices that the most used embedding was asked for. ``limits`` divides the critical path of the
    steps by what would have to be faster; ``limited_by`` is the greatest of them.
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
    profile: str | None = None
    simulated_s: float | None = None
    step_time_s: float | None = None
    tokens_per_step: int | None = None
    tokens_per_second: float | None = None
    limited_by: str | None = None
    limits: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """All fields, as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def watch(torch: Any, library: str, *, clock: bool) -> None:
    """Begin to follow the dry run; called once torch is imported."""
    global _records
    _records = Records(library, StepTimes() if clock else None)
    _records.watch(torch)
    _dry_values.watch(torch)


def report(device: int = 0, *, tokens_per_step: int | None = None) -> DryReport:
    """What the dry run found so far. Under the clock, waits for all that was launched.

    Parameters
    ----------
    device
        Index of the emulated device.
    tokens_per_step
        What a step trains on, for ``tokens_per_second``; None counts indices of embeddings.

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

    peaks = _records.peak_counts(device)
    blocks = _records.peak(device)
    allocated = peaks.allocated_bytes
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
            step=failure.step,
        )
    return DryReport(
        device=device,
        fits=shortage is None,
        capacity_bytes=torch.cuda.get_device_properties(device).total_memory,
        peak_reserved_bytes=peaks.reserved_bytes,
        peak_allocated_bytes=allocated,
        by_class=_by_class(blocks, allocated),
        peak=_moment(blocks),
        top=_groups(blocks),
        shortage=shortage,
        steps=_records.step - 1,
        **_times(_records.times, tokens_per_step),
    )


def _times(times: StepTimes | None, tokens_per_step: int | None) -> dict[str, Any]:
    if times is None:
        return {}
    clock = _clock.clock_report()
    known: dict[str, Any] = {"profile": clock.profile, "simulated_s": clock.makespan_ns / 1e9}
    steps = times.summary()
    if steps is None:
        return known
    tokens = tokens_per_step or steps.tokens_per_step
    return known | {
        "step_time_s": steps.step_time_s,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / steps.step_time_s if tokens else None,
        "limited_by": next(iter(steps.shares), None),
        "limits": steps.shares,
    }


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
    if block.stack:
        return _short(block.stack[-1])
    if block.forward_stack:
        return f"backward of {_short(block.forward_stack[-1])}"
    return f"{block.phase}, in torch's own threads"


def _short(frame: str) -> str:
    found = _FRAME.fullmatch(frame)
    if found is None:
        return frame
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
        stack=last.stack or last.forward_stack,
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

    # Paths and names of operators may have brackets, which are no markup.
    console = Console(stderr=True, soft_wrap=True, markup=False)
    console.print(f"\n{headline(found)}", style="bold")
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
    for line in _time_lines(found):
        console.print(line)
    lines = Table("size", "blocks", "class", "allocated by", title="Largest at the peak")
    for group in found.top:
        by = f"{group.operator}\n{group.line}" if group.operator else group.line
        lines.add_row(format_bytes(group.size_bytes), str(group.count), group.kind, by)
    console.print(lines)


def _time_lines(found: DryReport) -> Iterator[str]:
    if found.simulated_s is None:
        return
    card = found.profile or "a made-up card"
    if found.step_time_s is None:
        yield (
            f"Simulated on {card}: {_duration(found.simulated_s)} in all; no optimizer step was "
            "made, so there is no step time"
        )
        return
    line = f"Simulated on {card}: {_duration(found.step_time_s)} a step"
    if found.tokens_per_second is not None:
        line += f", {found.tokens_per_second:,.0f} tokens/s at {found.tokens_per_step:,} a step"
    yield line
    shares = [f"{name} {share:.1%}" for name, share in found.limits.items() if share >= 0.001]
    yield f"Limited by {found.limited_by}; the critical path: {', '.join(shares[:5])}"
    yield (
        f"The cost model's error is {CALIBRATION_ERROR_MEDIAN} % (median) and at most "
        f"{CALIBRATION_ERROR_MAX} % on published figures that it was not fit on"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def headline(found: DryReport) -> str:
    """One sentence: does it fit?"""
    of = format_bytes(found.capacity_bytes)
    if found.shortage is not None:
        text = (
            f"Dry run: does not fit into {of}: an allocation of "
            f"{format_bytes(found.shortage.requested_bytes)} found "
            f"{format_bytes(found.shortage.free_bytes)} free, "
            f"{format_bytes(found.shortage.short_bytes)} too little, in step {found.shortage.step}"
        )
        if found.shortage.requested_bytes + found.peak_allocated_bytes < VRAM_BYTES_MAX:
            text += "; a run with --vram 1TiB says what it needs"
        return text
    steps = "1 optimizer step" if found.steps == 1 else f"{found.steps} optimizer steps"
    return (
        f"Dry run: fits into {of}: {format_bytes(found.peak_reserved_bytes)} reserved at most, "
        f"{format_bytes(found.peak_allocated_bytes)} allocated, {steps}"
    )


def print_at_exit(owner_pid: int) -> None:
    """Print the report when the process ends, and write it where the environment says."""
    if os.getpid() != owner_pid or _records is None:
        return
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    tokens = int(os.environ.get(TOKENS_VARIABLE) or 0) or None
    found = [report(device, tokens_per_step=tokens) for device in range(torch.cuda.device_count())]
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

"""The table of docs/parity.md: runs every check under every allocator and writes what came out.

Note [No checker]: hazards are not looked for here, since a check asks what a user of a function
sees. That what "yes" means holds in every schedule is what the other tests of the adapter show.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER.parents[1] / "docs" / "parity.md"
COLUMNS = ("native", "ours", "fallback", "plug-in")

#: Torch's version that the table is of: functions and messages differ between versions.
TORCH = "2.14"

_INTRODUCTION = """\
# Parity with torch's allocator
What of torch's memory functions works, by the allocator that torch has. Written by
`python tools/write_parity.py`, from checks in `tests/parity` that ran on the emulated device with
torch {torch}.

- **native**: torch's own caching allocator.
- **ours**: `spillover.allocator.install()`.
- **fallback**: the same on a machine without a C++ compiler.
- **plug-in**: another library's `CUDAPluggableAllocator` with the two functions that torch asks
  for, which call `cuMemAlloc` and `cuMemFree`.

`n/a` is what has nothing to do there. A "no" of every column is what the emulated device or the
packages beside torch lack.

"""


class Process:
    """A column's process, started anew when a check ends it. Used by one thread."""

    def __init__(self, column: str, plug_in: Path) -> None:
        self._environment = {
            **os.environ,
            "SPILLOVER_PARITY_COLUMN": column,
            "SPILLOVER_PARITY_PLUG_IN": str(plug_in),
        }
        self._process: subprocess.Popen[str] | None = None

    def cell(self, name: str) -> str:
        """Run one check; what the table says."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / "column.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], 120)[0]:
            process.kill()
            self.close()
            return "no: does not return"
        line = process.stdout.readline()
        if line:
            return line.rstrip("\n")
        code = self.close()
        assert code < 0, f"the process of a column ended with {code} at {name}"
        return "no: the process crashes"

    def close(self) -> int:
        """End the process; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.communicate()
        return process.returncode


def run_column(column: str, names: list[str], plug_in: Path) -> dict[str, str]:
    """The cells of one column."""
    process = Process(column, plug_in)
    try:
        return {name: process.cell(name) for name in names}
    finally:
        process.close()


def names() -> list[str]:
    """Every row. Imports torch and what the checks are."""
    import memory_checks  # noqa: F401
    import pool_checks  # noqa: F401
    from checks import CHECKS

    return list(CHECKS)


def run(columns: tuple[str, ...] = COLUMNS, processes: int = 2) -> dict[str, dict[str, str]]:
    """Every cell, by column and row."""
    import plug_in

    rows = names()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(processes) as pool,
    ):
        library = plug_in.build(Path(folder))
        cells = pool.map(lambda column: run_column(column, rows, library), columns)
        return dict(zip(columns, cells, strict=True))


def render(cells: dict[str, dict[str, str]]) -> str:
    """The document."""
    lines = ["| function | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in cells[COLUMNS[0]]:
        row = [cells[column][name] for column in COLUMNS]
        lines.append(f"| `{name}` | " + " | ".join(row) + " |")
    return _INTRODUCTION.format(torch=TORCH) + "\n".join(lines) + "\n"


def committed() -> dict[str, dict[str, str]]:
    """The cells of the committed document."""
    cells: dict[str, dict[str, str]] = {column: {} for column in COLUMNS}
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("| `"):
            name, *row = (part.strip() for part in line.strip("|").split(" | "))
            for column, value in zip(COLUMNS, row, strict=True):
                cells[column][name.strip("`")] = value
    return cells

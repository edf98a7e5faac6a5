"""``spillover doctor``: says what of this machine Spillover can use, and why not more."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import spillover
from spillover.cli import _doctor_device, _doctor_disks, _doctor_host
from spillover.cli._doctor_part import Part

_STYLES = {"works": "green", "limited": "yellow", "missing": "dim", "fails": "red"}


def doctor(
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder for the disk tier; repeat for several. Else the temporary one."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of the table.")
    ] = False,
) -> None:
    """Say what of this machine Spillover can use, and why not more.

    Each part works, is limited (it works, not at its best), is missing (nothing needs it, or
    something else stands in for it) or fails. Makes empty files in each folder, which are gone at
    once, and context and a megabyte on the first device, where GPUDirect Storage may work.

    Ends with 0 where nothing fails, with 1 where something does, and with 2 for wrong options.
    """
    folders = disk or [Path(tempfile.gettempdir())]
    parts = [
        *_doctor_device.parts(),
        *_doctor_host.parts(),
        *_doctor_disks.parts(folders),
    ]
    works = all(part.state != "fails" for part in parts)
    if as_json:
        rows = [asdict(part) for part in parts]
        print(json.dumps({"spillover": spillover.__version__, "works": works, "parts": rows}))
    else:
        _show(parts)
    sys.exit(0 if works else 1)


def _show(parts: list[Part]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "result", "detail", title=f"Spillover {spillover.__version__} here")
    for part in parts:
        result = f"[{_STYLES[part.state]}]{part.state}"
        table.add_row(escape(part.name), result, escape(part.detail), end_section=True)
    Console().print(table)

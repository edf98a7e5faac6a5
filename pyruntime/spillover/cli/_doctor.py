"""``spillover doctor``: says what of this machine Spillover can use, and why not more."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder for the disk tier; repeat for several. Else the temporary one."
        ),
    ] = None,
) -> None:
    """Say what of this machine Spillover can use, and why not more.

    Makes an empty file in each folder, which is gone at once. Ends with 1 where something fails.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "result", "detail", title="This machine")
    works = True
    for folder in disk or [Path(tempfile.gettempdir())]:
        passed, detail = _look_at_disk(folder)
        works = works and passed
        table.add_row(
            f"disk {folder}", "[green]works" if passed else "[red]fails", detail, end_section=True
        )
    Console().print(table)
    sys.exit(0 if works else 1)


def _look_at_disk(folder: Path) -> tuple[bool, str]:
    from spillover._disk import DiskStore
    from spillover._errors import StorageError

    if not folder.is_dir():
        return False, "there is no such folder; a disk store would make it"
    try:
        with DiskStore(folder) as store:
            stats = store.stats()
    except StorageError as error:
        return False, str(error)
    access = "O_DIRECT" if stats.is_direct else "buffered: the file system refuses O_DIRECT"
    notes = f" ({stats.engine_notes})" if stats.engine_notes else ""
    return True, f"engine {stats.engine}{notes}; {access}"

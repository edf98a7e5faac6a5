"""``spillover store``: shows, checks and deletes durable stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Show, check and delete durable stores.", no_args_is_help=True)

_Folders = Annotated[list[Path], typer.Argument(help="The store's folders.", metavar="FOLDER...")]


@app.command()
def show(folders: _Folders) -> None:
    """Say what a durable store holds. Nobody else may have it open."""
    from rich.console import Console
    from rich.table import Table

    from spillover._durable import DurableStore
    from spillover._units import format_bytes

    with DurableStore(folders) as store:
        table = Table("entry", "size", "committed", title=f"commit {store.sequence}")
        for name, size in store.entries.items():
            table.add_row(name, format_bytes(size), "yes" if store.is_committed(name) else "no")
        console = Console()
        console.print(table)
        console.print(f"extra: {store.extra!r:.1000}")
        console.print(f"{format_bytes(store.stats().file_bytes)} reserved on the disks")


@app.command()
def verify(folders: _Folders) -> None:
    """Read all that is committed and compare it with its checksums."""
    from spillover._durable import DurableStore

    with DurableStore(folders) as store:
        store.verify()
        print(f"commit {store.sequence}: all checksums are good")


@app.command()
def delete(
    folders: _Folders,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a durable store for good; the folders stay."""
    from spillover._durable import DurableStore

    if not yes:
        names = ", ".join(map(str, folders))
        typer.confirm(f"Delete the durable store in {names} and all its commits?", abort=True)
    DurableStore.delete(folders)

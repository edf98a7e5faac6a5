"""``spillover store``: shows, checks and deletes durable stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spillover._durable import DurableStore

app = typer.Typer(help="Show, check and delete durable stores.", no_args_is_help=True)

_Folders = Annotated[list[Path], typer.Argument(help="The store's folders.", metavar="FOLDER...")]


def _open(folders: list[Path]) -> DurableStore:
    """The store whose commit counts; see Note [Generations]."""
    from spillover._disk import absolute_folders
    from spillover._durable import DurableStore
    from spillover._durable_generations import newest

    paths = absolute_folders(folders)
    _, store, _ = newest(paths)
    return DurableStore(paths) if store is None else store


@app.command()
def show(folders: _Folders) -> None:
    """Say what a durable store holds. Nobody else may have it open."""
    from rich.console import Console
    from rich.table import Table

    from spillover._units import format_bytes

    with _open(folders) as store:
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
    with _open(folders) as store:
        store.verify()
        print(f"commit {store.sequence}: all checksums are good")


@app.command()
def delete(
    folders: _Folders,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a durable store for good; the folders stay."""
    from spillover._disk import absolute_folders
    from spillover._durable import DurableStore
    from spillover._durable_generations import generations, remove

    if not yes:
        names = ", ".join(map(str, folders))
        typer.confirm(f"Delete the durable store in {names} and all its commits?", abort=True)
    paths = absolute_folders(folders)
    # The oldest first, so that an end on the way leaves the newest.
    deleted = [remove(paths, generation) for generation in reversed(generations(paths))]
    if not any(deleted):
        DurableStore.delete(paths)  # Which says that there is none.

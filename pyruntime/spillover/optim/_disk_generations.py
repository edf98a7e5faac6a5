"""Where the durable store of an optimizer lies, whose parameters may become more.

Note [Generations]
------------------
A durable store has its entries for good. An optimizer that gets places for more parameters makes
another store, the next generation, in folders beside the files of the first one; copies what the
present one has, committed or not; and goes on there. The commit that counts stays where it is until
the next generation has one of its own, and then its store is deleted. So at every instant the
newest generation that has a commit is the one that counts; whoever opens the directory next removes
what else an end of the process has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from spillover._durable import DurableStore
from spillover._errors import StorageError

_PREFIX = "generation-"


def folders_of(folders: Sequence[str], generation: int) -> list[str]:
    """Where that generation's files are; those of generation 0 are in the folders themselves."""
    if generation == 0:
        return list(folders)
    return [os.path.join(folder, f"{_PREFIX}{generation}") for folder in folders]


def newest(
    folders: Sequence[str], write_limit: int | None = None
) -> tuple[int, DurableStore | None]:
    """The generation that counts, and its store, open, where there is one with a commit.

    Removes all others, unfinished ones too. Where nothing was committed it is generation 0, which
    is left as it is. Raises StorageError and CorruptData.
    """
    numbers = sorted(_generations(folders), reverse=True)
    for generation in numbers:
        store = _opened(folders_of(folders, generation), write_limit)
        if store is not None and store.sequence > 0:
            try:
                for older in numbers[numbers.index(generation) + 1 :]:
                    remove(folders, older)
            except BaseException:
                store.close()
                raise
            return generation, store
        if store is not None:
            store.close()
        if generation > 0:
            remove(folders, generation)
    return 0, None


def remove(folders: Sequence[str], generation: int) -> None:
    """Delete that generation's store, if it is there, whole or in part. Raises StorageError."""
    there = [folder for folder in folders_of(folders, generation) if os.path.isdir(folder)]
    if not there:
        return
    try:
        DurableStore.delete(there)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
    if generation > 0:
        for folder in there:
            with contextlib.suppress(OSError):  # An empty folder does no harm.
                os.rmdir(folder)


def _generations(folders: Sequence[str]) -> set[int]:
    found = {0}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            names = (path.name for path in Path(folder).iterdir())
            numbers = (name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
            found.update(int(number) for number in numbers if number.isdecimal())
    return found


def _opened(folders: list[str], write_limit: int | None) -> DurableStore | None:
    if not any(map(os.path.isdir, folders)):
        return None
    for folder in folders:  # Where one is lost, the store says so, rather than that there is none.
        os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        return DurableStore(folders, write_limit=write_limit)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return None

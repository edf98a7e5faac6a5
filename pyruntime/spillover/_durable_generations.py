"""Durable stores whose entries may become more, as those of optimizers do.

Note [Generations]
------------------
A durable store has its entries for good. Who needs more of them makes another store, the next
generation, in folders beside the files of the first one; copies what the present one has, committed
or not; and goes on there. The commit that counts stays where it is until the next generation has
one of its own, and then its store is deleted. So at every instant the newest generation that has a
commit is the one that counts; whoever opens the folders next removes what else an end of the
process has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from spillover._durable import DurableStore
from spillover._errors import StorageError
from spillover._settings import logger

_PREFIX = "generation-"


def folders_of(folders: Sequence[str], generation: int) -> list[str]:
    """Where that generation's files are; those of generation 0 are in the folders themselves."""
    if generation == 0:
        return list(folders)
    return [os.path.join(folder, f"{_PREFIX}{generation}") for folder in folders]


def generations(folders: Sequence[str]) -> list[int]:
    """Those of which there is anything, and 0; newest first. Raises StorageError."""
    found = {0}
    for folder in folders:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise StorageError(error.errno, f"cannot list: {error.strerror}", folder) from None
        numbers = (name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
        found.update(int(number) for number in numbers if number.isdecimal())
    return sorted(found, reverse=True)


def newest(
    folders: Sequence[str], write_limit: int | None = None
) -> tuple[int, DurableStore | None]:
    """The generation that counts, and its store, open, where there is one with a commit.

    Removes all others, unfinished ones too. Where nothing was committed it is generation 0, which
    is left as it is. Raises StorageError and CorruptData.
    """
    numbers = generations(folders)
    for index, generation in enumerate(numbers):
        store = opened(folders_of(folders, generation), write_limit)
        if store is not None and store.sequence > 0:
            for older in numbers[index + 1 :]:
                remove_if_possible(folders, older)
            return generation, store
        if store is not None:
            store.close()
        if generation > 0:
            remove(folders, generation)
    return 0, None


def opened(folders: list[str], write_limit: int | None = None) -> DurableStore | None:
    """The store that is there; None where there is none. Raises StorageError and CorruptData."""
    if not any(map(os.path.isdir, folders)):
        return None
    for folder in folders:  # Where one is lost, the store says so, rather than that there is none.
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        return DurableStore(folders, write_limit=write_limit)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


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


def remove_if_possible(folders: Sequence[str], generation: int) -> None:
    """As :func:`remove`, of a store whose commit counts no more; what cannot be is left."""
    try:
        remove(folders, generation)
    except StorageError as error:
        logger.warning("%s; it is of no more use", error)

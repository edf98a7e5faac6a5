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

_PREFIX = "spillover.generation-"


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
) -> tuple[int, DurableStore | None, list[int]]:
    """The generation that counts; its store, open, where there is one with a commit; the others.

    Where nothing was committed it is generation 0, whose store is not opened. Nothing is removed:
    who finds that the commit is the right one calls :func:`remove_others`. Raises StorageError,
    also where a folder is lost, and CorruptData.
    """
    numbers = generations(folders)
    for generation in numbers:
        store = _opened(folders, generation, write_limit)
        if store is not None and store.sequence > 0:
            return generation, store, [each for each in numbers if each != generation]
        if store is not None:
            store.close()
    return 0, None, numbers[:-1]


def _opened(
    folders: Sequence[str], generation: int, write_limit: int | None
) -> DurableStore | None:
    """None where there is none, or one that was never complete."""
    parts = folders_of(folders, generation)
    if generation == 0:
        if not all(map(os.path.isdir, parts)):
            return None
    else:
        for folder, part in zip(folders, parts, strict=True):
            if not os.path.isdir(part):
                _make_part(folder, part)
    try:
        return DurableStore(parts, write_limit=write_limit)
    except StorageError as error:
        # Where folders are there, that says that no file is, nor one of a store that lost others.
        if error.errno != errno.ENOENT or not all(map(os.path.isdir, parts)):
            raise
        return None


def _make_part(folder: str, part: str) -> None:
    """So that the store says what is lost, if it is: other folders have that generation."""
    try:
        os.mkdir(part, mode=0o700)
    except OSError as error:
        raise StorageError(
            errno.ENODEV,
            f"the folder has no part of the durable store, and none can be made "
            f"({error.strerror}): it is lost, or not mounted. Give it back; nothing was changed",
            folder,
        ) from None


def remove(folders: Sequence[str], generation: int) -> bool:
    """Delete that generation's store, if it is there, whole or in part; whether it was.

    Raises StorageError.
    """
    there = [folder for folder in folders_of(folders, generation) if os.path.isdir(folder)]
    if not there:
        return False
    is_deleted = True
    try:
        DurableStore.delete(there)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        is_deleted = False
    if generation > 0:
        for folder in there:
            with contextlib.suppress(OSError):  # An empty folder does no harm.
                os.rmdir(folder)
    return is_deleted


def remove_others(folders: Sequence[str], others: Sequence[int]) -> None:
    """Delete stores that do not count; those that cannot be are left."""
    for generation in others:
        try:
            remove(folders, generation)
        except StorageError as error:
            logger.warning("%s; it is of no more use", error)

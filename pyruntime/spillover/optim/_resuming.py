"""``spillover.optim.resume``, which finds the optimizer of a directory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spillover._disk import Folder, absolute_folders
from spillover._errors import StateError
from spillover._settings import enabled
from spillover.optim._disk_tier import Resumed

if TYPE_CHECKING:
    from spillover.optim._host_optimizer import HostOptimizer

#: Of this process, for :func:`resume`.
_living: weakref.WeakSet[HostOptimizer] = weakref.WeakSet()


def note_living(optimizer: HostOptimizer) -> None:
    """Have :func:`resume` find it."""
    _living.add(optimizer)


def forget_living(optimizer: HostOptimizer) -> None:
    """Have it find it no more."""
    _living.discard(optimizer)


def resume(
    directory: Folder | Sequence[Folder], optimizer: HostOptimizer | None = None
) -> Resumed | None:
    """Take an optimizer with ``tier="disk"`` or ``"auto"``, and its weights, to the last commit.

    Call it when model and optimizer are made as they were before, in the process that was started
    again; or later, to go back to the last commit. It restores state, the weights in place, buffers
    of ``module``, options of groups, step counts and random number generators, so that training
    goes on to the same bits as if it had never ended.

    Parameters
    ----------
    directory
        As for the optimizer, or by another name: a link counts as what it leads to.
    optimizer
        Which one; None: the one of this process that has that directory.

    Returns
    -------
    What the commit says beside, or None where nothing was committed yet, as in a first run, and
    with ``SPILLOVER=0``.

    Raises
    ------
    StateError
        No optimizer here has that directory, or it is closed.
    ConfigError
        The commit is of another optimizer, or of more or fewer parameters (``add_param_group``
        comes first for what the commit has), or of other shapes or types, or in another order,
        which among equal shapes is told where both had ``named_parameters()``.
    CorruptData, StorageError
        What is on the disk is not what was written, or cannot be read. Call it again, or choose
        another directory.

    Notes
    -----
    Blocks until weights are read. State is read, and its checksums are compared, as steps use it.

    Examples
    --------
    >>> optimizer = spillover.optim.AdamW(
    ...     model.named_parameters(), tier="disk", directory="/nvme0/state", module=model
    ... )
    >>> resumed = spillover.optim.resume("/nvme0/state")
    >>> for step in range(resumed.step if resumed else 0, 1000): ...
    """
    if not enabled():
        return None
    if optimizer is None:
        wanted = set(absolute_folders(directory))
        found = [each for each in _living if _are_same(set(each.disk_folders), wanted)]
        if not found:
            raise StateError(
                f"no optimizer of this process has the directory {', '.join(sorted(wanted))}: make "
                "model and optimizer first, as they were, and then resume"
            )
        optimizer = found[0]
    return optimizer.resume()


def _are_same(folders: set[str], others: set[str]) -> bool:
    """Whether they are, by whatever names."""
    return folders == others or set(map(_place, folders)) == set(map(_place, others))


def _place(folder: str) -> tuple[int, int] | str:
    """Where it lies; its name where that cannot be seen."""
    try:
        found = os.stat(folder)
    except OSError:
        return folder
    return found.st_dev, found.st_ino

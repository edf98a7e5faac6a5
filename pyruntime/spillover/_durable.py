"""Storage on disks that outlives its process, with commits.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spillover import _core
from spillover._closeable import Closeable
from spillover._disk import Engine, Folder, absolute_folders
from spillover._errors import ConfigError
from spillover._settings import logger
from spillover._units import parse_bytes

if TYPE_CHECKING:
    from torch.cuda import Event
    from typing_extensions import Buffer

    from spillover._transfer import TransferTicket

_NOTHING, _BYTES, _JSON = range(3)


class DurableStore(_core.DurableStore, Closeable):
    """Named entries of fixed sizes in one or more folders, and atomic commits of all of them.

    A step reads entries and writes them; :meth:`commit` makes what was written the store's
    contents, all or nothing, with a little data of the caller's beside it. A process that is
    killed, or a machine that loses power, at whatever instant, leaves the last commit for the next
    who opens the store. Each part of an entry has two slots on the disk: writing goes to the one
    that is not committed, and a commit makes them change roles, so that nothing is copied and parts
    that were not written stay where they are. Steps between two commits write the uncommitted slot
    in place; :meth:`rollback` goes back to the last commit, to retained bytes.

    Parameters
    ----------
    folders
        A folder, or several on different disks, over which extents are striped evenly. All of them
        are needed to open the store again, in any order. Each holds one store.
    entries
        Name and size in bytes of each entry. A store with these entries is opened, or, where there
        is none, made: missing folders too, and space for everything is reserved at once, two slots
        an entry. None: open what is there.
    extra_limit
        The most bytes that a commit's ``extra`` may take, such as ``"1MiB"``, which is what a new
        store has where nothing is said.
    extent_bytes
        Entries are cut into extents of so many bytes, 8 MiB unless said otherwise when the store is
        made; parts of entries that are read or written by themselves consist of whole ones.
    write_limit
        The most bytes that this object may write, to spare flash memory. None: no limit.
    engine
        As of :class:`DiskStore`.

    Raises
    ------
    ConfigError
        An argument is wrong, or the store there has other entries.
    DiskFull
        There is no room; the message says how much is needed, and no file is left.
    CorruptData
        What is on the disk is not what was written, and no loss of power explains it.
    StorageError
        Somebody else has the store open (the message names the lock file), a folder cannot be used
        or is lost, or there is no store and ``entries`` is None. ``errno`` and ``filename`` are
        set.

    Notes
    -----
    Methods may be called from any thread. Memory at a multiple of 4096 bytes is given to the disk
    as it is; other memory is copied on the way. Files are private (mode 0600, in folders of mode
    0700 where they are made). They stay until :meth:`delete`, or ``spillover store delete``.

    A store is a context manager; :meth:`close` ends it, and forgets what is not committed. In a
    forked child every call raises :class:`StateError`.

    The order of writes and flushes is in ``docs/durable.md``.

    Examples
    --------
    >>> with DurableStore("/nvme0/state", {"exp_avg": 4096, "exp_avg_sq": 4096}) as store:
    ...     for name, values in moments.items():
    ...         store.write(name, values).wait()
    ...     store.commit({"step": 1})
    """

    def __init__(
        self,
        folders: Folder | Sequence[Folder],
        entries: Mapping[str, int] | None = None,
        *,
        extra_limit: int | str | None = None,
        extent_bytes: int | None = None,
        write_limit: int | str | None = None,
        engine: Engine = "auto",
    ) -> None:
        if entries is not None and not entries:
            raise ConfigError("a durable store needs at least one entry")
        for name, size in (entries or {}).items():
            if not isinstance(name, str) or isinstance(size, bool) or not isinstance(size, int):
                raise ConfigError(f"entries are names and sizes in bytes, not {name!r}: {size!r}")
            if size < 1:
                raise ConfigError(f"the entry {name!r} has {size} bytes; an entry has at least 1")
        super().__init__(
            absolute_folders(folders),
            list((entries or {}).items()),
            extent_bytes=extent_bytes,
            extra_limit_bytes=(
                None if extra_limit is None else parse_bytes(extra_limit, name="extra_limit")
            ),
            engine=engine,
            write_limit_bytes=(
                None if write_limit is None else parse_bytes(write_limit, name="write_limit")
            ),
        )
        stats = self.stats()
        for folder in stats.folders:
            if not folder.is_direct:
                logger.warning(
                    "%s: the file system refuses O_DIRECT, so what is stored there takes page "
                    "cache as well; on tmpfs a durable store does not outlast a restart",
                    folder.folder,
                )
        if stats.notes:
            logger.warning("durable store: %s", stats.notes)
        if stats.engine_notes:
            logger.info("durable store: engine %s; %s", stats.engine, stats.engine_notes)

    @property
    def entries(self) -> dict[str, int]:
        """Name and size in bytes of each entry."""
        return dict(self._entries())

    @property
    def sequence(self) -> int:
        """The number of the last commit; 0 where nothing was committed yet."""
        return self.stats().sequence

    @property
    def extra(self) -> Any:
        """What the last commit was given beside the entries: JSON values, bytes or None."""
        kind, data = self._extra()
        if kind == _NOTHING:
            return None
        return data if kind == _BYTES else json.loads(data)

    def write(
        self,
        entry: str,
        buffer: Buffer,
        *,
        offset: int = 0,
        after: Event | TransferTicket | None = None,
    ) -> _core.Ticket:
        """Start to write an entry, or a part of it, to the slot that is not committed.

        Parameters
        ----------
        entry
            Its name.
        buffer
            Anything contiguous with the buffer protocol. It is held, and must not change, until the
            ticket is done.
        offset
            Where in the entry, in bytes. What is written begins at a multiple of ``extent_bytes``
            and ends at one or at the entry's end.
        after
            Wait for this event, or this ticket of a :class:`TransferEngine`, before the memory is
            read: that of the copy which fills it. Where the copy fails, or was cancelled, so does
            the write.

        Returns
        -------
        The ticket; ``wait()`` raises what went wrong. The entry then has no newest contents until
        it is written again or rolled back, and cannot be committed; committed contents are
        untouched.

        Raises
        ------
        StateError
            That part is being read or written; the store is closed.
        ConfigError, DiskFull, StorageError
            There is no such part; the write limit is reached; a commit has failed before.

        Notes
        -----
        Blocks while a folder's queue of 64 extents is full, or a commit is under way.
        """
        return super().write(entry, buffer, offset=offset, after=after)

    def read(
        self, entry: str, buffer: Buffer, *, offset: int = 0, committed: bool = False
    ) -> _core.Ticket:
        """Start to read an entry, or a part of it, into ``buffer``, as much as fits there exactly.

        ``committed=True`` gives the contents of the last commit, otherwise those that were written
        last. The buffer is held until the ticket is done. ``wait()`` raises :class:`CorruptData`
        where the checksum is not that of what was written, :class:`StorageError` where the disk
        fails; reading may be tried again.

        Raises
        ------
        StateError
            It has no such contents, or is being written; the store is closed.
        ConfigError
            There is no such part.
        """
        return super().read(entry, buffer, offset=offset, committed=committed)

    def commit(self, extra: Any = None) -> int:
        """Make what was written the store's contents, durably, and return the commit's number.

        Blocks until every write that is under way is over and the disks have flushed. When it
        returns the commit outlasts the process and a loss of power.

        Parameters
        ----------
        extra
            Committed with the entries: bytes, or anything that JSON gives back as it was, such as
            ``{"step": 3, "param_groups": [...]}``.

        Raises
        ------
        ConfigError
            ``extra`` is too large, or JSON would change it (tuples, keys that are no strings).
        StateError
            A write has failed since the last commit: write it again, or roll back.
        StorageError
            The commit could not be made durable. The last commit can be read as before. After a
            flush that failed the store takes no writes until it is opened again: which then finds
            the last commit, or this one as a whole.
        """
        if extra is None:
            return self._commit(b"", _NOTHING)
        if isinstance(extra, bytes | bytearray | memoryview):
            return self._commit(bytes(extra), _BYTES)
        return self._commit(_as_json(extra), _JSON)

    def rollback(self) -> None:
        """Forget what was written since the last commit. Waits for writes that are under way."""
        super().rollback()

    def is_committed(self, entry: str) -> bool:
        """Whether the last commit has contents of all of the entry."""
        return super().is_committed(entry)

    def verify(self) -> None:
        """Read everything that is committed and compare it with its checksums. Blocks.

        Raises
        ------
        CorruptData, StorageError
            The first of what does not check out, or cannot be read.
        """
        super().verify()

    def register(self, buffer: Buffer) -> _core.MemoryRegistration:
        """Prepare memory that many requests will use; as :meth:`DiskStore.register`."""
        return super().register(buffer)

    def close(self) -> None:
        """Wait for requests under way, and let others open the store. May be called again."""
        super().close()

    def stats(self) -> _core.DurableStats:
        """Bytes, engine and folders at this moment. Cheap; does not block."""
        return super().stats()

    @staticmethod
    def delete(folders: Folder | Sequence[Folder]) -> None:
        """Remove the durable store in these folders for good; the folders stay.

        Raises
        ------
        StorageError
            There is none, somebody has it open, or a file cannot be removed.
        """
        _core.delete_durable(absolute_folders(folders))


def _as_json(extra: Any) -> bytes:
    try:
        text = json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra is bytes or what JSON can say: {error}") from None
    if not _is_same(json.loads(text), extra):
        raise ConfigError(
            "extra would come back changed: JSON has lists in place of tuples, and keys are strings"
        )
    return text.encode()


def _is_same(back: Any, given: Any) -> bool:
    """Whether JSON gave back what it was given; NaN counts as itself."""
    if isinstance(given, dict):
        return (
            isinstance(back, dict)
            and back.keys() == given.keys()
            and all(_is_same(back[key], value) for key, value in given.items())
        )
    if isinstance(given, list):
        return (
            isinstance(back, list) and len(back) == len(given) and all(map(_is_same, back, given))
        )
    return type(back) is type(given) and (back == given or back != back)

"""Scratch storage on disks.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spillover import _core
from spillover._closeable import Closeable
from spillover._errors import ConfigError
from spillover._settings import logger
from spillover._units import parse_bytes

if TYPE_CHECKING:
    from torch.cuda import Event
    from typing_extensions import Buffer

    from spillover._transfer import TransferTicket

Folder = str | os.PathLike[str]
Engine = Literal["auto", "io_uring", "threads"]


class DiskStore(_core.DiskStore, Closeable):
    """Scratch storage in one or more folders, written and read asynchronously.

    A payload is written once, read any number of times, and gives its space back when the last
    reference to it is gone. It is cut into extents, which go to the folders in proportion to their
    measured throughput, so one large payload uses every disk. Each extent has a checksum (CRC-32C),
    which reading checks. The files have no names and are private to the process (mode 0600, in
    folders of mode 0700 where they are made), so that nothing is left of them when it ends, however
    that happens; processes may share a folder.

    Parameters
    ----------
    folders
        A folder, or several on different disks. Missing ones are made; relative ones are meant from
        the working directory of this moment.
    limit
        The most space that all files together may take, in bytes or as a text such as
        ``"200GiB"``. None: what the disks have.
    write_limit
        The most bytes that may ever be written, to spare flash memory. None: no limit.
    engine
        ``"io_uring"``: one thread a folder with many transfers under way. ``"threads"``: a few
        threads that block. ``"auto"``: io_uring where the kernel has it and allows it;
        ``stats().engine`` and ``stats().engine_notes`` say which, and why.

    Raises
    ------
    ConfigError
        An argument is wrong.
    StorageError
        A folder cannot be used, or ``engine="io_uring"`` does not work here. ``errno`` and
        ``filename`` are set.

    Notes
    -----
    Methods may be called from any thread. Files bypass the page cache (O_DIRECT) where the file
    system allows it; where it does not, a warning is logged once a store and ``stats().folders``
    tells. Memory at a multiple of 4096 bytes, as :class:`HostPool`'s and page-aligned tensors', is
    given to the disk as it is; other memory is copied on the way.

    A store is a context manager; :meth:`close` ends it. In a forked child every call raises
    :class:`StateError`.

    Examples
    --------
    >>> with DiskStore(["/nvme0/spill", "/nvme1/spill"], limit="200GiB") as store:
    ...     payload, ticket = store.write(data)
    ...     ticket.wait()
    ...     store.read(payload, target).wait()
    """

    def __init__(
        self,
        folders: Folder | Sequence[Folder],
        *,
        limit: int | str | None = None,
        write_limit: int | str | None = None,
        engine: Engine = "auto",
    ) -> None:
        super().__init__(
            absolute_folders(folders),
            engine=engine,
            limit_bytes=None if limit is None else parse_bytes(limit, name="limit"),
            write_limit_bytes=(
                None if write_limit is None else parse_bytes(write_limit, name="write_limit")
            ),
        )
        stats = self.stats()
        for folder in stats.folders:
            if not folder.is_direct:
                logger.warning(
                    "%s: the file system refuses O_DIRECT, so what is stored there takes page "
                    "cache as well; tmpfs is memory anyway",
                    folder.folder,
                )
        if stats.engine_notes:
            logger.info("disk store: engine %s; %s", stats.engine, stats.engine_notes)

    def write(
        self, buffer: Buffer, *, after: Event | TransferTicket | None = None
    ) -> tuple[_core.DiskPayload, _core.Ticket]:
        """Start to store the bytes of ``buffer``.

        Parameters
        ----------
        buffer
            Anything contiguous with the buffer protocol, of at least a byte: bytes, a NumPy array,
            ``tensor.numpy()``. It is held, and must not change, until the ticket is done.
        after
            Wait for this event, or this ticket of a :class:`TransferEngine`, before the memory is
            read: that of the copy which fills it. Other requests do not wait for it. Where the copy
            fails, or was cancelled, so does the write.

        Returns
        -------
        The payload, to be read once the ticket is done, and the ticket. ``ticket.wait()`` raises
        what went wrong; the space is free again then.

        Raises
        ------
        DiskFull
            There is no room on the disks, or a limit is reached. Other payloads are untouched.
        ConfigError, StateError
            The buffer cannot be used; the store is closed.

        Notes
        -----
        Blocks only while a folder's queue of 64 extents is full.
        """
        return super().write(buffer, after=after)

    def read(self, payload: _core.DiskPayload, buffer: Buffer) -> _core.Ticket:
        """Start to read ``payload`` into ``buffer``, which has room for ``payload.size_bytes``.

        The buffer is held until the ticket is done, and has undefined contents before.
        ``ticket.wait()`` raises :class:`CorruptData` where the checksum is not the one of what was
        written, and :class:`StorageError` where the disk fails; the payload stays, so reading may
        be tried again.

        Raises
        ------
        ConfigError, StateError
            The buffer cannot be used; the payload is another store's, or is not stored; the store
            is closed.
        """
        return super().read(payload, buffer)

    def register(self, buffer: Buffer) -> _core.MemoryRegistration:
        """Prepare memory that many requests will use: a pool's buffer, a tensor that stays.

        With io_uring the kernel then need not look up its pages for each transfer. ``buffer`` is
        writable; it is held, and pinned against swapping, until the registration's ``remove()``,
        before which no request on it may be under way. Requests may use parts of it.

        Returns
        -------
        The registration. ``registered_bytes`` of it are prepared: 0 with threads, and less than all
        where the limit on locked memory (``ulimit -l``) is small. Requests work in any case.

        Raises
        ------
        ConfigError, StateError
            A part of it is registered already; the store is closed.
        """
        return super().register(buffer)

    def close(self) -> None:
        """Refuse new requests and wait for those under way. May be called again.

        The disks get the space back when the last payload is gone, too.
        """
        super().close()

    def stats(self) -> _core.DiskStats:
        """Bytes, engine, waits and folders at this moment. Cheap; does not block.

        ``folders[i].writes`` and ``.reads`` have bytes, errors, queue depth and times of each
        direction; :func:`spillover.stats` has the same of all stores, with bandwidths.
        """
        return super().stats()


def absolute_folders(folders: Folder | Sequence[Folder]) -> list[str]:
    """The names in full, each once.

    Raises
    ------
    ConfigError
        There are none, one is named twice, or is no path.
    """
    given = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not given:
        raise ConfigError("a disk store needs at least one folder")
    found: list[str] = []
    for folder in given:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ConfigError(f"folders must be paths such as '/nvme0/spill', not {folder!r}")
        name = str(Path(folder).expanduser().absolute())
        if name in found:
            raise ConfigError(f"the folder {name!r} is named twice; give each disk once")
        found.append(name)
    return found

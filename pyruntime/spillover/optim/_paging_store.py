"""Where paged optimizer state lies between steps: pinned host memory under a budget, and disks."""

from __future__ import annotations

import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from spillover import _core
from spillover._disk import DiskStore, Folder, absolute_folders
from spillover._errors import ConfigError, DiskFull, HostOutOfMemory
from spillover._host import HostPool
from spillover._pinned import host_pool
from spillover._transfer import TransferEngine, TransferTicket
from spillover._units import format_bytes, parse_bytes
from spillover.optim._paging_state import Parked

Tier = Literal["host", "disk", "auto"]

# Of the transfer engine for what is on disk: pinned memory of each device beside host_budget.
_CHUNK_BYTES = 16 << 20
_STAGING_BYTES = 64 << 20


@dataclass(frozen=True)
class PagingOptions:
    """What :func:`page` was asked for; plain values, so that a paged optimizer can be pickled."""

    tier: Tier
    folders: tuple[str, ...]
    host_budget: int | None
    bucket_bytes: int
    write_limit: int | None


def paging_options(
    tier: Tier,
    directory: Folder | Sequence[Folder] | None,
    host_budget: int | str | None,
    bucket_bytes: int | str,
    write_limit: int | str | None,
) -> PagingOptions:
    """Check what a user gave.

    Raises
    ------
    ConfigError
        An argument is wrong, or a tier lacks its folder.
    """
    if tier not in ("host", "disk", "auto"):
        raise ConfigError(f"tier={tier!r} is not known; it must be 'host', 'disk' or 'auto'")
    if tier != "host" and directory is None:
        raise ConfigError(f"tier={tier!r} needs directory, a folder or several on fast disks")
    if tier == "host" and (directory is not None or write_limit is not None):
        raise ConfigError("directory and write_limit are for tier='disk' and tier='auto'")
    if tier == "disk" and host_budget is not None:
        raise ConfigError("host_budget is for tier='host' and tier='auto'; a disk tier uses none")
    bucket = parse_bytes(bucket_bytes, name="bucket_bytes")
    if bucket == 0:
        raise ConfigError("bucket_bytes must be at least a byte, such as '64MiB'")
    budget = None if host_budget is None else parse_bytes(host_budget, name="host_budget")
    if budget == 0:
        raise ConfigError("host_budget must be at least a byte, such as '48GiB'")
    return PagingOptions(
        tier=tier,
        folders=() if directory is None else tuple(absolute_folders(directory)),
        host_budget=budget,
        bucket_bytes=bucket,
        write_limit=None if write_limit is None else parse_bytes(write_limit, name="write_limit"),
    )


class OnDisk:
    """The bytes of one tensor in a transfer engine, which has them on disk or is writing them."""

    def __init__(self, engine: TransferEngine, payload: _core.Payload) -> None:
        self.engine = engine
        self.payload = payload

    def read(self, parked: Parked) -> torch.Tensor:
        """Through the device, of which it takes as much memory for the time."""
        with torch.cuda.device(self.engine.device):
            found = self._fetched(on_device(parked, self.engine.device)).to("cpu")
        self.engine.collect()
        return found

    def read_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device that it was put from, in the layout of ``tensor``."""
        with torch.cuda.device(self.engine.device):
            return self._fetched(torch.empty_like(tensor, device=self.engine.device))

    def _fetched(self, target: torch.Tensor) -> torch.Tensor:
        self.engine.fetch(self.payload, target).stream_wait()
        return target

    def drop(self) -> None:
        """Give the space back, also while the payload is on its way to disk."""
        self.payload.drop()


class StateStore:
    """Gives memory for state tensors, and moves those that lie on disk.

    Not thread-safe: the optimizer that it belongs to is not, either.
    """

    def __init__(self, options: PagingOptions) -> None:
        self.options = options
        # A pool of its own counts what this optimizer has, and never gives more than the budget.
        self._pool = host_pool() if options.host_budget is None else HostPool(options.host_budget)
        self._disk: DiskStore | None = None
        self._engines: dict[torch.device, TransferEngine] = {}
        self._reserved: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        if options.folders:
            self._disk = DiskStore(options.folders, write_limit=options.write_limit)

    # ---- host ----------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        """Host memory that is set aside for state to come."""
        return sum(size * len(memory) for size, memory in self._reserved.items())

    def reserve(self, sizes: Sequence[int], what: str) -> None:
        """Set memory aside for tensors of ``sizes`` bytes, so that steps find it. All or nothing.

        Raises
        ------
        HostOutOfMemory, DiskFull
            The budget, the machine or the disks do not have it; the message has the bytes.
        """
        taken: list[torch.Tensor] = []
        disk_bytes = 0
        refused_bytes: int | None = None
        for size in sizes:
            if self.options.tier == "disk" or (refused_bytes and size >= refused_bytes):
                disk_bytes += size
                continue
            try:
                taken.append(self._allocate(size))
            except HostOutOfMemory as error:
                if self.options.tier == "host":
                    held = sum(memory.nbytes for memory in taken)
                    raise HostOutOfMemory(
                        f"{what} needs {format_bytes(sum(sizes))} of pinned host memory and found "
                        f"{format_bytes(held)}; give it a larger host_budget, or page it with "
                        f"tier='auto' and a directory on disk: {error}"
                    ) from error
                refused_bytes = size
                disk_bytes += size
        self._check_disk(disk_bytes, sum(sizes) - disk_bytes, what)
        for memory in taken:
            self._reserved[memory.nbytes].append(memory)

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        buffer = self._pool.allocate(size_bytes)
        # The tensor's storage holds the buffer.
        return torch.frombuffer(buffer, dtype=torch.uint8, count=size_bytes)

    def take(self, size_bytes: int) -> torch.Tensor | None:
        """Host memory for one tensor; None: it goes to disk.

        Raises
        ------
        HostOutOfMemory
            With the host tier, where the budget or the machine does not have it.
        """
        if self._reserved[size_bytes]:
            return self._reserved[size_bytes].pop()
        if self.options.tier == "disk":
            return None
        try:
            return self._allocate(size_bytes)
        except HostOutOfMemory:
            if self.options.tier == "auto":
                return None
            raise

    # ---- disk ----------------------------------------------------------------------------------

    def _check_disk(self, disk_bytes: int, host_bytes: int, what: str) -> None:
        if disk_bytes == 0:
            return
        folders = self.options.folders
        free: dict[int, int] = {
            os.stat(each).st_dev: shutil.disk_usage(each).free for each in folders
        }
        limit = self.options.write_limit
        for name, room in (("free", sum(free.values())), ("allowed by write_limit", limit)):
            if room is not None and disk_bytes > room:
                raise DiskFull(
                    errno.ENOSPC,
                    f"{what} needs {format_bytes(host_bytes)} of pinned host memory and "
                    f"{format_bytes(disk_bytes)} on disk, of which {format_bytes(room)} are "
                    f"{name}; add a folder on another disk or make room",
                    folders[0],
                )

    def engine(self, device: torch.device) -> TransferEngine:
        """That moves state between ``device`` and the disks."""
        if device not in self._engines:
            self._engines[device] = TransferEngine(
                device=device,
                host=0,
                disk=self._disk,
                chunk=_CHUNK_BYTES,
                staging=_STAGING_BYTES,
            )
        return self._engines[device]

    def put(
        self, device: torch.device, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[OnDisk], TransferTicket]:
        """Start to send tensors of one device to disk, after the work of its current stream.

        They must not change before the ticket is done, and the engine holds them until
        :meth:`collect`. Raises what :meth:`TransferEngine.put_all` does, and nothing is kept then.
        """
        engine = self.engine(device)
        payloads, ticket = engine.put_all(tensors)
        return [OnDisk(engine, payload) for payload in payloads], ticket

    def collect(self) -> None:
        """Let go of device memory whose copies are over."""
        for engine in self._engines.values():
            engine.collect()

    def close(self) -> None:
        """Give everything back; no state may be here any more."""
        self._reserved.clear()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        if self._disk is not None:
            self._disk.close()


def host_memory(size_bytes: int) -> torch.Tensor:
    """Memory of the host for state that no tier takes, so that it is not lost."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


def on_device(parked: Parked, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of ``device`` in the layout of ``parked``."""
    return torch.empty_strided(parked.shape, parked.stride, dtype=parked.dtype, device=device)

"""``spillover.stats()``: bytes, bandwidth, queues and waits of every tier and stream, at once.

Importing this module loads neither torch nor a driver.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from spillover import _core
from spillover._sources import source_stats
from spillover._stalls import TimeStats, stall_stats, work_stats
from spillover._units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from spillover._streams import ComputeWaitStats, CopyStreamStats
    from spillover._transfer_stats import TransferStats


@dataclass(frozen=True, kw_only=True)
class DevicePoolStats:
    """Spillover's pool of one device; :func:`torch.cuda.memory_stats` has more of it.

    Attributes
    ----------
    device
        Its index.
    allocated_bytes, allocated_bytes_max
        In blocks that somebody holds, now and at most.
    reserved_bytes, reserved_bytes_max
        Held from the driver.
    retries, out_of_memory
        How often an allocation found nothing and looked for more, and how often in vain.
    """

    device: int
    allocated_bytes: int
    allocated_bytes_max: int
    reserved_bytes: int
    reserved_bytes_max: int
    retries: int
    out_of_memory: int


@dataclass(frozen=True, kw_only=True)
class HostPoolStats:
    """One pool of pinned memory.

    Attributes
    ----------
    used_bytes, used_bytes_max
        In live buffers, rounded to pages or slots.
    reserved_bytes, reserved_bytes_max
        Pinned: in use, or kept for reuse.
    limit_bytes
        The budget; None without one.
    buffer_count
        Live buffers.
    """

    used_bytes: int
    used_bytes_max: int
    reserved_bytes: int
    reserved_bytes_max: int
    limit_bytes: int | None
    buffer_count: int


@dataclass(frozen=True, kw_only=True)
class PinningStats:
    """Pinning of host memory, of all pools of the process and all that was ever pinned.

    Attributes
    ----------
    count, bytes
        Regions that were pinned, and their bytes.
    pin_seconds, unpin_seconds
        How long host threads were in it; unmapping included.
    """

    count: int
    bytes: int
    pin_seconds: float
    unpin_seconds: float


@dataclass(frozen=True, kw_only=True)
class DiskDirectionStats:
    """What went one way between memory and one folder of a disk store.

    Attributes
    ----------
    bytes
        Moved, of extents that went well.
    extents, errors
        That are over; of them those that failed.
    resubmits
        Transfers taken up again after a short or an interrupted one.
    queue_depth, queue_depth_max
        Extents that wait or move, now and at most.
    busy_seconds
        By the clock, while there were any.
    queued_seconds, moving_seconds, checksum_seconds
        Summed over extents: in the queue; from there to the end; and of that the time of the
        processor for checksums.
    submitting_seconds
        Host threads that handed extents over; long where the queue is full.
    """

    bytes: int
    extents: int
    errors: int
    resubmits: int
    queue_depth: int
    queue_depth_max: int
    busy_seconds: float
    queued_seconds: float
    moving_seconds: float
    checksum_seconds: float
    submitting_seconds: float

    @property
    def bandwidth_bytes_s(self) -> float | None:
        """Bytes a second while there was something to do; None where there was nothing."""
        return self.bytes / self.busy_seconds if self.busy_seconds else None


@dataclass(frozen=True, kw_only=True)
class DiskFolderStats:
    """One folder of a disk store.

    Attributes
    ----------
    folder
        Its path.
    used_bytes, file_bytes
        Taken by payloads, and the size of its file.
    writes, reads
        What went each way.
    """

    folder: str
    used_bytes: int
    file_bytes: int
    writes: DiskDirectionStats
    reads: DiskDirectionStats


@dataclass(frozen=True, kw_only=True)
class DiskStoreStats:
    """One disk store.

    Attributes
    ----------
    engine
        ``"io_uring"`` or ``"threads"``.
    pending_extents
        Asked for and not over, those included that wait for a copy to end first.
    wait_count, wait_seconds
        Host threads that waited for a ticket which was not done.
    folders
        Its folders.
    """

    engine: str
    pending_extents: int
    wait_count: int
    wait_seconds: float
    folders: tuple[DiskFolderStats, ...]


@dataclass(frozen=True, kw_only=True)
class DurableFolderStats:
    """One folder of a durable store.

    Attributes
    ----------
    folder
        Its path.
    file_bytes
        The size of its file.
    writes, reads
        What of entries went each way; manifests and records are not in it.
    """

    folder: str
    file_bytes: int
    writes: DiskDirectionStats
    reads: DiskDirectionStats


@dataclass(frozen=True, kw_only=True)
class DurableStoreStats:
    """One durable store.

    Attributes
    ----------
    engine
        ``"io_uring"`` or ``"threads"``.
    sequence
        The number of its last commit.
    pending_extents
        Asked for and not over.
    wait_count, wait_seconds
        Host threads that waited for a ticket which was not done.
    commit_count, commit_seconds
        Calls of ``commit()``, failed ones too, and how long they took: they block.
    folders
        Its folders.
    """

    engine: str
    sequence: int
    pending_extents: int
    wait_count: int
    wait_seconds: float
    commit_count: int
    commit_seconds: float
    folders: tuple[DurableFolderStats, ...]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Made by :func:`spillover.stats`; ``print()`` it for a table.

    Attributes
    ----------
    devices
        Spillover's pools of device memory, those that were made.
    host, pinning
        Pools of pinned memory that are alive, and pinning as a whole.
    disks, durables
        Disk stores and durable stores that are alive.
    streams
        The two copy streams of each device.
    transfers
        Transfer engines that are alive.
    compute_waits
        Waits of compute streams for its copies, while tracing was on.
    stalls
        Waits of host threads, by cause.
    work
        What host threads did that takes time, such as optimizer steps.
    others
        Figures of what else is alive, by name: ``"activations"``, ``"weights"``, ….
    """

    devices: tuple[DevicePoolStats, ...]
    host: tuple[HostPoolStats, ...]
    pinning: PinningStats
    disks: tuple[DiskStoreStats, ...]
    durables: tuple[DurableStoreStats, ...]
    streams: tuple[CopyStreamStats, ...]
    compute_waits: tuple[ComputeWaitStats, ...]
    transfers: tuple[TransferStats, ...]
    stalls: tuple[TimeStats, ...]
    work: tuple[TimeStats, ...]
    others: dict[str, tuple[object, ...]]

    def __str__(self) -> str:
        """Tables of all that is not empty."""
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=120)
        for table in _tables(self):
            if table.row_count:
                console.print(table)
        return text.getvalue()


def stats() -> Stats:
    """Bytes, bandwidth, queues and waits of every tier and stream of this process, at this moment.

    Cheap; waits for neither device nor disk. Figures count from the start of the process, or of
    the pool, store or context that they belong to, and take no notice of traces; only times of
    copies on streams exist while tracing was on (:mod:`spillover.trace`). A forked child begins
    with nothing.
    """
    forked = _core.in_forked_child()
    pinning = _core.pin_stats()
    module = sys.modules.get("spillover._streams")
    streams = [] if module is None or forked else module.all_copy_streams()
    for one in streams:
        one.collect()
    others = source_stats()
    transfers = cast("tuple[TransferStats, ...]", others.pop("transfers", ()))
    return Stats(
        devices=() if forked else tuple(map(_device_pool, _core.devices_with_pool())),
        host=tuple(map(_host_pool, _core.living_host_pools())),
        pinning=PinningStats(
            count=pinning.count,
            bytes=pinning.bytes,
            pin_seconds=pinning.pin_s,
            unpin_seconds=pinning.unpin_s,
        ),
        disks=tuple(map(_disk_store, _core.living_disk_stores())),
        durables=tuple(map(_durable_store, _core.living_durable_stores())),
        streams=tuple(figures for one in streams for figures in one.stats()),
        compute_waits=tuple(one.compute_waits() for one in streams),
        transfers=transfers,
        stalls=stall_stats(),
        work=work_stats(),
        others=others,
    )


def _device_pool(device: int) -> DevicePoolStats:
    found = _core.Pool(device).stats()
    allocated, reserved = found["allocated_bytes"]["all"], found["reserved_bytes"]["all"]
    return DevicePoolStats(
        device=device,
        allocated_bytes=allocated["current"],
        allocated_bytes_max=allocated["peak"],
        reserved_bytes=reserved["current"],
        reserved_bytes_max=reserved["peak"],
        retries=found["num_alloc_retries"],
        out_of_memory=found["num_ooms"],
    )


def _host_pool(pool: _core.HostPool) -> HostPoolStats:
    found = pool.stats()
    return HostPoolStats(
        used_bytes=found.used_bytes,
        used_bytes_max=found.used_bytes_max,
        reserved_bytes=found.reserved_bytes,
        reserved_bytes_max=found.reserved_bytes_max,
        limit_bytes=found.limit_bytes,
        buffer_count=found.buffer_count,
    )


def _disk_store(store: _core.DiskStore) -> DiskStoreStats:
    found = store.stats()
    return DiskStoreStats(
        engine=found.engine,
        pending_extents=found.pending_extents,
        wait_count=found.waits.count,
        wait_seconds=found.waits.seconds,
        folders=tuple(
            DiskFolderStats(
                folder=folder.folder,
                used_bytes=folder.used_bytes,
                file_bytes=folder.file_bytes,
                writes=_direction(folder.writes),
                reads=_direction(folder.reads),
            )
            for folder in found.folders
        ),
    )


def _durable_store(store: _core.DurableStore) -> DurableStoreStats:
    found = store.stats()
    return DurableStoreStats(
        engine=found.engine,
        sequence=found.sequence,
        pending_extents=found.pending_extents,
        wait_count=found.waits.count,
        wait_seconds=found.waits.seconds,
        commit_count=found.commits.count,
        commit_seconds=found.commits.seconds,
        folders=tuple(
            DurableFolderStats(
                folder=folder.folder,
                file_bytes=folder.file_bytes,
                writes=_direction(folder.writes),
                reads=_direction(folder.reads),
            )
            for folder in found.folders
        ),
    )


def _direction(found: _core.DiskDirectionStats) -> DiskDirectionStats:
    return DiskDirectionStats(
        bytes=found.bytes,
        extents=found.extents,
        errors=found.errors,
        resubmits=found.resubmits,
        queue_depth=found.queue_depth,
        queue_depth_max=found.queue_depth_max,
        busy_seconds=found.busy_s,
        queued_seconds=found.queued_s,
        moving_seconds=found.moving_s,
        checksum_seconds=found.checksum_s,
        submitting_seconds=found.submitting_s,
    )


# ---- as text ----


#: What a thread of the program waits for in a transfer engine.
_CAUSES = {"host_budget": "host memory", "disk": "bytes from the disk", "copy": "copies to end"}


def _tables(stats: Stats) -> list[Table]:
    return [_memory(stats), _transfers(stats), _waits(stats), *_others(stats)]


def _memory(stats: Stats) -> Table:
    from rich.table import Table

    table = Table("tier", "used", "at most", "held", "at most", "limit", title="Memory")
    for device in stats.devices:
        table.add_row(
            f"device {device.device}",
            *map(format_bytes, (device.allocated_bytes, device.allocated_bytes_max)),
            *map(format_bytes, (device.reserved_bytes, device.reserved_bytes_max)),
            "",
        )
    for pool in stats.host:
        table.add_row(
            "host",
            *map(format_bytes, (pool.used_bytes, pool.used_bytes_max)),
            *map(format_bytes, (pool.reserved_bytes, pool.reserved_bytes_max)),
            "" if pool.limit_bytes is None else format_bytes(pool.limit_bytes),
        )
    for store in stats.disks:
        for folder in store.folders:
            sizes = format_bytes(folder.used_bytes), "", format_bytes(folder.file_bytes)
            table.add_row(f"disk {folder.folder}", *sizes, "", "")
    for durable in stats.durables:
        for kept in durable.folders:
            size = format_bytes(kept.file_bytes)
            table.add_row(f"durable {kept.folder}", "", "", size, "", "")
    return table


def _transfers(stats: Stats) -> Table:
    from rich.table import Table

    table = Table(
        "stream", "bytes", "requests", "bandwidth", "queue", "at most", "errors", title="Transfers"
    )
    for stream in stats.streams:
        if stream.copies:
            table.add_row(
                f"device {stream.device} copies {stream.direction}",
                format_bytes(stream.bytes),
                str(stream.copies),
                _rate(stream.bandwidth_bytes_s),
                str(stream.timed.in_flight),
                str(stream.timed.in_flight_max),
                "",
            )
    stores: list[tuple[str, DiskStoreStats | DurableStoreStats]]
    stores = [("disk", store) for store in stats.disks]
    stores += [("durable", store) for store in stats.durables]
    for kind, store in stores:
        for folder in store.folders:
            for name, way in (("write", folder.writes), ("read", folder.reads)):
                table.add_row(
                    f"{kind} {name} {folder.folder} ({store.engine})",
                    format_bytes(way.bytes),
                    str(way.extents),
                    _rate(way.bandwidth_bytes_s),
                    str(way.queue_depth),
                    str(way.queue_depth_max),
                    str(way.errors),
                )
    return table


def _waits(stats: Stats) -> Table:
    from rich.table import Table

    table = Table("who", "for what", "times", "seconds", title="Waits and work")
    for timed in stats.stalls:
        table.add_row(timed.part, f"waits for {timed.what}", str(timed.count), _time(timed.seconds))
    for store in stats.disks:
        if store.wait_count:
            row = str(store.wait_count), _time(store.wait_seconds)
            table.add_row("disk store", "waits for a ticket", *row)
    for durable in stats.durables:
        if durable.wait_count:
            row = str(durable.wait_count), _time(durable.wait_seconds)
            table.add_row("durable store", "waits for a ticket", *row)
        if durable.commit_count:
            row = str(durable.commit_count), _time(durable.commit_seconds)
            table.add_row("durable store", "commits", *row)
    for engine in stats.transfers:
        for cause, count in engine.stalls.items():
            if count:
                row = str(count), _time(engine.stall_ns[cause] / 1e9)
                table.add_row(f"transfers {engine.device}", f"waits: {_CAUSES[cause]}", *row)
    for waits in stats.compute_waits:
        if waits.count:
            row = str(waits.count), _time(waits.seconds)
            table.add_row(f"device {waits.device}", "compute waits for copies", *row)
    if stats.pinning.count:
        row = str(stats.pinning.count), _time(stats.pinning.pin_seconds)
        table.add_row("host pools", f"pins {format_bytes(stats.pinning.bytes)}", *row)
    for timed in stats.work:
        table.add_row(timed.part, timed.what, str(timed.count), _time(timed.seconds))
    return table


def _others(stats: Stats) -> list[Table]:
    from rich.table import Table

    tables = []
    for name, all_figures in [("transfers", stats.transfers), *stats.others.items()]:
        for figures in all_figures:
            table = Table("figure", "value", title=name)
            for field in dataclasses.fields(figures):  # type: ignore[arg-type]
                value = getattr(figures, field.name)
                is_size = field.name.endswith("_bytes") and isinstance(value, int)
                table.add_row(field.name, format_bytes(value) if is_size else str(value))
            tables.append(table)
    return tables


def _rate(bytes_s: float | None) -> str:
    return "" if bytes_s is None else f"{bytes_s / 1e9:.2f} GB/s"


def _time(seconds: float) -> str:
    return f"{seconds:.4f}"

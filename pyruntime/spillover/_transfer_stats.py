"""Figures of a transfer engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransferStats:
    """Figures of one engine: counters since it was made, and what is at this moment.

    Attributes
    ----------
    device
        Its device's index.
    out_bytes, in_bytes, out_transfers, in_transfers
        Copied from and to the device, in calls that were accepted.
    written_bytes, read_bytes
        Of payloads, to and from the disk, in requests that went well.
    prefetched_bytes
        Of those read, asked for ahead of a fetch.
    evicted_bytes
        Host memory given up at no cost, since the disk has the bytes as well.
    host_hits, host_misses
        Chunks fetched that the host had or was getting, and that the disk was asked for.
    disk_errors
        Requests that failed, whoever heard of it.
    host_bytes, host_bytes_max
        Of payloads in host memory, memory that is about to be filled included; now and at most.
    dirty_bytes
        Of them, neither on disk nor on the way there.
    leaving_bytes
        Device memory that copies out hold.
    writing_bytes, reading_bytes
        On their way to and from the disk.
    waiting_pieces
        Chunks of fetches that are not on a stream yet.
    copies_out, copies_in
        Batches on the two streams whose end nobody has seen yet.
    held_bytes, demoted_bytes
        Of held tensors that are on the device, and of those that had to give way so far.
    stalls, stall_ns
        How often and how long threads of the program stood still for ``"host_budget"``, ``"disk"``
        and ``"copy"``.
    """

    device: int
    out_bytes: int
    in_bytes: int
    out_transfers: int
    in_transfers: int
    written_bytes: int
    read_bytes: int
    prefetched_bytes: int
    evicted_bytes: int
    host_hits: int
    host_misses: int
    disk_errors: int
    host_bytes: int
    host_bytes_max: int
    dirty_bytes: int
    leaving_bytes: int
    writing_bytes: int
    reading_bytes: int
    waiting_pieces: int
    copies_out: int
    copies_in: int
    held_bytes: int
    demoted_bytes: int
    stalls: dict[str, int]
    stall_ns: dict[str, int]

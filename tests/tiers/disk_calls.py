"""Whole writes and reads of a disk store."""

from __future__ import annotations

import random

from spillover._core import DiskPayload, DiskStore


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def stored(store: DiskStore, data: bytes | bytearray) -> DiskPayload:
    """Write and wait; the ticket's error is raised."""
    payload, ticket = store.write(data)
    ticket.wait()
    assert ticket.is_done()
    assert payload.is_stored
    return payload


def fetched(store: DiskStore, payload: DiskPayload) -> bytes:
    """Read and wait; the ticket's error is raised."""
    target = bytearray(payload.size_bytes)
    store.read(payload, target).wait()
    return bytes(target)

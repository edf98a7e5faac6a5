"""Durable stores on two folders, and what is written to them."""

from __future__ import annotations

import random
from collections.abc import Callable

from spillover import DurableStore

EXTENT = 8192
ENTRIES = {"weight": 3 * EXTENT + 100, "bias": 5000, "flag": 1}
FILE = "spillover.durable"

Open = Callable[..., DurableStore]


def some(name: str, seed: int = 0) -> bytes:
    return random.Random(f"{name} {seed}").randbytes(ENTRIES[name])


def put(store: DurableStore, seed: int, *names: str) -> None:
    for ticket in [store.write(name, some(name, seed)) for name in names or ENTRIES]:
        ticket.wait()


def get(store: DurableStore, name: str, *, committed: bool = False) -> bytes:
    target = bytearray(store.entries[name])
    store.read(name, target, committed=committed).wait()
    return bytes(target)


def assert_holds(store: DurableStore, seeds: dict[str, int]) -> None:
    for name, seed in seeds.items():
        assert get(store, name) == some(name, seed), name

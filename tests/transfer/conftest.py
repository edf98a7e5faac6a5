"""Transfer engines with small chunks, and tensors whose contents tell where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spillover import DiskStore, TransferEngine

KIB = 1 << 10


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., TransferEngine]]:
    """Makes engines with chunks of 64 KiB; ``on_disk`` gives them a disk store. Closes them."""
    made: list[TransferEngine | DiskStore] = []

    def make(*, on_disk: bool = False, **options: Any) -> TransferEngine:
        if on_disk:
            store = DiskStore(tmp_path / "spill")
            made.append(store)
            options["disk"] = store
        engine = TransferEngine(**{"chunk": 64 * KIB, "staging": 256 * KIB, **options})
        made.append(engine)
        return engine

    yield make
    for each in reversed(made):
        each.close()

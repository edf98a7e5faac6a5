"""What tests of optimizers share: little memory on the way to the disk, and a lazy worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from overlap_models import LazyWorker

from spillover.optim import _awaited, _paging_store, _staging


@pytest.fixture(autouse=True)
def little_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that a transfer engine takes, so that small states really go to the disk."""
    monkeypatch.setattr(_paging_store, "_CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(_paging_store, "_STAGING_BYTES", 16 << 10)


@pytest.fixture
def lazy_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyWorker]:
    """See there. Batches are small, so that a step has several."""
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", 8 << 10)
    monkeypatch.setattr(_staging, "_stagings", {})
    lazy = LazyWorker()
    lazy.install(monkeypatch.setattr)
    yield lazy
    lazy.open()
    _awaited.wait_for_all()

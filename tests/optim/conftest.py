"""Paging with little memory on the way to the disk, so that small states really go there."""

from __future__ import annotations

import pytest

from spillover.optim import _paging_store


@pytest.fixture(autouse=True)
def little_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that a transfer engine takes."""
    monkeypatch.setattr(_paging_store, "_CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(_paging_store, "_STAGING_BYTES", 16 << 10)

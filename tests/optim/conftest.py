"""What tests of optimizers share: gradients off the device, little memory, a lazy worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gradient_models import Twins, backward, make_gpt
from overlap_models import LazyWorker

from spillover.optim import _awaited, _paging_store, _staging, offload_gradients


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


@pytest.fixture
def twins() -> Iterator[Twins]:
    """A model, and one with its weights whose gradients are offloaded; both have gradients."""
    plain, offloaded = make_gpt(), make_gpt()
    with offload_gradients(offloaded.named_parameters()) as handle:
        backward(plain, offloaded)
        yield plain, offloaded, handle

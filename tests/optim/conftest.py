"""What tests of optimizers share: little memory on the way to the disk, and a lazy worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from spillover.optim import _awaited, _host_step, _overlap, _paging_store, _staging


@pytest.fixture(autouse=True)
def little_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that a transfer engine takes, so that small states really go to the disk."""
    monkeypatch.setattr(_paging_store, "_CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(_paging_store, "_STAGING_BYTES", 16 << 10)


_wait_until: Any = _overlap.PendingStep._wait_until


class LazyWorker:
    """Has overlapped updates make progress only while somebody waits for one.

    Whoever does not wait then reads old weights, every time.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._wanted: list[Callable[[], bool]] = []
        self._is_open = False
        self.batches = 0

    def await_demand(self) -> None:
        """On the worker, before each batch."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._is_open or not all(is_so() for is_so in self._wanted)
            )
            self.batches += 1

    def wait(self, pending: _overlap.PendingStep, is_so: Callable[[], bool]) -> None:
        """What somebody waits for."""
        with self._condition:
            self._wanted.append(is_so)
            self._condition.notify_all()
        try:
            _wait_until(pending, is_so)
        finally:
            with self._condition:
                self._wanted.remove(is_so)

    def open(self) -> None:
        """Let it run freely."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()


@pytest.fixture
def lazy_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyWorker]:
    """See there. Batches are small, so that a step has several."""
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", 8 << 10)
    monkeypatch.setattr(_staging, "_stagings", {})
    lazy = LazyWorker()
    update_batch: Any = _host_step._Pipeline._update_batch

    def replaced_update(pipeline: Any, *batch: Any) -> None:
        if threading.current_thread().name.startswith("spillover-optimizer"):
            lazy.await_demand()
        update_batch(pipeline, *batch)

    monkeypatch.setattr(
        _overlap.PendingStep,
        "_wait_until",
        lambda pending, is_so: lazy.wait(pending, is_so),
    )
    monkeypatch.setattr(_host_step._Pipeline, "_update_batch", replaced_update)
    yield lazy
    lazy.open()
    _awaited.wait_for_all()

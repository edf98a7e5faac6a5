"""Disk stores and durable stores of each engine: one conformance suite for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from durable_cases import ENTRIES, EXTENT, Open

from spillover import DurableStore, StorageError
from spillover._core import DiskStore


@functools.lru_cache(maxsize=1)
def why_no_io_uring(folder: Path) -> str | None:
    try:
        DiskStore([str(folder)], engine="io_uring").close()
    except StorageError as error:
        return str(error)
    return None


@pytest.fixture(params=["threads", "io_uring"])
def make_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., DiskStore]:
    """Makes stores of one engine."""
    if request.param == "io_uring":
        reason = why_no_io_uring(tmp_path_factory.getbasetemp())
        if reason is not None:
            pytest.skip(reason)
    return functools.partial(DiskStore, engine=request.param)


@pytest.fixture(params=["threads", "io_uring"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine of durable stores."""
    if request.param == "io_uring":
        reason = why_no_io_uring(tmp_path_factory.getbasetemp())
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Of a durable store."""
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def open_store(folders: list[Path], engine: Any) -> Iterator[Open]:
    """Opens durable stores of one engine."""
    made: list[DurableStore] = []

    def open_it(entries: dict[str, int] | None = ENTRIES, **options: Any) -> DurableStore:
        if entries is not None:
            options.setdefault("extent_bytes", EXTENT)
        made.append(DurableStore(folders, entries, engine=engine, **options))
        return made[-1]

    yield open_it
    for store in made:
        store.close()

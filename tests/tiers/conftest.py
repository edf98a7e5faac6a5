"""Disk stores of each engine: one conformance suite for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from spillover import StorageError
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

"""The pool's slow path in a trace: driver calls, what it holds, and the search for more memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_calls import Cuda

import chrome_format
from spillover import DeviceOutOfMemory, _core, allocator, trace

MIB = 1 << 20
VIRTUAL_MEMORY = os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1"


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Gives what was recorded since the test began."""
    trace.start()
    yield lambda: chrome_format.read(trace.save(tmp_path / "trace.json"))
    trace.stop()


def total_bytes(found: dict[str, Any], name: str) -> int:
    return sum(span["args"]["bytes"] for span in chrome_format.spans(found, name))


def test_driver_calls_and_what_is_held(
    pool: _core.Pool, traced: Callable[[], dict[str, Any]]
) -> None:
    address = pool.alloc(8 * MIB)
    pool.free(address)
    assert pool.alloc(8 * MIB) == address  # Nothing new is needed.
    pool.free(address)
    pool.trim()
    found = traced()
    held_bytes, left_bytes = chrome_format.counter(found, "device memory 0", "mapped")
    assert (held_bytes >= 8 * MIB, left_bytes) == (True, 0)
    calls = ["cuMemAlloc", "cuMemFree"]
    if VIRTUAL_MEMORY:
        calls = ["cuMemCreate", "cuMemMap", "cuMemUnmap", "cuMemRelease"]
    for call in calls:
        assert total_bytes(found, call) == held_bytes


def test_the_fast_path_leaves_nothing(
    pool: _core.Pool, traced: Callable[[], dict[str, Any]]
) -> None:
    pool.free(pool.alloc(MIB))
    before = traced()["spillover"]["recorded"]
    for _ in range(100):
        pool.free(pool.alloc(MIB))
    assert traced()["spillover"]["recorded"] == before


def test_the_search_for_memory_and_its_steps(
    pool: _core.Pool, cuda: Cuda, traced: Callable[[], dict[str, Any]]
) -> None:
    allocator.configure(limit="64MiB")
    held = pool.alloc(48 * MIB)
    asked = []
    with (
        allocator.add_reclaimer(lambda missing, stream: asked.append(missing) or 0),
        pytest.raises((DeviceOutOfMemory, RuntimeError)),
    ):
        pool.alloc(32 * MIB)
    pool.free(held)
    allocator.configure(limit=None)
    found = traced()
    (search,) = chrome_format.spans(found, "out of memory: look for more")
    assert search["args"]["bytes"] == 32 * MIB
    assert len(asked) == len(chrome_format.spans(found, "ask reclaimers")) == 1
    for name in ("wait for streams", "give idle memory back", "ask reclaimers"):
        for step in chrome_format.spans(found, name):
            assert step["tid"] == search["tid"]
            assert search["ts"] <= step["ts"] <= search["ts"] + search["dur"]


@pytest.mark.virtual_memory
def test_sleep_and_its_copies(pool: _core.Pool, traced: Callable[[], dict[str, Any]]) -> None:
    host = _core.HostPool()
    with allocator.tag("traced"):
        address = pool.alloc(4 * MIB)
    pool.sleep([_core.tag_number("traced")], host)
    pool.wake([_core.tag_number("traced")])
    pool.free(address)
    found = traced()
    for name in ("sleep", "wake", "wait for copies in (wake)"):
        assert len(chrome_format.spans(found, name)) == 1
    assert total_bytes(found, "wait for a copy out (sleep)") == 4 * MIB
    used = chrome_format.counter(found, "device memory 0", "mapped")
    assert (used[0], max(used), 0 in used) == (4 * MIB, 4 * MIB, True)

"""Where the disk store puts extents: by throughput, within a limit, without loss to fragments."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_calls import fetched, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from spillover import ConfigError, DiskFull
from spillover._core import DiskPayload, DiskStore
from spillover.emulator import StorageFault, calls, faults

BLOCK = 4096
MIB = 1 << 20

Make = Callable[..., DiskStore]


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def shares(payloads: list[DiskPayload], folder_count: int) -> list[float]:
    sizes = [0] * folder_count
    for payload in payloads:
        for folder, _, size in payload._extents():
            sizes[folder] += size
    return [size / sum(sizes) for size in sizes]


@pytest.mark.parametrize("slow", [0, 1])
def test_slow_folder_gets_less(make_store: Make, tmp_path: Path, slow: int) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    store = make_store(folders, extent_bytes_max=256 << 10)
    data = random.Random(0).randbytes(4 * MIB)
    assert shares([stored(store, data)], 2) == [0.5, 0.5]
    with faults(
        storage=[StorageFault("write", "delay", times=None, delay_us=20_000, folder=folders[slow])]
    ):
        for _ in range(12):
            stored(store, data)
        payloads = [stored(store, data) for _ in range(6)]
    bandwidths = [folder.bandwidth_bytes_s for folder in store.stats().folders]
    assert bandwidths[slow] < bandwidths[1 - slow] / 2
    assert shares(payloads, 2)[slow] < 0.3
    # It is noticed when the folder is fast again; a busy machine makes it look slow for longer.
    give_up = time.monotonic() + 60
    while shares([stored(store, data)], 2)[slow] <= 0.15:
        assert time.monotonic() < give_up
    store.close()


def test_folders_as_fast_as_each_other_share(make_store: Make, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "abc"]
    store = make_store(folders, extent_bytes_max=64 << 10)
    slowed = StorageFault("write", "delay", times=None, delay_us=3000)
    with faults(storage=[slowed]):
        payloads = [stored(store, bytes(3 * MIB)) for _ in range(8)]
    assert all(0.2 < share < 0.5 for share in shares(payloads, 3))
    store.close()


def test_request_is_split_over_holes(make_store: Make, tmp_path: Path) -> None:
    store = make_store([str(tmp_path)], limit_bytes=64 * BLOCK)
    payloads = [stored(store, bytes([index]) * BLOCK) for index in range(64)]
    with pytest.raises(DiskFull, match=r"the limit of 256.00 KiB on space is reached") as caught:
        store.write(b"x")
    assert caught.value.errno == errno.EDQUOT
    assert caught.value.filename == str(tmp_path)
    del payloads[::2]
    data = random.Random(1).randbytes(32 * BLOCK - 5)
    payload = stored(store, data)
    assert len(payload._extents()) == 32
    assert fetched(store, payload) == data
    assert [fetched(store, payload)[0] for payload in payloads] == list(range(1, 64, 2))
    assert store.stats().used_bytes == 64 * BLOCK
    store.close()


@pytest.mark.parametrize("preallocate", [True, False])
def test_limit_holds_for_what_the_files_take(
    make_store: Make, tmp_path: Path, preallocate: bool
) -> None:
    limit = 48 * MIB
    folders = [str(tmp_path / name) for name in "ab"]
    store = make_store(folders, limit_bytes=limit, extent_bytes_max=MIB, preallocate=preallocate)

    def taken() -> int:
        return sum(os.fstat(store._descriptor(index)).st_blocks * 512 for index in (0, 1))

    payloads = []
    for size in (5 * MIB, 17 * MIB, 20 * MIB, 6 * MIB - BLOCK):
        payloads.append(stored(store, bytes(size)))
        assert taken() <= limit + 2 * MIB  # File systems count their own blocks for a file.
    with pytest.raises(DiskFull):
        store.write(bytes(2 * BLOCK))
    payloads.clear()
    # All of it in one folder: what was reserved in the other is given back.
    with faults(storage=[StorageFault("allocate", error="ENOSPC", times=None, folder=folders[0])]):
        kept = stored(store, bytes(limit))
        assert taken() <= limit + 2 * MIB
    assert fetched(store, kept) == bytes(limit)
    store.close()


def test_space_reserved_ahead_goes_back_when_another_folder_needs_it(
    make_store: Make, tmp_path: Path
) -> None:
    extent = 16 * MIB
    folders = [str(tmp_path / name) for name in "ab"]
    store = make_store(folders, limit_bytes=3 * extent, extent_bytes_max=extent)

    def only_in(index: int, size: int) -> DiskPayload:
        full = StorageFault("allocate", error="ENOSPC", times=None, folder=folders[1 - index])
        with faults(storage=[full]):
            payload = stored(store, bytes(size))
        assert shares([payload], 2)[index] == 1
        return payload

    first = only_in(0, extent)
    ahead = os.fstat(store._descriptor(0)).st_blocks * 512 - extent
    assert 0 < ahead < extent  # Too little for an extent of the second payload.
    second = only_in(1, 2 * extent)
    assert calls()["storage.truncate"] == 1
    for payload in (first, second):
        assert fetched(store, payload) == bytes(payload.size_bytes)
    store.close()


def test_limit_below_a_block_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit must be at least 4096 bytes"):
        DiskStore([str(tmp_path)], limit_bytes=100)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    folders=st.integers(1, 3),
    extent_blocks=st.integers(1, 12),
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(1, 40 * BLOCK), st.integers(0, 10**6)),
        min_size=10,
        max_size=80,
    ),
)
def test_nothing_fails_for_fragments(
    folders: int, extent_blocks: int, steps: list[tuple[bool, int, int]]
) -> None:
    """What fits in the limit by its blocks is stored, however the free ones lie."""
    limit_blocks = 200
    with tempfile.TemporaryDirectory() as root:
        store = DiskStore(
            [f"{root}/{index}" for index in range(folders)],
            limit_bytes=limit_blocks * BLOCK,
            extent_bytes_max=extent_blocks * BLOCK,
        )
        live: list[tuple[DiskPayload, bytes]] = []
        used = 0
        for grows, size, seed in steps:
            if live and not grows:
                payload, data = live.pop(seed % len(live))
                assert fetched(store, payload) == data
                used -= sum(blocks(extent[2]) for extent in payload._extents())
                del payload
            data = random.Random(seed).randbytes(size)
            if used + blocks(size) <= limit_blocks:
                live.append((stored(store, data), data))
                used += blocks(size)
            else:
                with pytest.raises(DiskFull):
                    store.write(data)
            stats = store.stats()
            assert stats.used_bytes == used * BLOCK
            assert stats.file_bytes <= limit_blocks * BLOCK
        for payload, data in live:
            assert fetched(store, payload) == data
        store.close()

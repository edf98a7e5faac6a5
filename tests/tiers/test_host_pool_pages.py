"""What host memory lies on: small pages, huge ones, registrations of regions, NUMA nodes."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_machine import GIB, MIB, write

from spillover import HostOutOfMemory, HostPool
from spillover._core import HostPool as CoreHostPool
from spillover._core import available_host_memory, numa_node_count, numa_node_of_pci
from spillover.emulator import Fault, calls, faults

PAGE = os.sysconf("SC_PAGESIZE")
HUGE = 2 * MIB


def advice(address: int, size: int) -> list[tuple[int, int, bool | None]]:
    """Parts of a range (offset, size): whether huge pages are wanted; None: nothing is advised."""
    found: list[tuple[int, int, bool | None]] = []
    for part in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    ):
        if not part:
            continue
        begin, end = (int(end, 16) for end in part.split(None, 1)[0].split("-"))
        if begin >= address + size or end <= address:
            continue
        assert begin >= address
        flags = re.search(r"^VmFlags:(.*)$", part, re.M)
        words = flags.group(1).split() if flags else []
        wanted = True if "hg" in words else False if "nh" in words else None
        found.append((begin - address, end - begin, wanted))
    return found


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("size", [4 * MIB + 5 * PAGE, 8 * MIB, 300 * PAGE])
def test_no_huge_page_is_wanted_past_the_end(size: int, ahead: bool) -> None:
    """Where the kernel makes them by itself, another behind the last would be extra memory."""
    pool = HostPool(limit=GIB, reserve=size if ahead else None, pinned=False)
    found = advice(pool.allocate(size).address, size)
    if not any(wanted is not None for _, _, wanted in found):
        pytest.skip("this kernel has no huge pages")
    whole = size // HUGE * HUGE
    parts = [(0, whole, True)] if whole else []
    assert found == parts + ([(whole, size - whole, False)] if whole < size else [])


def test_what_never_is_huge_says_so() -> None:
    pool = HostPool(limit=GIB, huge_pages="never", pinned=False)
    found = advice(pool.allocate(4 * MIB).address, 4 * MIB)
    assert [wanted for _, _, wanted in found] in ([False], [None])


def test_what_is_reserved_is_on_huge_pages_where_the_kernel_can() -> None:
    pool = HostPool(limit=GIB, reserve="16MiB", pinned=False)
    address = pool.allocate(16 * MIB).address
    found = pool.stats().huge_page_bytes
    assert found in range(0, 16 * MIB + 1, 2 * MIB)
    assert not found or address % (2 * MIB) == 0
    assert HostPool(reserve="16MiB", huge_pages="never", pinned=False).stats().huge_page_bytes == 0


def test_huge_pages_that_are_not_set_aside_are_done_without() -> None:
    pool = HostPool(limit=GIB, huge_pages="reserved", pinned=False)
    buffer = pool.allocate(4 * MIB)
    stats = pool.stats()
    assert stats.huge_page_bytes in (0, 4 * MIB)
    assert stats.used_bytes == buffer.size_bytes
    # Huge pages would double this one.
    odd = pool.allocate(2 * MIB + PAGE)
    assert pool.stats().used_bytes == buffer.size_bytes + odd.size_bytes


@pytest.fixture
def huge_pages_set_aside() -> Iterator[int]:
    """Bytes of huge pages that the system has set aside for the test, which gives them back."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    count = 8
    with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Tests of other sessions wait.
        before = int(setting.read_text())
        try:
            setting.write_text(str(before + count))
        except OSError as error:
            pytest.skip(f"no huge pages can be set aside here: {error}")
        try:
            if int(setting.read_text()) < before + count:
                pytest.skip("the system has no huge pages in one piece")
            yield count * HUGE
        finally:
            setting.write_text(str(before))


@pytest.mark.soak
@pytest.mark.parametrize("pinned", [True, False])
def test_huge_pages_that_are_set_aside_are_used(huge_pages_set_aside: int, pinned: bool) -> None:
    """In soak runs alone, since it changes the system for a moment."""
    pool = HostPool(limit=GIB, huge_pages="reserved", reserve="8MiB", pinned=pinned)
    assert pool.stats().huge_page_bytes == 8 * MIB
    buffers = [pool.allocate(8 * MIB), pool.allocate(4 * MIB), pool.allocate(100)]
    for buffer in buffers:
        memoryview(buffer)[-1] = 5
    assert pool.stats().huge_page_bytes == 12 * MIB
    # 4 MiB are left of them.
    beyond = pool.allocate(8 * MIB)
    memoryview(beyond)[-1] = 5
    assert pool.stats().huge_page_bytes == 12 * MIB
    del buffers, buffer, beyond
    pool.trim()
    assert pool.stats().huge_page_bytes == pool.stats().reserved_bytes == 0


@pytest.mark.soak
def test_huge_pages_that_are_set_aside_are_not_the_machines_memory(
    huge_pages_set_aside: int, tmp_path: Path
) -> None:
    """They are no part of what it says to be available."""
    write(tmp_path, "proc/meminfo", "MemAvailable: 1024 kB\n")
    pool = CoreHostPool(huge_pages="reserved", pinned=False, system_root=str(tmp_path))
    pool._reserve(4 * MIB, None)
    memoryview(pool.allocate(8 * MIB))[-1] = 5
    with pytest.raises(HostOutOfMemory, match="MemAvailable"):
        pool.allocate(4 * MIB + PAGE)


def test_what_is_reserved_is_registered_in_pieces() -> None:
    pool = CoreHostPool(limit_bytes=64 * MIB, region_bytes_max=8 * MIB)
    seen: list[int] = []
    with faults():
        pool._reserve(20 * MIB + 1, seen.append)
        assert calls()["cuMemHostRegister"] == 3
    total = 20 * MIB + PAGE
    assert seen == sorted(seen)
    assert seen[-1] == 20 * MIB + 1
    assert pool.stats().ahead_bytes == total
    held = [pool.allocate(size * MIB) for size in (8, 7, 4, 1)]
    assert pool.stats().ahead_bytes == PAGE
    assert pool.stats().reserved_bytes == total
    assert len({buffer.address for buffer in held}) == 4
    # What no piece has room for is registered by itself.
    pool.allocate(9 * MIB)
    assert pool.stats().reserved_bytes == total + 9 * MIB
    assert pool._is_valid()


def test_a_piece_that_cannot_be_registered_takes_the_others_with_it() -> None:
    pool = CoreHostPool(limit_bytes=64 * MIB, region_bytes_max=4 * MIB)
    with (
        faults(Fault("cuMemHostRegister", call=4, times=None)),
        pytest.raises(HostOutOfMemory, match="refused to pin"),
    ):
        pool._reserve(20 * MIB, None)
    assert pool.stats().reserved_bytes == pool.stats().ahead_bytes == 0
    assert pool._is_valid()


@pytest.mark.soak
def test_a_buffer_of_more_than_4_gib_is_cut_from_what_is_reserved() -> None:
    size = 4 * GIB + 16 * MIB
    if available_host_memory()[0] < size + 2 * GIB:
        pytest.skip("the machine has too little memory")
    pool = HostPool(limit=size + 32 * MIB, reserve=size)
    tensor = pool.empty(size, torch.uint8)
    tensor[-1] = 3
    assert pool.stats().used_bytes == pool.stats().reserved_bytes == size


def test_slabs_leave_room_for_large_blocks() -> None:
    """They come from the far end, and are gone with the last of their buffers."""
    pool = HostPool(limit=16 * MIB, reserve=8 * MIB, pinned=False)
    first = pool.allocate(MIB)
    small = [pool.allocate(100), pool.allocate(20_000)]
    del first
    rest = 8 * MIB - 2 * (128 << 10)
    assert pool.stats().ahead_bytes == rest
    large = pool.allocate(rest)
    assert pool.stats().reserved_bytes == 8 * MIB
    del large, small
    assert pool.stats().ahead_bytes == 8 * MIB
    assert len(pool.allocate(8 * MIB)) == pool.stats().reserved_bytes
    assert pool._is_valid()


def test_what_was_reserved_stays_when_more_is() -> None:
    pool = HostPool(limit=8 * MIB, reserve=6 * MIB, pinned=False)
    with pytest.raises(HostOutOfMemory, match=r"6.00 MiB that were pinned ahead are not \(6.00"):
        pool.reserve(4 * MIB)
    assert pool.stats().ahead_bytes == 6 * MIB
    pool.reserve(2 * MIB)
    assert pool.stats().ahead_bytes == 8 * MIB


def test_a_node_that_does_not_exist_is_noted() -> None:
    pool = HostPool(limit=GIB, numa=900, pinned=False)
    memoryview(pool.allocate(MIB))[0] = 1
    assert pool.stats().numa_node == 900
    assert pool.stats().numa_note


def test_a_nearest_node_that_nobody_knows_is_no_failure(tmp_path: Path) -> None:
    """With two nodes the driver is asked; what it answers, even an error, ends nothing."""
    write(tmp_path, "sys/devices/system/node/online", "0-1\n")
    fault = Fault("cuDeviceGetAttribute", times=None, error="CUDA_ERROR_UNKNOWN")
    with faults(fault):
        pool = CoreHostPool(limit_bytes=MIB, system_root=str(tmp_path))
        pool.allocate(100)
    assert pool.stats().numa_node is None
    assert "nearest to the device is not known" in pool.stats().numa_note


def test_memory_prefers_its_node() -> None:
    pool = HostPool(limit=GIB, numa=0, pinned=False)
    buffer = pool.allocate(4 * MIB)
    if pool.stats().numa_note:
        pytest.skip(f"mbind: {pool.stats().numa_note}")
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this kernel has no numa_maps")
    row = next(
        row for row in maps.read_text().splitlines() if row.startswith(f"{buffer.address:x}")
    )
    assert "prefer" in row.split()[1]


def test_nodes_are_read_from_the_kernel(tmp_path: Path) -> None:
    assert numa_node_count(str(tmp_path)) == 1
    write(tmp_path, "sys/devices/system/node/online", "0-1,4\n")
    write(tmp_path, "sys/bus/pci/devices/0000:65:00.0/numa_node", "4\n")
    write(tmp_path, "sys/bus/pci/devices/0000:66:00.0/numa_node", "-1\n")
    assert numa_node_count(str(tmp_path)) == 3
    assert numa_node_of_pci("0000:65:00.0", str(tmp_path)) == 4
    assert numa_node_of_pci("0000:66:00.0", str(tmp_path)) is None
    assert numa_node_of_pci("0000:67:00.0", str(tmp_path)) is None

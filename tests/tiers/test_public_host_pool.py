"""spillover.HostPool: limits that name themselves, memory pinned ahead, nodes and huge pages."""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from spillover import ConfigError, HostOutOfMemory, HostPool, StateError
from spillover._core import (
    available_host_memory,
    numa_node_count,
    numa_node_of_pci,
    total_host_memory,
)
from spillover.emulator import Fault, faults

PAGE = os.sysconf("SC_PAGESIZE")
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


MEMINFO = f"MemTotal: {64 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {40 * MIB} kB\n"


def write(root: Path, name: str, text: str) -> None:
    file = root / name.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_machine_is_the_limit_without_groups(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    root = str(tmp_path)
    assert available_host_memory(root) == (40 * GIB, "this machine's memory (MemAvailable)")
    assert total_host_memory(root) == (64 * GIB, "this machine's memory (MemTotal)")


def test_nothing_known_is_no_limit(tmp_path: Path) -> None:
    assert available_host_memory(str(tmp_path))[0] == 2**64 - 1


@pytest.mark.parametrize("group", ["/job/step", "/"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_least_group_is_named(tmp_path: Path, group: str, name: str) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/self/cgroup", f"0::{group}\n")
    limited = "" if group == "/" else "/job"
    folder = f"sys/fs/cgroup{limited}"
    write(tmp_path, f"sys/fs/cgroup{group.rstrip('/')}/memory.max", "max\n")
    write(tmp_path, f"{folder}/{name}", f"{8 * GIB}\n")
    write(tmp_path, f"{folder}/memory.current", f"{5 * GIB}\n")
    write(tmp_path, f"{folder}/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
    source = f"{name} (8.00 GiB) of the memory control group {limited or '/'}"
    assert available_host_memory(str(tmp_path)) == (5 * GIB, source)
    assert total_host_memory(str(tmp_path)) == (8 * GIB, source)


def test_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    folder = "sys/fs/cgroup/memory"
    write(tmp_path, f"{folder}/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, f"{folder}/docker/abc/memory.limit_in_bytes", f"{GIB}\n")
    write(tmp_path, f"{folder}/docker/abc/memory.usage_in_bytes", f"{3 * GIB}\n")
    available, source = available_host_memory(str(tmp_path))
    assert available == 0
    assert source == "memory.limit_in_bytes (1.00 GiB) of the memory control group /docker/abc"


def test_default_limit_is_most_of_what_there_is() -> None:
    total, source = total_host_memory()
    limit = HostPool(pinned=False).stats().limit_bytes
    assert limit == int(total * 0.9)
    with pytest.raises(HostOutOfMemory, match=re.escape(f"most of {source},")):
        HostPool(pinned=False).allocate(total)


def test_what_the_machine_lacks_is_named() -> None:
    available, source = available_host_memory()
    with pytest.raises(HostOutOfMemory, match=re.escape(source)):
        HostPool(limit=available + (1 << 40), pinned=False).allocate(available + (1 << 39))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least a byte"),
        ({"limit": "many"}, "limit='many' is not a size"),
        ({"numa": "far"}, "numa='far' is no node"),
        ({"numa": -1}, "numa=-1 is no node"),
        ({"numa": True}, "numa=True is no node"),
        ({"huge_pages": "always"}, "choose auto, reserved or never"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        HostPool(pinned=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pinned", [True, False])
def test_reserved_memory_serves_any_sizes_exactly(pinned: bool) -> None:
    pool = HostPool(limit=64 * MIB, reserve=32 * MIB, pinned=pinned)
    assert pool.stats().ahead_bytes == pool.stats().reserved_bytes == 32 * MIB
    generator = random.Random(3)
    held: list[tuple[object, int]] = []
    for _ in range(400):
        if held and generator.random() < 0.5:
            buffer, byte = held.pop(generator.randrange(len(held)))
            view = memoryview(buffer)  # type: ignore[arg-type]
            assert view[0] == view[-1] == byte
            del view, buffer
            continue
        size = generator.choice([100, 5000, 33 * KIB, 777777, 2 * MIB, 3 * MIB + 1])
        if sum(len(buffer) for buffer, _ in held) + size > 20 * MIB:  # type: ignore[arg-type]
            continue
        buffer = pool.allocate(size)
        byte = generator.randrange(256)
        view = memoryview(buffer)
        view[0] = view[-1] = byte
        held.append((buffer, byte))
        stats = pool.stats()
        assert stats.used_bytes <= stats.reserved_bytes <= 64 * MIB
    del view, buffer
    held.clear()
    # Holes have joined again: all of it is one.
    assert pool.trim() == 32 * MIB or pool.stats().reserved_bytes == 0
    assert pool.stats().reserved_bytes == 0


def test_a_block_as_large_as_the_reservation_fits() -> None:
    pool = HostPool(limit=8 * MIB, reserve=8 * MIB)
    parts = [pool.allocate(MIB) for _ in range(8)]
    assert pool.stats().ahead_bytes == 0
    with pytest.raises(HostOutOfMemory, match=r"budget of 8.00 MiB"):
        pool.allocate(PAGE * 10)
    for index in (1, 3, 5, 7, 0, 2, 4, 6):
        parts[index] = None  # type: ignore[call-overload]
    whole = pool.allocate(8 * MIB)
    assert pool.stats().used_bytes == whole.size_bytes


def test_reserved_memory_makes_room_for_what_does_not_fit_it() -> None:
    pool = HostPool(limit=8 * MIB)
    pool.reserve(4 * MIB)
    buffer = pool.allocate(6 * MIB)
    assert pool.stats().reserved_bytes == buffer.size_bytes


def test_reserving_is_all_or_nothing() -> None:
    pool = HostPool(limit=64 * MIB)
    kept = pool.allocate(MIB)
    with pytest.raises(HostOutOfMemory, match=r"budget of 64.00 MiB"):
        pool.reserve(64 * MIB)
    with pytest.raises(ConfigError, match="at least one byte"):
        pool.reserve(0)

    def interrupt(done_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.reserve(16 * MIB, progress=interrupt)
    with (
        faults(Fault("cuMemHostRegister", error="CUDA_ERROR_OUT_OF_MEMORY")),
        pytest.raises(HostOutOfMemory, match="refused to pin"),
    ):
        pool.reserve(16 * MIB)
    assert pool.stats().reserved_bytes == kept.size_bytes
    assert pool.stats().ahead_bytes == 0
    pool.reserve(63 * MIB)
    assert pool.stats().ahead_bytes == 63 * MIB


def test_progress_ends_with_all_of_it() -> None:
    seen: list[int] = []
    HostPool(limit=128 * MIB).reserve("100MiB", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 100 * MIB


def test_progress_bar_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    HostPool(pinned=False).reserve(MIB, progress=True)
    out, err = capfd.readouterr()
    assert "pinning host memory" in err
    assert out == ""


def test_tensors_are_pinned_and_copy() -> None:
    torch.cuda.init()
    pool = HostPool(limit=32 * MIB, reserve=16 * MIB)
    host = pool.empty((1000, 100), torch.float32)
    assert host.is_pinned()
    device = torch.arange(100_000, dtype=torch.float32, device="cuda").view(1000, 100)
    host.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(host, device.cpu())
    assert pool.empty(5, torch.int64).shape == (5,)
    assert pool.empty((0, 3), torch.int64).shape == (0, 3)
    assert pool.stats().buffer_count == 1


def test_a_forked_child_gets_an_error_and_harms_nothing() -> None:
    pool = HostPool(limit=32 * MIB, reserve=16 * MIB)
    host = pool.empty((MIB,), torch.uint8)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pool.allocate(MIB)
        except StateError:
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    host.fill_(7)
    assert int(host[-1]) == 7


def test_every_size_of_a_model_costs_at_most_two_percent() -> None:
    sizes = [shape * 4 for shape in (2048, 8192, 2048 * 512, 2048 * 2048)] * 20
    pool = HostPool(limit=GIB)
    held = [pool.allocate(size) for size in sizes]
    assert pool.stats().reserved_bytes <= 1.02 * sum(sizes)
    assert len(held) == len(sizes)


def test_reserved_huge_pages_fall_back() -> None:
    pool = HostPool(limit=GIB, huge_pages="reserved", pinned=False)
    buffer = pool.allocate(4 * MIB)
    stats = pool.stats()
    assert stats.huge_page_bytes in (0, 4 * MIB)
    assert stats.used_bytes == buffer.size_bytes
    # Huge pages would double this one.
    odd = pool.allocate(2 * MIB + PAGE)
    assert pool.stats().used_bytes == buffer.size_bytes + odd.size_bytes


def test_what_is_reserved_is_on_huge_pages_where_the_kernel_can() -> None:
    pool = HostPool(limit=GIB, reserve="16MiB", pinned=False)
    address = pool.allocate(16 * MIB).address
    found = pool.stats().huge_page_bytes
    assert found in range(0, 16 * MIB + 1, 2 * MIB)
    assert not found or address % (2 * MIB) == 0
    assert HostPool(reserve="16MiB", huge_pages="never", pinned=False).stats().huge_page_bytes == 0


def test_a_node_that_does_not_exist_is_noted() -> None:
    pool = HostPool(limit=GIB, numa=900, pinned=False)
    memoryview(pool.allocate(MIB))[0] = 1
    assert pool.stats().numa_node == 900
    assert pool.stats().numa_note


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


def test_small_limit_on_locked_memory_is_named() -> None:
    """Without CAP_IPC_LOCK; the pool works, and where the driver cannot pin it says the limit."""
    script = """
        import resource
        from spillover import emulator
        emulator.enable(vram="256MiB")
        import spillover
        from spillover.emulator import Fault, faults
        pool = spillover.HostPool(limit="64MiB", reserve="8MiB")
        memoryview(pool.allocate(1 << 20))[0] = 1
        try:
            with faults(Fault("cuMemHostRegister", error="CUDA_ERROR_OUT_OF_MEMORY")):
                pool.allocate(16 << 20)
        except spillover.HostOutOfMemory as error:
            assert "64.00 KiB (ulimit -l)" in str(error), error
        else:
            raise AssertionError("nothing was refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        preexec_fn=_without_locked_memory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _without_locked_memory() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 * KIB, 64 * KIB))
    cap_ipc_lock, drop_from_bounding_set = 14, 24
    # Where this process may not drop it, it does not have it.
    ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_ipc_lock, 0, 0, 0)

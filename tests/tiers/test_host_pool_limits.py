"""Which limit ends an allocation or a reservation, and that it does so before the system does."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_machine import GIB, KIB, MIB, set_group, set_memory, write

from spillover import HostOutOfMemory, HostPool
from spillover._core import HostPool as CoreHostPool
from spillover._core import available_host_memory, total_host_memory
from spillover.emulator import Fault, faults


def pageable(root: Path, **options: Any) -> CoreHostPool:
    """A pool on a machine that a test describes."""
    return CoreHostPool(pinned=False, system_root=str(root), **options)


def run(script: str, *arguments: str, prepare: Callable[[], None] | None = None) -> str:
    """Run a script in a process of its own, with a limit on it; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_machine_is_the_limit_without_groups(tmp_path: Path) -> None:
    set_memory(tmp_path, 40 * GIB)
    root = str(tmp_path)
    assert available_host_memory(root) == (40 * GIB, "this machine's memory (MemAvailable)")
    assert total_host_memory(root) == (64 * GIB, "this machine's memory (MemTotal)")


def test_nothing_known_is_no_limit(tmp_path: Path) -> None:
    assert available_host_memory(str(tmp_path))[0] == 2**64 - 1
    assert pageable(tmp_path).allocate(MIB).size_bytes == MIB


@pytest.mark.parametrize("group", ["/job/step", "/"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_least_group_is_named(tmp_path: Path, group: str, name: str) -> None:
    set_memory(tmp_path, 40 * GIB)
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
    set_memory(tmp_path, 40 * GIB)
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


def call(pool: CoreHostPool, size: int, *, ahead: bool) -> object:
    return pool._reserve(size, None) if ahead else pool.allocate(size)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_group_that_has_too_little_is_named(tmp_path: Path, ahead: bool) -> None:
    set_memory(tmp_path, 10 * GIB)
    set_group(tmp_path, 100 * MIB, used=10 * MIB)
    pool = pageable(tmp_path)
    with pytest.raises(HostOutOfMemory, match=r"memory.max \(100.00 MiB\) .* group /job leaves"):
        call(pool, 50 * MIB, ahead=ahead)
    assert pool.stats().reserved_bytes == 0
    call(pool, 26 * MIB, ahead=ahead)


@pytest.mark.parametrize("is_group", [True, False])
def test_memory_that_others_take_meanwhile_ends_a_reservation(
    tmp_path: Path, is_group: bool
) -> None:
    set_memory(tmp_path, 10 * GIB)
    pool = pageable(tmp_path)

    def take(done_bytes: int) -> None:
        if is_group:
            set_group(tmp_path, 8 * GIB, used=8 * GIB - 40 * MIB)
        else:
            set_memory(tmp_path, 40 * MIB)

    source = r"memory.max \(8.00 GiB\)" if is_group else "MemAvailable"
    with pytest.raises(HostOutOfMemory, match=rf"with 0 B of it made, .*{source}.* 40.00 MiB"):
        pool._reserve(256 * MIB, take)
    assert pool.stats().reserved_bytes == 0
    assert pool._is_valid()


def test_the_last_bytes_that_there_are_can_be_reserved(tmp_path: Path) -> None:
    set_memory(tmp_path, 164 * MIB)
    pool = pageable(tmp_path)

    def take(done_bytes: int) -> None:
        set_memory(tmp_path, 164 * MIB - done_bytes)

    pool._reserve(100 * MIB, take)
    assert pool.stats().ahead_bytes == 100 * MIB
    with pytest.raises(HostOutOfMemory, match=r"leaves this process 64\.00 MiB"):
        pool._reserve(MIB, None)


def test_what_other_threads_are_about_to_take_counts(tmp_path: Path) -> None:
    """Two that both look at what is available would together take more than there is."""
    set_memory(tmp_path, 200 * MIB)
    pool = pageable(tmp_path)
    messages: list[str] = []

    def allocate(done_bytes: int) -> None:
        try:
            pool.allocate(60 * MIB)
        except HostOutOfMemory as error:
            messages.append(str(error))
        else:
            assert 100 * MIB - done_bytes + 60 * MIB <= 136 * MIB  # The pool leaves 64 MiB.

    pool._reserve(100 * MIB, allocate)
    assert re.search(r"less \d+\.\d\d MiB that other threads are about to take", messages[0])
    assert pool._is_valid()


def test_idle_memory_goes_before_a_refusal_of_the_driver_fails_anything() -> None:
    pool = HostPool(limit="64MiB")
    idle = pool.allocate(8 * MIB)
    del idle
    with faults(Fault("cuMemHostRegister")):
        pool.allocate(4 * MIB)
    assert pool.stats().reserved_bytes == 4 * MIB


@pytest.mark.parametrize("ahead", [True, False])
def test_what_the_driver_cannot_pin_names_every_limit_there_is(ahead: bool) -> None:
    pool = HostPool(limit="64MiB")
    _, source = available_host_memory()
    with (
        faults(Fault("cuMemHostRegister", times=None)),
        pytest.raises(HostOutOfMemory, match="refused to pin") as caught,
    ):
        call(pool, 32 * MIB, ahead=ahead)
    assert "(ulimit -l)" in str(caught.value)
    assert re.search(re.escape(source) + r" leaves this process \d", str(caught.value))
    assert pool.stats().reserved_bytes == 0
    call(pool, 32 * MIB, ahead=ahead)
    assert pool.stats().reserved_bytes == 32 * MIB


def _without_locked_memory() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 * KIB, 64 * KIB))
    cap_ipc_lock, drop_from_bounding_set = 14, 24
    # Where this process may not drop it, it does not have it.
    ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_ipc_lock, 0, 0, 0)


def test_small_limit_on_locked_memory_is_named() -> None:
    """Without CAP_IPC_LOCK; the pool works, and where the driver cannot pin it says the limit."""
    run(
        """
        import ctypes, errno, mmap
        page = mmap.mmap(-1, 1 << 20)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        assert libc.mlock(ctypes.c_void_p(address), 1 << 20) == -1, "memory can be locked"
        assert ctypes.get_errno() in (errno.ENOMEM, errno.EPERM)

        from spillover import emulator
        emulator.enable(vram="256MiB")
        import spillover
        from spillover.emulator import faults
        pool = spillover.HostPool(limit="64MiB", reserve="8MiB")
        memoryview(pool.allocate(1 << 20))[0] = 1
        large = pool.allocate(10 << 20)
        memoryview(large)[-1] = 1
        try:
            with faults(pinned_limit=0):
                pool.allocate(16 << 20)
        except spillover.HostOutOfMemory as error:
            assert "64.00 KiB (ulimit -l)" in str(error), error
        else:
            raise AssertionError("nothing was refused")
        """,
        prepare=_without_locked_memory,
    )


def test_a_limit_on_addresses_is_named() -> None:
    run("""
        import resource
        from spillover import HostOutOfMemory, HostPool
        pool = HostPool(limit="2GiB", pinned=False)
        held = pool.allocate("1MiB")
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for attempt in (pool.allocate, pool.reserve):
            try:
                attempt("1GiB")
            except HostOutOfMemory as error:
                assert "(ulimit -v)" in str(error), error
            else:
                raise AssertionError("nothing was refused")
        assert pool.stats().reserved_bytes == 1 << 20
        pool.allocate("32MiB")
    """)


def test_a_limit_on_mappings_is_named_and_spoils_nothing() -> None:
    mappings_max = int(Path("/proc/sys/vm/max_map_count").read_text())
    if mappings_max > 200_000:
        pytest.skip(f"vm.max_map_count is {mappings_max}")
    run("""
        from spillover import HostOutOfMemory, HostPool
        pool = HostPool(limit="1TiB", pinned=False)
        held = []
        try:
            while True:
                held.append(pool.allocate(32 << 10))
        except HostOutOfMemory as error:
            message = str(error)
        assert "vm.max_map_count" in message, message
        others = [bytearray(1 << 20) for _ in range(100)]
        # What is idle goes for what has another size.
        del held[:200]
        held += [pool.allocate(64 << 10) for _ in range(150)]
        assert pool.stats().reserved_bytes == pool.stats().used_bytes
        pool.reserve("1GiB")
        held += [pool.allocate(32 << 10) for _ in range(1 << 15)]
    """)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 384 MiB, where this user may make one; processes may be put into it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {row.split(":")[1]: row.split(":", 2)[2] for row in lines}
    parent = Path("/sys/fs/cgroup/memory", own.get("memory", "/").lstrip("/"))
    limit_name = "memory.limit_in_bytes"
    if "memory" not in own:
        parent = Path("/sys/fs/cgroup", own.get("", "/").lstrip("/"))
        limit_name = "memory.max"
    group = parent / f"spillover-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (group / limit_name).write_text(str(384 * MIB))
        yield group
    except OSError as error:
        pytest.skip(f"no control group can be limited here: {error}")
    finally:
        group.rmdir()


def test_a_real_group_ends_a_reservation_before_the_kernel_ends_the_process(
    memory_group: Path,
) -> None:
    """The program takes memory of its own while it reserves: it gets an error and lives on."""
    script = """
        import sys
        import numpy
        from spillover import HostOutOfMemory, HostPool
        pool = HostPool(limit="4GiB", pinned=False)
        assert "spillover-test" in spillover_limit()
        try:
            pool.reserve("1GiB")
        except HostOutOfMemory as error:
            assert "spillover-test" in str(error), error
        held = []
        def take(done_bytes):
            if not held:
                held.append(numpy.ones(200 << 20, numpy.uint8))
        try:
            pool.reserve("200MiB", progress=take)
        except HostOutOfMemory as error:
            assert "spillover-test" in str(error) and "of it made" in str(error), error
        else:
            raise AssertionError("there was no room for it")
        assert pool.stats().reserved_bytes == 0
        held.clear()
        pool.reserve("200MiB")
    """
    prelude = (
        "from spillover._core import available_host_memory\n"
        "def spillover_limit(): return available_host_memory()[1]\n"
    )
    procs = memory_group / "cgroup.procs"
    run(
        prelude + textwrap.dedent(script),
        prepare=lambda: procs.write_text(str(os.getpid())) and None,
    )

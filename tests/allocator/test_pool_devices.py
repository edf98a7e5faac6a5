"""Pools of several devices in one process: each on its own, whichever device is current.

The programs run in processes of their own with three devices (``run_on_devices``).
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_calls import Cuda, live_blocks, on_thread
from upstream import Upstream

import spillover
from spillover import _core, allocator
from spillover._paths import library_path
from spillover.emulator import Fault, faults

MIB = 1 << 20
RunOnDevices = Callable[[Callable[[], None]], None]


@pytest.fixture
def run_on_devices(
    run_emulated: Callable[..., subprocess.CompletedProcess[str]],
) -> RunOnDevices:
    def run(program: Callable[[], None]) -> None:
        run_emulated(
            "import sys\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import test_pool_devices\n"
            "getattr(test_pool_devices, sys.argv[2])()\n",
            str(Path(__file__).parent),
            program.__name__,
            vram="256MiB",
            devices=3,
        )

    return run


def devices() -> tuple[list[Cuda], list[_core.Pool]]:
    cudas = [Cuda(device) for device in range(3)]
    cudas[0].use_device()
    return cudas, [_core.Pool(device) for device in range(3)]


def reserved_bytes(pool: _core.Pool) -> int:
    return pool.stats()["reserved_bytes"]["all"]["current"]


def context_is_active(device: int) -> bool:
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    return bool(active.value)


def no_context_for_figures() -> None:
    library = ctypes.CDLL(str(library_path("libspillover.so")))
    allocator.Pool(0).allocate(MIB).free()
    library.spillover_pluggable_empty_cache()
    allocator.trim(device=1)
    allocator.check_invariants(1)
    assert set(allocator.stats(1).values()) == {0}
    assert allocator.stats(1).keys() == allocator.stats(0).keys()
    assert [context_is_active(device) for device in range(3)] == [True, False, False]
    for call in (allocator.trim, allocator.stats, allocator.check_invariants):
        with pytest.raises(spillover.ConfigError, match="device 3 does not exist"):
            call(device=3)


def test_a_device_that_is_not_used_gets_no_context(run_on_devices: RunOnDevices) -> None:
    """A context takes hundreds of MiB of a card, which may be another process's."""
    run_on_devices(no_context_for_figures)


def any_current_device() -> None:
    cudas, pools = devices()
    address = pools[1].alloc(8 * MIB)
    assert _core.device_of(address) == 1
    assert cudas[0].is_current()
    cudas[1].use_device()
    cudas[1].fill(address, 8 * MIB, 0)

    def free() -> None:
        cudas[2].use_device()
        pools[1].free(address)
        pools[1].trim()
        assert cudas[2].is_current()

    on_thread(free)
    assert reserved_bytes(pools[1]) == 0
    # A thread on which no device is current.
    on_thread(lambda: pools[2].free(pools[2].alloc(8 * MIB)))
    assert reserved_bytes(pools[2]) >= 8 * MIB
    for pool in pools:
        pool.check_invariants()


def figures_of_their_own() -> None:
    _, pools = devices()
    allocator.configure(device=1, limit=64 * MIB)
    pools[2].set_memory_fraction(0.5)
    assert [pool.limit_bytes() for pool in pools[1:]] == [64 * MIB, 128 * MIB]
    held = pools[0].alloc(200 * MIB)
    idle = pools[2].alloc(100 * MIB)
    pools[2].free(idle)
    with pytest.raises(spillover.SpilloverError, match="device 1 is out of memory"):
        pools[1].alloc(100 * MIB)
    # One device's shortage is not another's: nothing of theirs was given back.
    assert [reserved_bytes(pool) for pool in pools] == [200 * MIB, 0, 100 * MIB]
    assert [pool.stats()["num_ooms"] for pool in pools] == [0, 1, 0]
    pools[0].reset_peak_stats()
    pools[0].free(held)
    assert pools[2].stats()["allocated_bytes"]["all"]["peak"] == 100 * MIB
    pools[0].trim()
    assert [reserved_bytes(pool) for pool in pools] == [0, 0, 100 * MIB]


def wrong_pool() -> None:
    _, pools = devices()
    address = pools[1].alloc(3 * MIB)
    for wrong in (pools[0].free, lambda address: pools[0].record_stream(address, 0)):
        with pytest.raises(spillover.ConfigError, match="device 1"):
            wrong(address)
    assert list(live_blocks(pools[1])) == [address]
    pools[1].free(address)
    for pool in pools:
        pool.check_invariants()


def stream_of_another_device() -> None:
    cudas, pools = devices()
    cudas[1].use_device()
    stream = cudas[1].create_stream()
    cudas[0].use_device()
    with pytest.raises(spillover.ConfigError, match="stream of device 1"):
        pools[0].alloc(3 * MIB, stream)
    assert pools[0].segments() == []


def used_by_another_device(*, is_kept: bool) -> None:
    """A block of device 0 is read by a stream of device 1 and freed meanwhile."""
    cudas, pools = devices()
    source, target = pools[0].alloc(12 * MIB), pools[1].alloc(12 * MIB)
    cudas[0].fill(source, 12 * MIB, 0)
    cudas[0].synchronize()
    cudas[1].use_device()
    stream = cudas[1].create_stream()
    if is_kept:
        pools[1].keep_stream(stream)
    cudas[1].copy(target, source, 12 * MIB, stream)
    pools[0].record_stream(source, stream)
    cudas[0].use_device()
    pools[0].free(source)
    # The hazard checker compares this fill with the copy.
    again = pools[0].alloc(12 * MIB)
    assert again != source
    cudas[0].fill(again, 12 * MIB, 0)
    pools[0].check_invariants()
    # The end of the other device's work is waited for, and frees the block.
    pools[0].trim()
    assert pools[0].stats()["active"]["all"]["current"] == 1
    assert pools[0].alloc(12 * MIB)
    assert reserved_bytes(pools[0]) == 24 * MIB


def used_by_a_kept_stream_of_another_device() -> None:
    used_by_another_device(is_kept=True)


def used_by_a_foreign_stream_of_another_device() -> None:
    used_by_another_device(is_kept=False)


def peers() -> None:
    """Memory that was mapped before and after the peer was let in."""
    cudas, pools = devices()
    cudas[1].allow_peer(cudas[0])
    cudas[0].use_device()
    before = pools[0].alloc(4 * MIB)
    own = Upstream(cudas[0])
    given = pools[0].alloc_in(own.arena, 4 * MIB)
    spillover_add_peer(0, 1)
    after = pools[0].alloc(40 * MIB)
    assert own.holds(given)
    cudas[1].use_device()
    for address, size in ((given, 4 * MIB), (before, 4 * MIB), (after, 40 * MIB)):
        cudas[1].fill(address, size, 0)
    cudas[1].synchronize()
    # Pieces that are mapped anew keep the permission.
    cudas[0].use_device()
    pools[0].free(after)
    pools[0].alloc(10 * MIB)
    large = pools[0].alloc(60 * MIB)
    cudas[1].use_device()
    cudas[1].fill(large, 60 * MIB, 0)
    cudas[1].synchronize()
    cudas[0].use_device()
    pools[0].release_arena(own.arena)
    pools[0].free(given)
    pools[0].trim()
    own.check_ended()


def peers_after_a_failure() -> None:
    """What could not be let in is let in by the next call."""
    cudas, pools = devices()
    cudas[1].allow_peer(cudas[0])
    cudas[0].use_device()
    address = pools[0].alloc(9 * MIB)
    library = ctypes.CDLL(str(library_path("libspillover.so")))
    if cudas[0].has_virtual_memory:
        with faults(Fault("cuMemSetAccess", call=2)):
            assert library.spillover_add_peer(0, 1) != 0
    spillover_add_peer(0, 1)
    cudas[1].use_device()
    cudas[1].fill(address, 9 * MIB, 0)
    cudas[1].synchronize()


def spillover_add_peer(device: int, peer: int) -> None:
    library = ctypes.CDLL(str(library_path("libspillover.so")))
    assert library.spillover_add_peer(device, peer) == 0


def invariants_of_all_at_once() -> None:
    """Threads that use every pool, while others walk them: no order of locks is met twice."""
    _, pools = devices()
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                failures.append(error)

        return run

    def churn() -> None:
        blocks = [pool.alloc(size) for pool in pools for size in (700, 3 * MIB)]
        for index, address in enumerate(blocks):
            pools[index // 2].free(address)

    def walk() -> None:
        for pool in reversed(pools):
            pool.check_invariants()
            pool.trim()

    threads = [threading.Thread(target=guarded(work)) for work in (churn, churn, walk, walk)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.5)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert failures == []


PROGRAMS = [
    any_current_device,
    figures_of_their_own,
    wrong_pool,
    stream_of_another_device,
    used_by_a_kept_stream_of_another_device,
    used_by_a_foreign_stream_of_another_device,
    peers,
    peers_after_a_failure,
    invariants_of_all_at_once,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_devices(run_on_devices: RunOnDevices, program: Callable[[], None]) -> None:
    run_on_devices(program)

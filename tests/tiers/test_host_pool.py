"""Pinned host memory: budget, reuse, cost in memory, and tensors over it."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
from collections.abc import Callable

import pytest
import torch

from spillover import ConfigError, HostOutOfMemory
from spillover._core import HostPool, available_host_memory
from spillover._pinned import empty_pinned, host_pool, host_stats

PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20


@pytest.fixture(params=[True, False], ids=["pinned", "pageable"])
def make_pool(request: pytest.FixtureRequest) -> Callable[..., HostPool]:
    return lambda limit_bytes=None: HostPool(limit_bytes=limit_bytes, pinned=request.param)


def test_sizes_are_exact_up_to_the_page(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool()
    size = 3 * MIB + 5
    buffer = pool.allocate(size)
    stats = pool.stats()
    assert buffer.size_bytes == len(buffer) == size
    assert buffer.address % PAGE == 0
    assert size <= stats.used_bytes == stats.reserved_bytes < size + PAGE
    assert stats.used_bytes <= 1.02 * size
    assert stats.buffer_count == 1
    assert stats.limit_bytes is None


def test_a_freed_buffer_serves_the_same_size_again(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool()
    buffer = pool.allocate(2 * MIB - 100)
    address = buffer.address
    del buffer
    assert pool.stats().used_bytes == 0
    assert pool.stats().reserved_bytes == 2 * MIB
    other = pool.allocate(3 * MIB)
    again = pool.allocate(2 * MIB)
    assert other.address != address
    assert again.address == address
    assert pool.stats().reserved_bytes == 5 * MIB


def test_sizes_that_do_not_come_back_do_not_pile_up(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool()
    held: list[object] = []
    for step in range(40):
        held = [pool.allocate(16 * MIB + (2 * step + i) * PAGE) for i in range(2)]
    stats = pool.stats()
    assert stats.used_bytes == sum(len(buffer) for buffer in held)  # type: ignore[arg-type]
    assert stats.reserved_bytes_max <= 2 * stats.used_bytes_max + 64 * MIB


def test_the_budget_is_hard_and_says_what_to_do(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool(2 * MIB)
    held = pool.allocate(MIB)
    with pytest.raises(HostOutOfMemory) as caught:
        pool.allocate(MIB + 1)
    text = str(caught.value)
    for part in ("2.00 MiB", "1.00 MiB are in use", "SPILLOVER_HOST_LIMIT", "disk tier"):
        assert part in text
    assert isinstance(caught.value, MemoryError)
    # Nothing was lost by the attempt.
    assert pool.allocate(MIB).size_bytes == MIB
    assert held.size_bytes == MIB


def test_idle_memory_of_other_sizes_makes_room(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool(4 * MIB)
    buffers = [pool.allocate(MIB) for _ in range(4)]
    del buffers
    gc.collect()
    assert pool.stats().reserved_bytes == 4 * MIB
    large = pool.allocate(3 * MIB)
    assert large.size_bytes == 3 * MIB
    stats = pool.stats()
    assert stats.reserved_bytes <= 4 * MIB
    assert stats.reserved_bytes_max <= 4 * MIB


def test_small_requests_share_slabs(make_pool: Callable[..., HostPool]) -> None:
    pool = make_pool()
    buffers = [pool.allocate(100) for _ in range(500)]
    stats = pool.stats()
    assert stats.used_bytes == 500 * 128
    assert stats.reserved_bytes == 128 << 10
    spans = sorted((item.address, item.size_bytes) for item in buffers)
    for (address, size), (following, _) in itertools.pairwise(spans):
        assert address % 64 == 0
        assert address + size <= following
    del buffers, spans
    assert pool.trim() == 128 << 10
    assert pool.stats().reserved_bytes == 0


@pytest.mark.parametrize("size", [1, 63, 65, 1024, 1025, 5000, 20000, 32767, 32768, 300_000])
def test_waste_is_bounded(size: int) -> None:
    pool = HostPool(pinned=False)
    buffer = pool.allocate(size)
    used = pool.stats().used_bytes
    assert buffer.size_bytes == size
    assert size <= used <= max(size + PAGE, size * 9 // 8 + 64)


def test_random_use_keeps_the_books() -> None:
    seed = 7
    print(f"seed {seed}")
    chosen = random.Random(seed)
    pool = HostPool(limit_bytes=24 * MIB, pinned=False)
    live: list[tuple[memoryview, int]] = []
    for step in range(3000):
        if live and chosen.random() < 0.5:
            view, mark = live.pop(chosen.randrange(len(live)))
            assert view[0] == view[-1] == mark
            del view
            continue
        size = chosen.choice([chosen.randint(1, 5000), chosen.randint(30_000, 400_000)])
        try:
            view = memoryview(pool.allocate(size))
        except HostOutOfMemory:
            live.clear()
            continue
        mark = step % 251
        view[0] = view[-1] = mark
        live.append((view, mark))
        stats = pool.stats()
        assert stats.buffer_count == len(live)
        assert stats.used_bytes <= stats.reserved_bytes <= 24 * MIB
    del view
    live.clear()
    assert pool.stats().used_bytes == 0
    pool.trim()
    assert pool.stats().reserved_bytes == 0


def test_threads_may_share_a_pool() -> None:
    pool = HostPool(limit_bytes=64 * MIB, pinned=False)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        try:
            for _ in range(300):
                buffers = [pool.allocate(chosen.choice([200, 3000, 70_000])) for _ in range(5)]
                for index, buffer in enumerate(buffers):
                    memoryview(buffer)[:8] = bytes([seed, index] * 4)
                for index, buffer in enumerate(buffers):
                    assert bytes(memoryview(buffer)[:8]) == bytes([seed, index] * 4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.stats().buffer_count == 0


def test_zero_bytes_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="at least one byte"):
        HostPool(pinned=False).allocate(0)


def test_a_request_beyond_the_machine_is_refused() -> None:
    available, _ = available_host_memory()
    assert 0 < available < 1 << 50
    with pytest.raises(HostOutOfMemory, match=r"cannot be had: |refused"):
        HostPool(pinned=False).allocate(available + (1 << 40))


def test_empty_pinned_is_pinned_and_gives_back() -> None:
    # torch calls nothing pinned before its own start.
    torch.cuda.init()
    pool = HostPool()
    tensor = empty_pinned((3, 1000, 50), torch.bfloat16, pool=pool)
    assert tensor.is_pinned()
    assert tensor.shape == (3, 1000, 50)
    assert tensor.dtype is torch.bfloat16
    assert tensor.is_contiguous()
    assert pool.stats().buffer_count == 1
    part = tensor[1, 2:]
    del tensor
    assert pool.stats().buffer_count == 1
    del part
    assert pool.stats().buffer_count == 0
    assert empty_pinned((0, 4), torch.float32, pool=pool).shape == (0, 4)
    assert empty_pinned((), torch.float64, pool=pool).shape == ()


def test_empty_pinned_copies_asynchronously() -> None:
    host = empty_pinned((1 << 16,), torch.float32)
    device = torch.arange(1 << 16, dtype=torch.float32, device="cuda")
    host.copy_(device, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert torch.equal(host, torch.arange(1 << 16, dtype=torch.float32))


def test_the_process_has_one_pool() -> None:
    assert host_pool() is host_pool()
    before = host_stats().used_bytes
    tensor = empty_pinned((1 << 20,), torch.uint8)
    assert host_stats().used_bytes == before + tensor.nbytes


def test_the_process_limit_comes_from_the_environment(
    run_emulated: Callable[..., object],
) -> None:
    run_emulated(
        """
        import torch
        from spillover import HostOutOfMemory
        from spillover._pinned import empty_pinned, host_stats
        assert host_stats().limit_bytes == 1 << 20
        empty_pinned((1000,), torch.float32)
        try:
            empty_pinned((1 << 20,), torch.float32)
        except HostOutOfMemory:
            pass
        else:
            raise AssertionError("the limit was ignored")
        """,
        env={"SPILLOVER_HOST_LIMIT": "1MiB"},
    )


def test_a_forked_child_may_drop_what_it_inherited() -> None:
    tensor = empty_pinned((1 << 20,), torch.uint8, pool=HostPool())
    tensor.fill_(5)
    child = os.fork()
    if child == 0:
        # The mapping is shared: the child reads, and frees its copy of the handle, without harm.
        code = 0 if int(tensor[100]) == 5 else 1
        del tensor
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert int(tensor.sum()) == 5 << 20

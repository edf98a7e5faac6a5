"""torch.cuda.MemPool with an allocator of its own, and Spillover's allocator installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_process import TorchProcess

OWN_ALLOCATOR = (
    (Path(__file__).parent / "own_allocator.py")
    .read_text()
    .replace("from __future__ import annotations\n", "")
)


def test_a_pool_with_its_own_allocator(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
own = OwnAllocator()
pool = torch.cuda.MemPool(own.allocator)
outside = torch.ones(4 * MiB, dtype=torch.uint8, device="cuda")
assert own.sizes == []
reserved = torch.cuda.memory_reserved()
with torch.cuda.use_mem_pool(pool):
    small = [torch.full((1000,), i, device="cuda") for i in range(3)]
    medium = torch.ones(5 * MiB, dtype=torch.uint8, device="cuda")
    large = torch.ones(31 * MiB, dtype=torch.uint8, device="cuda")
# Segments of the sizes that torch's own allocator asks for.
assert own.sizes == [2 * MiB, 20 * MiB, 32 * MiB], own.sizes
assert all(own.holds(tensor) for tensor in (*small, medium, large)) and not own.holds(outside)
assert [tensor[5].item() for tensor in small] == [0, 1, 2] and large[-1].item() == 1
stats = torch.cuda.memory_stats()
assert stats["allocated_bytes.all.current"] == 40 * MiB + 3 * 8192, stats
assert torch.cuda.memory_reserved() == reserved + 54 * MiB
assert sorted(s["total_size"] for s in pool.snapshot()) == sorted(own.sizes)
allocator.check_invariants()

# What is freed serves the pool again, and nobody else; a busy stream is waited for.
address = large.data_ptr()
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    sum_on_side = large.sum()
large.record_stream(side)
del large
other = torch.ones(31 * MiB, dtype=torch.uint8, device="cuda")
assert not own.holds(other)
torch.cuda.synchronize()
with torch.cuda.use_mem_pool(pool):
    large = torch.ones(31 * MiB, dtype=torch.uint8, device="cuda")
assert large.data_ptr() == address and len(own.sizes) == 3
torch.cuda.empty_cache()
assert len(own.live) == 3

# The pool's end gives back what is idle; the rest follows.
del small, medium
assert len(own.live) == 3
del pool
assert [segment.size for segment in own.live.values()] == [32 * MiB], own.live
later = torch.ones(30 * MiB, dtype=torch.uint8, device="cuda")
assert not own.holds(later)
del large, other
torch.cuda.empty_cache()
own.check_ended()
allocator.check_invariants()
"""
    )


def test_the_allocator_of_a_pool_has_no_memory(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
own = OwnAllocator(limit=22 * MiB)
pool = torch.cuda.MemPool(own.allocator)
with torch.cuda.use_mem_pool(pool):
    first = torch.ones(1000, device="cuda")
    # 20 MiB would be shared by others of this size; where there is no more, 6 MiB do.
    second = torch.ones(6 * MiB, dtype=torch.uint8, device="cuda")
    third = torch.ones(9 * MiB, dtype=torch.uint8, device="cuda")
    try:
        torch.ones(16 * MiB, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        assert "(torch.cuda.MemPool) gave no memory" in str(error), error
    else:
        raise AssertionError("no error")
    # Idle memory of the ordinary kind does not serve the pool.
    assert own.sizes == [2 * MiB, 20 * MiB], own.sizes
outside = torch.ones(16 * MiB, dtype=torch.uint8, device="cuda")
del pool, first, second, third
torch.cuda.empty_cache()
own.check_ended()

# The driver's last memory is what the pool keeps idle.
filler = torch.empty(450 * MiB, dtype=torch.uint8, device="cuda")
del filler
own = OwnAllocator()
pool = torch.cuda.MemPool(own.allocator)
with torch.cuda.use_mem_pool(pool):
    large = torch.ones(300 * MiB, dtype=torch.uint8, device="cuda")
assert large[-1].item() == 1
del large, pool
torch.cuda.empty_cache()
own.check_ended()
"""
    )


def test_spillovers_pool_as_the_allocator_of_a_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        from spillover._paths import library_path
        pool = torch.cuda.MemPool(torch._C._cuda_getAllocator())
        with torch.cuda.use_mem_pool(pool):
            x = torch.ones(3 * MiB, dtype=torch.uint8, device="cuda")
        assert len(pool.snapshot()) == 1
        assert x[-1].item() == 1
        del x, pool

        # By another name it would hold the same memory twice.
        names = "spillover_pluggable_alloc", "spillover_pluggable_free"
        ours = torch.cuda.memory.CUDAPluggableAllocator(
            str(library_path("libspillover.so")), *names
        )
        pool = torch.cuda.MemPool(ours.allocator())
        with torch.cuda.use_mem_pool(pool):
            try:
                torch.ones(1, device="cuda")
            except RuntimeError as error:
                assert "holds already" in str(error), error
            else:
                raise AssertionError("no error")
        del pool
        assert torch.cuda.memory_allocated() == 0
        """
    )


def test_memory_goes_back_as_it_was_given(torch_with_pool: TorchProcess) -> None:
    """Once, with its size, device and stream; and an allocator lives as long as its memory."""
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
own = OwnAllocator(offset=256)
pool = torch.cuda.MemPool(own.allocator)
del own.allocator
side = torch.cuda.Stream()
with torch.cuda.use_mem_pool(pool):
    here = torch.ones(5 * MiB, dtype=torch.uint8, device="cuda")
    with torch.cuda.stream(side):
        there = torch.ones(5 * MiB, dtype=torch.uint8, device="cuda")
streams = {segment.stream for segment in own.live.values()}
assert streams == {0, side.cuda_stream}, streams
assert {segment.device for segment in own.live.values()} == {0}
del pool
assert own.holds(here) and own.holds(there)
assert here.data_ptr() % 512 == 0
there.record_stream(torch.cuda.current_stream())
assert (here + there).sum().item() == 10 * MiB
del here, there
torch.cuda.empty_cache()
own.check_ended()
"""
    )


def test_two_threads_and_one_allocator(torch_with_pool: TorchProcess) -> None:
    """Its functions are called one at a time, as torch's own allocator calls them."""
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
import threading
own = OwnAllocator(pause_s=0.005)
failures = []

def work():
    try:
        for _ in range(3):
            pool = torch.cuda.MemPool(own.allocator)
            with torch.cuda.use_mem_pool(pool):
                blocks = [torch.ones(11 * MiB, dtype=torch.uint8, device="cuda") for _ in range(3)]
            assert all(own.holds(block) and block[-1].item() == 1 for block in blocks)
            del blocks, pool
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert failures == [], failures
torch.cuda.empty_cache()
own.check_ended()
"""
    )


def test_graphs_and_checkpoints_in_its_memory(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
own = OwnAllocator()
pool = torch.cuda.MemPool(own.allocator)
x = torch.ones(MiB, device="cuda")
(x * 2 + 1).sum().item()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, pool=pool.id):
    y = x * 2 + 1
assert own.holds(y)
x.fill_(5)
graph.replay()
assert y.eq(11).all().item()
state = torch._C._cuda_getCheckpointState(0, pool.id)
assert torch._C._cuda_checkPoolLiveAllocations(0, pool.id, {y.untyped_storage().data_ptr()})
graph.reset()
del y, pool, graph, state
torch.cuda.empty_cache()
own.check_ended()
"""
    )


@pytest.mark.virtual_memory
def test_its_memory_does_not_sleep(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
own = OwnAllocator()
with allocator.tag("weights"):
    pool = torch.cuda.MemPool(own.allocator)
    with torch.cuda.use_mem_pool(pool):
        buffer = torch.ones(5 * MiB, dtype=torch.uint8, device="cuda")
    weight = torch.ones(6 * MiB, dtype=torch.uint8, device="cuda")
assert allocator.sleep("weights") == 6 * MiB
assert buffer.sum().item() == 5 * MiB
with torch.cuda.use_mem_pool(pool):
    more = torch.ones(7 * MiB, dtype=torch.uint8, device="cuda")
assert own.holds(more) and more[-1].item() == 1
assert allocator.sleep("") == 0
del buffer, more, pool
torch.cuda.empty_cache()
own.check_ended()
assert allocator.wake() == 6 * MiB
assert weight.sum().item() == 6 * MiB
"""
    )


def test_what_an_allocator_raises_reaches_the_caller(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        # Null functions, which C++ does not call but throw an exception.
        pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(0, 0))
        for _ in range(2):
            try:
                with torch.cuda.use_mem_pool(pool):
                    torch.ones(1, device="cuda")
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                assert "bad_function_call" in str(error), error
            else:
                raise AssertionError("no error")
        # It is no error of a later request.
        helper = torch.cuda.MemPool()
        try:
            with torch.cuda.use_mem_pool(helper):
                torch.empty(1 << 30, device="cuda")
        except torch.OutOfMemoryError:
            pass
        assert torch.ones(5, device="cuda").sum().item() == 5
        """
    )

"""torch.cuda.MemPool and CUDA graphs with Spillover's allocator."""

from __future__ import annotations

from torch_process import TorchProcess


def test_a_pool_has_its_own_memory(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        pool = torch.cuda.MemPool()
        assert pool.use_count() == 1
        with torch.cuda.use_mem_pool(pool):
            assert pool.use_count() == 2
            inside = torch.full((8 * MiB,), 3, dtype=torch.uint8, device="cuda")
            small = torch.zeros(10, device="cuda")
        assert pool.use_count() == 1
        outside = torch.zeros(8 * MiB, dtype=torch.uint8, device="cuda")

        def owners(segments):
            return {
                block["address"]: segment["segment_pool_id"]
                for segment in segments
                for block in segment["blocks"]
                if block["state"] == "active_allocated"
            }

        mine = {inside.data_ptr(): pool.id, small.data_ptr(): pool.id}
        assert owners(pool.snapshot()) == mine, pool.snapshot()
        every = owners(torch.cuda.memory_snapshot())
        assert every == {**mine, outside.data_ptr(): (0, 0)}, every

        address = inside.data_ptr()
        del inside
        torch.cuda.empty_cache()
        again = torch.empty(8 * MiB, dtype=torch.uint8, device="cuda")
        assert again.data_ptr() != address
        with torch.cuda.use_mem_pool(pool):
            back = torch.empty(8 * MiB, dtype=torch.uint8, device="cuda")
        assert back.data_ptr() == address
        """
    )


def test_the_memory_of_a_pool_that_is_gone_goes_back(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        before = torch.cuda.memory_reserved()
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            kept = torch.full((4 * MiB,), 5, dtype=torch.uint8, device="cuda")
            gone = torch.empty(32 * MiB, dtype=torch.uint8, device="cuda")
        del gone
        assert torch.cuda.memory_reserved() == before + 36 * MiB
        del pool  # empties it
        assert torch.cuda.memory_reserved() == before + 4 * MiB
        assert kept.sum().item() == 5 * 4 * MiB
        del kept
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
        """
    )


def test_only_the_thread_that_uses_a_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import threading
        outer, inner = torch.cuda.MemPool(), torch.cuda.MemPool()
        tensors = {}

        def allocate(name):
            tensors[name] = torch.zeros(3 * MiB, dtype=torch.uint8, device="cuda")

        with torch.cuda.use_mem_pool(outer):
            thread = threading.Thread(target=allocate, args=("thread",))
            thread.start()
            thread.join()
            with torch.cuda.use_mem_pool(inner):
                allocate("inner")
            allocate("outer")
        owner = {
            block["address"]: segment["segment_pool_id"]
            for segment in torch.cuda.memory_snapshot()
            for block in segment["blocks"]
        }
        found = {name: owner[tensor.data_ptr()] for name, tensor in tensors.items()}
        assert found == {"thread": (0, 0), "inner": inner.id, "outer": outer.id}, found
        try:
            with torch.cuda.use_mem_pool(outer), torch.cuda.use_mem_pool(outer):
                raise AssertionError("a pool was begun twice")
        except RuntimeError as error:
            assert "already recording" in str(error)
        assert outer.use_count() == 1
        """
    )


def test_pools_that_help_out_and_that_do_not_split(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        helper = torch.cuda.MemPool(use_on_oom=True)
        with torch.cuda.use_mem_pool(helper):
            held = torch.empty(100 * MiB, dtype=torch.uint8, device="cuda")
        address = held.data_ptr()
        del held
        allocator.configure(limit=104 * MiB, wait_max="0s")
        try:
            saved = torch.ones(60 * MiB, dtype=torch.uint8, device="cuda")
            assert saved.data_ptr() == address
            assert saved.sum().item() == 60 * MiB
        except torch.cuda.OutOfMemoryError:
            raise AssertionError("the pool did not help out") from None
        finally:
            allocator.configure(limit=None, wait_max="30s")
        del saved

        whole = torch.cuda.MemPool(no_split=True)
        with torch.cuda.use_mem_pool(whole):
            first, second = torch.zeros(10, device="cuda"), torch.zeros(10, device="cuda")
        assert abs(first.data_ptr() - second.data_ptr()) >= 2 * MiB
        """
    )


OWN_ALLOCATOR = """
import ctypes

class OwnAllocator:
    # Of torch's pluggable kind; counts what it has given and what came back.
    def __init__(self, limit=1 << 60):
        cudart = ctypes.CDLL("libcudart.so.13")
        cudart.cudaFree.argtypes = [ctypes.c_void_p]
        self.live, self.sizes, self.streams, self.limit = {}, [], [], limit

        @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
        def allocate(size, device, stream):
            pointer = ctypes.c_void_p()
            if sum(self.live.values()) + size > self.limit:
                return None
            if cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) != 0:
                cudart.cudaGetLastError()
                return None
            self.live[pointer.value] = size
            self.sizes.append(size)
            self.streams.append(stream or 0)
            return pointer.value

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
        def free(pointer, size, device, stream):
            assert self.live.pop(pointer) == size
            assert cudart.cudaFree(pointer) == 0

        self.functions = allocate, free
        self.allocator = torch._C._cuda_customAllocator(
            *(ctypes.cast(function, ctypes.c_void_p).value for function in self.functions)
        )
"""


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
def inside(tensor):
    return any(a <= tensor.data_ptr() < a + size for a, size in own.live.items())
assert all(inside(tensor) for tensor in (*small, medium, large)) and not inside(outside)
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
assert not inside(other)
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
assert list(own.live.values()) == [32 * MiB], own.live
later = torch.ones(30 * MiB, dtype=torch.uint8, device="cuda")
assert not inside(later)
del large, other
torch.cuda.empty_cache()
assert own.live == {}
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
assert own.live == {}

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
assert own.live == {}
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


def test_a_graph_replays_on_its_memory(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(MiB, device="cuda")

        def step():
            y = x * 2
            z = y + 1  # y's block is free after this, within the graph only
            del y
            return z * 3

        step()
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        address = result.data_ptr()
        held = torch.cuda.memory_reserved()
        for value in (1.0, 2.0, 5.0):
            # Eager work in between must not get what the graph writes to.
            junk = [torch.full((MiB,), -1.0, device="cuda") for _ in range(4)]
            x.fill_(value)
            graph.replay()
            assert result.eq((value * 2 + 1) * 3).all().item()
            assert all(tensor.eq(-1.0).all().item() for tensor in junk)
            del junk
            torch.cuda.empty_cache()
        assert result.data_ptr() == address
        pool = graph.pool()
        owned = torch.cuda.memory_snapshot(pool)
        assert sum(segment["total_size"] for segment in owned) >= 8 * MiB
        graph.reset()
        assert result.eq(33.0).all().item()  # lives as long as it is wanted
        del result
        torch.cuda.empty_cache()
        assert torch.cuda.memory_snapshot(pool) == []
        """
    )


def test_two_graphs_share_a_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.arange(256 * 1024, device="cuda", dtype=torch.float32)
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            a = (x + 1) * 2
        with torch.cuda.graph(second, pool=first.pool()):
            b = (a - 2) / 2
        assert first.pool() == second.pool()
        handle = first.pool()
        for shift in (0.0, 7.0):
            x.copy_(torch.arange(256 * 1024, device="cuda") + shift)
            first.replay()
            second.replay()
            assert torch.equal(b, x)
        first.reset()
        second.replay()  # the pool lives with its last graph
        assert torch.equal(b, x)
        del a, first
        torch.cuda.empty_cache()
        second.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_snapshot(handle) != []
        del b, second
        torch.cuda.empty_cache()
        assert torch.cuda.memory_snapshot(handle) == []
        """
    )


def test_a_graph_of_two_streams(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(MiB, device="cuda")
        side = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                z = y + 1
                y.record_stream(side)
            del y
            other = x * 5  # must not get y's block
            torch.cuda.current_stream().wait_stream(side)
            result = z + other
        for value in (1.0, 3.0):
            x.fill_(value)
            graph.replay()
            assert result.eq(value * 7 + 1).all().item()
        del z, other
        """
    )


def test_a_graphs_memory_is_not_used_while_it_runs_elsewhere(
    torch_with_pool: TorchProcess,
) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(2 * MiB, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = (x * 2) + 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.replay()
        # Let go of while it runs: whoever gets the memory writes to it at once.
        del result
        graph.reset()
        for _ in range(6):
            torch.zeros(2 * MiB, device="cuda")
        """
    )


def test_training_with_graphed_callables(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def train(graphed):
            torch.manual_seed(3)
            model = torch.nn.Sequential(
                torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)
            ).cuda()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if graphed:
                model = torch.cuda.make_graphed_callables(
                    model, (torch.randn(16, 32, device="cuda"),)
                )
            torch.manual_seed(4)
            losses = []
            for _ in range(4):
                loss = model(torch.randn(16, 32, device="cuda")).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        assert train(graphed=True) == train(graphed=False)
        torch._C._cuda_clearCublasWorkspaces()
        """
    )


def test_live_allocations_of_a_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        graph = torch.cuda.CUDAGraph()
        x = torch.ones(1000, device="cuda")
        with torch.cuda.graph(graph):
            y = x + 1
        check = torch._C._cuda_checkPoolLiveAllocations
        assert check(0, graph.pool(), {y.untyped_storage().data_ptr()})
        assert not check(0, graph.pool(), set())
        del y
        assert check(0, graph.pool(), set())
        """
    )


def test_a_checkpoint_of_a_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(MiB, device="cuda")

        def capture(function, **options):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, **options):
                result = function()
            return graph, result

        first, a = capture(lambda: x + 1)
        pool = first.pool()
        state = torch._C._cuda_getCheckpointState(0, pool)
        second, b = capture(lambda: (a * 2) + 3, pool=pool)
        address = b.data_ptr()
        torch._C._cuda_setCheckpointPoolState(0, state, [b.untyped_storage()._cdata], [])
        assert torch._C._cuda_checkPoolLiveAllocations(0, pool, {a.untyped_storage().data_ptr()})
        del b  # its block was freed already
        # Another graph that follows the first one, from the same state.
        third, c = capture(lambda: (a * 2) + 4, pool=pool)
        assert c.data_ptr() == address
        first.replay()
        third.replay()
        assert a.eq(2).all().item() and c.eq(8).all().item()
        first.replay()
        second.replay()
        assert a.eq(2).all().item() and c.eq(7).all().item()
        """
    )


def test_a_checkpoint_brings_back_what_was_freed(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(MiB, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            a, b = x + 1, x + 2
        pool = graph.pool()
        check = torch._C._cuda_checkPoolLiveAllocations
        addresses = {a.data_ptr(), b.data_ptr()}
        state = torch._C._cuda_getCheckpointState(0, pool)
        del a, b
        assert check(0, pool, set())
        torch._C._cuda_setCheckpointPoolState(0, state, [], [])
        assert check(0, pool, addresses)
        for address in addresses:
            torch._C._cuda_cudaCachingAllocator_raw_delete(address)
        assert check(0, pool, set())
        """
    )

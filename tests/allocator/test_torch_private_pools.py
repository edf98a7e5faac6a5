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
            kept = torch.full((12 * MiB,), 5, dtype=torch.uint8, device="cuda")
            gone = torch.empty(32 * MiB, dtype=torch.uint8, device="cuda")
        del gone
        assert torch.cuda.memory_reserved() == before + 44 * MiB
        del pool  # empties it
        assert torch.cuda.memory_reserved() == before + 12 * MiB
        assert kept.sum().item() == 5 * 12 * MiB
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


def test_a_pool_that_helps_out(torch_with_pool: TorchProcess) -> None:
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
        """
    )


def test_blocks_of_a_pool_that_does_not_split_are_segments(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        ordinary, whole = torch.cuda.MemPool(), torch.cuda.MemPool(no_split=True)
        sizes = (4 * MiB, 40, 4 * MiB, 21 * MiB)

        def allocate(pool):
            with torch.cuda.use_mem_pool(pool):
                return [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]

        def held():
            stats = torch.cuda.memory_stats()
            return stats["segment.all.current"], stats["reserved_bytes.all.current"]

        def events(*actions):
            (trace,) = torch.cuda.memory._snapshot()["device_traces"][:1]
            return [(e["addr"], e["size"]) for e in trace if e["action"] in actions]

        (count, reserved) = before = held()
        torch.cuda.memory._record_memory_history(stacks="python")
        tensors = allocate(whole)
        assert held() == (count + 4, reserved + 32 * MiB), held()

        segments = {segment["address"]: segment for segment in whole.snapshot()}
        ours = [segments.pop(tensor.data_ptr()) for tensor in tensors]
        assert not segments, segments
        assert [segment["total_size"] for segment in ours] == [size * MiB for size in (4, 2, 4, 22)]
        for size, segment in zip(sizes, ours):
            (block,) = segment["blocks"]
            assert block["size"] == segment["total_size"] and block["requested_size"] == size
            assert block["state"] == "active_allocated"
        ranges = [(segment["address"], segment["total_size"]) for segment in ours]
        assert events("segment_map", "segment_alloc") == ranges, ranges
        others = allocate(ordinary)
        assert len(whole.snapshot()) > len(ordinary.snapshot())
        del others, ordinary  # and its memory

        # A smaller request gets a free block whole.
        address = tensors.pop().data_ptr()
        with torch.cuda.use_mem_pool(whole):
            tensors.append(torch.empty(5 * MiB, dtype=torch.uint8, device="cuda"))
        assert tensors[-1].data_ptr() == address
        assert held() == (count + 4, reserved + 32 * MiB), held()
        now = [(segment["address"], segment["total_size"]) for segment in whole.snapshot()]
        assert sorted(now) == sorted(ranges), now
        del tensors, whole
        assert held() == before, held()
        assert set(ranges) <= set(events("segment_unmap", "segment_free"))
        torch.cuda.memory._record_memory_history(None)
        """
    )


def test_a_graph_and_checkpoints_in_a_pool_that_does_not_split(
    torch_with_pool: TorchProcess,
) -> None:
    torch_with_pool.run(
        """
        x = torch.ones(3 * MiB // 4, device="cuda")
        pool = torch.cuda.MemPool(no_split=True)

        def capture(function):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool.id):
                result = function()
            return graph, result

        first, a = capture(lambda: x + 1)
        state = torch._C._cuda_getCheckpointState(0, pool.id)
        second, b = capture(lambda: (a * 2) + 3)
        address = b.data_ptr()
        torch._C._cuda_setCheckpointPoolState(0, state, [b.untyped_storage()._cdata], [])
        del b  # its block was freed already
        third, c = capture(lambda: (a * 2) + 4)
        assert c.data_ptr() == address
        first.replay()
        third.replay()
        assert a.eq(2).all().item() and c.eq(8).all().item()
        assert all(len(segment["blocks"]) == 1 for segment in pool.snapshot())
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


def test_a_block_of_two_captured_streams_is_free_after_the_capture(
    torch_with_pool: TorchProcess,
) -> None:
    """As with torch's own allocator: in the graph it could be written before it was read."""
    torch_with_pool.run(
        """
        x, side = torch.ones(2 * MiB, device="cuda"), torch.cuda.Stream()
        for is_joined_before in (False, True):
            graph, following = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                main = torch.cuda.current_stream()
                shared = x + 1
                address = shared.data_ptr()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    doubled = shared * 2
                shared.record_stream(side)
                del shared
                if is_joined_before:
                    main.wait_stream(side)
                other = x + 3
                assert other.data_ptr() != address
                if not is_joined_before:
                    main.wait_stream(side)
                total = doubled + other
            with torch.cuda.graph(following, pool=graph.pool()):
                again = x + 5
            assert again.data_ptr() == address
            for value in (2, 6):
                x.fill_(value)
                graph.replay()
                following.replay()
                assert total.eq(2 * (value + 1) + value + 3).all().item()
                assert again.eq(value + 5).all().item()
            x.fill_(1)
        """
    )


def test_the_cache_is_emptied_while_a_graph_is_recorded(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x, unused = (torch.ones(8 * MiB, device="cuda") for _ in range(2))
        del unused
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.cuda.empty_cache()
            y = x + 1
            torch.cuda.empty_cache()
        x.fill_(3)
        graph.replay()
        assert y.eq(4).all().item()
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


CAPTURE_ON_TWO_STREAMS = """
def setting(value):
    torch._C._accelerator_setAllocatorSettings(f"graph_capture_record_stream_reuse:{value}")

def capture(join):
    '''Where a tensor lay that others use, and where later ones lie: before and after the join.'''
    own, others = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    source = torch.ones(MiB, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=own):
        used = source * 2
        results = []
        for other in others:
            other.wait_stream(own)
            with torch.cuda.stream(other):
                results.append(used + 1)
                used.record_stream(other)
        places = [used.data_ptr()]
        del used
        before = source * 5
        join(own, others)
        after = source * 7
        places += [before.data_ptr(), after.data_ptr()]
        for other in others:
            own.wait_stream(other)
        results.append(before + after)
    for value in (1.0, 3.0):
        source.fill_(value)
        graph.replay()
        assert all(result.eq(value * 2 + 1).all().item() for result in results[:2])
        assert results[2].eq(value * 12).all().item()
    return places
"""


def test_a_capture_reuses_what_it_has_waited_for(torch_with_pool: TorchProcess) -> None:
    """With torch's setting graph_capture_record_stream_reuse; the emulator sees every overlap."""
    torch_with_pool.run(
        CAPTURE_ON_TWO_STREAMS
        + """
def both(own, others):
    for other in others:
        own.wait_stream(other)

def through_each_other(own, others):
    others[1].wait_stream(others[0])
    own.wait_stream(others[1])

def one(own, others):
    own.wait_stream(others[0])

setting(True)
try:
    for join in (both, through_each_other):
        used, before, after = capture(join)
        assert used != before, "the others still use it"
        assert used == after, join
    used, before, after = capture(one)
    assert used not in (before, after), "one of the others still uses it"
finally:
    setting(False)
used, before, after = capture(both)
assert used not in (before, after), "it is off"
"""
    )


def test_a_capture_leaves_alone_what_was_used_before_it(torch_with_pool: TorchProcess) -> None:
    """What streams did before the capture is no part of the graph and may not be done yet."""
    torch_with_pool.run(
        CAPTURE_ON_TWO_STREAMS
        + """
pool = torch.cuda.MemPool()
own, other = torch.cuda.Stream(), torch.cuda.Stream()
with torch.cuda.stream(own), torch.cuda.use_mem_pool(pool):
    early = torch.ones(MiB, device="cuda")
source = torch.ones(MiB, device="cuda")
other.wait_stream(own)
other.wait_stream(torch.cuda.current_stream())
setting(True)
try:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(other):
        total = early.sum()
    early.record_stream(other)
    place = early.data_ptr()
    with torch.cuda.graph(graph, pool=pool.id, stream=own):
        other.wait_stream(own)
        with torch.cuda.stream(other):
            source.mul_(1)
        del early
        own.wait_stream(other)
        result = source * 2
    assert result.data_ptr() != place
finally:
    setting(False)
graph.replay()
assert total.item() == MiB
assert result.eq(2).all().item()
"""
    )

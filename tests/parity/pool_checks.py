"""Checks of torch.cuda.MemPool, of CUDA graphs and of what torch.compile asks of an allocator."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import MIB, check, check_each
from memory_checks import tensor
from torch.cuda import graphs, memory


def pool_of(address: int) -> Any:
    return next(
        segment["segment_pool_id"]
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["address"] == address
    )


@check_each(
    {
        "torch.cuda.MemPool": lambda: None,
        "torch.cuda.use_mem_pool": lambda: None,
        "torch.cuda.MemPool.id": lambda: None,
    }
)
def _mem_pool(target: Callable[[], None]) -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    del x
    y = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    assert y.data_ptr() != address, "memory of the pool is given to others"
    with torch.cuda.use_mem_pool(pool):
        x = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    assert x.data_ptr() == address, "the pool keeps no memory"
    assert pool_of(address) == pool.id, "the memory is not the pool's"


@check("torch.cuda.MemPool.snapshot")
def _pool_snapshot() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = tensor(3 * MIB)
    y = tensor(3 * MIB)
    addresses = {block["address"] for segment in pool.snapshot() for block in segment["blocks"]}
    assert x.data_ptr() in addresses, "does not show the pool's block"
    assert y.data_ptr() not in addresses, "shows other blocks"


@check("torch.cuda.MemPool.use_count")
def _use_count() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        assert pool.use_count() == 2, "does not count"
    assert pool.use_count() == 1, "does not count"


@check("torch.cuda.MemPool(allocator)")
def _pool_allocator() -> None:
    path = os.environ["SPILLOVER_PARITY_PLUG_IN"]
    allocator = memory.CUDAPluggableAllocator(path, "test_malloc", "test_free")
    pool = torch.cuda.MemPool(allocator.allocator())
    with torch.cuda.use_mem_pool(pool):
        x = tensor(3 * MIB)
    assert x.sum().item() == 0
    assert pool_of(x.data_ptr()) == pool.id, "the memory is not the pool's"


def _fill(size_bytes: int, **options: bool) -> torch.cuda.MemPool:
    """A pool that holds that much idle memory."""
    pool = torch.cuda.MemPool(**options)
    with torch.cuda.use_mem_pool(pool):
        x = tensor(size_bytes)
    del x
    return pool


@check("torch.cuda.MemPool(use_on_oom=True)")
def _use_on_oom() -> None:
    size = torch.cuda.get_device_properties(0).total_memory * 3 // 4
    pool = _fill(size)
    try:
        tensor(size)
    except RuntimeError:
        pass
    else:
        raise AssertionError("an ordinary pool's memory is given to others")
    del pool
    torch.cuda.empty_cache()
    pool = _fill(size, use_on_oom=True)
    assert tensor(size).sum().item() == 0
    del pool


@check("torch.cuda.MemPool(no_split=True)")
def _no_split() -> None:
    pool = torch.cuda.MemPool(no_split=True)
    with torch.cuda.use_mem_pool(pool):
        held = [tensor(4 * MIB), tensor(4 * MIB)]
    counts = [len(segment["blocks"]) for segment in pool.snapshot()]
    assert counts == [1, 1], "blocks share a segment"
    del held


def capture(graph: torch.cuda.CUDAGraph, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Capture ``out = source * 2 + 1``, with a temporary tensor; gives source and out."""
    source = torch.zeros(MIB, device="cuda")
    with torch.cuda.graph(graph, **options):
        out = source * 2 + 1
    return source, out


def is_replayed(graph: Any, source: torch.Tensor, out: torch.Tensor) -> None:
    for value in (3.0, 5.0):
        source.fill_(value)
        graph.replay()
        assert out.sum().item() == (2 * value + 1) * MIB, "computes something else"


@check_each(
    {
        "torch.cuda.CUDAGraph": lambda: torch.cuda.CUDAGraph,
        "torch.cuda.graph": lambda: torch.cuda.CUDAGraph,
    }
)
def _graph(target: Callable[[], type]) -> None:
    graph = target()()
    source, out = capture(graph)
    # Its memory is not given to others.
    others = [torch.full((MIB,), 7.0, device="cuda") for _ in range(8)]
    assert out.data_ptr() not in {x.data_ptr() for x in others}, "memory of the graph is reused"
    is_replayed(graph, source, out)
    assert all(x[0].item() == 7.0 for x in others), "a replay writes to others' memory"


@check("torch.Tensor.record_stream (captured)")
def _captured_record_stream() -> None:
    source, side = torch.zeros(MIB, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shared = source + 1
        address = shared.data_ptr()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = shared * 2
        shared.record_stream(side)
        del shared
        other = source - 1
        assert other.data_ptr() != address, "memory is reused before the other stream has read it"
        torch.cuda.current_stream().wait_stream(side)
        out = doubled - (other - source)  # 2 * (source + 1) + 1
        out -= 2
    is_replayed(graph, source, out)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=graph.pool()):
        again = source + 1
    assert again.data_ptr() == address, "memory is not reused after the capture"


@check("torch.cuda.empty_cache (captured)")
def _captured_empty_cache() -> None:
    source, unused = torch.zeros(MIB, device="cuda"), torch.zeros(8 * MIB, device="cuda")
    del unused
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cuda.empty_cache()
        out = source * 2 + 1
        torch.cuda.empty_cache()
    is_replayed(graph, source, out)


@check("torch.accelerator.Graph")
def _accelerator_graph() -> None:
    source = torch.zeros(MIB, device="cuda")
    graph = torch.accelerator.Graph()
    torch.cuda.synchronize()
    with torch.Stream(device="cuda"), graph:
        out = source * 2 + 1
    torch.cuda.synchronize()
    is_replayed(graph, source, out)


@check("torch.cuda.graph_pool_handle")
def _pool_handle() -> None:
    pool = torch.cuda.graph_pool_handle()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    source, out = capture(first, pool=pool)
    address = out.data_ptr()
    del out
    source, out = capture(second, pool=pool)
    assert out.data_ptr() == address, "two graphs of one pool share no memory"
    is_replayed(second, source, out)


@check("torch.cuda.is_current_stream_capturing")
def _is_capturing() -> None:
    assert not torch.cuda.is_current_stream_capturing()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(4, device="cuda")
        assert torch.cuda.is_current_stream_capturing(), "is not seen"


@check("torch.cuda.make_graphed_callables")
def _graphed_callables() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16, device="cuda")
    x = torch.randn(4, 16, device="cuda", requires_grad=True)
    expected = layer(x).detach().clone()
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    out = graphed(x)
    out.sum().backward()
    assert torch.equal(out, expected), "computes something else"
    assert x.grad is not None, "has no gradient"


@check_each(
    {
        f"torch.cuda.graphs.register_graph_{name}_hook": lambda name=name: (
            name,
            getattr(graphs, f"register_graph_{name}_hook"),
        )
        for name in (
            "capture_start",
            "capture_end",
            "instantiate",
            "replay_start",
            "replay_end",
            "destroy",
        )
    }
)
def _hook(target: Callable[[], tuple[str, Callable[[Any], Any]]]) -> None:
    name, register = target()
    calls: list[Any] = []
    handle = register(calls.append)
    try:
        graph = torch.cuda.CUDAGraph()
        source, out = capture(graph)
        is_replayed(graph, source, out)
        del graph
    finally:
        handle.remove()
    assert len(calls) == (2 if name.startswith("replay") else 1), "is not called"


@check("torch.cuda.export_dot")
def _export_dot() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        graph = torch.cuda.CUDAGraph()
        graph.register_capture_end_hook(graphs.export_dot(str(path)))
        capture(graph)
        assert "digraph" in path.read_text(), "writes nothing"


@check("torch.cuda.export_graph_data")
def _export_data() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pickle"
        graph = torch.cuda.CUDAGraph()
        graph.register_post_instantiate_hook(graphs.export_graph_data(str(path)))
        capture(graph)
        assert pickle.loads(path.read_bytes()), "writes nothing"


@check("torch._C._cuda_checkPoolLiveAllocations")
def _live_allocations() -> None:
    graph = torch.cuda.CUDAGraph()
    _, out = capture(graph)

    def live(addresses: set[int]) -> bool:
        return torch._C._cuda_checkPoolLiveAllocations(0, graph.pool(), addresses)

    assert live({out.data_ptr()}), "does not know what lives"
    assert not live(set()), "does not know what lives"


@check_each(
    {
        "torch._C._cuda_getCheckpointState": lambda: None,
        "torch._C._cuda_setCheckpointPoolState": lambda: None,
    }
)
def _checkpoint(target: Callable[[], None]) -> None:
    graph = torch.cuda.CUDAGraph()
    _, out = capture(graph)
    address = out.data_ptr()
    state = torch._C._cuda_getCheckpointState(0, graph.pool())
    del out
    torch._C._cuda_setCheckpointPoolState(0, state, [], [])
    assert torch._C._cuda_checkPoolLiveAllocations(0, graph.pool(), {address}), "restores nothing"
    torch._C._cuda_cudaCachingAllocator_raw_delete(address)

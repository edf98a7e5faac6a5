"""Snapshots and history of the pool as torch's own tools read them."""

from __future__ import annotations

from pathlib import Path

from torch_process import TorchProcess

OWN_ALLOCATOR = (
    (Path(__file__).parent / "own_allocator.py")
    .read_text()
    .replace("from __future__ import annotations\n", "")
)


def test_segments_and_blocks_add_up(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        small = torch.empty(1000, dtype=torch.uint8, device="cuda")
        large = torch.empty(25 * MiB, dtype=torch.uint8, device="cuda")
        gone = torch.empty(5 * MiB, dtype=torch.uint8, device="cuda")
        del gone
        segments = torch.cuda.memory_snapshot()
        stats = torch.cuda.memory_stats()
        assert sum(s["total_size"] for s in segments) == stats["reserved_bytes.all.current"]
        assert sum(s["allocated_size"] for s in segments) == stats["allocated_bytes.all.current"]
        assert sum(s["active_size"] for s in segments) == stats["active_bytes.all.current"]
        assert sum(s["requested_size"] for s in segments) == stats["requested_bytes.all.current"]
        live = {}
        for segment in segments:
            assert segment["segment_type"] in ("small", "large")
            assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    live[block["address"]] = block["requested_size"]
        assert live == {small.data_ptr(): 1000, large.data_ptr(): 25 * MiB}, live
        """
    )


def test_history_and_viewer(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import pickle, time
        older = torch.empty(2 * MiB, dtype=torch.uint8, device="cuda")
        torch.cuda.memory._record_memory_history(max_entries=6, stacks="python")
        assert torch._C._cuda_isHistoryEnabled()

        def allocate_here():
            return torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")

        kept = allocate_here()
        del older
        snapshot = torch.cuda.memory._snapshot()
        trace = snapshot["device_traces"][0]
        trace = [entry for entry in trace if "segment" not in entry["action"]]
        actions = [(entry["action"], entry["size"]) for entry in trace]
        assert actions == [
            ("alloc", 3 * MiB), ("free_requested", 2 * MiB), ("free_completed", 2 * MiB)
        ], actions
        assert abs(trace[0]["time_us"] / 1e6 - time.time()) < 60
        assert "allocate_here" in [frame["name"] for frame in trace[0]["frames"]]
        blocks = {
            block["address"]: block for s in snapshot["segments"] for block in s["blocks"]
        }
        names = [frame["name"] for frame in blocks[kept.data_ptr()]["frames"]]
        assert "allocate_here" in names

        # Old entries give way to new ones.
        for _ in range(10):
            allocate_here()
        assert len(torch.cuda.memory._snapshot()["device_traces"][0]) == 6

        from torch.cuda import _memory_viz
        assert "<html" in _memory_viz.trace_plot(snapshot).lower() or "script" in (
            _memory_viz.trace_plot(snapshot)
        )
        pickle.dumps(snapshot)

        torch.cuda.memory._record_memory_history(enabled=None)
        allocate_here()
        assert torch.cuda.memory._snapshot()["device_traces"][0] == []
        assert not torch._C._cuda_isHistoryEnabled()
        """
    )


def test_out_of_memory_is_in_the_history(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        torch.cuda.memory._record_memory_history(stacks="python")
        try:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pass
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        assert [entry["action"] for entry in trace] == ["oom"], trace
        assert trace[0]["size"] == 1 << 40
        assert 0 < trace[0]["device_free"] <= 512 * MiB
        torch.cuda.memory._record_memory_history(enabled=None)
        """
    )


def test_a_snapshot_is_an_event_of_later_ones(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        torch.cuda.memory._record_memory_history()
        held = torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")
        last = [torch.cuda.memory._snapshot()["device_traces"][0][-1] for _ in range(2)]
        assert [entry["action"] for entry in last] == ["alloc", "snapshot"], last
        assert last[1]["size"] == 3 * MiB
        torch.cuda.memory._record_memory_history(enabled=None)
        """
    )


def test_segments_are_in_the_history(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def events(*actions):
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
            return [entry for entry in trace if entry["action"] in actions]

        older = torch.empty(8 * MiB, dtype=torch.uint8, device="cuda")
        torch.cuda.memory._record_memory_history(context="all", stacks="python")
        x = torch.empty(40 * MiB, dtype=torch.uint8, device="cuda")
        address = x.data_ptr()
        mapped = events("segment_map", "segment_alloc")
        assert sum(entry["size"] for entry in mapped) == 40 * MiB, mapped
        assert mapped[0]["addr"] <= address < mapped[0]["addr"] + mapped[0]["size"]
        order = [e["action"] for e in events("segment_map", "segment_alloc", "alloc")]
        assert order == [e["action"] for e in mapped] + ["alloc"], order
        again = torch.empty(MiB, dtype=torch.uint8, device="cuda")
        count = len(events("segment_map", "segment_alloc"))
        del again
        torch.empty(MiB, dtype=torch.uint8, device="cuda")
        assert len(events("segment_map", "segment_alloc")) == count  # from what is mapped already
        del x
        assert events("segment_unmap", "segment_free") == []
        torch.cuda.empty_cache()
        unmapped = events("segment_unmap", "segment_free")
        assert sum(entry["size"] for entry in unmapped) >= 40 * MiB, unmapped
        assert "empty_cache" in [frame["name"] for frame in unmapped[-1]["frames"]]

        torch.cuda.memory._record_memory_history(
            skip_actions=["segment_unmap", "segment_free"], clear_history=True
        )
        y = torch.empty(40 * MiB, dtype=torch.uint8, device="cuda")
        del y
        torch.cuda.empty_cache()
        assert events("segment_map", "segment_alloc")
        assert not events("segment_unmap", "segment_free")
        torch.cuda.memory._record_memory_history(enabled=None)
        """
    )


def test_segments_without_caching_are_in_the_history(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        x = torch.empty(40 * MiB, dtype=torch.uint8, device="cuda")
        torch.cuda.memory._record_memory_history()
        torch.cuda.caching_allocator_enable(False)
        del x
        torch.cuda.caching_allocator_enable(True)
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(enabled=None)
        assert trace[-1]["action"] in ("segment_unmap", "segment_free"), trace
        """
    )


def test_texts_of_the_user_are_in_the_history(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import threading
        memory = torch.cuda.memory

        def allocate():
            return torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")

        assert memory._get_memory_metadata() == ""
        memory._record_memory_history()
        memory._set_memory_metadata("step 1")
        assert memory._get_memory_metadata() == "step 1"
        marked = allocate()
        other = []
        thread = threading.Thread(target=lambda: other.append(allocate()))
        thread.start()
        thread.join()
        memory._set_memory_metadata("")
        if hasattr(memory, "_annotate_tensor"):  # since torch 2.14
            assert torch._C._cuda_memoryMetadataSupported()
            memory._annotate_tensor(marked[MiB:], "saved for backward")
        trace = memory._snapshot()["device_traces"][0]
        texts = {
            (entry["action"], entry["addr"]): entry["user_metadata"]
            for entry in trace
            if entry["action"] in ("alloc", "annotate")
        }
        expected = {("alloc", marked.data_ptr()): "step 1", ("alloc", other[0].data_ptr()): ""}
        if hasattr(memory, "_annotate_tensor"):
            expected["annotate", marked.data_ptr()] = "saved for backward"
        assert texts == expected, texts
        memory._record_memory_history(enabled=None)
        """
    )


def test_private_pools_are_in_the_history(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            older = torch.empty(2 * MiB, dtype=torch.uint8, device="cuda")
        torch.cuda.memory._record_memory_history(stacks="python")
        try:
            kept = torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")
            with torch.cuda.use_mem_pool(pool):
                pooled = torch.empty(25 * MiB, dtype=torch.uint8, device="cuda")
                try:
                    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
                except torch.OutOfMemoryError:
                    pass
            del older, pooled, kept
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        found = {(e["action"], e["size"] // MiB, tuple(e["pool_id"])) for e in trace}
        own = tuple(pool.id)
        expected = {
            ("alloc", 3, (0, 0)), ("alloc", 25, own), ("oom", 1 << 20, own),
            ("free_requested", 2, own), ("free_requested", 25, own), ("free_requested", 3, (0, 0)),
        }
        assert expected <= found, found
        mapped = {"segment_map", "segment_alloc"}  # With memory at fixed addresses the latter.
        assert {e[2] for e in found if e[0] in mapped} == {(0, 0), own}, found
        """
    )


def test_a_block_that_a_pool_has_lent_is_the_pools(torch_with_pool: TorchProcess) -> None:
    """And what a pool that is gone leaves behind stays its own to the last."""
    torch_with_pool.run(
        """
        pool = torch.cuda.MemPool(use_on_oom=True)
        with torch.cuda.use_mem_pool(pool):
            del_later = torch.empty(300 * MiB, dtype=torch.uint8, device="cuda")
        own = tuple(pool.id)
        del del_later
        torch.cuda.memory._record_memory_history(stacks="python")
        try:
            lent = torch.empty(300 * MiB, dtype=torch.uint8, device="cuda")
            del pool
            torch.cuda.empty_cache()
            torch.cuda.empty_cache()
            segments = torch.cuda.memory_snapshot()
            assert [s["segment_pool_id"] for s in segments] == [own], segments
            del lent
            torch.cuda.empty_cache()
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        of_blocks = [(e["action"], tuple(e["pool_id"])) for e in trace]
        names = ["alloc", "free_requested", "free_completed"]
        assert [entry for entry in of_blocks if entry[0] in names] == [(n, own) for n in names]
        segments = [(e["action"].partition("_")[2], tuple(e["pool_id"])) for e in trace
                    if "segment" in e["action"]]
        assert segments in ([("unmap", own)], [("free", own)]), segments
        """
    )


def test_which_segments_grow(torch_with_pool: TorchProcess) -> None:
    """Those that are mapped, as torch's own with its setting expandable_segments."""
    torch_with_pool.run(
        OWN_ALLOCATOR
        + """
import os
pool = torch.cuda.MemPool(OwnAllocator().allocator)
with torch.cuda.use_mem_pool(pool):
    inside = torch.empty(3 * MiB, device="cuda")
outside = torch.empty(3 * MiB, device="cuda")
is_virtual = os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1"
assert [s["is_expandable"] for s in pool.snapshot()] == [False]
others = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == (0, 0)]
assert [s["is_expandable"] for s in others] == [is_virtual], others
del inside, outside, pool
torch.cuda.empty_cache()
"""
    )


def test_regions_are_in_the_history(torch_with_pool: TorchProcess) -> None:
    """As many of them, the latest, as are kept."""
    torch_with_pool.run(
        """
        memory = torch.cuda.memory
        torch.ones(1, device="cuda")
        with torch.profiler.record_function("before"):
            pass
        memory._record_memory_history(max_entries=4, global_record_annotations=True)
        try:
            for i in range(10):
                with torch.profiler.record_function(f"region {i}"):
                    torch.empty(1, device="cuda")
            annotations = memory._snapshot()["external_annotations"]
        finally:
            memory._record_memory_history(enabled=None)
        assert [(a["name"], a["stage"]) for a in annotations] == [
            ("region 8", "START"), ("region 8", "END"), ("region 9", "START"), ("region 9", "END")
        ], annotations
        assert all(a["device"] == 0 for a in annotations)
        assert annotations[0]["time_us"] <= annotations[3]["time_us"]
        with torch.profiler.record_function("after"):
            pass
        assert memory._snapshot()["external_annotations"] == []
        """
    )

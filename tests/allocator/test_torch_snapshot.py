"""Snapshots and history of the pool as torch's own tools read them."""

from __future__ import annotations

from torch_process import TorchProcess


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
        trace = [entry for entry in trace if entry["action"] != "segment_map"]
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
        mapped = events("segment_map")
        assert sum(entry["size"] for entry in mapped) == 40 * MiB, mapped
        assert mapped[0]["addr"] <= address < mapped[0]["addr"] + mapped[0]["size"]
        order = [entry["action"] for entry in events("segment_map", "alloc")]
        assert order == ["segment_map"] * len(mapped) + ["alloc"], order
        again = torch.empty(MiB, dtype=torch.uint8, device="cuda")
        count = len(events("segment_map"))
        del again
        torch.empty(MiB, dtype=torch.uint8, device="cuda")
        assert len(events("segment_map")) == count  # from what is mapped already
        del x
        assert events("segment_unmap") == []
        torch.cuda.empty_cache()
        unmapped = events("segment_unmap")
        assert sum(entry["size"] for entry in unmapped) >= 40 * MiB, unmapped
        assert "empty_cache" in [frame["name"] for frame in unmapped[-1]["frames"]]

        torch.cuda.memory._record_memory_history(
            skip_actions=["segment_unmap"], clear_history=True
        )
        y = torch.empty(40 * MiB, dtype=torch.uint8, device="cuda")
        del y
        torch.cuda.empty_cache()
        assert events("segment_map") and not events("segment_unmap")
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
        assert trace[-1]["action"] == "segment_unmap", trace
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

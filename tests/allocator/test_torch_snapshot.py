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
        actions = [(entry["action"], entry["size"]) for entry in trace]
        assert actions[:3] == [
            ("alloc", 3 * MiB), ("free_requested", 2 * MiB), ("free_completed", 2 * MiB)
        ], actions
        assert actions[3][0] == "snapshot"
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
        assert [entry["action"] for entry in trace] == ["oom", "snapshot"], trace
        assert trace[0]["size"] == 1 << 40
        assert 0 < trace[0]["device_free"] <= 512 * MiB
        torch.cuda.memory._record_memory_history(enabled=None)
        """
    )

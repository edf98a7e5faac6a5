"""torch.cuda's memory functions on Spillover's pool, through the full adapter."""

from __future__ import annotations

from torch_process import TorchProcess


def test_counters_and_peaks(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        assert torch.cuda.get_allocator_backend() == "spillover"
        assert torch.cuda.memory_allocated() == 0
        a = torch.empty(10 * MiB, dtype=torch.uint8, device="cuda")
        b = torch.empty(1000, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_allocated() == 10 * MiB + 1024
        assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated()
        del a
        assert torch.cuda.memory_allocated() == 1024
        assert torch.cuda.max_memory_allocated() == 10 * MiB + 1024
        assert torch.cuda.max_memory_reserved() >= 10 * MiB

        stats = torch.cuda.memory_stats()
        assert stats["requested_bytes.all.current"] == 1000
        assert stats["requested_bytes.all.peak"] == 10 * MiB + 1000
        assert stats["allocation.all.allocated"] == 2
        assert stats["allocation.all.freed"] == 1
        assert stats["allocation.small_pool.current"] == 1
        assert stats["allocation.large_pool.freed"] == 1
        assert stats["num_ooms"] == 0
        for name in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes",
                     "allocation", "segment", "active"):
            for field in ("current", "peak", "allocated", "freed"):
                parts = [stats[f"{name}.{kind}.{field}"] for kind in ("small_pool", "large_pool")]
                if field != "peak":
                    assert sum(parts) == stats[f"{name}.all.{field}"], (name, field)
            all_of = {field: stats[f"{name}.all.{field}"] for field in ("current", "allocated",
                                                                       "freed", "peak")}
            assert all_of["allocated"] - all_of["freed"] == all_of["current"], name
            assert all_of["peak"] >= all_of["current"], name
        ours = allocator.stats()
        for key, value in ours.items():
            assert stats[key] == value, key
        assert "Allocated memory" in torch.cuda.memory_summary()
        assert torch.cuda.mem_get_info()[1] == 512 * MiB
        allocator.check_invariants()
        """
    )


def test_resets_and_empty_cache(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        a = torch.empty(30 * MiB, dtype=torch.uint8, device="cuda")
        keep = torch.empty(100, device="cuda")
        del a
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == 512
        torch.cuda.reset_accumulated_memory_stats()
        stats = torch.cuda.memory_stats()
        assert stats["allocation.all.allocated"] == stats["allocation.all.freed"] == 0

        free_before = torch.cuda.mem_get_info()[0]
        reserved_before = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        given_back = reserved_before - torch.cuda.memory_reserved()
        assert given_back >= 30 * MiB
        assert torch.cuda.mem_get_info()[0] - free_before == given_back
        del keep
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        allocator.check_invariants()
        """
    )


def test_accelerator_functions(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        a = torch.empty(20 * MiB, dtype=torch.uint8, device="cuda")
        assert torch.accelerator.memory_allocated() == 20 * MiB
        assert torch.accelerator.memory_reserved() == torch.cuda.memory_reserved()
        del a
        assert torch.accelerator.max_memory_allocated() == 20 * MiB
        torch.accelerator.reset_peak_memory_stats()
        assert torch.accelerator.max_memory_allocated() == 0
        torch.accelerator.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        assert torch.accelerator.memory_stats()["allocation.all.freed"] == 1
        """
    )


def test_raw_interface(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        stream = torch.cuda.Stream()
        address = torch.cuda.caching_allocator_alloc(5 * MiB, stream=stream)
        assert torch.cuda.memory_allocated() == 5 * MiB
        torch.cuda.caching_allocator_delete(address)
        assert torch.cuda.memory_allocated() == 0

        a = torch.empty(100, device="cuda")
        assert a.data_ptr() % 512 == 0
        empty = torch.empty(0, device="cuda")
        assert empty.data_ptr() == 0
        assert torch.cuda.memory_allocated() == 512

        # A storage keeps its memory through a release and a resize.
        a.untyped_storage().resize_(1 << 20)
        assert torch.cuda.memory_allocated() == MiB
        a.untyped_storage().resize_(0)
        assert torch.cuda.memory_allocated() == 0
        """
    )


def test_profiler_sees_allocations(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        from torch.profiler import ProfilerActivity, profile
        torch.ones(1, device="cuda")
        before = torch.ones(1 << 20, device="cuda")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            inside = torch.empty(1 << 21, dtype=torch.uint8, device="cuda")
            del inside, before
        sizes = {event.key: event.self_device_memory_usage for event in record.key_averages()}
        assert sizes["aten::empty"] == 1 << 21, sizes
        assert sum(sizes.values()) == -(1 << 22), sizes
        """
    )


def test_an_interval_leaves_peaks_alone(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        from threading import Thread
        from spillover.allocator import _pool

        def use(size):
            torch.empty(size, dtype=torch.uint8, device="cuda")

        _pool.take_interval(0)
        keep = torch.empty(2 * MiB, dtype=torch.uint8, device="cuda")
        use(30 * MiB)
        assert _pool.take_interval(0)[0::2] == (2 * MiB, 32 * MiB)
        assert torch.cuda.max_memory_allocated() == 32 * MiB
        use(10 * MiB)
        assert _pool.take_interval(0)[2] == 12 * MiB
        assert torch.cuda.max_memory_allocated() == 32 * MiB
        assert torch.cuda.memory_stats()["requested_bytes.all.peak"] == 32 * MiB
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 2 * MiB
        _pool.take_interval(0)
        use(5 * MiB)
        assert torch.cuda.max_memory_allocated() == 7 * MiB

        # What other threads have counted is neither lost nor counted twice.
        torch.cuda.reset_peak_memory_stats()
        for size in (1000, 20 * MiB, 1000):
            thread = Thread(target=use, args=(size,))
            thread.start()
            thread.join()
            _pool.take_interval(0)
            _pool.take_interval(0)
        assert torch.cuda.max_memory_allocated() == 22 * MiB
        assert torch.cuda.memory_allocated() == 2 * MiB
        assert _pool.take_interval(0)[0::2] == (2 * MiB, 2 * MiB)
        """
    )

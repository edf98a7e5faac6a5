"""torch's switches that stop caching, with the pool."""

from __future__ import annotations

from collections.abc import Callable

from torch_process import TorchProcess


def test_without_caching_each_tensor_has_memory_of_its_own(torch_with_pool: TorchProcess) -> None:
    """It comes from the driver, goes back there when freed, and the pool knows nothing of it."""
    torch_with_pool.run(
        """
        def counted():
            stats = torch.cuda.memory_stats()
            return {key: stats[f"{key}.all.allocated"] for key in ("allocation", "requested_bytes")}

        free_bytes = torch.cuda.mem_get_info
        kept = torch.ones(32 * MiB, dtype=torch.uint8, device="cuda")
        torch.ones(64 * MiB, dtype=torch.uint8, device="cuda")
        torch.cuda.caching_allocator_enable(False)
        try:
            assert torch.cuda.memory_reserved() <= 32 * MiB, "what was idle has gone back"
            before, free_before = counted(), free_bytes()[0]
            a = torch.ones(32 * MiB, dtype=torch.uint8, device="cuda")
            b = torch.ones(16 * MiB, dtype=torch.uint8, device="cuda")
            late = torch.ones(16 * MiB, dtype=torch.uint8, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                total = b.sum()
            b.record_stream(side)
            assert free_bytes()[0] <= free_before - 64 * MiB
            assert counted() == before
            del a
            assert free_bytes()[0] > free_before - 64 * MiB
            del b
            with torch.cuda.stream(side):
                assert total.item() == 16 * MiB
            del total
            pointer = torch.cuda.caching_allocator_alloc(8 * MiB)
            torch.cuda.caching_allocator_delete(pointer)
            assert free_bytes()[0] <= free_before - 16 * MiB
            del kept
            assert torch.cuda.memory_reserved() == 0, "what the pool had handed out went back, too"
        finally:
            torch.cuda.caching_allocator_enable(True)
        assert late.sum().item() == 16 * MiB
        cached = torch.ones(32 * MiB, dtype=torch.uint8, device="cuda")
        free_before = free_bytes()[0]
        del late
        assert free_bytes()[0] >= free_before + 16 * MiB, "it is freed where it comes from"
        del cached
        assert torch.cuda.memory_reserved() >= 32 * MiB, "it is cached again"
        """
    )


def test_out_of_memory_without_caching(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def fails(size_bytes):
            try:
                torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError as error:
                return str(error)
            raise AssertionError("no error")

        assert "caching" not in fails(1 << 40)
        torch.cuda.caching_allocator_enable(False)
        try:
            text = fails(1 << 40)
            assert text.startswith("CUDA out of memory. Tried to allocate 1024.00 GiB"), text
            assert "caching is switched off" in text, text
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                x = torch.ones(256 * MiB, dtype=torch.uint8, device="cuda")
            assert torch.cuda.memory_allocated() == 256 * MiB, "a private pool is the pool's"
            del x, pool
            torch.empty(400 * MiB, dtype=torch.uint8, device="cuda")
        finally:
            torch.cuda.caching_allocator_enable(True)
        assert torch.ones(3, device="cuda").sum().item() == 3
        """
    )


def test_torchs_variable_against_caching(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import spillover
        import torch
        assert spillover.allocator.install(adapter="full")
        torch.ones(32 << 20, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() == 0
        """,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )

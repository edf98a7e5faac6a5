"""torch's switches that stop caching, with the pool."""

from __future__ import annotations

from collections.abc import Callable

from torch_process import TorchProcess


def test_without_caching_memory_goes_back_at_once(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def reserved():
            return torch.cuda.memory_reserved()

        kept = torch.ones(4 * MiB, dtype=torch.uint8, device="cuda")
        torch.ones(64 * MiB, dtype=torch.uint8, device="cuda")
        assert reserved() >= 68 * MiB
        torch.cuda.caching_allocator_enable(False)
        try:
            assert reserved() <= 4 * MiB, "what was idle has gone back"
            free_bytes = torch.cuda.mem_get_info()[0]
            a = torch.ones(32 * MiB, dtype=torch.uint8, device="cuda")
            b = torch.ones(16 * MiB, dtype=torch.uint8, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                total = b.sum()
            b.record_stream(side)
            held = reserved()
            del a
            assert reserved() <= held - 32 * MiB
            del b
            assert reserved() <= held - 48 * MiB
            with torch.cuda.stream(side):
                assert total.item() == 16 * MiB
            del total
            pointer = torch.cuda.caching_allocator_alloc(8 * MiB)
            torch.cuda.caching_allocator_delete(pointer)
            assert torch.cuda.mem_get_info()[0] == free_bytes
            assert kept.sum().item() == 4 * MiB
        finally:
            torch.cuda.caching_allocator_enable(True)
        torch.ones(32 * MiB, dtype=torch.uint8, device="cuda")
        assert reserved() >= 36 * MiB, "it is cached again"
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

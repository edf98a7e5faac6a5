"""Running out of memory through torch: the error, its text, the limit, and going on afterwards."""

from __future__ import annotations

import pytest
from torch_process import TorchProcess


def test_error_and_recovery(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        held = torch.empty(300 * MiB, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(400 * MiB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            message = str(error)
        else:
            raise AssertionError("no error")
        assert isinstance(torch.OutOfMemoryError("x"), RuntimeError)
        assert message.startswith("CUDA out of memory. Tried to allocate 400.00 MiB. GPU 0 has"), (
            message
        )
        assert "512.00 MiB" in message
        assert "300.00 MiB is allocated by PyTorch" in message
        assert torch.cuda.memory_stats()["num_ooms"] == 1
        assert torch.cuda.memory_allocated() == 300 * MiB
        allocator.check_invariants()

        # What is left still serves, and the same request does once there is room.
        small = torch.ones(100 * MiB, dtype=torch.uint8, device="cuda")
        assert small[-1].item() == 1
        del held, small
        again = torch.ones(400 * MiB, dtype=torch.uint8, device="cuda")
        assert again[-1].item() == 1
        allocator.check_invariants()
        """
    )


@pytest.mark.virtual_memory
def test_what_could_be_put_together_is_not_fragmented(torch_with_pool: TorchProcess) -> None:
    """Memory was not enough: the text must not blame holes that the pool would have filled."""
    torch_with_pool.run(
        """
        held = [torch.empty(60 * MiB, dtype=torch.uint8, device="cuda") for _ in range(6)]
        del held[::2]
        try:
            torch.empty(400 * MiB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "332.00 MiB is free; the largest free block has 332.00 MiB (0 %" in str(error), (
                error
            )
        else:
            raise AssertionError("no error")
        fits = torch.ones(330 * MiB, dtype=torch.uint8, device="cuda")
        assert fits[-1].item() == 1
        """
    )


def test_cached_segments_are_given_back_before_failing(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        blocks = [torch.empty(50 * MiB, dtype=torch.uint8, device="cuda") for _ in range(8)]
        del blocks
        whole = torch.empty(450 * MiB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_allocated() == 450 * MiB
        allocator.check_invariants()
        """
    )


def test_fraction_limits_the_pool(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        torch.cuda.set_per_process_memory_fraction(0.25)
        assert torch.cuda.get_per_process_memory_fraction() == 0.25
        a = torch.empty(100 * MiB, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(100 * MiB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "128.00 MiB" in str(error), error
            assert "set_per_process_memory_fraction" in str(error), error
        else:
            raise AssertionError("no error")
        torch.cuda.set_per_process_memory_fraction(1.0)
        b = torch.empty(100 * MiB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() >= 200 * MiB
        """
    )


def test_observers_and_absurd_sizes(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        seen = []
        torch.ones(1, device="cuda")
        torch._C._cuda_attach_out_of_memory_observer(
            lambda *facts, seen=seen: seen.append(facts)
        )
        for size in (1 << 40, (1 << 62) + 5):
            try:
                torch.empty(size, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError:
                pass
            else:
                raise AssertionError("no error")
        # The second is refused before the pool is asked.
        assert len(seen) == 1, seen
        device, wanted, total, free = seen[0]
        assert (device, wanted, total) == (0, 1 << 40, 512 * MiB), seen
        assert 0 < free <= total
        """
    )


def test_the_text_says_what_holds_the_memory_and_what_helps(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def failure(size):
            try:
                torch.empty(size, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError as error:
                return str(error)
            raise AssertionError("no error")

        allocator.configure(limit="256MiB")
        try:
            with allocator.tag("weights"):
                weights = torch.empty(60 * MiB, dtype=torch.uint8, device="cuda")
            with torch.cuda.use_mem_pool(pool := torch.cuda.MemPool()):
                pooled = torch.empty(40 * MiB, dtype=torch.uint8, device="cuda")
            other = torch.empty(20 * MiB, dtype=torch.uint8, device="cuda")
            text = failure(200 * MiB)
        finally:
            allocator.configure(limit=None)
        for part in (
            "CUDA out of memory. Tried to allocate 200.00 MiB. GPU 0 has a total capacity of "
            "512.00 MiB of which",
            "This process may use 256.00 MiB of it.",
            "120.00 MiB is allocated by PyTorch",
            "is reserved by PyTorch but unallocated",
            "By tag: 'weights' 60.00 MiB, private pools 40.00 MiB, untagged 20.00 MiB.",
            "Tried: blocks that threads keep",
            "raise it to at least 320.00 MiB",
            "configure(limit=...)",
            "spillover.offload_activations",
        ):
            assert part in text, (part, text)
        del weights, pooled, other, pool

        # What a reclaimer gave is told, and without a limit none is recommended.
        held = [torch.empty(100 * MiB, dtype=torch.uint8, device="cuda") for _ in range(3)]
        def give(missing, stream):
            return held.pop().nbytes if len(held) > 2 else 0
        with allocator.add_reclaimer(give):
            text = failure(400 * MiB)
        assert "1 reclaimer (says that it freed 100.00 MiB)" in text, text
        assert "limit" not in text, text
        """
    )

"""The pool under several streams and threads; the checker of the emulated device watches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch_process import INSTALL, TorchProcess

PIPELINE = """
copies, compute = torch.cuda.Stream(), torch.cuda.current_stream()
total = torch.zeros((), dtype=torch.int64, device="cuda")
expected = 0
for step in range(30):
    host = torch.full((50_000,), step, dtype=torch.int64).pin_memory()
    with torch.cuda.stream(copies):
        # Made on the copy stream, read on the compute stream, freed right after.
        data = host.to("cuda", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(copies)
    compute.wait_event(ready)
    total += data.sum()
    data.record_stream(compute)
    del data
    expected += 50_000 * step
assert total.item() == expected
torch.cuda.synchronize()
torch.cuda.empty_cache()
allocator.check_invariants()
assert torch.cuda.memory_allocated() == 512
"""


def test_copies_feed_compute(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(PIPELINE)


@pytest.mark.parametrize("schedule", ["random"])
def test_copies_feed_compute_in_any_order(
    run_emulated: Callable[..., object], schedule: str
) -> None:
    run_emulated(INSTALL + PIPELINE, schedule=schedule, seed=3)


def test_recorded_block_is_not_reused_early(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        side = torch.cuda.Stream()
        block = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        result = torch.empty(1 << 20, dtype=torch.uint8).pin_memory()
        with torch.cuda.stream(side):
            result.copy_(block, non_blocking=True)
        block.record_stream(side)
        address = block.data_ptr()
        del block
        assert torch.cuda.memory_stats()["active_bytes.all.current"] >= 1 << 20
        assert torch.cuda.memory_allocated() == 0
        others = [torch.zeros(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(3)]
        assert address not in [other.data_ptr() for other in others]
        side.synchronize()
        assert bool((result == 7).all())
        # Once the side stream is done, the block serves again.
        assert torch.zeros(1 << 20, dtype=torch.uint8, device="cuda").data_ptr() == address
        allocator.check_invariants()
        """
    )


def test_threads(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import random, threading
        failures = []

        def work(seed):
            try:
                choice = random.Random(seed)
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    held = []
                    for _ in range(120):
                        size = choice.choice((64, 3000, 70_000, 400_000))
                        value = choice.randrange(100)
                        held.append((torch.full((size,), value, device="cuda"), value))
                        if len(held) > 6:
                            tensor, expected = held.pop(choice.randrange(len(held)))
                            low, high = torch.aminmax(tensor)
                            assert low.item() == high.item() == expected
                    if seed == 0:
                        torch.cuda.empty_cache()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        torch.cuda.synchronize()
        allocator.check_invariants()
        assert torch.cuda.memory_allocated() == 0
        """
    )

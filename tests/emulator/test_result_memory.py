"""An operator's result comes after everything that its memory's former owner left on the stream."""

from __future__ import annotations

import threading
import time

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_that_another_thread_queued_does_not_overwrite_a_result() -> None:
    size = 1200
    ones = torch.ones(size, size, device="cuda")
    staging = torch.full((size * size,), 7.0).pin_memory()
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    _ = ones @ ones
    recycled = torch.empty(size, size, device="cuda")
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []
    worker = threading.Thread(target=lambda: results.append(ones @ ones))
    worker.start()
    # Long enough for the kernel to begin, short enough for it not to end.
    time.sleep(0.01)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        recycled.view(-1).copy_(staging, non_blocking=True)
    # Correct on a device: whatever takes this memory next on `main` comes after the copy.
    main.wait_event(side.record_event())
    del recycled
    worker.join()
    torch.cuda.synchronize()
    assert torch.equal(results[0], torch.full_like(results[0], size))

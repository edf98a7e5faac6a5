"""torch's own caching allocator: expandable segments, several streams, freeing and retrying."""

from __future__ import annotations

from _program import main

# isort: split
import torch

MIB = 1 << 20


def set_expandable(enabled: bool) -> None:
    """Switch the kind of segments for allocations from now on."""
    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{enabled}")


def use_streams() -> None:
    """Blocks go back and forth between two streams, ordered by events and record_stream."""
    compute = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    total = torch.zeros((), device="cuda")
    for step in range(12):
        work = torch.full((MIB // 8,), float(step), device="cuda")
        side.wait_stream(compute)
        with torch.cuda.stream(side):
            doubled = work * 2
            work.record_stream(side)
        done = side.record_event()
        del work
        other = torch.ones(MIB // 8, device="cuda")
        done.wait(compute)
        total += (doubled[0] + other[0]).detach()
        doubled.record_stream(compute)
        del doubled, other
    assert total.item() == sum(2 * step + 1 for step in range(12))


def use_pinned_memory() -> None:
    """Pinned buffers are used again only when the copies from them have ended."""
    sums = []
    for step in range(8):
        host = torch.full((MIB,), float(step)).pin_memory()
        sums.append(host.to("cuda", non_blocking=True).mean())
        del host
    assert [s.item() for s in sums] == [float(step) for step in range(8)]
    back = torch.stack(sums).to("cpu", non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert back.tolist() == [float(step) for step in range(8)]


def run_out_of_memory() -> None:
    """What fits again after a cached block is given back, and what never fits."""
    _, total = torch.cuda.mem_get_info()
    limit = 128 * MIB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        large = torch.empty(limit * 6 // 10, dtype=torch.uint8, device="cuda")
        del large
        pieces = [torch.zeros(limit // 8, dtype=torch.uint8, device="cuda") for _ in range(6)]
        assert all(int(piece[-1]) == 0 for piece in pieces)
        try:
            torch.empty(limit // 2, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("more than the limit was allocated")
        assert all(int(piece[-1]) == 0 for piece in pieces)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def run() -> None:
    """Each with both kinds of segments."""
    for expandable in (False, True):
        torch.cuda.empty_cache()
        set_expandable(expandable)
        try:
            use_streams()
            use_pinned_memory()
            run_out_of_memory()
        finally:
            torch.cuda.empty_cache()
            set_expandable(False)


if __name__ == "__main__":
    main(run)

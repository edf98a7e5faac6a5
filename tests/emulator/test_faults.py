"""Injected faults: what strikes when, what the driver says then, and what ends with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch

from spillover import ConfigError, StateError, emulator
from spillover.emulator import Fault, StorageFault, call_bytes, calls, faults

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh_device() -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def allocate(mib: int = 64) -> torch.Tensor:
    """One call of cuMemAlloc: larger than what torch's segments round up to."""
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def test_calls_are_counted_by_documented_name() -> None:
    with faults():
        first, second = allocate(), allocate(128)
        torch.cuda.synchronize()
    del first, second
    torch.cuda.empty_cache()
    counted = calls()
    assert counted["cuMemAlloc"] == counted["cudaMalloc"] == 2
    assert "cuMemFree" not in counted, "the block had ended"
    assert not any(name.endswith(("_v2", "_ptsz")) for name in counted)
    with faults():
        assert "cuMemAlloc" not in calls()


def test_bytes_of_calls_are_counted() -> None:
    with faults():
        first, second = allocate(), allocate(128)
        assert call_bytes() == {"cuMemAlloc": 192 * MIB}
        with pytest.raises(torch.OutOfMemoryError):
            allocate(8192)
        assert call_bytes()["cuMemAlloc"] == 192 * MIB, "a call that failed is about nothing"
        del first, second
        torch.cuda.empty_cache()
        assert call_bytes() == {"cuMemAlloc": 192 * MIB, "cuMemFree": 192 * MIB}


def test_nth_call_of_a_function_fails_and_the_next_works() -> None:
    with faults(Fault("cuMemAlloc", call=2)) as injected:
        first = allocate(64)
        # torch frees its cache and tries again, which succeeds.
        second = allocate(128)
        assert injected.fired() == ["cuMemAlloc 2: CUDA_ERROR_OUT_OF_MEMORY"]
        assert calls()["cuMemAlloc"] == 3
    assert first.numel() + second.numel() == 192 * MIB


def test_every_further_call_fails_without_end() -> None:
    with faults(Fault("cudaMalloc", times=None)) as injected:
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                allocate()
        assert all(line.endswith("OUT_OF_MEMORY") for line in injected.fired())
        assert len(injected.fired()) >= 2
    allocate()


def test_any_call_of_the_driver() -> None:
    def struck(call: int) -> str:
        with faults(Fault(call=call)) as injected:
            with contextlib.suppress(RuntimeError):
                allocate()
                torch.cuda.synchronize()
            (line,) = injected.fired()
        return line.split()[0]

    torch.cuda.empty_cache()
    names = {struck(call) for call in range(1, 4)}
    assert all(name.startswith("cu") and name[2].isupper() for name in names)


def test_error_by_name_and_runtime_function() -> None:
    with (
        faults(Fault("cudaStreamSynchronize", error="CUDA_ERROR_NOT_SUPPORTED")),
        pytest.raises(RuntimeError, match="operation not supported"),
    ):
        torch.cuda.current_stream().synchronize()
    torch.cuda.current_stream().synchronize()


def test_operator_fails_as_a_launch() -> None:
    x = torch.ones(4, device="cuda")
    with faults(Fault("cuLaunchKernel")), pytest.raises(torch.AcceleratorError, match="OS call"):
        x + 1
    assert (x + 1).sum().item() == 8


def test_release_does_its_work_and_then_fails(
    run_emulated: Callable[..., object],
) -> None:
    # In a process of its own: torch keeps the block in its lists and would free it again.
    run_emulated(
        """
        import torch
        from spillover.emulator import Fault, faults, live
        block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        del block
        with faults(Fault("cuMemFree")) as injected:
            try:
                torch.cuda.empty_cache()
                raise SystemExit("no error")
            except torch.AcceleratorError as error:
                assert "OS call failed" in str(error)
        assert injected.fired() == ["cuMemFree 1: CUDA_ERROR_OPERATING_SYSTEM"]
        assert live().device_allocations == 0
        """
    )


def test_timing_decides_whether_the_work_is_done() -> None:
    source = torch.arange(4, dtype=torch.float32).pin_memory()
    target = torch.zeros(4, device="cuda")
    for timing, expected in (("before", 0), ("after", 6)):
        with (
            faults(Fault("cudaMemcpyAsync", timing=timing)),  # type: ignore[arg-type]
            pytest.raises(RuntimeError, match="OS call"),
        ):
            target.copy_(source, non_blocking=True)
        assert target.sum().item() == expected


def test_probability_is_decided_by_seed_and_call() -> None:
    def struck(seed: int) -> list[str]:
        plan = Fault("cuEventRecordWithFlags", probability=0.3, times=None)
        event = torch.cuda.Event()
        with faults(plan, seed=seed) as injected:
            for _ in range(40):
                with contextlib.suppress(RuntimeError):
                    event.record()
            return injected.fired()

    assert struck(1) == struck(1) != struck(2)
    assert 4 <= len(struck(1)) <= 22


def test_sticky_error_stays_and_others_do_not(
    run_emulated: Callable[..., object],
) -> None:
    run_emulated(
        """
        import torch
        from spillover.emulator import Fault, faults
        x = torch.ones(4, device="cuda")
        for error, sticks in (("CUDA_ERROR_UNKNOWN", False), ("CUDA_ERROR_ILLEGAL_ADDRESS", True)):
            with faults(Fault("cuStreamSynchronize", error=error)):
                try:
                    torch.cuda.current_stream().synchronize()
                    raise SystemExit("no error")
                except RuntimeError as failure:
                    print(failure)
            try:
                (x + 1).cpu()
                assert not sticks
            except RuntimeError as failure:
                assert sticks and "illegal memory access" in str(failure), failure
        import os
        os._exit(0)  # as the device refuses even to be torn down
        """
    )


def test_another_process_takes_memory() -> None:
    free, total = torch.cuda.mem_get_info()
    with faults(occupied=total - 128 * MIB) as injected:
        assert torch.cuda.mem_get_info() == (
            max(0, free - (total - 128 * MIB)),
            total,
        )
        with pytest.raises(torch.OutOfMemoryError):
            allocate(256)
        injected.occupy("1MiB")
        assert torch.cuda.mem_get_info()[0] == free - MIB
        kept = allocate(256)
        injected.occupy(total)
        assert torch.cuda.mem_get_info()[0] == 0
        kept.fill_(1)  # what is held already stays
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == (free, total)


def test_pinning_is_refused_past_a_limit() -> None:
    torch._C._host_emptyCache()
    held = emulator.live().pinned_bytes
    with faults(pinned_limit=held + 4 * MIB):
        kept = torch.empty(2 * MIB, dtype=torch.uint8, pin_memory=True)
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.empty(8 * MIB, dtype=torch.uint8, pin_memory=True)
    del kept
    assert torch.empty(8 * MIB, dtype=torch.uint8, pin_memory=True).is_pinned()


def test_stuck_stream_is_not_ready_and_waits_end_with_an_error() -> None:
    stream = torch.cuda.Stream()
    event = torch.cuda.Event()
    source = torch.arange(1024, dtype=torch.float32).pin_memory()
    with torch.cuda.stream(stream):
        target = torch.zeros(1024, device="cuda")
    stream.synchronize()
    with emulator.stuck(stream, timeout_s=0.05):
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event.record()
        assert not any(stream.query() or event.query() for _ in range(100))
        for wait in (stream.synchronize, event.synchronize, torch.cuda.synchronize):
            with pytest.raises(RuntimeError, match="timed out"):
                wait()
        # Another stream is not held up.
        assert torch.ones(4, device="cuda").sum().item() == 4
    stream.synchronize()
    assert event.query()
    assert torch.equal(target.cpu(), source)


def test_stuck_stream_released_by_another_thread() -> None:
    stream = torch.cuda.Stream()
    hold = emulator.stuck(stream, timeout_s=60)
    hold.__enter__()
    releaser = threading.Timer(0.05, hold.__exit__, (None, None, None))
    releaser.start()
    stream.synchronize()
    releaser.join()


def test_slow_stream_keeps_its_order_and_values() -> None:
    stream = torch.cuda.Stream()
    source = torch.arange(1024, dtype=torch.float32).pin_memory()
    target = torch.zeros(1024, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with emulator.slow(stream, delay_us=2000), torch.cuda.stream(stream):
        for _ in range(3):
            target.copy_(source, non_blocking=True)
        stream.synchronize()
    assert torch.equal(target.cpu(), source)


@pytest.mark.parametrize(
    ("make", "nearest"),
    [
        (lambda: Fault("cuMemAloc"), "cuMemAlloc"),
        (lambda: Fault("cudaMaloc"), "cudaMalloc"),
        (lambda: Fault(error="CUDA_ERROR_OUT_OF_MEMRY"), "CUDA_ERROR_OUT_OF_MEMORY"),
        (lambda: StorageFault("writ"), "write"),
        (lambda: StorageFault("write", error="ENOSPCE"), "ENOSPC"),
    ],
)
def test_unknown_names_give_the_nearest(make: Callable[[], object], nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"the nearest is '{nearest}'"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fault(call=0),
        lambda: Fault(times=0),
        lambda: Fault(probability=0),
        lambda: Fault(timing="later"),  # type: ignore[arg-type]
        lambda: StorageFault("open", "flip"),
        lambda: StorageFault("read", "torn"),
        lambda: StorageFault("read", "delay", delay_us=-1),
    ],
)
def test_wrong_faults(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_plans_do_not_nest_and_end_with_their_block() -> None:
    outer = faults(Fault("cuMemAlloc"))
    with outer, pytest.raises(StateError, match="already"), faults():
        pass
    with pytest.raises(ZeroDivisionError), faults(Fault("cuMemAlloc")):
        raise ZeroDivisionError
    allocate()

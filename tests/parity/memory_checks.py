"""Checks of torch.cuda.memory's functions and of those of torch.accelerator that are like them."""

from __future__ import annotations

import gc
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from checks import MIB, NotApplicableError, check, check_each
from torch import accelerator
from torch.cuda import memory

OUT_OF_MEMORY_BYTES = 1 << 50  # more than any device has, and less than torch refuses by itself


def tensor(size_bytes: int) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8, device="cuda")


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@check_each(
    {
        "torch.cuda.memory_allocated": lambda: torch.cuda.memory_allocated,
        "torch.accelerator.memory.memory_allocated": lambda: accelerator.memory_allocated,
    }
)
def _allocated(target: Callable[[], Callable[[], int]]) -> None:
    before = target()()
    x = tensor(3 * MIB)
    assert target()() == before + 3 * MIB, "does not count"
    del x
    assert target()() == before, "does not count frees"


@check_each(
    {
        "torch.cuda.memory_reserved": lambda: torch.cuda.memory_reserved,
        "torch.cuda.memory_cached": lambda: torch.cuda.memory_cached,
        "torch.accelerator.memory.memory_reserved": lambda: accelerator.memory_reserved,
    }
)
def _reserved(target: Callable[[], Callable[[], int]]) -> None:
    torch.cuda.empty_cache()
    before = target()()
    x = tensor(40 * MIB)
    held = target()()
    assert held >= before + 40 * MIB, "does not count"
    del x
    assert target()() == held, "does not count cached memory"
    torch.cuda.empty_cache()
    assert target()() == before, "does not count what goes back to the driver"


@check_each(
    {
        "torch.cuda.max_memory_allocated": lambda: (
            torch.cuda.max_memory_allocated,
            torch.cuda.reset_peak_memory_stats,
        ),
        "torch.cuda.max_memory_reserved": lambda: (
            torch.cuda.max_memory_reserved,
            torch.cuda.reset_peak_memory_stats,
        ),
        "torch.cuda.max_memory_cached": lambda: (
            torch.cuda.max_memory_cached,
            torch.cuda.reset_peak_memory_stats,
        ),
        "torch.cuda.reset_max_memory_allocated": lambda: (
            torch.cuda.max_memory_allocated,
            torch.cuda.reset_max_memory_allocated,
        ),
        "torch.cuda.reset_max_memory_cached": lambda: (
            torch.cuda.max_memory_reserved,
            torch.cuda.reset_max_memory_cached,
        ),
        "torch.cuda.reset_peak_memory_stats": lambda: (
            lambda: torch.cuda.memory_stats().get("requested_bytes.all.peak", 0),
            torch.cuda.reset_peak_memory_stats,
        ),
        "torch.accelerator.memory.max_memory_allocated": lambda: (
            accelerator.max_memory_allocated,
            accelerator.reset_peak_memory_stats,
        ),
        "torch.accelerator.memory.max_memory_reserved": lambda: (
            accelerator.max_memory_reserved,
            accelerator.reset_peak_memory_stats,
        ),
        "torch.accelerator.memory.reset_peak_memory_stats": lambda: (
            lambda: accelerator.memory_stats().get("active_bytes.all.peak", 0),
            accelerator.reset_peak_memory_stats,
        ),
    }
)
def _peak(target: Callable[[], tuple[Callable[[], int], Callable[[], None]]]) -> None:
    peak, reset = target()
    torch.cuda.empty_cache()
    reset()
    before = peak()
    x = tensor(48 * MIB)
    del x
    assert peak() >= before + 48 * MIB, "knows no peak"
    torch.cuda.empty_cache()
    reset()
    assert peak() == before, "is not set back"


@check_each(
    {
        "torch.cuda.memory_stats": lambda: (
            torch.cuda.memory_stats,
            torch.cuda.reset_accumulated_memory_stats,
        ),
        "torch.cuda.memory_stats_as_nested_dict": lambda: (
            _flat_stats,
            torch.cuda.reset_accumulated_memory_stats,
        ),
        "torch.cuda.reset_accumulated_memory_stats": lambda: (
            torch.cuda.memory_stats,
            torch.cuda.reset_accumulated_memory_stats,
        ),
        "torch.accelerator.memory.memory_stats": lambda: (
            accelerator.memory_stats,
            accelerator.reset_accumulated_memory_stats,
        ),
        "torch.accelerator.memory.reset_accumulated_memory_stats": lambda: (
            accelerator.memory_stats,
            accelerator.reset_accumulated_memory_stats,
        ),
    }
)
def _stats(target: Callable[[], tuple[Callable[[], dict[str, int]], Callable[[], None]]]) -> None:
    stats, reset = target()
    before = stats()
    assert "allocated_bytes.large_pool.peak" in before, "has no figures"
    assert {"num_ooms", "num_alloc_retries", "segment.all.current"} <= set(before), "lacks figures"
    x = tensor(3 * MIB)
    now = stats()
    for name in ("active_bytes.all.current", "allocated_bytes.large_pool.allocated"):
        assert now[name] == before[name] + 3 * MIB, f"{name} does not count"
    assert now["allocation.all.current"] == before["allocation.all.current"] + 1, "does not count"
    del x
    reset()
    assert stats()["allocated_bytes.all.allocated"] == 0, "is not set back"


def _flat_stats() -> dict[str, int]:
    nested = torch.cuda.memory_stats_as_nested_dict()
    flat: dict[str, int] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", nested)
    return flat


@check("torch.cuda.memory_summary")
def _summary() -> None:
    x = tensor(3 * MIB)
    text = torch.cuda.memory_summary()
    assert "Allocated memory" in text, "is not a summary"
    assert re.search(rf"\| Allocated memory +\| +{x.numel() // 1024} KiB", text), "does not count"


@check("torch.cuda.memory_snapshot")
def _segments() -> None:
    x = tensor(3 * MIB)
    live = [
        block["requested_size"]
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated" and block["address"] == x.data_ptr()
    ]
    assert live == [3 * MIB], "does not show a live block"


@contextmanager
def history(**options: Any) -> Iterator[None]:
    memory._record_memory_history(**options)
    try:
        yield
    finally:
        memory._record_memory_history(None)


def events(action: str) -> list[dict[str, Any]]:
    return [event for event in memory._snapshot()["device_traces"][0] if event["action"] == action]


@check("torch.cuda.memory._record_memory_history")
def _record_history() -> None:
    with history(stacks="python"):
        x = tensor(3 * MIB)
        address = x.data_ptr()
        del x
        torch.cuda.synchronize()
        allocations = [event for event in events("alloc") if event["addr"] == address]
        assert allocations, "records no allocation"
        assert any("memory_checks" in frame["filename"] for frame in allocations[-1]["frames"]), (
            "records no stack"
        )
        assert any(event["addr"] == address for event in events("free_completed")), (
            "records no free"
        )


@check("torch.cuda.memory._snapshot")
def _snapshot() -> None:
    x = tensor(3 * MIB)
    found = memory._snapshot()
    assert {"segments", "device_traces", "allocator_settings"} <= set(found), "is not a snapshot"
    addresses = {block["address"] for s in found["segments"] for block in s["blocks"]}
    assert x.data_ptr() in addresses, "does not show a live block"


@check("torch.cuda.memory._dump_snapshot")
def _dump_snapshot() -> None:
    x = tensor(3 * MIB)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.pickle"
        memory._dump_snapshot(str(path))
        found = pickle.loads(path.read_bytes())
    addresses = {block["address"] for s in found["segments"] for block in s["blocks"]}
    assert x.data_ptr() in addresses, "does not show a live block"


@check("torch.cuda.memory._set_memory_metadata")
def _metadata() -> None:
    with history():
        memory._set_memory_metadata("a check")
        try:
            x = tensor(3 * MIB)
            assert memory._get_memory_metadata() == "a check", "is not kept"
        finally:
            memory._set_memory_metadata("")
        found = [event for event in events("alloc") if event["addr"] == x.data_ptr()]
        assert found, "records no allocation"
        assert found[-1]["user_metadata"] == "a check", "is not recorded"


@check("torch.cuda.memory._annotate_tensor")
def _annotate() -> None:
    with history():
        x = tensor(3 * MIB)
        memory._annotate_tensor(x, "a check")
        found = [event for event in events("annotate") if event["addr"] == x.data_ptr()]
        assert [event["user_metadata"] for event in found] == ["a check"], "is not recorded"


@check("torch.cuda.memory._allocation_traceback")
def _traceback() -> None:
    with history(stacks="python"):
        x = tensor(3 * MIB)
        frames = memory._allocation_traceback(x.data_ptr()) or []
        assert any("memory_checks" in frame["filename"] for frame in frames), "has no stack"


@check("torch.cuda.memory._set_allocator_settings")
def _settings() -> None:
    memory._set_allocator_settings("max_split_size_mb:200")
    tensor(3 * MIB)
    try:
        memory._set_allocator_settings("no_such_key:1")
    except ValueError:
        return
    raise AssertionError("takes every key")


@check_each(
    {
        "torch.cuda.empty_cache": lambda: torch.cuda.empty_cache,
        "torch.accelerator.memory.empty_cache": lambda: accelerator.empty_cache,
    }
)
def _empty_cache(target: Callable[[], Callable[[], None]]) -> None:
    torch.cuda.empty_cache()
    before = free_bytes()
    x = tensor(64 * MIB)
    del x
    target()()
    assert free_bytes() == before, "gives nothing back"


@check_each(
    {
        "torch.cuda.mem_get_info": lambda: torch.cuda.mem_get_info,
        "torch.accelerator.memory.get_memory_info": lambda: accelerator.get_memory_info,
    }
)
def _memory_info(target: Callable[[], Callable[[], tuple[int, int]]]) -> None:
    torch.cuda.empty_cache()
    free, total = target()()
    assert total == torch.cuda.get_device_properties(0).total_memory, "knows another size"
    x = tensor(64 * MIB)
    assert target()()[0] <= free - 64 * MIB, "does not count"
    del x


@check("torch.cuda.get_per_process_memory_fraction")
def _get_fraction() -> None:
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        assert torch.cuda.get_per_process_memory_fraction() == 0.25, "is not what was set"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@check("torch.cuda.set_per_process_memory_fraction")
def _set_fraction() -> None:
    half = torch.cuda.get_device_properties(0).total_memory // 2
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        try:
            tensor(half)
        except RuntimeError:
            pass
        else:
            raise AssertionError("is not a limit")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    tensor(half)


@check_each(
    {
        "torch.cuda.caching_allocator_alloc": lambda: None,
        "torch.cuda.caching_allocator_delete": lambda: None,
    }
)
def _raw_allocation(target: Callable[[], None]) -> None:
    quarter = torch.cuda.get_device_properties(0).total_memory // 4
    for _ in range(6):
        address = torch.cuda.caching_allocator_alloc(quarter)
        assert address, "gives no address"
        torch.cuda.caching_allocator_delete(address)
    # What is recorded with it is its stream, not the current one.
    stream = torch.cuda.Stream()
    address = torch.cuda.caching_allocator_alloc(MIB, stream=stream)
    torch.cuda.caching_allocator_delete(address)


def _without_cache() -> None:
    before = free_bytes()
    x = tensor(64 * MIB)
    del x
    assert free_bytes() == before, "memory is kept"


@check("torch.cuda.caching_allocator_enable")
def _enable() -> None:
    torch.cuda.empty_cache()
    torch.cuda.caching_allocator_enable(False)
    try:
        _without_cache()
    finally:
        torch.cuda.caching_allocator_enable(True)


@check("torch.cuda.caching_allocator_disabled")
def _disabled() -> None:
    torch.cuda.empty_cache()
    with memory.caching_allocator_disabled():
        _without_cache()


@check("torch.cuda.get_allocator_backend")
def _backend() -> None:
    name = torch.cuda.get_allocator_backend()
    native = os.environ["SPILLOVER_PARITY_COLUMN"] == "native"
    assert (name == "native") == native, f"says {name!r}"


@check("torch.cuda.memory.CUDAPluggableAllocator")
def _pluggable() -> None:
    path = os.environ["SPILLOVER_PARITY_PLUG_IN"]
    allocator = memory.CUDAPluggableAllocator(path, "test_malloc", "test_free")
    assert allocator.allocator() is not None, "is no allocator"


@check("torch.cuda.memory.change_current_allocator")
def _change() -> None:
    if os.environ["SPILLOVER_PARITY_COLUMN"] == "native":
        raise NotApplicableError
    # This process's allocator came by it. Another one is refused as soon as memory was taken.
    x = tensor(3 * MIB)
    path = os.environ["SPILLOVER_PARITY_PLUG_IN"]
    try:
        memory.change_current_allocator(
            memory.CUDAPluggableAllocator(path, "test_malloc", "test_free")
        )
    except RuntimeError:
        del x
        return
    raise AssertionError("an allocator in use is changed")


@check("torch.cuda.list_gpu_processes")
def _processes() -> None:
    x = tensor(3 * MIB)
    text = torch.cuda.list_gpu_processes()
    assert re.search(rf"process +{os.getpid()} uses", text), "does not name this process"
    del x


@check_each(
    {
        "torch.cuda.device_memory_used": lambda: torch.cuda.device_memory_used,
        "torch.cuda.memory_usage": lambda: torch.cuda.memory_usage,
    }
)
def _nvml(target: Callable[[], Callable[[], int]]) -> None:
    x = tensor(3 * MIB)
    assert target()() >= 0
    del x


@check("torch.cuda.ipc_collect")
def _ipc_collect() -> None:
    torch.cuda.ipc_collect()


@check("torch.multiprocessing of CUDA tensors")
def _share() -> None:
    x = tensor(3 * MIB)
    x.untyped_storage()._share_cuda_()
    del x
    gc.collect()
    torch.cuda.ipc_collect()


@check_each(
    {
        "torch.cuda.host_memory_stats": lambda: torch.cuda.host_memory_stats,
        "torch.cuda.host_memory_stats_as_nested_dict": lambda: (
            lambda: {
                f"allocated_bytes.{key}": value
                for key, value in torch.cuda.host_memory_stats_as_nested_dict()[
                    "allocated_bytes"
                ].items()
            }
        ),
    }
)
def _host_stats(target: Callable[[], Callable[[], dict[str, int]]]) -> None:
    accelerator.empty_host_cache()
    before = target()()["allocated_bytes.current"]
    x = torch.zeros(4 * MIB, dtype=torch.uint8, pin_memory=True)
    assert x.is_pinned(), "is not pinned"
    assert target()()["allocated_bytes.current"] >= before + 4 * MIB, "does not count"


@check_each(
    {
        "torch.cuda.reset_peak_host_memory_stats": lambda: (
            torch.cuda.reset_peak_host_memory_stats,
            "active_bytes.peak",
        ),
        "torch.cuda.reset_accumulated_host_memory_stats": lambda: (
            torch.cuda.reset_accumulated_host_memory_stats,
            "active_bytes.allocated",
        ),
    }
)
def _host_reset(target: Callable[[], tuple[Callable[[], None], str]]) -> None:
    reset, name = target()
    x = torch.zeros(4 * MIB, dtype=torch.uint8, pin_memory=True)
    del x
    assert torch.cuda.host_memory_stats()[name] >= 4 * MIB, "does not count"
    reset()
    assert torch.cuda.host_memory_stats()[name] < 4 * MIB, "is not set back"


@check("torch.accelerator.memory.empty_host_cache")
def _empty_host_cache() -> None:
    x = torch.zeros(4 * MIB, dtype=torch.uint8, pin_memory=True)
    del x
    accelerator.empty_host_cache()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] < 4 * MIB, "gives nothing back"


@check("torch.OutOfMemoryError")
def _out_of_memory() -> None:
    message = None
    try:
        torch.empty(OUT_OF_MEMORY_BYTES, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        message = str(error)
    assert message is not None, "is not raised"
    assert "Tried to allocate" in message, "does not say what was asked for"
    assert tensor(MIB).sum().item() == 0


@check("torch._C._cuda_attach_out_of_memory_observer")
def _observer() -> None:
    seen: list[int] = []
    torch._C._cuda_attach_out_of_memory_observer(
        lambda device, size, total, free: seen.append(size)
    )
    with suppress(RuntimeError):
        torch.empty(OUT_OF_MEMORY_BYTES, dtype=torch.uint8, device="cuda")
    assert seen == [OUT_OF_MEMORY_BYTES], "is not called"


@check("torch.Tensor.record_stream")
def _record_stream() -> None:
    side = torch.cuda.Stream()
    for _ in range(8):
        x = torch.ones(4 * MIB, dtype=torch.uint8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            total = x.sum(dtype=torch.int64)
        x.record_stream(side)
        del x
        torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")  # must not take x's memory
        side.synchronize()
        assert total.item() == 4 * MIB, "memory is reused too early"


@check("PYTORCH_CUDA_ALLOC_CONF")
def _environment() -> None:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("column.py")), "--fraction"],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.25"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "limited", "per_process_memory_fraction is not a limit"

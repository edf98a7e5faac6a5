"""The emulated runtime under torch's own CUDA code: allocators, streams, events, NVML."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable

import pytest

from spillover import emulator

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

#: That of this session's device; enable() puts it there.
SCHEDULE = os.environ.get("SPILLOVER_EMULATOR_SCHEDULE")

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]

MEMORY = """
import torch

MIB = 1 << 20
free, total = torch.cuda.mem_get_info()
assert total == 512 * MIB and 0 < free <= total, (free, total)
properties = torch.cuda.get_device_properties(0)
assert (properties.major, properties.minor) == (9, 0), properties
assert properties.total_memory == total and properties.multi_processor_count > 0

x = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() == 64 * MIB
del x
try:
    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
    raise SystemExit("a terabyte fitted")
except torch.OutOfMemoryError as error:
    assert "512.00 MiB" in str(error), error
assert torch.empty(8, device="cuda").is_cuda
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() <= 32 * MIB, torch.cuda.memory_reserved()

torch.cuda.memory._record_memory_history(stacks="python")
y = torch.empty(MIB, dtype=torch.uint8, device="cuda")
snapshot = torch.cuda.memory._snapshot()
assert any(block["state"] == "active_allocated"
           for segment in snapshot["segments"] for block in segment["blocks"])
torch.cuda.memory._record_memory_history(None)
print("ok")
"""


@pytest.mark.parametrize(
    "setting", [pytest.param("", marks=pytest.mark.soak), "expandable_segments:True"]
)
def test_native_allocator(run_emulated: RunEmulated, setting: str) -> None:
    run_emulated(MEMORY, env={"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting})


def test_stream_ordered_allocator(run_emulated: RunEmulated) -> None:
    setting = "backend:cudaMallocAsync"
    run_emulated(
        """
        import torch

        assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
        stream = torch.cuda.Stream()
        for _ in range(4):
            with torch.cuda.stream(stream):
                x = torch.full((1 << 20,), 3, dtype=torch.int32, device="cuda")
                assert x.sum().item() == 3 << 20
        del x
        torch.cuda.synchronize()
        try:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
            raise SystemExit("a terabyte fitted")
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        assert torch.empty(8, device="cuda").is_cuda
        """,
        env={"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting},
    )


def test_memory_pool() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = torch.ones(1 << 20, device="cuda")
    assert len(pool.snapshot()) == 1
    assert x.sum().item() == 1 << 20
    del x, pool


def test_streams_events_and_pinned_copies() -> None:
    host = torch.arange(1 << 16, dtype=torch.float32).pin_memory()
    assert host.is_pinned()
    back = torch.empty_like(host).pin_memory()
    first, second = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    copied = torch.cuda.Event()
    with torch.cuda.stream(first):
        device = host.to("cuda", non_blocking=True)
        copied.record()
    with torch.cuda.stream(second):
        second.wait_event(copied)
        device.record_stream(second)
        back.copy_(device * 2, non_blocking=True)
        done = second.record_event()
    if SCHEDULE == "late":  # which runs nothing before somebody waits
        assert not done.query()
    done.synchronize()
    assert torch.equal(back, host * 2)
    assert second.priority < 0
    assert first.query()


def test_sleep_keeps_its_stream_busy() -> None:
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        start.record()
        torch.cuda._sleep(20_000_000)
        end.record()
    assert other.query()
    other.synchronize()
    if SCHEDULE == "late":
        assert not end.query()
    end.synchronize()
    assert start.elapsed_time(end) >= 10, start.elapsed_time(end)


def test_registering_host_memory_through_torch() -> None:
    runtime = torch.cuda.cudart()
    host = torch.arange(4096, dtype=torch.float32)
    size = host.numel() * host.element_size()
    assert not host.is_pinned()
    assert runtime.cudaHostRegister(host.data_ptr(), size, 0) == 0
    assert host.is_pinned()
    assert torch.equal(host.to("cuda", non_blocking=True).cpu(), host)
    assert runtime.cudaHostUnregister(host.data_ptr()) == 0
    assert not host.is_pinned()
    free, total = runtime.cudaMemGetInfo(0)
    assert 0 < free <= total
    assert runtime.cudaGetErrorString(runtime.cudaError(2)) == "out of memory"


def test_two_devices(run_emulated: RunEmulated) -> None:
    run_emulated(
        """
        import torch

        assert torch.cuda.device_count() == 2
        uuids = {str(torch.cuda.get_device_properties(i).uuid) for i in range(2)}
        assert len(uuids) == 2, uuids
        x = torch.ones(1 << 20, device="cuda:1")
        assert torch.cuda.memory_allocated(0) == 0
        assert torch.cuda.memory_allocated(1) == 4 << 20
        with torch.cuda.device(1):
            assert torch.cuda.current_device() == 1
            assert torch.empty(1, device="cuda").device.index == 1
        assert torch.cuda.current_device() == 0
        assert torch.equal(x.to("cuda:0").cpu(), x.cpu())
        """,
        devices=2,
    )


def test_device_count_and_memory_through_nvml() -> None:
    torch.cuda.init()
    assert torch.cuda._device_count_nvml() == 1
    (uuid,) = torch.cuda._raw_device_uuid_nvml()
    x = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    assert uuid == "GPU-" + str(torch.cuda.get_device_properties(0).uuid)

    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
    assert nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0
    assert nvml.nvmlDeviceGetMemoryInfo(handle, memory) == 0
    free, total = torch.cuda.mem_get_info()
    assert list(memory) == [total, free, total - free]
    count = ctypes.c_uint(0)
    processes = nvml.nvmlDeviceGetComputeRunningProcesses
    assert processes(handle, ctypes.byref(count), None) == 7
    assert count.value == 1
    fabric = (ctypes.c_ubyte * 36)(*[255] * 36)
    assert nvml.nvmlDeviceGetGpuFabricInfoV(handle, fabric) == 0
    assert bytes(fabric[:4]) == bytes([255] * 4)
    assert fabric[28] == 0
    assert nvml.nvmlShutdown() == 0
    del x


def test_a_hazard_is_in_the_exception() -> None:
    x = torch.zeros(1 << 16, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    host = torch.ones(1 << 16).pin_memory()
    with torch.cuda.stream(side):
        x.copy_(host, non_blocking=True)
    with pytest.raises(RuntimeError) as raised:
        (x + 1).cpu()
    assert "unknown error" not in str(raised.value)
    assert emulator.hazards()[0] in str(raised.value)
    torch.cuda.synchronize()
    emulator.clear_hazards()

"""The adapter with several devices and with child processes that have CUDA of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch_process import ENABLE, TorchProcess

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def torch_with_devices() -> Iterator[TorchProcess]:
    process = TorchProcess(ENABLE.replace("vram=", "devices=3, vram="))
    yield process
    process.close()


def test_functions_for_all_devices_touch_none_that_is_not_used(run_emulated: RunEmulated) -> None:
    """Each process of a node would have a context on each of its cards otherwise."""
    run_emulated(
        """
        import ctypes
        import spillover
        spillover.allocator.install(adapter="full")
        import torch
        torch.cuda.memory._record_memory_history()
        held = torch.ones(1 << 20, device="cuda:0")
        torch.cuda.empty_cache()
        torch.cuda.memory._snapshot()
        torch.cuda.memory_stats(1)
        torch.cuda.reset_peak_memory_stats(1)
        flags, active = ctypes.c_uint(), ctypes.c_int()
        driver = ctypes.CDLL("libcuda.so.1")
        for device in range(3):
            driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
            assert active.value == (device == 0), device
        """,
        devices=3,
    )


def test_devices_are_told_apart(torch_with_devices: TorchProcess) -> None:
    torch_with_devices.run(
        """
        import threading

        def allocated():
            return [torch.cuda.memory_allocated(device) // MiB for device in range(3)]

        # Whichever device is current, on whichever thread.
        first = torch.ones(MiB, device="cuda:0")
        held = {1: torch.ones(2 * MiB, device="cuda:1")}
        assert allocated() == [4, 8, 0]
        assert held[1].device.index == 1

        def work():
            torch.cuda.set_device(2)
            held[0] = torch.ones(MiB, device="cuda:0")
            del held[1]
            with torch.cuda.device(1):
                torch.cuda.synchronize()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert allocated() == [8, 0, 0] and torch.cuda.current_device() == 0

        # A limit of one device is not the others'.
        torch.cuda.set_per_process_memory_fraction(0.25, 1)
        try:
            torch.empty(200 * MiB, dtype=torch.uint8, device="cuda:1")
        except torch.OutOfMemoryError as error:
            assert "GPU 1" in str(error), error
        else:
            raise AssertionError("no error")
        torch.cuda.set_per_process_memory_fraction(1.0, 1)
        held[2] = torch.empty(200 * MiB, dtype=torch.uint8, device="cuda:2")
        assert torch.cuda.memory_stats(1)["num_ooms"] == 1
        assert torch.cuda.memory_stats(2)["num_ooms"] == 0
        torch.cuda.reset_peak_memory_stats(0)
        assert torch.cuda.max_memory_allocated(2) == 200 * MiB
        snapshot = torch.cuda.memory._snapshot()
        # What device 1 had idle went to the driver before its request failed.
        assert {segment["device"] for segment in snapshot["segments"]} == {0, 2}
        """
    )


def test_devices_copy_and_reach_each_others_memory(torch_with_devices: TorchProcess) -> None:
    """Torch makes peers of two devices at their first copy: of memory before it and after it."""
    torch_with_devices.run(
        """
        import ctypes
        runtime = ctypes.CDLL("libcudart.so.13")
        before = torch.arange(3 * MiB, device="cuda:0", dtype=torch.int32)
        small = torch.arange(100, device="cuda:2")
        for other in (1, 2):
            copy = before.to(f"cuda:{other}", non_blocking=True)
            after = torch.full((20 * MiB,), 4, dtype=torch.uint8, device="cuda:0")
            back = torch.empty_like(after).copy_(after.to(f"cuda:{other}"))
            # The other device writes where these blocks lie.
            torch.cuda.synchronize(0)
            with torch.cuda.device(other):
                for block in (before, after):
                    assert runtime.cudaMemsetAsync(
                        ctypes.c_void_p(block.data_ptr()), 9, ctypes.c_size_t(1000), None) == 0
                torch.cuda.synchronize()
            assert after[0].item() == 9 and after[1000].item() == 4
            assert back[0].item() == 4 and copy[7].item() == 7
            assert before[250].item() == 250
            before[:250] = torch.arange(250, device="cuda:0", dtype=torch.int32)
        assert small.to("cuda:1").sum().item() == 4950
        assert torch.cuda.can_device_access_peer(0, 2)
        """
    )


@pytest.mark.parametrize("kind", ["default", "torch", "external"])
def test_a_block_may_be_used_by_another_devices_stream(
    torch_with_devices: TorchProcess, kind: str
) -> None:
    """The checker reports a copy of device 1 that reads what device 0 has handed out again."""
    torch_with_devices.run(
        f"""
        import ctypes
        runtime = ctypes.CDLL("libcudart.so.13")
        source = torch.full((MiB,), 7, dtype=torch.uint8, device="cuda:0")
        target = torch.empty(MiB, dtype=torch.uint8, device="cuda:1")
        torch.cuda.synchronize(0)
        with torch.cuda.device(1):
            handle = ctypes.c_void_p()
            assert runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), 1) == 0
            stream = {{
                "default": torch.cuda.default_stream(1),
                "torch": torch.cuda.Stream(1),
                "external": torch.cuda.ExternalStream(handle.value, device=1),
            }}[{kind!r}]
            assert runtime.cudaMemcpyAsync(
                ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr()),
                ctypes.c_size_t(MiB), 3, ctypes.c_void_p(stream.cuda_stream)) == 0
        source.record_stream(stream)
        address = source.data_ptr()
        del source
        again = torch.zeros(MiB, dtype=torch.uint8, device="cuda:0")
        assert again.data_ptr() != address
        stream.synchronize()
        assert bool((target == 7).all())
        torch.cuda.empty_cache()
        assert torch.cuda.memory_stats(0)["active.all.current"] == 1
        assert runtime.cudaStreamDestroy(handle) == 0
        """
    )


SCRIPT = """
import sys
import spillover

def work(rank, queue):
    assert spillover.allocator.install(adapter="full")
    import torch

    torch.cuda.set_device(rank)
    tensor = torch.full((1000,), rank, device="cuda")
    queue.put((rank, tensor.sum().item(), torch.cuda.memory_allocated()))
    spillover.allocator.check_invariants()

if __name__ == "__main__":
    assert spillover.allocator.install(adapter="full")
    import torch
    import torch.multiprocessing as multiprocessing

    held = torch.ones(1 << 20, device="cuda")
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    children = [context.Process(target=work, args=(rank, queue)) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted(queue.get(timeout=150) for _ in children)
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode
    assert found == [(0, 0, 8192), (1, 1000, 8192)], found
    assert held.sum().item() == 1 << 20
"""


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.soak), "forkserver"])
def test_children_with_devices_of_their_own(tmp_path: Path, method: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "spillover", "emulate", "--vram", "256MiB", "--devices", "2"]
    result = subprocess.run(
        [*command, "--", sys.executable, str(script), method],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_multiprocessing_by_fork_is_told_why(run_emulated: RunEmulated) -> None:
    """CUDA in a child fails with a sentence; its copies of tensors and its end are silent."""
    result = run_emulated(
        """
        import multiprocessing, sys, warnings
        import spillover
        assert spillover.allocator.install(adapter="full")
        import torch

        warnings.simplefilter("ignore", DeprecationWarning)
        held = [torch.ones(1000, device="cuda") for _ in range(4)]

        def work(queue):
            global held
            for call in (lambda: torch.ones(10, device="cuda"), spillover.allocator.stats):
                try:
                    call()
                    queue.put("no error")
                except Exception as error:
                    queue.put(str(error))
            del held

        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        for error in (queue.get(), queue.get()):
            assert "fork" in error and "spawn" in error, error
        child.join()
        assert child.exitcode == 0, child.exitcode
        assert [tensor.sum().item() for tensor in held] == [1000.0] * 4
        sys.stderr.write("end\\n")
        """
    )
    assert result.stderr == "end\n"

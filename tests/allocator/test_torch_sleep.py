"""Sleep under torch: tensors, graphs and pools are where they were after waking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch_process import TorchProcess

pytestmark = pytest.mark.virtual_memory


def test_a_model_sleeps_and_computes_the_same(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        with allocator.tag("weights"):
            model = torch.nn.Sequential(*[torch.nn.LayerNorm((512, 512)) for _ in range(4)]).cuda()
        x = torch.randn(8, 512, 512, device="cuda")
        expected = model(x).detach().cpu()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        moved = allocator.sleep("weights")
        assert moved >= 4 * 512 * 512 * 4
        assert torch.cuda.memory_reserved() <= reserved - moved
        assert torch.cuda.memory_allocated() == allocated
        torch.cuda.empty_cache()
        torch.cuda.memory_snapshot()
        assert allocator.wake("weights") == moved
        assert torch.equal(model(x).detach().cpu(), expected)
        """
    )


def test_a_graph_replays_after_its_weights_and_its_pool_have_slept(
    torch_with_pool: TorchProcess,
) -> None:
    torch_with_pool.run(
        """
        with allocator.tag("weights"):
            weight = torch.randn(256, 256, device="cuda")
        x = torch.randn(256, 256, device="cuda")
        with allocator.tag("graphs"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = torch.relu(x * weight) + weight
        graph.replay()
        expected = y.clone()
        address = y.data_ptr()
        allocator.sleep(["weights", "graphs"])
        stats = allocator.tag_stats("graphs")
        assert stats["asleep_bytes"] >= 2 * MiB, stats
        allocator.wake()
        assert y.data_ptr() == address
        assert torch.equal(y, expected), "results of the last replay are there"
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, torch.relu(x * weight) + weight)
        del graph, y
        """
    )


def test_a_graph_that_is_recorded_is_left_alone(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        from spillover import StateError
        with allocator.tag("weights"):
            weight = torch.ones(4 * MiB, dtype=torch.uint8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = weight + 1
            for call in (allocator.sleep, lambda: allocator.sleep("weights")):
                try:
                    call()
                except StateError as error:
                    assert "being recorded" in str(error)
                else:
                    raise AssertionError
        graph.replay()
        assert y.sum().item() == 8 * MiB
        """
    )


def test_running_out_while_waking_is_an_out_of_memory_error(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        with allocator.tag("weights"):
            weight = torch.full((64 * MiB,), 3, dtype=torch.uint8, device="cuda")
        allocator.sleep("weights")
        other = torch.empty(460 * MiB, dtype=torch.uint8, device="cuda")
        try:
            allocator.wake("weights")
        except torch.OutOfMemoryError as error:
            assert "needs 64.00 MiB, of which 12.00 MiB are missing" in str(error), error
        else:
            raise AssertionError
        del other
        allocator.wake("weights")
        assert (weight == 3).all()
        """
    )


def test_use_while_asleep_is_a_hazard(run_python: Callable[..., str]) -> None:
    run_python(
        """
from spillover import emulator
emulator.enable(vram="64MiB", hazards="count")
from spillover import allocator
allocator.install(adapter="full")
import torch
with allocator.tag("weights"):
    weight = torch.ones(4 << 20, dtype=torch.uint8, device="cuda")
allocator.sleep("weights")
try:
    weight.sum().item()
except Exception:
    pass
found = "".join(emulator.hazards())
assert "access while unmapped or asleep" in found, found
import os
os._exit(0)
"""
    )


def test_several_devices(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
from spillover import HostOutOfMemory, _core, allocator
MiB = 1 << 20
for device in range(2):
    with allocator.tag("weights"):
        _core.Pool(device).alloc(40 * MiB)
assert allocator.sleep("weights", device=1) == 40 * MiB
assert allocator.tag_stats("weights", 0)["asleep_bytes"] == 0
assert allocator.wake() == 40 * MiB
assert allocator.sleep() == 80 * MiB
assert allocator.wake("weights", device=0) == 40 * MiB
assert allocator.wake("weights") == 40 * MiB
# The second device's contents do not fit any more: the first one's come back.
try:
    allocator.sleep("weights")
except HostOutOfMemory:
    pass
else:
    raise AssertionError
assert all(_core.Pool(device).sleeping_tags() == [] for device in range(2))
""".replace(
            "# The second",
            "from spillover import _pinned\n"
            "_pinned._pool = _core.HostPool(limit_bytes=60 * MiB)\n# The second",
        ),
        devices=2,
    )


def test_memory_that_another_process_may_have_open_stays_awake(
    run_python: Callable[..., str],
) -> None:
    run_python(
        """
from spillover import StateError, emulator
emulator.enable(vram="64MiB")
from spillover import allocator
allocator.install(adapter="full")
import torch
with allocator.tag("weights"):
    weight = torch.ones(4 << 20, dtype=torch.uint8, device="cuda")
weight.untyped_storage()._share_cuda_()
try:
    allocator.sleep("weights")
except StateError as error:
    assert "shared with other processes" in str(error), error
else:
    raise AssertionError
assert weight.sum().item() == 4 << 20
"""
    )

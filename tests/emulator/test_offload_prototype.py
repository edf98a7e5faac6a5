"""A hand-written offload of saved tensors: right with its waits, flagged without one of them."""

from __future__ import annotations

import pytest

PROGRAM = """
import sys
import torch
from torch import nn

forgotten = sys.argv[1]
torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(4)]
model = nn.Sequential(*layers).cuda()
x = torch.randn(256, 128, device="cuda")

def gradients():
    torch.cuda.synchronize()
    return [parameter.grad.clone() for parameter in model.parameters()]

model(x).square().mean().backward()
expected, peak_plain = gradients(), torch.cuda.max_memory_allocated()
model.zero_grad(set_to_none=True)
torch.cuda.reset_peak_memory_stats()
side = torch.cuda.Stream()

def pack(tensor):
    if tensor.numel() < 1 << 14 or tensor.is_leaf or isinstance(tensor, nn.Parameter):
        return tensor
    if forgotten != "wait for the producer":
        side.wait_stream(torch.cuda.current_stream())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(side):
        host.copy_(tensor, non_blocking=True)
    if forgotten != "record_stream":
        tensor.record_stream(side)
    return host

def unpack(packed):
    if packed.is_cuda:
        return packed
    with torch.cuda.stream(side):
        tensor = packed.to("cuda", non_blocking=True)
    if forgotten != "wait before use":
        torch.cuda.current_stream().wait_stream(side)
    tensor.record_stream(torch.cuda.current_stream())
    return tensor

with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
    loss = model(x).square().mean()
loss.backward()
assert all(torch.equal(a, b) for a, b in zip(expected, gradients())) or forgotten
import spillover.emulator
print(len(spillover.emulator.hazards()), "hazards")
"""


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("late", marks=pytest.mark.soak),
        pytest.param("eager", marks=pytest.mark.soak),
        pytest.param("threaded", marks=pytest.mark.soak),
        "random",
    ],
)
def test_ordered_offload_is_exact(run_emulated, schedule: str) -> None:
    result = run_emulated(PROGRAM, "", schedule=schedule)
    assert result.stdout.split() == ["0", "hazards"]


@pytest.mark.parametrize("schedule", ["late", pytest.param("eager", marks=pytest.mark.soak)])
@pytest.mark.parametrize("forgotten", ["wait for the producer", "wait before use", "record_stream"])
def test_each_forgotten_wait_is_reported(run_emulated, schedule: str, forgotten: str) -> None:
    result = run_emulated(PROGRAM, forgotten, schedule=schedule, hazards="count")
    assert int(result.stdout.split()[0]) > 0

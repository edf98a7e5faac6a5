"""torch on four emulated devices: current devices, copies, memory, generators, training."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]

EXPANDABLE = "expandable_segments:True"

PLACES = """
import threading

import torch

assert torch.cuda.device_count() == 4
torch.cuda.set_device(2)
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
thread.start()
thread.join()
assert seen == [0] and torch.cuda.current_device() == 2, seen
with torch.cuda.device(1):
    assert torch.empty(3, device="cuda").device.index == 1
assert torch.empty(3, device="cuda").device.index == 2
torch.cuda.set_device(0)
try:
    torch.cuda.set_device(4)
    raise SystemExit("there is no fifth device")
except RuntimeError as error:
    assert "invalid device ordinal" in str(error), error

# Operators run where their arguments are, whatever device is current.
x = torch.arange(10.0, device="cuda:1")
y = (x * 2).sum()
assert y.device.index == 1 and y.item() == 90 and torch.cuda.current_device() == 0
try:
    torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")
    raise SystemExit("devices were mixed")
except RuntimeError as error:
    assert "cuda:0" in str(error) and "cuda:1" in str(error), error
for device in range(4):
    assert torch.cuda.default_stream(device).device.index == device
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)

# Autograd's thread of each device uses that device, and the streams of the forward pass.
devices = []
class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        devices.append((gradient.device.index, torch.cuda.current_device()))
        return gradient
x = torch.ones(4, device="cuda:0", requires_grad=True)
for device in (1, 2, 3):
    x = Probe.apply(x.to(f"cuda:{device}"))
x.sum().backward()
assert devices == [(3, 3), (2, 2), (1, 1)], devices
"""

COPIES = """
import torch

x = torch.arange(1000.0, device="cuda:0")
y = x.to("cuda:1")
z = y.to("cuda:3", non_blocking=True)
assert torch.equal(z.cpu(), torch.arange(1000.0))
permuted = torch.empty(10, 100, device="cuda:2").t()
permuted.copy_(z.view(100, 10))
assert torch.equal(permuted.cpu(), torch.arange(1000.0).view(100, 10))
half = torch.empty(1000, dtype=torch.half, device="cuda:1")
half.copy_(x)
assert half[5].item() == 5
host = torch.ones(1000).pin_memory()
assert all(host.to(f"cuda:{i}", non_blocking=True).sum().item() == 1000 for i in range(4))

# Streams of two devices: an event of the one is waited for by the other.
first, second = torch.cuda.Stream(0), torch.cuda.Stream(1)
with torch.cuda.stream(first):
    a = torch.ones(1 << 18, device="cuda:0")
with torch.cuda.stream(first), torch.cuda.stream(second):
    b = a.to("cuda:1")
    c = b * 2
assert c.device.index == 1
torch.cuda.current_stream(1).wait_stream(second)
assert c.sum().item() == 1 << 19
event = torch.cuda.Event()
event.record(first)
try:
    event.record(second)
    raise SystemExit("an event was recorded on another device")
except RuntimeError as error:
    assert "Event device" in str(error), error
second.wait_event(event)

# What lists of tensors on several devices do.
xs = [torch.full((4,), float(i), device=f"cuda:{i}") for i in range(4)]
ys = torch._foreach_add(xs, 1.0)
assert [y.device.index for y in ys] == [0, 1, 2, 3]
assert [y.sum().item() for y in ys] == [4, 8, 12, 16]
torch._foreach_mul_(ys, xs)
assert [y.sum().item() for y in ys] == [0, 8, 24, 48]
assert [n.item() for n in torch._foreach_norm(xs)] == [0, 2, 4, 6]
back = [torch.zeros(4, device=f"cuda:{3 - i}") for i in range(4)]
torch._foreach_copy_(back, xs)
assert [b.sum().item() for b in back] == [0, 4, 8, 12]
try:
    torch._foreach_add(xs, [torch.ones(4)] * 4)
    raise SystemExit("a tensor of the CPU was added")
except RuntimeError as error:
    assert "cpu" in str(error), error
sparse = torch.eye(4).to_sparse().to("cuda:2")
assert (sparse @ torch.ones(4, 2, device="cuda:2")).device.index == 2
"""

MEMORY = """
import torch

MIB = 1 << 20
a = [torch.empty(160 * MIB, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2)]
try:
    torch.empty(160 * MIB, dtype=torch.uint8, device="cuda:1")
    raise SystemExit("it fitted")
except torch.OutOfMemoryError as error:
    assert "GPU 1" in str(error), error
assert torch.cuda.memory_allocated(1) == 160 * MIB
assert torch.cuda.memory_allocated(2) == 0
assert torch.cuda.max_memory_allocated(0) == 160 * MIB
free = [torch.cuda.mem_get_info(i)[0] for i in range(4)]
assert max(free[:2]) <= 96 * MIB < min(free[2:]), free
del a
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved(1) == 0
assert len({str(torch.cuda.get_device_properties(i).uuid) for i in range(4)}) == 4
assert torch.cuda.can_device_access_peer(0, 3)

# Generators are one a device.
torch.manual_seed(3)
a, b = torch.rand(5, device="cuda:1"), torch.rand(5, device="cuda:2")
assert torch.equal(a.cpu(), b.cpu())
states = torch.cuda.get_rng_state_all()
c = torch.rand(5, device="cuda:1")
assert not torch.equal(a, c)
assert torch.equal(torch.cuda.get_rng_state(2), states[2])
torch.cuda.set_rng_state_all(states)
assert torch.equal(torch.rand(5, device="cuda:1"), c)
generator = torch.Generator("cuda:3").manual_seed(3)
assert torch.equal(torch.rand(5, device="cuda:3", generator=generator).cpu(), a.cpu())
"""

TRAINING = """
import copy

import torch
from torch import nn

torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
split = [copy.deepcopy(layer).to(f"cuda:{i}") for i, layer in enumerate(layers)]
parameters = [[p for layer in model for p in layer.parameters()] for model in (layers, split)]
for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
    optimizers = [torch.optim.AdamW(group, lr=0.01, **options) for group in parameters]
    for step in range(3):
        x = torch.randn(8, 16)
        losses = []
        for model, optimizer, group, moves in zip(
            (layers, split), optimizers, parameters, (False, True), strict=True
        ):
            value = x.to("cuda:0") if moves else x
            for i, layer in enumerate(model):
                value = layer(value.to(f"cuda:{i}") if moves else value)
            loss = value.square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(group, 0.1)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1], (options, step, losses)
for ours, theirs in zip(*parameters, strict=True):
    assert torch.equal(ours, theirs.cpu())
total = nn.utils.clip_grad_norm_(parameters[1], 1.0)
assert total.device.index == 0
"""

COLLECTIVES = """
import torch
from torch import nn
from torch.cuda import comm, nccl

x = torch.arange(32.0, device="cuda:0").view(8, 4)
copies = comm.broadcast(x, [0, 1, 2, 3])
assert copies[0] is x and all(torch.equal(c.cpu(), x.cpu()) for c in copies)
assert [c.device.index for c in copies] == [0, 1, 2, 3]
outputs = [torch.empty_like(x, device=f"cuda:{i}") for i in (1, 3)]
comm.broadcast(x, out=outputs)
assert all(torch.equal(o.cpu(), x.cpu()) for o in outputs)
parts = comm.scatter(x, [0, 1, 2, 3])
assert torch.equal(comm.gather(parts, destination=0), x)
assert torch.equal(comm.reduce_add(copies, 0), 4 * x)
coalesced = comm.broadcast_coalesced([x, x + 1], [0, 1, 2])
assert [[t.device.index for t in group] for group in coalesced] == [[0, 0], [1, 1], [2, 2]]
assert torch.equal(comm.reduce_add_coalesced(coalesced, 0)[1], 3 * (x + 1))

def fresh():
    return [torch.full((4,), float(i), device=f"cuda:{i}") for i in range(4)]

inputs = fresh()
nccl.all_reduce(inputs)
assert all(t.tolist() == [6.0] * 4 for t in inputs)
for op, expected in ((1, 0.0), (2, 3.0), (3, 0.0), (4, 1.5)):
    inputs = fresh()
    nccl.all_reduce(inputs, op=op)
    assert all(t.tolist() == [expected] * 4 for t in inputs), op
inputs = fresh()
nccl.broadcast(inputs, root=2)
assert all(t.tolist() == [2.0] * 4 for t in inputs)
gathered = [torch.empty(16, device=f"cuda:{i}") for i in range(4)]
nccl.all_gather(fresh(), gathered)
assert all(g.view(4, 4)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0] for g in gathered)
scattered = [torch.empty(1, device=f"cuda:{i}") for i in range(4)]
nccl.reduce_scatter(fresh(), scattered)
assert [s.item() for s in scattered] == [6.0] * 4
for wrong in ([x, x], [], [x.t(), x.to("cuda:1")], [x, torch.ones(3, device="cuda:1")]):
    try:
        nccl.all_reduce(wrong)
        raise SystemExit("accepted")
    except RuntimeError:
        pass
try:
    comm.broadcast(x, [1, 0])
    raise SystemExit("the tensor is not on the first device")
except RuntimeError as error:
    assert "device 1" in str(error), error

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
data = torch.randn(8, 16, device="cuda")
alone = net(data)
alone.sum().backward()
expected = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
together = nn.DataParallel(net)(data)
assert torch.allclose(together, alone)
together.sum().backward()
for p, gradient in zip(net.parameters(), expected, strict=True):
    assert torch.allclose(p.grad, gradient, atol=1e-5)
"""

PIPELINE = """
import torch

# Micro-batches through four devices, each on a stream of its own, in flight together.
streams = [torch.cuda.Stream(i) for i in range(4)]
weights = [torch.full((64, 64), 0.01 * (i + 1), device=f"cuda:{i}") for i in range(4)]
torch.cuda.synchronize()
for i in range(4):
    torch.cuda.synchronize(i)
batches = [torch.randn(8, 64) for _ in range(6)]
hosts = [batch.pin_memory() for batch in batches]
results = [torch.empty(8, 64).pin_memory() for _ in batches]
kept = []
for host, result in zip(hosts, results, strict=True):
    value = None
    for i in range(4):
        with torch.cuda.stream(streams[i]):
            if value is None:
                value = host.to("cuda:0", non_blocking=True)
            else:
                # torch copies on the source's current stream, and has the other one wait for it.
                with torch.cuda.stream(streams[i - 1]), torch.cuda.stream(streams[i]):
                    value = value.to(f"cuda:{i}", non_blocking=True)
            value = value @ weights[i]
            kept.append(value)
    with torch.cuda.stream(streams[3]):
        result.copy_(value, non_blocking=True)
streams[3].synchronize()
for batch, result in zip(batches, results, strict=True):
    for i in range(4):
        batch = batch @ torch.full((64, 64), 0.01 * (i + 1))
    assert torch.equal(batch, result)
"""


def run(run_emulated: RunEmulated, *programs: str, **options: object) -> None:
    """Each program in a function of its own, so that names do not meet; one process."""
    code = "import gc, torch\n"
    for program in programs:
        code += f"exec(compile({program!r}, 'program', 'exec'), {{}})\n"
        # Before it unmaps an expandable segment torch waits for the segment's stream, but for a
        # default stream that is the current device's: the others have to be waited for here.
        code += "gc.collect(); torch.cuda.set_device(0)\n"
        code += "for i in range(4): torch.cuda.synchronize(i)\n"
        code += "torch.cuda.empty_cache()\n"
    run_emulated(code, vram="256MiB", devices=4, **options)


@pytest.mark.parametrize("setting", ["", pytest.param(EXPANDABLE, marks=pytest.mark.soak)])
def test_four_devices(run_emulated: RunEmulated, setting: str) -> None:
    settings = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
    run(run_emulated, MEMORY, PLACES, COPIES, TRAINING, COLLECTIVES, PIPELINE, env=settings)


@pytest.mark.parametrize("schedule", [pytest.param("threaded", marks=pytest.mark.soak), "random"])
def test_schedules(run_emulated: RunEmulated, schedule: str) -> None:
    run(run_emulated, COPIES, TRAINING, PIPELINE, schedule=schedule)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["eager", "threaded", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_all_on_every_schedule(run_emulated: RunEmulated, schedule: str, seed: int) -> None:
    programs = (MEMORY, PLACES, COPIES, TRAINING, COLLECTIVES, PIPELINE)
    run(run_emulated, *programs, schedule=schedule, seed=seed)

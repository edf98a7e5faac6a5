"""Overlapped steps in processes of their own: schedules, devices, compilers, groups, ends."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from torch import nn
from overlap_models import LazyWorker, Net, assert_same_run, loss_of, train
from spillover.optim import AdamW, SGD, _awaited, _staging

_staging._SLOT_BYTES_MAX = 8 << 10
"""

TRAINING = (
    PRELUDE
    + """
def observe(model, optimizer):
    return [each.detach().clone() for each in list(model.parameters())[::3]]

for options in (
    {},
    {"dtype": torch.bfloat16},
    {"offload_gradients": True, "micro_steps": 2},
    {"dtype": torch.bfloat16, "offload_gradients": True, "moments": "blockwise8"},
    {"set_to_none": False, "make": SGD, "momentum": 0.9},
):
    for after_step in (None, observe):
        runs = [train(overlaps=x, after_step=after_step, **options) for x in (True, False)]
        assert_same_run(*runs)
print("equal")
"""
)


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("random", 1),
        pytest.param("late", 0, marks=pytest.mark.soak),
        pytest.param("threaded", 0, marks=pytest.mark.soak),
        pytest.param("eager", 0, marks=pytest.mark.soak),
        pytest.param("random", 2, marks=pytest.mark.soak),
    ],
)
def test_schedules(run_emulated: Run, schedule: str, seed: int) -> None:
    assert "equal" in run_emulated(TRAINING, schedule=schedule, seed=seed, timeout=200).stdout


def test_our_own_allocator(run_emulated: Run) -> None:
    code = "from spillover import allocator\nallocator.install()\n" + TRAINING
    assert "equal" in run_emulated(code, schedule="random", seed=3, timeout=200).stdout


def test_two_devices_and_the_host(run_emulated: Run) -> None:
    code = (
        PRELUDE
        + """
class Spread(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(40, 40).to(where) for where in ("cuda:0", "cuda:1", "cpu", "cuda:0")
        )

    def forward(self, value):
        for layer in self.layers:
            value = torch.tanh(layer(value.to(layer.weight.device)))
        return value

def run(overlaps):
    model = Spread()
    optimizer = AdamW(model.parameters(), lr=0.1, **({"overlap": model} if overlaps else {}))
    for step in range(4):
        with torch.cuda.device(step % 2):
            value = torch.randn(3, 40, generator=torch.Generator().manual_seed(step))
            model(value).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [each.detach().cpu() for each in model.parameters()]

assert all(map(torch.equal, run(True), run(False)))
print("equal")
"""
    )
    assert "equal" in run_emulated(code, schedule="late", devices=2).stdout


COMPILED = (
    PRELUDE
    + """
import warnings
warnings.simplefilter("ignore")
from overlap_models import tokens_of

kind, backend, is_given = sys.argv[1:]

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32))
        self.cuda()

    def forward(self, value):
        return self.layers(value)

def run(overlaps):
    torch._dynamo.reset()
    model = Plain()
    called = model
    if kind == "module":
        called = torch.compile(model, backend=backend)
    elif kind == "in place":
        model.compile(backend=backend)
    elif kind == "function":
        called = torch.compile(lambda value: model(value), backend=backend)
    elif kind == "block":
        model.layers[1].compile(backend=backend)
    given = called if is_given == "given" else model
    optimizer = AdamW(model.parameters(), lr=0.01, **({"overlap": given} if overlaps else {}))
    found = []
    for step in range(5):
        value = torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).cuda()
        loss = called(value).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found + [each.detach().clone() for each in model.parameters()]

lazy = LazyWorker()
lazy.install(setattr)
found = run(True)
lazy.open()
assert all(map(torch.equal, found, run(False)))
print("equal")
"""
)


# Compiling takes long.
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        pytest.param("module", "given", marks=pytest.mark.soak),
        pytest.param("in place", "given", marks=pytest.mark.soak),
        pytest.param("block", "given", marks=pytest.mark.soak),
        pytest.param("module", "inner", marks=pytest.mark.soak),
        ("function", "inner"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.soak)])
def test_compiled_modules(run_emulated: Run, kind: str, backend: str, given: str) -> None:
    assert "equal" in run_emulated(COMPILED, kind, backend, given, timeout=400).stdout


DDP = (
    PRELUDE
    + """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
lazy = LazyWorker()
lazy.install(setattr)


def broadcast(model, optimizer):
    for each in model.parameters():
        dist.broadcast(each.data, 0)
    return [each.detach().clone() for each in model.parameters()]


def broadcast_parameters(model, optimizer):
    with torch.no_grad():
        for each in model.parameters():
            dist.broadcast(each, 0)
            dist.all_reduce(each)
    return [each.detach().clone() for each in model.parameters()]


def gathered(model, optimizer):
    found = [torch.empty_like(model.table.weight)]
    dist.all_gather(found, model.table.weight)
    return found


def wrapped_anew(model, optimizer):
    '''The constructor broadcasts parameters.'''
    DistributedDataParallel(model)
    return [each.detach().clone() for each in model.parameters()]


def run(overlaps, **options):
    lazy.close() if overlaps else lazy.open()
    return train(overlaps=overlaps, **options)


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


for after_step in (broadcast, broadcast_parameters, gathered, wrapped_anew):
    assert_same_run(*[run(x, after_step=after_step, steps=2) for x in (True, False)])
views = lambda model: DistributedDataParallel(
    model, find_unused_parameters=True, gradient_as_bucket_view=True
)
for wrap in (ddp, views):
    for options in ({}, {"offload_gradients": True, "micro_steps": 2}, {"set_to_none": False}):
        assert_same_run(*[run(x, wrap=wrap, steps=3, **options) for x in (True, False)])
dist.destroy_process_group()
lazy.open()
print("equal")
"""
)


def test_ddp_and_broadcasts(run_emulated: Run) -> None:
    assert "equal" in run_emulated(DDP, timeout=400).stdout


END = (
    PRELUDE
    + """
import os
lazy = LazyWorker()
lazy.install(setattr)
model = Net()
optimizer = AdamW(model.parameters(), overlap=model)
loss_of(model, 0).backward()
optimizer.step()
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        print(any(map(_awaited.is_awaited, model.parameters())), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
if "failure" in sys.argv:
    from spillover.optim import _staging
    def fail(*_):
        raise RuntimeError("on purpose")
    _staging.Staging.start_departure = fail
if "quit" in sys.argv:
    lazy.open()
"""
)


def test_nothing_is_awaited_in_a_forked_child(run_emulated: Run) -> None:
    assert run_emulated(END, "fork", "quit").stdout == "False\n"


def test_the_process_ends_after_the_updates(run_emulated: Run) -> None:
    result = run_emulated(END, "quit")
    assert result.stderr == ""


def test_a_failure_that_nobody_heard_of_is_printed_at_the_end(run_emulated: Run) -> None:
    assert "on purpose" in run_emulated(END, "failure", "quit").stderr

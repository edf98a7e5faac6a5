"""Overlapped steps in processes of their own: schedules, devices, compilers, process groups, ends."""

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
from overlap_models import Net, assert_same_run, loss_of, train
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
        ("late", 0),
        ("threaded", 0),
        ("random", 1),
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
            model(torch.randn(3, 40, generator=torch.Generator().manual_seed(step))).sum().backward()
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
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.LayerNorm(32))
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
        model.layers[2].compile(backend=backend)
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

# Only who waits has the worker go on.
import threading
from conftest import LazyWorker
import pytest
lazy = LazyWorker.__new__(LazyWorker)
from spillover.optim import _host_step, _overlap
import conftest
lazy.__init__()
update_batch = _host_step._Pipeline._update_batch
def replaced(pipeline, *batch):
    if threading.current_thread().name.startswith("spillover-optimizer"):
        lazy.await_demand()
    update_batch(pipeline, *batch)
_host_step._Pipeline._update_batch = replaced
_overlap.PendingStep._wait_until = lazy.wait
found = run(True)
lazy.open()
assert all(map(torch.equal, found, run(False)))
print("equal")
"""
)

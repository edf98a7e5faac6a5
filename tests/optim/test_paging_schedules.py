"""Paged steps are the same whatever order the device takes, on one device and on two."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = f"""
import sys, tempfile
sys.path.insert(0, {str(Path(__file__).parent)!r})
import functools
import torch
from paging_programs import KIB, Lion, Net, assert_same, backward, groups_of, train, trained
from spillover.optim import _paging_store, page, unpage

_paging_store._CHUNK_BYTES, _paging_store._STAGING_BYTES = 8 * KIB, 16 * KIB
folder = tempfile.TemporaryDirectory()
TIERS = [
    {{}},
    {{"tier": "disk", "directory": folder.name}},
    {{"tier": "auto", "directory": folder.name, "host_budget": 20 * KIB}},
]
"""

ONE_DEVICE = (
    PROGRAM
    + """
for make in (torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9), Lion):
    expected = trained(make, None, steps=4)
    for tier in TIERS:
        found = trained(make, {"bucket_bytes": 8 * KIB, **tier}, steps=4)
        for weight, wanted in zip(found[0].parameters(), expected[0].parameters(), strict=True):
            assert torch.equal(weight, wanted)

# State that the program holds, steps that fail, and the way back, in between.
expected = Net(), None
expected = expected[0], torch.optim.Adam(groups_of(expected[0]))
train(*expected, 4)
for tier in TIERS:
    model = Net()
    optimizer = page(torch.optim.Adam(groups_of(model)), bucket_bytes=8 * KIB, **tier)
    train(model, optimizer, 1)
    held = optimizer.state[model.layers[0].weight]["exp_avg"]
    train(model, optimizer, 1, first=1)
    assert held.eq(optimizer.state[model.layers[0].weight]["exp_avg"]).all()
    unpage(optimizer)
    page(optimizer, bucket_bytes=4 * KIB, **tier)
    train(model, optimizer, 2, first=2)
    assert_same((model, optimizer), expected)
print("equal")
"""
)

TWO_DEVICES = (
    PROGRAM
    + """
def run(options):
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(40, 40).to(device))
        for device in ("cuda:0", "cuda:1", "cpu", "cuda:1", "cuda:0", "cuda:1")
    ]
    model = torch.nn.ParameterList(weights)
    optimizer = torch.optim.AdamW(model, lr=0.1)
    if options is not None:
        page(optimizer, bucket_bytes=13_000, **options)
    for step in range(5):
        for weight in weights:
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(40, 40, generator=generator).to(weight.device)
        with torch.cuda.device(step % 2):
            optimizer.step()
    return model, optimizer

expected = run(None)
for tier in TIERS:
    model, optimizer = run(tier)
    assert_same((model, optimizer), expected)
    assert all(
        value.device.type == "cpu"
        for entry in optimizer.state.values() for value in entry.values()
    )
    # A parameter that changes its device has its state come there.
    moved = model[0]
    moved.data = moved.data.to("cuda:1")
    moved.grad = moved.data.clone()
    optimizer.step()
    assert torch.isfinite(moved).all()
    unpage(optimizer)
    assert optimizer.state[moved]["exp_avg"].device == moved.device
print("equal")
"""
)


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("random", 1),
        *[
            pytest.param(*other, marks=pytest.mark.soak)
            for other in (("late", 0), ("eager", 0), ("threaded", 0), ("random", 2))
        ],
    ],
)
def test_one_device(run_emulated: Run, schedule: str, seed: int) -> None:
    assert "equal" in run_emulated(ONE_DEVICE, schedule=schedule, seed=seed, timeout=400).stdout


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("threaded", 0),
        pytest.param("late", 0, marks=pytest.mark.soak),
        pytest.param("random", 3, marks=pytest.mark.soak),
    ],
)
def test_two_devices(run_emulated: Run, schedule: str, seed: int) -> None:
    result = run_emulated(TWO_DEVICES, schedule=schedule, seed=seed, devices=2, timeout=400)
    assert "equal" in result.stdout


def test_our_own_allocator(run_emulated: Run) -> None:
    code = ONE_DEVICE.replace(
        "import functools\n",
        "from spillover import allocator\nallocator.install()\nimport functools\n",
    )
    assert "equal" in run_emulated(code, schedule="random", seed=5, timeout=400).stdout

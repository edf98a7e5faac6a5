"""The tests of activation offloading on other schedules than the session's, which is "late"."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

SCHEDULED = """
import sys
sys.path.insert(0, FOLDER)
import torch
from activation_networks import NETWORKS, check_network
for name in NETWORKS:
    check_network(name, DIRECTORY)
    check_network(name)
torch.cuda.synchronize()
assert not spillover.emulator.hazards(), spillover.emulator.hazards()
print("equal")
"""


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        ("threaded", 0),
        *(
            pytest.param(*other, marks=pytest.mark.soak)
            for other in [("eager", 0), *(("random", seed) for seed in range(20))]
        ),
    ],
)
def test_networks_on_every_schedule(
    run_emulated: Callable[..., Any], tmp_path: Path, schedule: str, seed: int
) -> None:
    code = SCHEDULED.replace("FOLDER", repr(str(HERE))).replace("DIRECTORY", repr(str(tmp_path)))
    assert "equal" in run_emulated(code, schedule=schedule, seed=seed).stdout


FILES = (
    "test_activations_autograd.py",
    "test_activations_budgets.py",
    "test_activations_checkpoint.py",
    "test_activations_functions.py",
    "test_activations_peers.py",
    "test_activations_networks.py",
    "test_activations_pitfalls.py",
    "test_activations_surroundings.py",
    "test_activations_tensors.py",
    "test_activations_wrappers.py",
)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("schedule", "seed"),
    [("eager", 0), ("threaded", 0), *(("random", seed) for seed in range(3))],
)
def test_everything_on_every_schedule(schedule: str, seed: int) -> None:
    run_files(schedule, seed, *FILES)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3, 20))
def test_peers_on_every_seed(seed: int) -> None:
    run_files("random", seed, "test_activations_peers.py")


def run_files(schedule: str, seed: int, *names: str) -> None:
    """In a session of its own; what it prints says which test failed."""
    own = {"SPILLOVER_TEST_SCHEDULE": schedule, "SPILLOVER_TEST_SEED": str(seed)}
    environment = {**os.environ, **own, "SPILLOVER_SOAK": "0"}
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(variable, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, "--show-capture=no", *names],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

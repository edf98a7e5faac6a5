"""Each part of the product survives a fault at every call that it makes of the driver and the disk.

``make test`` takes a seeded sample; ``make soak`` takes every call that does
some work (see ``QUESTIONS``).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS, STORAGE

PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import scenarios
scenarios.main(*sys.argv[1:])
"""
ON_DISK = ("disk", "activations_disk", "paging_disk", "transfers_disk", "durable")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_sweep(run_emulated: Run) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str, schedule: str = "late") -> dict[str, Any]:
        result = run_emulated(
            PROGRAM, *arguments, schedule=schedule, vram="256MiB", check=False, timeout=1100
        )
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
        assert result.returncode == 0, f"exit code {result.returncode}\n{tail}"
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        assert not found["failures"], "\n".join(found["failures"])
        assert found["points"] > 0
        print(" ".join(arguments), found)
        return found

    return run


def test_sample_of_driver_calls(run_sweep: Callable[..., dict[str, Any]]) -> None:
    run_sweep("all", "work", "3", "20")


def test_sample_of_storage_operations(run_sweep: Callable[..., dict[str, Any]]) -> None:
    run_sweep("activations_disk", "storage", "8", "7")
    run_sweep("paging_disk", "storage", "8", "7")
    run_sweep("transfers_disk", "storage", "8", "7")
    run_sweep("durable", "storage", "8", "7")


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("schedule", ["late", "random"])
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "durable"])
def test_every_driver_call(
    name: str, schedule: str, run_sweep: Callable[..., dict[str, Any]]
) -> None:
    run_sweep(name, "work", schedule=schedule)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["host_pool", "reserved_host_pool"])
def test_every_driver_call_of_the_host_pool(
    name: str, run_sweep: Callable[..., dict[str, Any]]
) -> None:
    run_sweep(name, "driver")


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", STORAGE)
@pytest.mark.parametrize("name", ON_DISK)
def test_every_storage_operation(
    name: str, fault: str, run_sweep: Callable[..., dict[str, Any]]
) -> None:
    if STORAGE[fault].operation in ("rename", "lock", "sync") and name != "durable":
        pytest.skip("scratch storage does not do that")
    found = run_sweep(name, fault)
    if fault.endswith(("short", "delay", "EINTR", "EAGAIN", "EOPNOTSUPP")):
        assert found["survived"] == found["points"], "a fault that is retried cost an operation"

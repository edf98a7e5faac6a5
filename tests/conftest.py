"""Gives the whole test session one emulated device, before anything imports torch.

Tests that need another device (a smaller one, another schedule, our allocator installed) run a
program of their own through ``run_emulated``.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from program_server import HAZARDS, ProgramServer
from spillover import emulator

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = os.environ.get("SPILLOVER_TEST_GPU") == "1"

#: Whether emulated devices have virtual memory; see test_pool_without_virtual_memory.py.
VIRTUAL_MEMORY = os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1"

#: When the emulated device works, for the soak's runs of the same tests under other schedules.
SCHEDULE = os.environ.get("SPILLOVER_TEST_SCHEDULE", "late")
SEED = int(os.environ.get("SPILLOVER_TEST_SEED", "0"))

if not ON_GPU:
    # The pool checks itself at intervals, in the processes that tests start as well.
    os.environ.setdefault("SPILLOVER_ALLOCATOR", "check_every=64")
    emulator.enable(
        vram="2GiB",
        schedule=SCHEDULE,  # type: ignore[arg-type]
        hazards="raise",
        seed=SEED,
        virtual_memory=VIRTUAL_MEMORY,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what this session cannot run: GPU tests without a GPU, long ones in `make test`."""
    soak = os.environ.get("SPILLOVER_SOAK") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run `make test-gpu`"))
        if item.get_closest_marker("soak") and not soak:
            item.add_marker(pytest.mark.skip(reason="long: run `make soak`"))
        if item.get_closest_marker("virtual_memory") and not VIRTUAL_MEMORY:
            item.add_marker(pytest.mark.skip(reason="is about virtual memory"))
        if item.get_closest_marker("fixed_memory") and VIRTUAL_MEMORY:
            item.add_marker(pytest.mark.skip(reason="runs on devices without virtual memory"))


def pytest_collection_finish() -> None:
    """Keep the modules out of what tests collect: a collection takes little of its time then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def hazards() -> Iterator[None]:
    """Fail a test that leaves a hazard behind; tests that provoke one clear it themselves."""
    if ON_GPU:
        yield
        return
    emulator.clear_hazards()
    yield
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            # torch.cuda.graph() leaves its stream current when a capture fails.
            torch.cuda.set_stream(torch.cuda.default_stream())
    found = emulator.hazards()
    emulator.clear_hazards()
    assert not found, "hazards were reported:\n" + "\n".join(found)


@pytest.fixture
def settled_memory() -> None:
    """Have nothing on its way out that earlier tests left: for tests that measure what is held."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    gc.collect()  # What autograd's threads held has become garbage since.


@pytest.fixture(scope="session")
def program_server() -> Iterator[ProgramServer]:
    """What starts programs on emulated devices faster."""
    server = ProgramServer()
    yield server
    server.close()


@pytest.fixture
def run_emulated(
    program_server: ProgramServer,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a new process with emulated devices of its own."""

    def run(
        code: str | Path,
        *arguments: str,
        vram: str = "512MiB",
        schedule: str = "late",
        hazards: str = "raise",
        seed: int = 0,
        devices: int = 1,
        check: bool = True,
        timeout: float = 120,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        body = code.read_text() if isinstance(code, Path) else textwrap.dedent(code)
        prelude = "import spillover.emulator\n"
        options: dict[str, Any] = {
            "vram": vram,
            "schedule": schedule,
            "seed": seed,
            "devices": devices,
            "virtual_memory": VIRTUAL_MEMORY,
        }
        is_served = "import torch" in body and not env and hazards == HAZARDS
        if is_served and program_server.can_run():
            result = program_server.run(prelude + "\n" + body, arguments, options, timeout)
        else:
            options["hazards"] = hazards
            enable = f"spillover.emulator.enable(**{options!r})\n"
            result = subprocess.run(
                [sys.executable, "-c", prelude + enable + body, *arguments],
                capture_output=True,
                text=True,
                timeout=timeout,
                # Where a process ends by a signal, stderr has what its threads were doing.
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
                check=False,
            )
        if check:
            assert result.returncode == 0, (
                f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
            )
        return result

    return run

"""The pool's tests once more, on devices without virtual memory, where it has fixed chunks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
#: One process each, so that they run side by side.
GROUPS = {
    "pool": [
        "fixed_memory",
        "behaviour",
        "growth",
        "magazines",
        "faults",
        "tags",
        "settings",
        "arenas",
        "trace",
    ],
    "waiting": ["reclaim", "threads", "python", "c_api", "upstream", "watermarks", "sharing"],
    "model": ["model"],
}

#: pytest's exit code for a file whose tests are all left out.
NO_TESTS = 5


def run_suite(*files: str, keyword: str = "") -> None:
    environment = {
        # The inner session is not a worker of this one.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "SPILLOVER_TEST_VIRTUAL_MEMORY": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command += ["--timeout", "0"]  # The outer session has one.
    if keyword:
        command += ["-k", keyword]
    result = subprocess.run(
        [*command, *(str(FOLDER / file) for file in files)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode in (0, NO_TESTS), result.stdout + result.stderr


pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1"
    or os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY") == "0",
    reason="starts sessions on emulated devices",
)


@pytest.mark.parametrize(
    "group",
    ["pool", *(pytest.param(name, marks=pytest.mark.soak) for name in ("waiting", "model"))],
)
def test_pool(group: str) -> None:
    # Without the tests that start torch.
    run_suite(
        *(f"test_pool_{name}.py" for name in GROUPS[group]),
        keyword="not tensors and not install and not array",
    )


@pytest.mark.soak
def test_adapter() -> None:
    run_suite("test_torch_out_of_memory.py", "test_torch_statistics.py")


@pytest.mark.soak
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_everything(file: str) -> None:
    run_suite(file)

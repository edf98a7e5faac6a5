"""The driver layer's C++ handles, through a small program built against libspillover.so."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from spillover._paths import library_path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the tests need a C++ compiler"
    library = library_path("libspillover.so")
    out = tmp_path_factory.mktemp("handles") / "handles_check"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-Wall",
            f"-I{CSRC}",
            str(HERE / "handles_check.cpp"),
            str(library),
            f"-Wl,-rpath,{library.parent}",
            "-o",
            str(out),
        ],
        check=True,
    )
    return out


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program with the driver of this session, emulated or real."""
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LD_PRELOAD": loaded_driver(), "SPILLOVER_EMULATOR_VRAM": "256MiB"},
        check=False,
    )


def loaded_driver() -> str:
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = "/" + line.rstrip().partition("/")[2]
            if Path(path).name.startswith("libcuda.so"):
                return path
    return ""


def test_handles_keep_their_promises(program: Path) -> None:
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    # Every deleter succeeded: a failed one reports on stderr.
    assert "while a handle was released" not in result.stderr


def test_a_release_that_fails_is_reported_and_does_not_stop(program: Path) -> None:
    result = run(program, "failing-release")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cuMemHostUnregister failed while a handle was released" in result.stderr

"""The kernels of Arm processors, cross-compiled and run under QEMU.

``neon_check.cpp`` compares them with the portable ones, and prints digests that are the same here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from spillover._paths import library_path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
PROGRAM = HERE / "neon_check.cpp"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wno-unused-parameter")

#: Half a minute of one processor, most of it the compiler's.
pytestmark = pytest.mark.soak


def compiled_for_arm(folder: Path) -> Path:
    """The program with all of csrc/optim, as csrc/optim/CMakeLists.txt compiles a release."""
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", *WARNINGS, f"-I{CSRC}"]
    sources = sorted((CSRC / "optim").glob("*.cpp"))
    release = ["-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off"]
    subprocess.run([*command, *release, "-c", *map(str, sources)], check=True, cwd=folder)
    objects = [f"{source.stem}.o" for source in sources]
    # Without a folder of Arm libraries to name, which each distribution has elsewhere.
    link = ["-static", "-pthread", "-o", "on_arm"]
    subprocess.run([*command, "-O1", str(PROGRAM), *objects, *link], check=True, cwd=folder)
    return folder / "on_arm"


def compiled_for_this_machine(folder: Path) -> Path:
    """The program with the library that is installed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the tests need a C++ compiler"
    library = library_path("libspillover.so")
    out = folder / "here"
    command = [compiler, "-std=c++20", "-O1", *WARNINGS, f"-I{CSRC}", str(PROGRAM), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(out)], check=True)
    return out


def output_of(*command: str | Path) -> list[str]:
    """What the program prints; it fails where instruction sets disagree."""
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, (
        f"exit code {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr}"
    )
    return result.stdout.splitlines()


@pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user)",
)
def test_arm_processors_give_the_same_bits(tmp_path: Path) -> None:
    assert EMULATOR is not None
    on_arm = output_of(EMULATOR, compiled_for_arm(tmp_path))
    assert on_arm[0] == "instruction sets: portable neon"
    here = output_of(compiled_for_this_machine(tmp_path))
    assert len(on_arm) > 400
    assert on_arm[1:] == here[1:]

"""Builds the stress programs with each sanitizer; the pool's runs on the emulated device.

Usage: run_sanitizers.py [thread] [address,undefined]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from spillover._paths import library_path

ROOT = Path(__file__).resolve().parents[1]
#: Each program with the layers that it is built of and its arguments before the seed.
PROGRAMS = {
    "allocator/stress.cpp": (
        ("base", "driver", "trace", "allocator", "tiers", "transfer"),
        ("3", "1200"),
    ),
    "trace/stress.cpp": (("base", "trace"), ("3", "4")),
    "optim/stress.cpp": (("base", "optim"), ("3", "3")),
}
SANITIZERS = ("thread", "address,undefined")


def cuda_headers() -> str:
    """The folder of <cuda.h> in the installed wheel."""
    for folder in map(Path, sys.path):
        for found in folder.glob("nvidia/*/include/cuda.h"):
            return str(found.parent)
    raise SystemExit("the CUDA headers are missing: run `make setup`")


def build(sanitizer: str, source: str, layers: tuple[str, ...], program: Path) -> None:
    """Compile the layers and a stress program as one."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("a C++ compiler is needed")
    sources = [
        str(path) for layer in layers for path in sorted((ROOT / "csrc" / layer).glob("*.cpp"))
    ]
    command = [
        compiler,
        "-std=c++20",
        "-g",
        "-O1",
        "-fno-omit-frame-pointer",
        # As csrc/optim/CMakeLists.txt has it.
        "-ffp-contract=off",
        f"-fsanitize={sanitizer}",
    ]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", cuda_headers()]
    command += [*sources, str(ROOT / "tests" / source)]
    command += ["-pthread", "-ldl", "-o", str(program)]
    subprocess.run(command, check=True)


def main(arguments: list[str]) -> int:
    """Run the named sanitizers, or all; the exit status is 1 where one has found something."""
    driver = library_path("emulator/libcuda.so.1").parent
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(driver),
        "SPILLOVER_EMULATOR_VRAM": "256MiB",
        "SPILLOVER_EMULATOR_POISON": "0",
    }
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for sanitizer in arguments or SANITIZERS:
            for source, (layers, options) in PROGRAMS.items():
                program = Path(folder) / "stress"
                build(sanitizer, source, layers, program)
                for seed in (1, 2, 3):
                    print(f"{source}, {sanitizer}, seed {seed}: ", end="", flush=True)
                    result = subprocess.run(
                        [str(program), *options, str(seed)], env=environment, check=False
                    )
                    if result.returncode != 0:
                        failed.append(f"{source}, {sanitizer}, seed {seed}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

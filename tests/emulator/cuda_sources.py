"""Compiles CUDA sources for the host, as the emulated device runs them, and with NVRTC."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def cuda_folders() -> list[Path]:
    """Folders of the CUDA packages that torch brings."""
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return [folder for place in places for folder in Path(place).iterdir() if folder.is_dir()]


def cuda_headers() -> Path:
    """The folder with ``cuda_bf16.h``."""
    for folder in cuda_folders():
        if (folder / "include" / "cuda_bf16.h").exists():
            return folder / "include"
    pytest.skip("CUDA's headers are not installed (nvidia-cuda-runtime)")


def compile_for_host(source: Path, library: Path) -> None:
    """Compile a file that includes kernels and registers them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc/emulator/host_kernels/include")]
    command += ["-isystem", str(cuda_headers()), "-o", str(library), str(source), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def compile_with_nvrtc(source: Path, architecture: str) -> str:
    """Compile kernels to PTX, for which no GPU is needed."""
    libraries = [path for folder in cuda_folders() for path in folder.glob("lib/libnvrtc.so.*")]
    if not libraries:
        pytest.skip("NVRTC is not installed (torch's CUDA build brings it)")
    # In a process of its own: NVRTC has the linker look for a library that lies beside it.
    result = subprocess.run(
        [sys.executable, __file__, libraries[0], source, architecture, cuda_headers()],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries[0].parent)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def print_ptx(library: str, source: str, architecture: str, headers: str) -> None:
    """Print what NVRTC makes of a source, or exit with its complaints."""
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    path = Path(source)
    text, name = path.read_bytes(), path.name.encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}", f"--include-path={headers}"]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    if nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        sys.exit(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    print(ptx.value.decode())


if __name__ == "__main__":
    print_ptx(*sys.argv[1:])

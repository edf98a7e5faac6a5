"""Facts about the installed torch that a compilation against it needs.

torch is imported inside the functions: importing this module does not load it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from spillover._errors import BuildError, ConfigError
from spillover._settings import logger

_OLDEST = (2, 11)
_NEWEST = (2, 14)
_CUDA_VERSION = re.compile(r"^\s*#\s*define\s+CUDART_VERSION\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class TorchFacts:
    """What the installed torch is and where its headers and libraries lie."""

    version: str
    git_version: str
    cuda_version: str
    cxx11_abi: bool
    root: Path

    @property
    def include_folders(self) -> list[Path]:
        """Torch's own headers, which include the pybind11 that torch was built with."""
        include = self.root / "include"
        return [include, include / "torch" / "csrc" / "api" / "include"]

    @property
    def library_folder(self) -> Path:
        """Where libc10.so and its like lie."""
        return self.root / "lib"

    @property
    def identity(self) -> str:
        """Text that differs where binaries built against one do not fit the other."""
        return (
            f"torch {self.version} {self.git_version} cuda {self.cuda_version} "
            f"abi {int(self.cxx11_abi)}"
        )


def torch_facts() -> TorchFacts:
    """Look at the installed torch.

    Raises
    ------
    ConfigError
        There is no torch, or it is a build without CUDA.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            "PyTorch is not installed; Spillover's PyTorch part needs a CUDA build of it: "
            "install it with 'pip install torch'"
        ) from error
    if torch.version.cuda is None:
        raise ConfigError(
            f"torch {torch.__version__} is a build without CUDA; Spillover's PyTorch part needs a "
            "CUDA build of torch: install it with 'pip install torch'"
        )
    _warn_if_untested(torch.__version__)
    return TorchFacts(
        version=torch.__version__,
        git_version=str(torch.version.git_version),
        cuda_version=torch.version.cuda,
        cxx11_abi=bool(torch._C._GLIBCXX_USE_CXX11_ABI),
        root=Path(torch.__file__).resolve().parent,
    )


def _warn_if_untested(version: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not _OLDEST <= found <= _NEWEST:
        logger.warning(
            "torch %s is not one that Spillover is made for (%d.%d to %d.%d); trying it anyway",
            version,
            *_OLDEST,
            *_NEWEST,
        )


def cuda_include_folders(cuda_version: str) -> list[Path]:
    """Folders with the CUDA headers that fit torch's CUDA version, in search order.

    They come from the small header wheels that Spillover depends on, from the wheels that torch
    depends on, from triton, or from a CUDA toolkit.

    Raises
    ------
    BuildError
        No folder has them.
    """
    major = int(cuda_version.partition(".")[0])
    candidates = [folder for folder in _candidates(major) if folder.is_dir()]
    fitting = [folder for folder in candidates if _runtime_major(folder) in (None, major)]
    runtime = [folder for folder in fitting if _runtime_major(folder) == major]
    # Some wheels of the runtime leave out crt/, which a wheel of its own or triton then has.
    compiler = [folder for folder in fitting if (folder / "crt" / "host_defines.h").is_file()]
    if not runtime or not compiler:
        raise BuildError(
            f"no headers of CUDA {major} were found (cuda_runtime_api.h and crt/host_defines.h); "
            "run 'pip install nvidia-cuda-runtime nvidia-cuda-crt', or set CUDA_HOME to a toolkit "
            f"of CUDA {major}"
        )
    first = [runtime[0]] if runtime[0] in compiler else [runtime[0], compiler[0]]
    # The headers of cuBLAS and others may be in folders of their own.
    return first + [folder for folder in fitting if folder not in first]


def _candidates(major: int) -> list[Path]:
    folders: list[Path] = []
    for root in _namespace_folders("nvidia"):
        folders.append(root / f"cu{major}" / "include")
        folders.append(root / "cuda_runtime" / "include")
        folders.extend(sorted(root.glob("*/include")))
    folders.extend(root / "backends/nvidia/include" for root in _namespace_folders("triton"))
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders.extend(Path(home) / "include" for home in homes if home)
    return list(dict.fromkeys(folders))


def _namespace_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _runtime_major(include: Path) -> int | None:
    """CUDA major version of a folder's runtime header, None where it has none."""
    header = include / "cuda_runtime_api.h"
    if not header.is_file():
        return None
    match = _CUDA_VERSION.search(header.read_text(errors="replace"))
    return int(match[1]) // 1000 if match else None

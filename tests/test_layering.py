"""The layers of csrc/README.md hold: a file includes only from its own layer and those below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "pyruntime" / "spillover"

#: layer -> layers that it may include from, besides itself
ALLOWED = {
    "base": set(),
    "driver": {"base"},
    "trace": {"base"},
    "allocator": {"base", "driver", "trace"},
    # Adapters see only the C interface, so that the full one can be built without other sources.
    "plain_adapter": {"allocator/c_api.h"},
    "replay": {"allocator/c_api.h"},
    "tiers": {"base", "driver", "trace"},
    # What the pool lets others do for it is in a header that includes nothing of the pool.
    "transfer": {
        "base",
        "driver",
        "trace",
        "tiers",
        "allocator/content_store.hpp",
        "allocator/c_api.h",
    },
    "optim": {"base"},
    "bindings": {
        "base",
        "driver",
        "trace",
        "allocator",
        "plain_adapter",
        "tiers",
        "transfer",
        "optim",
    },
    "torch_adapter": {"allocator/c_api.h"},
    "torch_replay": {"replay/c_api.h", "replay/timed_threads.hpp"},
    "emulator/core": set(),
    "emulator/libcuda": {"emulator/core"},
    "emulator/libcudart": {
        "emulator/core/c_api.h",
        "emulator/core/fault_api.h",
        "emulator/core/kernel_api.h",
    },
    "emulator/libnvidia_ml": {"emulator/core/c_api.h"},
    "emulator/aten": {
        "emulator/core/c_api.h",
        "emulator/core/clock_api.h",
        "emulator/core/dry_api.h",
    },
    "emulator/host_kernels": {"emulator/core/c_api.h", "emulator/core/kernel_api.h"},
    "emulator/python": {"emulator/core/c_api.h"},
}
CUDA_LAYERS = {"driver", "torch_adapter"}
PYTHON_LAYERS = {"bindings", "torch_adapter", "emulator/python"}
TORCH_LAYERS = {"torch_adapter", "torch_replay", "emulator/aten"}

CUDA = re.compile(r"cuda(_runtime(_api)?)?\.h|driver_types\.h")
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/")
PYTHON = re.compile(r"Python\.h|pybind11/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

SOURCES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in {".c", ".cpp", ".hpp", ".h", ".cu", ".inc"}
)


def layer_of(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "emulator" and len(parts) > 2 else parts[0]


def test_there_are_sources() -> None:
    assert {layer_of(str(path.relative_to(CSRC))) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_respect_layers(path: Path) -> None:
    layer = layer_of(str(path.relative_to(CSRC)))
    for header in INCLUDE.findall(path.read_text()):
        if CUDA.fullmatch(header):
            assert layer in CUDA_LAYERS or layer.startswith("emulator"), header
        elif TORCH.match(header):
            assert layer in TORCH_LAYERS, header
        elif PYTHON.match(header):
            assert layer in PYTHON_LAYERS, header
        elif (CSRC / header).exists():
            other = layer_of(header)
            assert other == layer or other in ALLOWED[layer] or header in ALLOWED[layer], header


def test_io_uring_is_confined() -> None:
    users = [path.name for path in SOURCES if "io_uring" in path.read_text().replace("//", "")]
    code_users = [
        name
        for name in users
        if re.search(r"io_uring_(setup|enter|register)", (next(CSRC.rglob(name))).read_text())
    ]
    assert len(code_users) <= 1


def module_level_imports(path: Path) -> set[str]:
    """Modules imported when the file is imported, TYPE_CHECKING blocks left out."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_python_private_modules_stay_private() -> None:
    """Nothing imports another package's private module, but for the shared ones."""
    shared = {
        "spillover._backward_end",
        "spillover._build",
        "spillover._children",
        "spillover._closeable",
        "spillover._copy_times",
        "spillover._core",
        "spillover._disk",
        "spillover._durable",
        "spillover._durable_generations",
        "spillover._errors",
        "spillover._first_use",
        "spillover._held",
        "spillover._host",
        "spillover._layout",
        "spillover._paths",
        "spillover._pictures",
        "spillover._pinned",
        "spillover._reclaim",
        "spillover._settings",
        "spillover._sources",
        "spillover._stalls",
        "spillover._streams",
        "spillover._torch_import",
        "spillover._transfer",
        "spillover._transfer_stats",
        "spillover._units",
    }
    for path in PACKAGE.rglob("*.py"):
        package = "spillover." + path.relative_to(PACKAGE).parts[0]
        for name in module_level_imports(path):
            if name.startswith("spillover.") and "._" in name:
                own = name.startswith(package + ".") or name.startswith(package + "._")
                assert own or ".".join(name.split(".")[:2]) in shared, f"{path.name}: {name}"

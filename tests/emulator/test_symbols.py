"""The emulated libraries have every symbol that the installed torch asks for.

A new torch that needs more fails here with the list of what is missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import re
from pathlib import Path

import pytest
from elf_symbols import ElfLibrary

from spillover._paths import library_path

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

HERE = Path(__file__).parent
RUNTIME_SOURCES = HERE.parents[1] / "csrc" / "emulator" / "libcudart"
EMULATED = library_path("emulator")
VERSION_NODE = "libcudart.so.13"


def read_names(path: Path) -> set[str]:
    """First words of a text file's lines, without comments."""
    lines = path.read_text().splitlines()
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def torch_folder() -> Path:
    """Where torch is installed, without importing it or asking the finders that watch for that."""
    specification = importlib.machinery.PathFinder.find_spec("torch")
    if specification is None or specification.origin is None:
        pytest.skip("torch is not installed")
    return Path(specification.origin).parent


@functools.lru_cache(maxsize=1)
def torch_libraries() -> tuple[ElfLibrary, ...]:
    """The shared libraries that the torch wheel brings."""
    libraries = tuple(ElfLibrary(path) for path in sorted((torch_folder() / "lib").glob("*.so")))
    if not any(library.path.name == "libtorch_cuda.so" for library in libraries):
        pytest.skip("this torch was built without CUDA")
    return libraries


@functools.lru_cache(maxsize=1)
def needed_runtime_symbols() -> dict[str, str]:
    """Name and version node of every runtime function that torch's libraries are linked to."""
    return {
        symbol.name: symbol.version
        for library in torch_libraries()
        for symbol in library.symbols(r"(__)?cuda\w+")
        if not symbol.is_defined and symbol.version.startswith("libcudart.so.")
    }


@functools.lru_cache(maxsize=1)
def runtime_exports() -> dict[str, bool]:
    """Each exported runtime function, and whether it is only a stub."""
    library = ElfLibrary(EMULATED / "libcudart.so.13")
    return {symbol.name: symbol.is_weak for symbol in library.symbols(r"\S+") if symbol.is_defined}


def exported(library: str, pattern: str) -> set[str]:
    """Names that an emulated library defines."""
    symbols = ElfLibrary(EMULATED / library).symbols(pattern)
    return {symbol.name for symbol in symbols if symbol.is_defined}


@functools.lru_cache(maxsize=1)
def driver_api_header() -> str:
    """torch's own list of what it looks up in the driver and in NVML."""
    header = torch_folder() / "include" / "c10" / "cuda" / "driver_api.h"
    if not header.exists():
        pytest.skip("this torch has no driver_api.h")
    return header.read_text()


def listed_in(macro: str) -> list[str]:
    """Arguments of each _(...) in the macros of the header that start with this name."""
    bodies = re.findall(rf"#define {macro}\w*\(_\)\s*\\\n((?:.*\\\n)*.*)", driver_api_header())
    bodies += re.findall(rf"#define {macro}\w*\(_\) (_\(.*\))\n", driver_api_header())
    return [argument for body in bodies for argument in re.findall(r"_\((\w+(?:, \d+)?)\)", body)]


def test_runtime_exports_are_the_listed_ones() -> None:
    listed = read_names(RUNTIME_SOURCES / "exports.txt")
    own = {VERSION_NODE, "spillover_emulator_runtime_functions"}
    assert set(runtime_exports()) - own == listed


def test_runtime_exports_carry_the_version_that_torch_asks_for() -> None:
    runtime = ctypes.CDLL(str(EMULATED / "libcudart.so.13"))
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype = ctypes.c_void_p
    dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    for name in ("cudaMalloc", "__cudaRegisterFunction", "cudaGraphLaunch"):
        assert dlvsym(runtime._handle, name.encode(), VERSION_NODE.encode())


def test_every_runtime_function_of_torch_is_exported() -> None:
    needed = needed_runtime_symbols()
    assert len(needed) > 80, "reading torch's symbols failed"
    assert set(needed.values()) == {VERSION_NODE}, "this torch is built for another CUDA"
    missing = sorted(set(needed) - set(runtime_exports()))
    assert not missing, f"torch needs runtime functions that are not exported: {missing}"


def test_stubs_that_torch_may_call_are_known() -> None:
    stubs = {name for name, is_stub in runtime_exports().items() if is_stub}
    known = read_names(HERE / "stubs_known_to_torch.txt")
    unknown = sorted((set(needed_runtime_symbols()) & stubs) - known)
    assert not unknown, f"torch needs these, but they are only stubs: {unknown}"
    outdated = sorted(known - stubs)
    assert not outdated, f"implemented by now; take them off the list: {outdated}"


def test_runtime_needs_only_functions_of_the_emulated_driver() -> None:
    runtime = ElfLibrary(EMULATED / "libcudart.so.13")
    assert "libcuda.so.1" in runtime.needed()
    used = {s.name for s in runtime.symbols(r"(cu[A-Z]|spillover_)\w+") if not s.is_defined}
    missing = sorted(used - exported("libcuda.so.1", r"(cu[A-Z]|spillover_)\w+"))
    assert used
    assert not missing, f"the runtime calls driver functions that do not exist: {missing}"


def test_every_driver_function_that_torch_links_to_is_exported() -> None:
    needed = {
        symbol.name
        for library in torch_libraries()
        if "libcuda.so.1" in library.needed()
        for symbol in library.symbols(r"cu[A-Z]\w+")
        if not symbol.is_defined and not symbol.name.startswith("cuFile")
    }
    assert needed, "no library of torch needs the driver"
    missing = sorted(needed - exported("libcuda.so.1", r"cu[A-Z]\w+"))
    assert not missing, f"torch needs driver functions that are not exported: {missing}"


def test_required_driver_entry_points_are_found() -> None:
    """As torch looks them up: by unsuffixed name and version, through the runtime."""
    runtime = ctypes.CDLL(str(EMULATED / "libcudart.so.13"))
    required = listed_in("C10_LIBCUDA_DRIVER_API_REQUIRED")
    assert len(required) >= 10, "reading torch's driver_api.h failed"
    missing = []
    for entry in required:
        name, _, version = entry.partition(", ")
        function, answer = ctypes.c_void_p(), ctypes.c_int(-1)
        status = runtime.cudaGetDriverEntryPointByVersion(
            name.encode(),
            ctypes.byref(function),
            ctypes.c_uint(int(version or 12000)),
            ctypes.c_ulonglong(0),
            ctypes.byref(answer),
        )
        if status != 0 or answer.value != 0 or not function.value:
            missing.append(entry)
    assert not missing, f"torch requires driver entry points that are not there: {missing}"


def test_every_nvml_function_of_torch_is_exported() -> None:
    needed = set(listed_in("C10_NVML_DRIVER_API"))
    assert "nvmlInit_v2" in needed, "reading torch's driver_api.h failed"
    for library in torch_libraries():
        if library.path.name in ("libc10_cuda.so", "libtorch_cuda.so"):
            needed |= library.read_only_strings(r"nvml[A-Z]\w+")
    missing = sorted(needed - exported("libnvidia-ml.so.1", r"nvml\w+"))
    assert not missing, f"torch needs NVML functions that are not exported: {missing}"


def test_a_stub_says_what_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    runtime = ctypes.CDLL(str(EMULATED / "libcudart.so.13"))
    for _ in range(2):
        assert runtime.cudaGraphAddMemFreeNode(None, None, None, 0, None) == 801
        assert runtime.cudaGetLastError() == 801
    message = "spillover emulator: cudaGraphAddMemFreeNode is not emulated: "
    assert capfd.readouterr().err.count(message) == 1

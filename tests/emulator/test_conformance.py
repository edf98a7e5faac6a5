"""Every function of the emulated driver, runtime and NVML, called with valid and invalid arguments.

What is expected stands in NVIDIA's documentation; see :mod:`conformance`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from ctypes import byref, c_int, c_uint64

import conformance_driver
import conformance_graphs
import conformance_memory
import conformance_nvml
import conformance_runtime
import conformance_runtime_graphs
import conformance_work
from conformance import Calls
from conformance_runtime import (
    INVALID_CONFIGURATION,
    INVALID_DIRECTION,
    INVALID_FUNCTION,
    MISSING_CONFIGURATION,
    CompiledProgram,
)
from driver_ctypes import (
    ILLEGAL_ADDRESS,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NO_BINARY,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    SUCCESS,
    Driver,
    converted,
    run_program,
)
from elf_symbols import ElfLibrary
from graph_calls import ILLEGAL_STATE, UNSUPPORTED

from spillover._paths import library_path

EMULATED = library_path("emulator")
CUDA_VERSION = 13000
PER_THREAD_STREAMS = 2  # CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM
PER_THREAD_SUFFIXES = ("_ptsz", "_ptds")

#: Errors that the documentation of a function leaves out: patterns of names, codes, and why.
UNDOCUMENTED: tuple[tuple[str, set[int], str], ...] = (
    (r"(__)?cu.*", {INVALID_VALUE}, "a null pointer or a flag that there is not"),
    (r"(__)?cu.*", {INVALID_HANDLE}, "a stream, event, module or kernel that there is not"),
    (r"cu.*Mem(cpy|set).*", {ILLEGAL_ADDRESS}, "what the bytes' owner would be told later"),
    (r"cuda(MallocPitch|MallocAsync)", {OUT_OF_MEMORY}, "as of cudaMalloc"),
    (r"cudaGraphAddMemcpyNode1D", {INVALID_DIRECTION}, "as of cudaMemcpy"),
    (r"cudaDeviceGraphMemTrim", {INVALID_DEVICE}, "as of cuDeviceGraphMemTrim"),
    (r"(__)?cudaGetKernel", {INVALID_FUNCTION}, "as of cudaFuncGetName"),
    (r"__cudaLaunchKernel", {INVALID_FUNCTION, INVALID_CONFIGURATION}, "as of cudaLaunchKernel"),
    (r"__cudaPopCallConfiguration", {MISSING_CONFIGURATION}, "what the code is for"),
    (r"cu.*(Get|Set)MemPool", {INVALID_DEVICE}, "as of cuDeviceGetDefaultMemPool"),
    (r"cu.*MemPoolSetAccess", {INVALID_DEVICE}, "a device that cannot be shut out"),
    (r"cu.*(Memcpy2D|Graph).*", {NOT_SUPPORTED}, "what is refused by name"),
    (r"cuPointerSetAttribute", {NOT_SUPPORTED}, "what is refused by name"),
    (r"cuModuleGetFunction", {NO_BINARY}, "the image has it, and it cannot run here"),
    (r"cu.*Stream(Begin|End)Capture", {ILLEGAL_STATE, UNSUPPORTED}, "the guide to graphs has them"),
)

#: Functions without wrong arguments.
#: Handles of the process itself are refused: test_ipc.py and test_ipc_handles.py open others'.
ELSEWHERE = {
    f"cu{prefix}{name}"
    for prefix in ("", "da")
    for name in ("IpcOpenMemHandle", "IpcCloseMemHandle", "IpcOpenEventHandle")
}
#: Known to CUDA and refused whatever the arguments.
REFUSED = {"cuPointerSetAttribute"}
DRIVER_CANNOT_FAIL = {"cuCtxGetStreamPriorityRange", "cuMemGetInfo"}
RUNTIME_CANNOT_FAIL = {
    "__cudaPushCallConfiguration",
    "cudaDeviceGetStreamPriorityRange",
    "cudaDeviceReset",
    "cudaDeviceSynchronize",
    "cudaMemGetInfo",
    "cudaProfilerStart",
    "cudaProfilerStop",
}
NVML_CANNOT_FAIL = {"nvmlInit", "nvmlInit_v2", "nvmlInitWithFlags"}
#: Functions of the runtime that return no code of their own, and what compiled programs register;
#: test_runtime_api.py, CompiledProgram and the checks here call them.
NO_ERROR_CODE = {
    "__cudaInitModule",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaPeekAtLastError",
}


class Names:
    """The runtime's functions, in the variant with one of the suffixes where there is one."""

    def __init__(
        self, library: ctypes.CDLL, implemented: set[str], suffixes: tuple[str, ...]
    ) -> None:
        self._library, self._implemented, self._suffixes = library, implemented, suffixes
        self.called: set[str] = set()

    def __call__(self, name: str) -> Callable[..., int]:
        variants = [name + suffix for suffix in self._suffixes]
        found = [each for each in variants if each in self._implemented] or [name]
        self.called.add(found[0])
        return self._library[found[0]]


def driver_function(cuda: Driver, name: str, flags: int = 0) -> Callable[..., int]:
    pointer = c_uint64()
    cuda("cuGetProcAddress_v2", name.encode(), byref(pointer), CUDA_VERSION, flags, None)
    return ctypes.CFUNCTYPE(c_int)(pointer.value)


def driver_functions(cuda: Driver) -> list[str]:
    text = ctypes.create_string_buffer(1 << 16)
    cuda.library.spillover_emulator_function_names(text, converted(len(text)))
    return text.value.decode().split()


def every_driver_function() -> None:
    """Twice: as compiled for the legacy default stream, and for per-thread ones."""
    cuda = Driver()
    for flags in (0, PER_THREAD_STREAMS):
        find = functools.partial(driver_function, cuda, flags=flags)
        call = Calls(functools.cache(find), state=cuda.live)
        for module in (
            conformance_driver,
            conformance_memory,
            conformance_work,
            conformance_graphs,
        ):
            for area in module.AREAS:
                area(call, cuda)
        names = driver_functions(cuda)
        call.check(
            names,
            cannot_fail=DRIVER_CANNOT_FAIL,
            cannot_succeed=ELSEWHERE | REFUSED,
            undocumented=undocumented(names),
        )


def every_runtime_function() -> None:
    cuda, library = Driver(), ctypes.CDLL(str(EMULATED / "libcudart.so.13"))
    assert library.cudaSetDevice(0) == SUCCESS
    program = CompiledProgram(library, cuda, 64)
    symbols = ElfLibrary(EMULATED / "libcudart.so.13").symbols(r"(__)?cuda[A-Z]\w+")
    implemented = {each.name for each in symbols if each.is_defined and not each.is_weak}

    def after(code: int) -> None:
        """A failing call is the thread's last error until somebody asks for it."""
        errors = (library.cudaPeekAtLastError(), library.cudaGetLastError())
        assert errors == (code, code), errors
        assert library.cudaGetLastError() == SUCCESS

    for suffixes in ((), PER_THREAD_SUFFIXES):
        find = Names(library, implemented, suffixes)
        call = Calls(find, state=cuda.live, after=after)
        for area in conformance_runtime.AREAS:
            area(call, cuda)
        for module in (conformance_runtime, conformance_runtime_graphs):
            for area in module.PROGRAM_AREAS:
                area(call, cuda, program)
        call("cudaDeviceReset")
        variants = {name for name in implemented if name.endswith(PER_THREAD_SUFFIXES)}
        assert not suffixes or variants <= find.called, variants - find.called
        names = {n for n in implemented - variants - NO_ERROR_CODE if "egister" not in n}
        call.check(
            names,
            cannot_fail=RUNTIME_CANNOT_FAIL,
            cannot_succeed=ELSEWHERE,
            undocumented=undocumented(names),
        )
    program.unload()


def every_nvml_function() -> None:
    Driver()
    library = ctypes.CDLL(str(EMULATED / "libnvidia-ml.so.1"))
    call = Calls(lambda name: library[name])
    conformance_nvml.every_function(call, library)
    symbols = ElfLibrary(EMULATED / "libnvidia-ml.so.1").symbols(r"nvml[A-Z]\w+")
    names = {each.name for each in symbols if each.is_defined} - {"nvmlErrorString"}
    absent = set(conformance_nvml.ABSENT)
    known = {name: set(range(1, 30)) for name in names}
    call.check(names, cannot_fail=NVML_CANNOT_FAIL, cannot_succeed=absent, undocumented=known)


def undocumented(names: Collection[str]) -> dict[str, set[int]]:
    found: defaultdict[str, set[int]] = defaultdict(set)
    for pattern, codes, _ in UNDOCUMENTED:
        for name in names:
            if re.fullmatch(pattern, name):
                found[name] |= codes
    return found


def test_driver() -> None:
    run_program(every_driver_function, devices=2)


def test_runtime() -> None:
    run_program(every_runtime_function, devices=2)


def test_nvml() -> None:
    run_program(every_nvml_function, devices=2)

"""torch's observers in C++: trace trackers, out of memory, and requests refused by a limit.

Python has a binding for one of the three only, so a small library is compiled.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spillover._build import _compiler, _parts, _torch

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]
SOURCE = Path(__file__).with_name("torch_observers.cpp")
OWN_ALLOCATOR = (
    Path(__file__)
    .with_name("own_allocator.py")
    .read_text()
    .replace("from __future__ import annotations\n", "")
)

pytestmark = pytest.mark.soak  # Compiles torch's headers.


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("observers") / "libobservers.so"
    recipe, facts = _parts._RECIPES["replay"], _torch.torch_facts()
    minor = torch.__version__.split(".")[1]
    _compiler.compile_and_link(
        _compiler.find_compiler(),
        [SOURCE],
        output=path,
        compile_flags=[
            *_parts._compile_flags(recipe, facts),
            *_parts._include_flags(recipe, facts),
            f"-DTORCH_VERSION_MINOR={minor}",
        ],
        link_flags=_parts._link_flags(recipe, facts),
    )
    return path


PROGRAM = """
import ctypes, sys
import torch
MiB = 1 << 20

def make(mib):
    return torch.empty(mib * MiB, dtype=torch.uint8, device="cuda")

def fail(mib):
    try:
        make(mib)
    except torch.OutOfMemoryError:
        return
    raise AssertionError("no error")

library = ctypes.CDLL(sys.argv[1])
torch.cuda.init()
library.attach_observers()
first = make(30)
torch.cuda.set_per_process_memory_fraction(0.25)
fail(200)
torch.cuda.set_per_process_memory_fraction(1.0)
fail(600)
del first
out = ctypes.create_string_buffer(1 << 16)
library.take_lines(out, ctypes.c_size_t(len(out)))
print(out.value.decode())
"""
INSTALL = "import spillover.allocator\nspillover.allocator.install(adapter='full')\n"
MIB = 1 << 20
#: ``TraceEntry::Action``: allocations, frees and lack of memory.
OF_BLOCKS = {"0", "1", "2", "8"}


def lines(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines() if line]


def test_observers_are_told_what_torchs_own_allocator_tells(
    run_emulated: RunEmulated, library: Path
) -> None:
    result = run_emulated(INSTALL + PROGRAM, str(library))
    ours, native = lines(result), lines(run_emulated(PROGRAM, str(library)))
    ours_of_memory, native_of_memory = (
        [facts for facts in found if facts[0] == "out_of_memory"] for found in (ours, native)
    )
    assert ours_of_memory == native_of_memory
    assert [facts[2:4] for facts in ours_of_memory] == [
        [str(200 * MIB), str(128 * MIB)],
        [str(600 * MIB), str(512 * MIB)],
    ]
    ours_of_blocks, native_of_blocks = (
        [facts[:4] for facts in found if facts[0] == "trace" and facts[1] in OF_BLOCKS]
        for found in (ours, native)
    )
    assert ours_of_blocks == native_of_blocks
    assert [facts[1] for facts in ours_of_blocks] == ["0", "8", "8", "1", "2"]
    # What a limit refused, as c10 has it: device, request, allocated, total memory of the device.
    # torch's own allocator tells it of a policy that is not asked for here.
    if torch.__version__ >= "2.12":
        rejections = [facts[1:] for facts in ours if facts[0] == "rejection"]
        assert rejections == [["0", str(200 * MIB), str(30 * MIB), str(512 * MIB)]]
        assert "observer of refused requests failed: one that throws" in result.stderr


SEGMENTS_PROGRAM = """
import ctypes, sys
import torch
MiB = 1 << 20
library = ctypes.CDLL(sys.argv[1])
torch.cuda.init()
library.attach_observers()

def seen():
    out = ctypes.create_string_buffer(1 << 16)
    library.take_lines(out, ctypes.c_size_t(len(out)))
    names = {"3": "alloc", "4": "free", "5": "map", "6": "unmap"}
    return [
        (names.get(words[1], words[1]), int(words[3]) // MiB, (int(words[5]), int(words[6])))
        for line in out.value.decode().splitlines()
        for words in [line.split()]
        if words[0] == "trace" and words[1] in names
    ]

def make(mib):
    return torch.empty(mib * MiB, dtype=torch.uint8, device="cuda")

none = (0, 0)
is_native = len(sys.argv) > 2
OWN
own = OwnAllocator()
pool = torch.cuda.MemPool(own.allocator)
with torch.cuda.use_mem_pool(pool):
    large = make(40)
    medium = make(5)
assert seen() == [("alloc", 40, pool.id), ("alloc", 20, pool.id)]
number = pool.id
del large
torch.cuda.empty_cache()
assert seen() == []
del pool
assert seen() == [("free", 40, number)]
torch.cuda.empty_cache()
assert seen() == []
del medium  # The pool is gone, and its memory known as its own until the end.
torch.cuda.empty_cache()
assert seen() == [("free", 20, number)]
own.check_ended()

# Ordinary memory.
outside = make(30)
del outside
torch.cuda.empty_cache()
gone = ("alloc", "free") if is_native or FIXED else ("map", "unmap")
assert seen() == [(gone[0], 30, none), (gone[1], 30, none)]
library.fail_on_segments(1)
outside = make(30)
library.fail_on_segments(0)
assert outside.fill_(3).sum().item() == 90 * MiB
del outside
torch.cuda.empty_cache()
print("done")
"""


@pytest.mark.parametrize("is_native", [False, True])
def test_trackers_are_told_of_segments(
    run_emulated: RunEmulated, library: Path, is_native: bool
) -> None:
    """As soon as they are there, before they go, and by whose they are: NCCL registers them."""
    program = SEGMENTS_PROGRAM.replace("OWN\n", OWN_ALLOCATOR).replace(
        "FIXED", str(os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY") == "0")
    )
    if is_native:
        program = program.partition("library.fail_on_segments")[0] + 'print("done")'
    install = "" if is_native else INSTALL
    result = run_emulated(install + program, str(library), *(["native"] if is_native else []))
    assert lines(result) == [["done"]]
    if not is_native:
        assert "a trace tracker failed on a segment of 31457280 bytes" in result.stderr

"""torch's observers in C++: trace trackers, out of memory, and requests refused by a limit.

Python has a binding for one of the three only, so a small library is compiled.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spillover._build import _compiler, _parts, _torch

RunEmulated = Callable[..., subprocess.CompletedProcess[str]]
SOURCE = Path(__file__).with_name("torch_observers.cpp")

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
#: ``TraceEntry::Action``: allocations, frees and lack of memory, but nothing of segments.
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
        [facts for facts in found if facts[0] == "trace" and facts[1] in OF_BLOCKS]
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

"""torch.multiprocessing sends tensors of the pool between processes on emulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_process import TorchProcess

pytestmark = pytest.mark.skipif(
    os.environ.get("SPILLOVER_TEST_GPU") == "1", reason="checks the emulated libraries"
)

MAPPED = {"SPILLOVER_TEST_VIRTUAL_MEMORY": "1"}
FIXED = {"SPILLOVER_TEST_VIRTUAL_MEMORY": "0"}
EXPANDABLE = {**MAPPED, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def run(programs: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "sharing_programs.py", *programs.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **variables},
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result


@pytest.mark.parametrize(
    "variables", [MAPPED, pytest.param(FIXED, marks=pytest.mark.soak)], ids=["mapped", "fixed"]
)
@pytest.mark.parametrize("program", ["tensors", "lifetimes"])
def test_both_have_the_pool(program: str, variables: dict[str, str]) -> None:
    assert "spillover: " not in run(program, variables).stderr


@pytest.mark.parametrize(
    "variables", [MAPPED, pytest.param(FIXED, marks=pytest.mark.soak)], ids=["mapped", "fixed"]
)
@pytest.mark.parametrize(
    "programs",
    [
        "events peers sender_dies receiver_dies",
        *(
            pytest.param(each, marks=pytest.mark.soak)
            for each in ("events", "peers", "receiver_dies", "sender_dies")
        ),
    ],
)
def test_events_peers_and_ends(programs: str, variables: dict[str, str]) -> None:
    """In one process, and each in one of its own."""
    run(programs, variables)


@pytest.mark.parametrize("native", ["sender", "receiver"])
@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(MAPPED, marks=pytest.mark.soak),
        pytest.param(FIXED, marks=pytest.mark.soak),
        EXPANDABLE,
    ],
    ids=["plain", "fixed", "exp"],
)
def test_one_side_has_torchs_own_allocator(native: str, variables: dict[str, str]) -> None:
    run("tensors", {**variables, "SPILLOVER_TEST_NATIVE": native})


@pytest.mark.parametrize(
    "variables", [MAPPED, pytest.param(FIXED, marks=pytest.mark.soak)], ids=["mapped", "fixed"]
)
@pytest.mark.parametrize("native", ["", pytest.param("receiver", marks=pytest.mark.soak)])
def test_memory_of_a_pools_own_allocator(native: str, variables: dict[str, str]) -> None:
    run("own_allocator", {**variables, "SPILLOVER_TEST_NATIVE": native})


@pytest.mark.parametrize("native", ["", pytest.param("receiver", marks=pytest.mark.soak)])
def test_chunks_of_several_sizes(native: str) -> None:
    """Torch's own allocator cannot open them, and says so."""
    run("large", {**MAPPED, "SPILLOVER_TEST_VRAM": "1GiB", "SPILLOVER_TEST_NATIVE": native})


HANDLES = """
version = 3 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else 2
x = torch.arange(1000, device="cuda", dtype=torch.float32)
shared = x.untyped_storage()._share_cuda_()

def opened(handle, size=4000, offset=shared[3]):
    # Without an event there is nothing that only another process can open.
    return torch.UntypedStorage._new_shared_cuda(
        0, handle, size, offset, shared[4], shared[5], shared[6], False)

def refused(handle, *words):
    try:
        opened(handle)
    except (RuntimeError, NotImplementedError) as error:
        assert all(word in str(error) for word in words), (handle, error)
    else:
        raise AssertionError(handle)
"""


@pytest.mark.virtual_memory
def test_handles() -> None:
    # A process of its own, since nobody tells torch that what was sent is not needed any more.
    process = TorchProcess()
    process.run(
        HANDLES
        + """
import struct
handle = shared[1]
assert handle[:2] == bytes([version]) + b"e"
assert x.untyped_storage()._share_cuda_()[1] == handle
storage = opened(handle)
y = torch.empty(0, device="cuda").set_(storage, 0, (1000,))
assert y.data_ptr() != x.data_ptr()
x[1] = 7
torch.cuda.synchronize()
assert y[1].item() == 7
del y, storage

# What torch's own allocator sends: since 2.13, and before.
size, count = struct.unpack_from("=QQ", handle, 10)
head = 34 if version == 3 else 26
files = handle[head:][:4 * count]
for number, kinds in ((3, b"\\1\\0\\0\\0pad!"), (2, b""), (1, b"")):
    storage = opened(bytes([number]) + handle[1:26] + kinds + files)
    assert torch.empty(0, device="cuda").set_(storage, 0, (1000,))[1].item() == 7
    del storage
# And by sizes, as ours does for chunks of several.
file, = struct.unpack("=i", files)
process, = struct.unpack_from("=i", handle, 2)
sized = b"\\3s" + struct.pack("=iQQQii", process, 1, size, 0, file, 0)
storage = opened(sized)
del storage

refused(b"\\3", "too early")
refused(b"\\3x" + bytes(100), "kind 120")
refused(b"\\x07" + handle[1:], "version 7", "newer torch")
refused(b"\\0" + handle[1:], "version 0")
refused(handle[:20], "too early")
refused(handle[:head], "chunks", "room")
refused(handle[:-1], "too early")
refused(sized[:-1], "1 chunks", "room for 0")
refused(b"\\3c" + bytes(64), "cuIpcOpenMemHandle")
refused(b"\\3c" + bytes(63), "too early")
header = b"\\3e" + struct.pack("=iiQQii", process, 0, size, 1 << 40, 1, 0)
refused(header + files, str(1 << 40))
fabric = struct.pack("=iiQQii", process, 0, size, 1, 2, 0) + bytes(64)
refused(b"\\3e" + fabric, "posix_fd")
refused(b"\\2e" + fabric[:24] + bytes(64), "posix_fd")
refused(b"\\3s" + struct.pack("=iQQQii", 1 << 30, 1, size, 0, file, 0), "ended")
refused(b"\\3s" + struct.pack("=iQQQii", process, 1, size, 0, 99999, 0), "was freed")

del x, shared
"""
    )
    process.close()

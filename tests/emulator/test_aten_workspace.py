"""The cuBLAS workspaces, which a GPU's memory statistics contain."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAM = """
import json
import torch

def allocated():
    return torch.cuda.memory_allocated()

a = torch.ones(64, 64, device="cuda")
marks = [allocated()]
a.add_(1)
marks.append(allocated())
for _ in range(3):
    torch.mm(a, a)
    torch.nn.functional.linear(a, a)
marks.append(allocated())
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    torch.bmm(a[None], a[None])
torch.cuda.synchronize()
marks.append(allocated())
torch._C._cuda_clearCublasWorkspaces()
marks.append(allocated())
a @ a
marks.append(allocated())
print(json.dumps([m - marks[0] for m in marks]))
"""

MIB = 1 << 20


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}, 8 * MIB + 128 * 1024),
        ({"SPILLOVER_EMULATOR_CUBLAS_WORKSPACE": "0"}, 0),
    ],
    ids=["default", "configured", "off"],
)
def test_workspace_of_each_stream(
    run_emulated: RunEmulated, environment: dict[str, str], size: int | None
) -> None:
    marks = json.loads(run_emulated(PROGRAM, env=environment).stdout)
    if size is None:
        # Torch's choice for the card that is emulated.
        size = marks[2]
        assert size in (32 * MIB, 8 * MIB + 128 * 1024)
    assert marks == [0, 0, size, 2 * size, 0, size]

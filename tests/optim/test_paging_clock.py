"""A paged step in virtual time: state comes and goes at the link's pace, and the host goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

from spillover import emulator

ELEMENTS = 16 << 20
COUNT = 24

PROGRAM = """
import json, sys
from spillover import emulator
emulator.enable(dry=True, vram="64GiB", hazards="off", profile="rtx4090")
import torch
from spillover.optim import page

elements, count = map(int, sys.argv[1:])
empty = [torch.empty(elements, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
weights = [torch.nn.Parameter(each) for each in empty]
for weight in weights:
    weight.grad = torch.empty_like(weight)
optimizer = page(torch.optim.AdamW(weights, fused=True))
found = []
for _ in range(3):
    torch.cuda.synchronize()
    start = emulator.now_ns()
    optimizer.step()
    returned = emulator.now_ns()
    torch.cuda.synchronize()
    found.append((returned - start, emulator.now_ns() - start))
print(json.dumps(found))
"""


def test_copies_fill_the_link_and_the_host_is_free() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(ELEMENTS), str(COUNT)],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (_, first), *others = json.loads(result.stdout.splitlines()[-1])
    state_bytes = 2 * 2 * ELEMENTS * COUNT
    gpu = emulator.load_profile("rtx4090").gpu
    bound_ns = 2 * state_bytes / gpu.pcie_duplex_gb_s
    for returned, done in others:
        assert bound_ns <= done <= 1.06 * bound_ns
        assert returned < 0.1 * done
    # The first one makes its state on the device, and only sends it away.
    assert state_bytes / gpu.pcie_to_host_gb_s <= first <= 1.1 * bound_ns

"""Programs of PyTorch under the clock, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

_PRELUDE = """
import json, sys
from spillover import emulator
emulator.enable(vram="1GiB", profile="rtx4090", **OPTIONS)
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
"""


STEP = """
nn = torch.nn
layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)]
model = nn.Sequential(nn.Embedding(64, 64), *layers, nn.Linear(64, 64)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(64, (2, 16), device="cuda")
ends = []
for _ in range(3):
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    ends.append(emulator.now_ns())
"""


def run_clocked(code: str, *arguments: str, **options: object) -> dict[str, object]:
    """Run code with the clock on; it prints JSON last."""
    settings = {"hazards": "raise", **options}
    prelude = _PRELUDE.replace("**OPTIONS", f"**{settings!r}")
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))
